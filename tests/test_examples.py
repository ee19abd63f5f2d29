"""Every example runs to its end, on small settings."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

SMALL = {
    "training_loop": ["--epochs", "1"],
    "huggingface_style": ["--epochs", "1"],
    "huggingface_datasets": ["--epochs", "1"],
    "normalised": ["--epochs", "1", "--samples", "128"],
    "tabular": ["--epochs", "2", "--budget", "2"],
    "callbacks": ["--enough", "0"],
    "lightning_module": ["--epochs", "1"],
    "accelerate_loop": ["--epochs", "1"],
    "mixup": ["--epochs", "1", "--adversarial"],
}
NEEDS = {
    "callbacks": "torch.utils.tensorboard",
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "huggingface_datasets": "datasets.features",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore")
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SMALL[name]])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_for_torchrun_runs_on_two_ranks(tmp_path):
    pytest.importorskip("sklearn")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*launcher, "--nproc-per-node=2", EXAMPLES / "torchrun.py", "--epochs", "1"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("val_robust_accuracy") == 1  # the first rank alone speaks


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_an_example_says_how_it_is_run(path):
    text = path.read_text()
    assert f"examples/{path.name}" in text.split('"""')[1]
    if path.stem in {*SMALL, "torchrun", "quickstart"}:
        assert text.count("\n") < 120
