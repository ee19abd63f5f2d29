"""Two ranks under torchrun train as one does."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import advfeat as af
from advfeat.training import Options
from advfeat.training._checkpoint import CheckpointFolder

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
    pytest.mark.slow,
]


def blobs(count=48, classes=3):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    return TensorDataset(
        0.8 * F.one_hot(y, classes) + 0.2 * torch.rand(count, classes, generator=generator), y
    )


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


BALL = {"eps": 0.1, "norm": "linf", "random_start": True}
COMMON = {"batch_size": 16, "seed": 3, "lr": 0.1}

# Without BatchNorm: one epoch of three batches, and what else must not know of the ranks.
EQUAL = {
    "standard": (af.fit, {"epochs": 1}),
    "adversarial": (af.adversarial_fit, {"epochs": 1, **BALL}),
    "a last batch of five": (af.adversarial_fit, {"epochs": 1, **BALL, "data": blobs(53)}),
    "mixed": (af.adversarial_fit, {"epochs": 1, **BALL, "mix": 0.3}),
    "trades": (af.adversarial_fit, {"epochs": 1, **BALL, "objective": "trades"}),
    "mart": (af.adversarial_fit, {"epochs": 1, **BALL, "objective": "mart"}),
    "fast": (
        af.adversarial_fit,
        {"epochs": 1, "eps": 0.1, "norm": "linf", "method": "fast"},
    ),
    "options": (
        af.adversarial_fit,
        {
            "epochs": 1,
            **BALL,
            "options": Options(ema=0.5, awp=0.01, clip_norm=0.5, accumulate=2, label_smoothing=0.1),
        },
    ),
    "left over": (af.adversarial_fit, {"epochs": 2, **BALL, "data": blobs(51)}),
    "weighted": (
        af.fit,
        {"epochs": 2, "data": blobs(51), "options": Options(class_weights=[1.0, 2.0, 0.5])},
    ),
    "closure": (
        af.fit,
        {"epochs": 1, "optimizer": lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=2)},
    ),
    "split": (af.adversarial_fit, {"epochs": 2, **BALL, "validation": 0.3, "data": blobs(70)}),
}


def trained(name, model=None, **settings):
    train, particular = EQUAL[name]
    model = plain() if model is None else model
    settings = COMMON | particular | settings
    history = train(model, settings.pop("data", blobs()), **settings)
    return model, history


def without_seconds(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]


def refusal(call):
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return "not refused"


def program(folder):
    """What each of the two ranks does; its results are looked at below."""
    torch.set_num_threads(1)
    early = refusal_without_group()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {"rank": rank, "without a group": early}
    for name in EQUAL:
        model, history = trained(name)
        found[name] = {"model": model.state_dict(), "rows": without_seconds(history)}
    model = normed()
    history = af.adversarial_fit(
        model,
        blobs(50),
        **COMMON,
        **BALL,
        epochs=2,
        validation=blobs(31),
        checkpoint=folder / "run",
    )
    measured = af.robust_accuracy(model, blobs(31), eps=0.1, norm="linf", steps=20)
    found["normed"] = {
        "model": model.state_dict(),
        "rows": without_seconds(history),
        "measured": [float(measured.standard), float(measured)],
    }
    torch.manual_seed(rank)  # the ranks of a user who seeds none of them
    model = plain()
    torch.manual_seed(rank)
    af.fit(model, blobs(), epochs=1, batch_size=16)
    found["unseeded"] = model.state_dict()
    sampler = DistributedSampler(blobs(), shuffle=False)
    model = plain()
    af.fit(model, DataLoader(blobs(), batch_size=8, sampler=sampler), epochs=1, seed=3)
    found["loader"] = model.state_dict()
    heard = []
    history = af.fit(
        plain(),
        blobs(),
        **COMMON,
        epochs=5,
        on_epoch=lambda row: heard.append(row["epoch"]) or row["epoch"] < 2,
    )
    found["stopped"] = {"heard": heard, "rows": len(history.rows)}
    found["shared"] = refusal(lambda: af.fit(plain(), DataLoader(blobs()), epochs=1))
    x, y = blobs().tensors
    found["whole"] = [
        refusal(lambda data=data: af.fit(plain(), data, epochs=1))
        for data in (
            DataLoader(blobs(), 8, sampler=SubsetRandomSampler(range(48))),
            DataLoader(blobs(), 8, sampler=WeightedRandomSampler([1.0] * 48, 48)),
            DataLoader(blobs(), batch_sampler=BatchSampler(RandomSampler(blobs()), 8, False)),
            list(DataLoader(blobs(), 8)),
        )
    ]
    own = [(x[rank::2], y[rank::2])]
    found["own"] = refusal(lambda: af.fit(plain(), own, epochs=1, checkpoint=folder / "own"))
    other = blobs(48).tensors[0].flip(0)
    data = TensorDataset(other, y)
    found["another run"] = refusal(
        lambda: af.fit(plain(), data, epochs=1, checkpoint=folder / "own")
    )
    found["in use"] = in_use(rank, folder)
    wrapped = nn.parallel.DistributedDataParallel(plain())
    found["wrapped"] = refusal(lambda: af.fit(wrapped, blobs(), epochs=1))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def in_use(rank, folder):
    """Both ranks hear that another run writes there."""
    held = CheckpointFolder(folder / "held").locked() if rank == 0 else nullcontext()
    with held:
        try:
            af.fit(plain(), blobs(), epochs=1, checkpoint=folder / "held", seed=0)
        except BlockingIOError as error:
            return str(error)
    return "not refused"


def refusal_without_group():
    try:
        af.fit(plain(), blobs(), epochs=1)
    except RuntimeError as error:
        return str(error)
    return "not refused"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(af.__file__).parent.parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, __file__, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    return found, sorted(path.name for path in (folder / "run").iterdir())


def assert_same_weights(found, expected):
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_train_as_one(ranks, name):
    (first, second), _ = ranks
    model, history = trained(name)
    assert_same_weights(first[name]["model"], second[name]["model"])
    for key, value in model.state_dict().items():
        torch.testing.assert_close(first[name]["model"][key], value, rtol=0, atol=1e-5)
    for found in (first, second):
        for row, expected in zip(found[name]["rows"], without_seconds(history), strict=True):
            assert row == pytest.approx(expected, abs=1e-5)


def test_statistics_and_figures_are_the_same_on_both_ranks_and_of_all_samples(ranks):
    (first, second), _ = ranks
    assert_same_weights(first["normed"]["model"], second["normed"]["model"])
    assert first["normed"]["rows"] == second["normed"]["rows"]
    row = first["normed"]["rows"][-1]
    assert [row["val_accuracy"], row["val_robust_accuracy"]] == first["normed"]["measured"]
    assert row["val_accuracy"] * 31 == pytest.approx(round(row["val_accuracy"] * 31))


def test_ranks_without_a_seed_agree_on_one(ranks):
    (first, second), _ = ranks
    assert_same_weights(first["unseeded"], second["unseeded"])


def test_a_sharded_loader_gives_each_rank_its_own_samples(ranks):
    (first, second), _ = ranks
    model, (x, y) = plain(), blobs().tensors
    shares = [(x[rank::2].split(8), y[rank::2].split(8)) for rank in (0, 1)]
    batches = [
        (
            torch.cat([shares[0][0][k], shares[1][0][k]]),
            torch.cat([shares[0][1][k], shares[1][1][k]]),
        )
        for k in range(3)
    ]
    af.fit(model, batches, epochs=1, seed=3)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(first["loader"][key], value, rtol=0, atol=1e-6)
    assert_same_weights(first["loader"], second["loader"])


def test_the_first_rank_calls_back_writes_and_decides(ranks):
    (first, second), files = ranks
    assert files == ["best.pt", "last.pt"]
    assert first["stopped"] == {"heard": [1, 2], "rows": 2}
    assert second["stopped"] == {"heard": [], "rows": 2}


def test_what_would_train_each_rank_alone_or_twice_is_refused(ranks):
    (first, second), _ = ranks
    for found in (first, second):
        assert "call torch.distributed.init_process_group() first" in found["without a group"]
        assert found["shared"].startswith("data: this loader gives each of the 2 ranks all samples")
        assert found["wrapped"].startswith("model: a DistributedDataParallel; pass the module")


def test_every_way_to_give_all_samples_to_each_rank_is_refused(ranks):
    for found in ranks[0]:
        for message in found["whole"]:
            assert "gives each of the 2 ranks all samples" in message
        assert found["own"] == "not refused"


def test_all_ranks_refuse_what_the_first_one_does(ranks):
    (first, second), _ = ranks
    assert "data." in first["another run"]
    assert "first rank" in second["another run"]
    assert all("in use" in found["in use"] for found in (first, second))


def test_a_model_sharded_by_fsdp_is_refused():
    sharded = type("FSDPModule", (nn.Linear,), {})(3, 3)
    with pytest.raises(TypeError, match="model: sharded by FSDP"):
        af.fit(sharded, blobs(), epochs=1)


if __name__ == "__main__":
    program(Path(sys.argv[1]))
