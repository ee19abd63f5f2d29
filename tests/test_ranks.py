"""Under torchrun each rank makes rows of its own: the same rows, the same values."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from test_resume import METHODS, ROWS, build, contents, half_built

import advfeat as af

ROOT = Path(af.__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from test_resume import METHODS, build
import numpy as np
folder = {folder!r}
for method in METHODS:
    made = build(method, f"{{folder}}/{{method}}")
    assert len(made) == 22
# Ranks that would draw different seeds agree on one.
import torch
torch.manual_seed(int(os.environ["RANK"]))
seed = build("D_rand", f"{{folder}}/seedless", seed=None).manifest["settings"]["seed"]
print(f"seed {{seed}}", flush=True)
# A loader that gives each rank its own rows would be shared out twice.
from test_resume import dataset
from torch.utils.data import DataLoader, DistributedSampler
loader = DataLoader(dataset(), sampler=DistributedSampler(dataset()))
try:
    build("D_det", f"{{folder}}/x", data=loader)
except ValueError as error:
    print(error, flush=True)
# One that was begun by one process is gone on with by two.
build("D_R", f"{{folder}}/half")
"""


def torchrun(script):
    return subprocess.run(
        [sys.executable, "-m", *f"torch.distributed.run --nproc-per-node 2 {script}".split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_two_ranks_make_what_one_process_makes(tmp_path):
    half_built(tmp_path / "half", "D_R")
    script = tmp_path / "build.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    run = torchrun(script)
    assert run.returncode == 0, run.stderr
    for method in METHODS:
        one, two = build(method), af.ConstructedDataset.open(tmp_path / method)
        assert list(two.fields) == list(one.fields)
        for name, array in one.fields.items():
            np.testing.assert_allclose(two.fields[name], array, rtol=0, atol=1e-6)
    seeds = {line for line in run.stdout.splitlines() if line.startswith("seed")}
    assert len(seeds) == 1
    assert run.stdout.count("the ranks share the rows themselves") == 2
    build("D_R", tmp_path / "alone")
    assert contents(tmp_path / "half") == contents(tmp_path / "alone")
    manifest = json.loads((tmp_path / "D_det" / "manifest.json").read_text())
    assert manifest["rows"] == ROWS
