"""The command line: the blocks of its page, what it loads, and errors of one line."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import advfeat as af
from advfeat.cli import _load, main
from advfeat.cli._commands import size

PAGE = Path(__file__).parents[1] / "docs/cli.md"
MODELS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def make_model(width=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3))

def number():
    return 3

def broken():
    return {}["weights"]

def dataset():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(20, 12, generator=generator), torch.arange(20) % 3)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "clitoys.py").write_text(MODELS)
    sys.modules.pop("clitoys", None)
    torch.manual_seed(0)
    import clitoys

    torch.save(clitoys.make_model().state_dict(), "w.pt")
    inputs, labels = clitoys.dataset().tensors
    np.savez("test.npz", x=inputs.numpy(), y=labels.numpy())
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("short_ensembles")
def test_the_blocks_of_the_page_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    sys.modules.pop("mymodels", None)
    namespace = {}
    for kind, block in re.findall(
        r"^```(python|console)\n(.*?)^```", PAGE.read_text(), re.S | re.M
    ):
        if kind == "python":
            exec(compile(block, "cli.md", "exec"), namespace)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "advfeat"
            assert main([*arguments, "--quiet"]) == 0, capsys.readouterr().err
    assert "Reliability of the number" in (tmp_path / "out.html").read_text()
    assert len(af.ConstructedDataset.open(tmp_path / "det")) == 400
    assert "standard" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_evaluate_prints_and_writes_the_report(folder, capsys):
    command = "evaluate clitoys:make_model --weights w.pt --data test.npz --eps 1/50 --norm linf"
    command += " --json out.json --html out.html --budget 8 --quiet"
    assert main(command.split()) == 0
    shown = capsys.readouterr().out
    assert "Robustness:" in shown
    found = json.loads((folder / "out.json").read_text())
    assert found["eps"] == 0.02
    assert found["clean"]["total"] == 20
    model = _load.named("clitoys:make_model")()
    model.load_state_dict(torch.load("w.pt", weights_only=True))
    assert found["clean"]["count"] == af.accuracy(model, _load.data("test.npz")).count
    assert (folder / "out.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("kind", ["d_r", "d_nr", "d_det", "d_rand"])
def test_construct_makes_and_resumes(folder, capsys, kind):
    arguments = f"construct {kind} clitoys.py:make_model --weights w.pt --data clitoys:dataset"
    arguments = [*arguments.split(), "--steps", "2", "--out", "made", "--quiet"]
    assert main(arguments) == 0
    first = af.ConstructedDataset.open(folder / "made")
    assert len(first) == 20
    assert main(arguments) == 0
    assert main([*arguments[:-3], "--out", "made", "--quiet", "--steps", "3"]) == 2
    assert "steps" in capsys.readouterr().err
    assert _load.data(str(folder / "made")).manifest == first.manifest


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate nothing:make --data test.npz --eps 0.1 --norm linf", "No module named"),
        ("evaluate clitoys:make --data test.npz --eps 0.1 --norm linf", "has no make"),
        ("evaluate clitoys --data test.npz --eps 0.1 --norm linf", "MODULE:NAME"),
        ("evaluate none.py:make --data test.npz --eps 0.1 --norm linf", "no file none.py"),
        ("evaluate clitoys:number --data test.npz --eps 0.1 --norm linf", "made no model"),
        ("evaluate clitoys:broken --data test.npz --eps 0.1 --norm linf", "KeyError: 'weights'"),
        ("evaluate clitoys:make_model --data none.npz --eps 0.1 --norm linf", "no such file"),
        ("evaluate clitoys:make_model --data none --eps 0.1 --norm linf", "expected an .npz"),
        ("evaluate clitoys:make_model --data test.npz --eps 0.1 --norm l7", "norm"),
        ("evaluate clitoys:make_model --data test.npz --eps -1 --norm l2", "eps"),
        ("evaluate clitoys:make_model --data test.npz --eps 1 --norm l2 --mean 0.5", "--std"),
        ("evaluate clitoys:make_model --data test.npz --eps 1 --norm l2 --model-args {", "JSON"),
        ("evaluate clitoys:make_model --weights no.pt --data test.npz --eps 1 --norm l2", "no.pt"),
        ("construct d_r clitoys:make_model --data test.npz --eps 1 --out x", "no ball"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(folder, capsys, command, said):
    assert main([*command.split(), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("advfeat: error: ")
    assert said in error


def test_weights_that_hold_code_are_refused(folder, capsys):
    torch.save(nn.Linear(2, 2), "whole.pt")
    command = "evaluate clitoys:make_model --weights whole.pt --data test.npz --eps 1 --norm l2"
    assert main(command.split()) == 2
    assert "state_dict" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_weights_of_wrapped_models_and_inside_checkpoints(tmp_path, prefix):
    model, again = nn.Linear(3, 2), nn.Linear(3, 2)
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "w.pt")
    _load.load_weights(again, str(tmp_path / "w.pt"))
    assert torch.equal(model.weight, again.weight)


def test_weights_of_another_model_say_so(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not of this model"):
        _load.load_weights(nn.Linear(4, 2), str(tmp_path / "w.pt"))


def test_images_with_channels_last_of_256_levels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "t.npz", images=images, labels=np.arange(5)[:, None])
    inputs, labels = _load.data(str(tmp_path / "t.npz")).tensors
    assert inputs.shape == (5, 3, 8, 6)
    assert labels.tolist() == list(range(5))
    torch.testing.assert_close(inputs[1, 2, 3, 4], torch.tensor(images[1, 3, 4, 2] / 255).float())


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.5", 0.5), ("1e-3", 1e-3)])
def test_a_radius_is_a_number_or_a_fraction(text, value):
    assert size(text) == value


@pytest.mark.parametrize("command", [[], ["evaluate"], ["construct"], ["study"]])
def test_help_lists_options_with_defaults(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    if command:
        assert "default: 0" in shown
        assert "None" not in shown


def test_unknown_options_end_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--nothing"])
    assert ended.value.code == 2


@pytest.mark.slow
def test_the_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "advfeat", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("advfeat ")
