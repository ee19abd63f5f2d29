"""Two ranks share the samples that they measure, and both return the whole (A13)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import advfeat as af

COUNT, EPS = 23, 0.1

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]


SEEN = []  # samples of each call in this process


class Counting(nn.Module):
    """Linear; counts the samples whose class it was asked for without a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3)
        self.linear.bias.data = -self.linear.weight.data.sum(1) / 2  # each class occurs

    def forward(self, x):
        SEEN.append(len(x))  # not on the model: one with a counter is looked at longer
        return self.linear(x)


def data(count=COUNT):
    generator = torch.Generator().manual_seed(1)
    x = 0.2 + 0.6 * torch.rand(count, 5, generator=generator)
    with torch.no_grad():
        y = Counting()(x).argmax(1)
    y[::5] = (y[::5] + 1) % 3
    return TensorDataset(x, y)


def exact(count=COUNT):
    """Outcome of each sample clean and under attack, in closed form."""
    x, y = data(count).tensors
    linear = Counting().linear
    logits = linear(x)
    gap = logits.gather(1, y[:, None]) - logits
    pull = (linear.weight[y][:, None] - linear.weight).abs().sum(2)
    others = torch.arange(3) != y[:, None]
    right = ((gap > 0) | ~others).all(1)
    return right, ((gap > EPS * pull) | ~others).all(1)


class Repeating(Sampler):
    """A user's own: each rank's part, and sample 0 on every rank."""

    def __init__(self, rank, world_size):
        self.own = sorted({0, *range(rank, COUNT, world_size)})

    def __iter__(self):
        return iter(self.own)

    def __len__(self):
        return len(self.own)


def measured(found):
    parts = {"correct": found.correct, "index": found.index}
    if hasattr(found, "standard"):
        parts |= {"clean": found.standard.correct, "broken_by": found.broken_by,
                  "value": found.value, "adversarial": found.adversarial}  # fmt: skip
    return parts


def robust(given, **settings):
    settings = {"eps": EPS, "norm": "linf", "steps": 4, "keep_inputs": True} | settings
    return measured(af.robust_accuracy(Counting(), given, **settings))


def program(folder):
    """What each rank does, with a group of the user's and without."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found, model = {}, Counting()
    samples = data()
    SEEN.clear()
    found["torchrun alone"] = measured(af.accuracy(model, samples, batch_size=4))
    dist.init_process_group("gloo")
    found["seen"] = sum(SEEN)
    loaders = {
        "distributed": {"sampler": DistributedSampler(data(), shuffle=True), "batch_size": 4},
        "drop last": {"sampler": DistributedSampler(data(), drop_last=True), "batch_size": 4},
        "shuffled": {"shuffle": True, "batch_size": 4},
        "own sampler": {"sampler": Repeating(rank, world_size), "batch_size": 4},
    }
    for name, settings in loaders.items():
        loader = DataLoader(data(), **settings)
        found[name] = measured(af.accuracy(Counting(), loader))
        found[f"robust, {name}"] = robust(loader)
    found["robust"] = robust(data())
    torch.manual_seed(rank)  # no rank's seed is another's
    found["random attack"] = robust(data(), steps=None)
    found["one sample"] = robust(data(1))
    one = DataLoader(data(1), sampler=DistributedSampler(data(1)))
    found["one sample, distributed"] = robust(one)
    batches = list(DataLoader(data(), batch_size=8))
    found["stream"] = measured(af.accuracy(Counting(), batches))
    if rank == 0:
        with af.distributed.on_one_rank():
            found["alone"] = measured(af.accuracy(Counting(), data()))
    heard = []
    af.fit(Counting(), data(), epochs=1, batch_size=8, seed=0, validation=data(),
           on_epoch=lambda row: heard.append(float(af.accuracy(Counting(), data()))))  # fmt: skip
    found["heard"] = heard
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder, root = tmp_path_factory.mktemp("ranks"), Path(af.__file__).parent.parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, __file__, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


CLEAN = ["torchrun alone", "distributed", "drop last", "shuffled", "own sampler", "stream"]
ROBUST = ["robust", *(f"robust, {name}" for name in CLEAN[1:5]), "random attack"]


@pytest.mark.parametrize("name", CLEAN)
def test_accuracy_is_the_whole_on_every_rank(ranks, name):
    right, _ = exact()
    for found in ranks:
        assert torch.equal(found[name]["index"], torch.arange(COUNT))
        assert torch.equal(found[name]["correct"], right)


@pytest.mark.parametrize("name", ROBUST)
def test_robust_accuracy_is_the_whole_on_every_rank(ranks, name):
    right, robust = exact()
    assert 0 < robust.sum() < right.sum() < COUNT
    x, y = data().tensors
    for found in ranks:
        found = found[name]
        assert torch.equal(found["index"], torch.arange(COUNT))
        assert torch.equal(found["clean"], right)
        assert torch.equal(found["correct"], robust)
        assert torch.equal(found["broken_by"] == -2, ~right)
        assert torch.equal(found["value"].isnan(), ~right)
        assert (found["adversarial"] - x).abs().max() <= EPS + 1e-6
        assert torch.equal(Counting()(found["adversarial"]).argmax(1) == y, robust)
    for field, values in ranks[0][name].items():
        assert torch.equal(values.nan_to_num(), ranks[1][name][field].nan_to_num())


def test_the_work_is_shared(ranks):
    assert ranks[0]["seen"] < COUNT + 8  # with the inspection of the first batch
    assert {len(found["heard"]) for found in ranks} == {0, 1}
    assert torch.equal(ranks[0]["alone"]["correct"], exact()[0])
    assert ranks[0]["heard"] == [int(exact()[0].sum()) / COUNT]


@pytest.mark.parametrize("name", ["one sample", "one sample, distributed"])
def test_more_ranks_than_samples(ranks, name):
    for found in ranks:
        assert found[name]["index"].tolist() == [0]
        assert torch.equal(found[name]["correct"], exact(1)[1])
        assert found[name]["adversarial"].shape == (1, 5)


if __name__ == "__main__":
    program(sys.argv[1])
