"""Under torchrun each rank makes rows of its own: the same rows, the same values."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from builds import METHODS, SAMPLES, build, contents, dataset, half_built
from torch.utils.data import DataLoader

import advfeat as af

ROOT = Path(af.__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from builds import METHODS, build, network
folder = {folder!r}
for method in METHODS:
    made = build(method, f"{{folder}}/{{method}}")
    assert len(made) == 22
# Ranks that would draw different seeds agree on one.
import torch
model = network()
torch.manual_seed(int(os.environ["RANK"]))
made = build("D_rand", f"{{folder}}/seedless", model=model, seed=None)
seed = made.manifest["settings"]["seed"]
print(f"seed {{seed}}", flush=True)
# On disks of their own, joined afterwards.
for method in ("D_R", "D_rand"):
    for _ in range(2):
        own = build(method, f"{{folder}}/{{method}}-own/rank-{{{{rank}}}}")
    assert len(own) < 22
# A loader that gives each rank its own rows would be shared out twice.
from builds import dataset
from torch.utils.data import DataLoader, DistributedSampler
loader = DataLoader(dataset(), sampler=DistributedSampler(dataset(), 2, int(os.environ["RANK"])))
try:
    build("D_det", f"{{folder}}/x", data=loader)
except ValueError as error:
    print(error, flush=True)
# One that was begun by one process is gone on with by two.
build("D_R", f"{{folder}}/half")
# The default process group is still the user's to initialise, and to destroy (B24).
import torch.distributed as dist
assert not dist.is_initialized()
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
assert total.item() == 2
build("D_R", f"{{folder}}/half")
build("D_det", f"{{folder}}/after")
dist.barrier()
dist.destroy_process_group()
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


@pytest.mark.slow
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
    for method in ("D_R", "D_rand"):
        one, joined = build(method), af.ConstructedDataset.open(tmp_path / f"{method}-own")
        for name, array in one.fields.items():
            np.testing.assert_allclose(joined.fields[name], array, rtol=0, atol=1e-6)
        assert joined.manifest["samples"] == SAMPLES
    seeds = {line for line in run.stdout.splitlines() if line.startswith("seed")}
    assert len(seeds) == 1, seeds
    assert run.stdout.count("ranks divide the samples themselves") == 2
    build("D_R", tmp_path / "alone")
    assert contents(tmp_path / "half") == contents(tmp_path / "alone")
    manifest = json.loads((tmp_path / "D_det" / "manifest.json").read_text())
    assert manifest["samples"] == SAMPLES


def sharded(place, count=3):
    """Folders as ranks make them, each for itself."""
    whole = build("D_det")
    for rank in range(count):
        own = whole.subset(slice(rank, None, count))
        shard = {"rank": rank, "of": count}
        own.manifest = {**whole.manifest, "shard": shard, "samples": len(own)}
        own.save(place / f"rank-{rank}")
    return whole


def test_shards_are_joined_where_they_lie(tmp_path):
    whole = sharded(tmp_path)
    joined = af.ConstructedDataset.open(tmp_path)
    assert len(joined) == SAMPLES
    assert torch.equal(joined.images, whole.images)
    assert torch.equal(joined.labels, whole.labels)
    assert torch.equal(joined[7][0], whole[7][0])
    batches = list(DataLoader(joined, batch_size=8, num_workers=1))
    assert torch.equal(torch.cat([x for x, _ in batches]), whole.images)
    assert torch.equal(joined.subset([5, 0, 21]).images, whole.images[[5, 0, 21]])
    assert torch.equal(joined.subset(slice(3, 9)).images, whole.images[3:9])
    assert len(list(joined)) == SAMPLES
    source, image = joined.pairs(dataset())[13]
    assert torch.equal(source, dataset()[13][0])
    assert torch.equal(image, whole.images[13])
    joined.save(tmp_path / "one")
    assert torch.equal(af.ConstructedDataset.open(tmp_path / "one").images, whole.images)


def test_shares_that_do_not_belong_together_are_refused(tmp_path):
    sharded(tmp_path)
    path = tmp_path / "rank-1" / "manifest.json"
    before = path.read_text()
    manifest = json.loads(before)
    manifest["settings"]["steps"] = 99
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not made by the same call"):
        af.ConstructedDataset.open(tmp_path)
    path.write_text(before)
    (tmp_path / "rank-2").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"ranks \[0, 1\] of 3"):
        af.ConstructedDataset.open(tmp_path)


def test_one_process_has_a_folder_of_its_own_too(tmp_path):
    made = build("D_rand", tmp_path / "rank-{rank}")
    assert len(made) == SAMPLES
    assert torch.equal(af.ConstructedDataset.open(tmp_path).images, made.images)
    with pytest.raises(ValueError, match="shard"):
        build("D_rand", tmp_path / "rank-0")
