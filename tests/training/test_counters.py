"""Counters and generators that a user's objects keep in attributes resume with the run."""

import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import advfeat as af
from advfeat.training._counters import Counters

X = torch.rand(24, 5, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, X[:, :3].argmax(1))


class EpochSampler:
    """Another order in each epoch, by a counter of its own."""

    epoch = 0

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 4

    def __iter__(self):
        self.epoch += 1
        order = torch.randperm(24, generator=torch.Generator().manual_seed(self.epoch))
        return iter(order.view(4, 6).tolist())


class EpochStream(IterableDataset):
    def __init__(self):
        self.sampler = EpochSampler()

    def __len__(self):
        return 24

    def __iter__(self):
        return (DATA[i] for batch in self.sampler for i in batch)


class Annealed(nn.Module):
    """Counts its steps, and keeps a mean of its inputs that is no buffer."""

    def __init__(self):
        super().__init__()
        self.linear, self.steps, self.mean = nn.Linear(5, 3), 0, torch.zeros(5)

    def forward(self, x):
        if self.training:
            self.steps += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x - self.mean) * (1 + 0.1 * self.steps)


class AnnealedLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, logits, labels):
        self.scale *= 0.9
        return nn.functional.cross_entropy(logits * self.scale, labels, reduction="none")


class Brightness:
    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, x):
        return x * (0.5 + 0.5 * torch.rand(len(x), 1, generator=self.generator))


KINDS = {
    "batch sampler": lambda: {"data": DataLoader(DATA, batch_sampler=EpochSampler())},
    "stream": lambda: {"data": DataLoader(EpochStream(), 6)},
    "model": lambda: {"model": Annealed()},
    "loss": lambda: {"loss": AnnealedLoss()},
    "augmentation": lambda: {"augment": Brightness()},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_cut_in_an_epoch_resumes_to_the_same_weights(kind, tmp_path):
    def train(**options):
        torch.manual_seed(0)
        given = {"model": nn.Linear(5, 3), "data": DataLoader(DATA, 6), **KINDS[kind](), **options}
        model = given.pop("model")
        af.fit(model, given.pop("data"), epochs=2, seed=0, progress=False, **given)
        return model.state_dict()

    def cut(row):
        if row["step"] == 6:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=tmp_path, on_step=cut)
    whole, resumed = train(), train(checkpoint=tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Reader:
    """Its number says which file is open."""

    def __init__(self):
        self.number, self.file = 0, None


def test_a_number_that_changes_beside_something_else_is_left_alone():
    reader, sampler, steady = Reader(), EpochSampler(), EpochSampler()
    counters = Counters({"reader": reader, "sampler": sampler, "steady": steady})
    reader.number, reader.file, sampler.epoch = 3, object(), 5
    state = counters.state_dict()
    assert state == {"sampler": {"epoch": 5}}
    other = EpochSampler()
    Counters({"sampler": other}).load_state_dict(state)
    assert other.epoch == 5
    with counters.unchanged():
        sampler.epoch = 9
    assert sampler.epoch == 5
