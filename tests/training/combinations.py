"""Runs of every kind, small enough to be cut and resumed by the hundred."""

import random
import warnings
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

import advfeat as af
from advfeat.training import Options

SAMPLES, BATCH, EPOCHS = 60, 15, 3
STEPS = EPOCHS * SAMPLES // BATCH


def blobs(count=SAMPLES, classes=3):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    x = 0.8 * F.one_hot(y, classes) + 0.2 * torch.rand(count, classes, generator=generator)
    return TensorDataset(x, y)


class Counter(nn.Module):
    """A buffer that is in no state_dict, and changes what the module returns."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x * (1 + 0.01 * torch.sin(self.calls))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), Counter(), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


# --- Data ---


class Global(Dataset):
    """Draws from the three generators of a program."""

    def __init__(self):
        self.x, self.y = blobs().tensors

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return self.x[index] * (1 - 0.02 * noise), self.y[index]


class Owning(Global):
    """Draws from generators of its own, one of them in a closure."""

    def __init__(self):
        super().__init__()
        self.numpy = np.random.default_rng(3)
        self.old = np.random.RandomState(3)
        self.python = random.Random(3)
        self.torch = torch.Generator().manual_seed(3)
        hidden = np.random.Generator(np.random.MT19937(3))
        self.transform = lambda x: x * (1 - 0.01 * hidden.random())

    def __getitem__(self, index):
        noise = self.numpy.random() + self.old.rand() + self.python.random()
        noise += torch.rand((), generator=self.torch).item()
        return self.transform(self.x[index]) * (1 - 0.01 * noise), self.y[index]


class Stream(IterableDataset):
    def __init__(self):
        self.rng = np.random.default_rng(5)

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        x, y = blobs().tensors
        for index in self.rng.permutation(SAMPLES):
            yield x[index], y[index]


class ByNumpy(Sampler):
    """A sampler of the user's own, which draws from NumPy's global state."""

    def __iter__(self):
        return iter(np.random.permutation(SAMPLES).tolist())  # noqa: NPY002

    def __len__(self):
        return SAMPLES


class Stateful(Sampler):
    """A sampler with a state_dict and no generator that could be found."""

    def __init__(self):
        self.epochs = 0

    def __iter__(self):
        self.epochs += 1
        return iter(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epochs)))

    def __len__(self):
        return SAMPLES

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


def loader(dataset=None, **options):
    return DataLoader(blobs() if dataset is None else dataset, BATCH, **options)


def generator():
    return torch.Generator().manual_seed(9)


def constructed(folder):
    return af.construct_det_dataset(nn.Linear(3, 3), blobs(), eps=0.05, steps=1, out=folder / "det")


DATA = {
    "tensors": lambda _: blobs(),
    "global": lambda _: Global(),
    "owning": lambda _: Owning(),
    "constructed": constructed,
    "batches": lambda _: list(loader()),
    "shuffled": lambda _: loader(Global(), shuffle=True),
    "generator": lambda _: loader(Owning(), shuffle=True, generator=generator()),
    "random sampler": lambda _: loader(sampler=RandomSampler(blobs(), generator=generator())),
    "weighted": lambda _: loader(
        sampler=WeightedRandomSampler(torch.arange(1.0, 61), SAMPLES, generator=generator())
    ),
    "by numpy": lambda _: loader(Global(), sampler=ByNumpy()),
    "stateful": lambda _: loader(sampler=Stateful()),
    "stream": lambda _: loader(Stream()),
    "workers": lambda _: loader(Global(), shuffle=True, num_workers=2),
}


# --- Optimisers ---


class Lookahead(Optimizer):
    """Slow weights beside the fast ones, in a further key of the state (Zhang et al. 2019)."""

    def __init__(self, inner, k=5, alpha=0.5):
        self.inner, self.k, self.alpha, self.counter = inner, k, alpha, 0
        self.slow = [p.detach().clone() for g in inner.param_groups for p in g["params"]]
        self.defaults, self._hooks = inner.defaults, {}

    @property
    def param_groups(self):
        return self.inner.param_groups

    @property
    def state(self):
        return self.inner.state

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.counter += 1
        if self.counter % self.k == 0:
            fast = [p for g in self.param_groups for p in g["params"]]
            for p, slow in zip(fast, self.slow, strict=True):
                slow.lerp_(p, self.alpha)
                p.copy_(slow)

    def state_dict(self):
        return self.inner.state_dict() | {"slow": self.slow, "counter": self.counter}

    def load_state_dict(self, state):
        own = {"state": state["state"], "param_groups": state["param_groups"]}
        self.inner.load_state_dict(own)
        self.slow, self.counter = [s.clone() for s in state["slow"]], state["counter"]


class ScheduleFree(SGD):
    """Schedule-free SGD (Defazio et al. 2024): the weights of training are not those to use."""

    def __init__(self, parameters, lr=0.1, beta=0.9):
        super().__init__(parameters, lr=lr)
        for group in self.param_groups:
            group |= {"beta": beta, "k": 0, "train_mode": False}

    def _move(self, training):
        for group in self.param_groups:
            if group["train_mode"] != training:
                weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = training

    def train(self):
        self._move(True)

    def eval(self):
        self._move(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "call optimizer.train() first"
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, 1 / group["k"])
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["k"]) - 1))
                z.sub_(p.grad, alpha=group["lr"])


class SAM(SGD):
    """Sharpness-aware minimisation (Foret et al. 2021), in its commonest form."""

    def __init__(self, parameters, lr=0.05, rho=0.05):
        super().__init__(parameters, lr=lr, momentum=0.9)
        self.rho = rho

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12
        self.moved = [(p, p.grad * (self.rho / norm)) for p in parameters]
        for p, e in self.moved:
            p.add_(e)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p, e in self.moved:
            p.sub_(e)
        super().step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "SAM requires closure, but it was not provided"
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


OPTIMIZERS = {
    "sgd": None,
    "adam": partial(torch.optim.Adam, lr=0.01),
    "lookahead": lambda p: Lookahead(SGD(p, lr=0.1, momentum=0.9)),
    "schedule-free": ScheduleFree,
    "sam": SAM,
    "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
}

SCHEDULES = {
    "default": None,
    "one cycle": "one_cycle",
    "warm-up": lambda o: LambdaLR(o, lambda step: min(1.0, step / 5)),
    "plateau": lambda o: ReduceLROnPlateau(o, mode="max", patience=0, threshold=0.5),
    "parts": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=4), CosineAnnealingLR(o, STEPS - 4)], [4]
    ),
    "one cycle inside": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=2), OneCycleLR(o, 0.1, total_steps=STEPS)], [2]
    ),
}

METHODS = {
    "standard": None,
    "pgd": {"random_start": True, "attack_mode": "train", "steps": 2},
    "mix": {"mix": 0.4, "steps": 2},
    "warm-up": {"warmup": 1.5, "steps": 2},
    "trades": {"objective": "trades", "steps": 2},
    "mart": {"objective": "mart", "steps": 2},
    "fast": {"method": "fast"},
    "free": {"method": "free", "steps": 2},
}

OPTIONS = {
    "none": {},
    "ema": {"ema": 0.9},
    "awp": {"awp": 0.01, "clip_norm": 1.0},
    "accumulate": {"accumulate": 2, "class_weights": [1.0, 2.0, 1.0]},
    "patience": {"patience": 2},
}


def is_possible(data, method, optimizer, schedule, options):
    """Whether the library takes a combination."""
    closure = optimizer in ("sam", "lbfgs")
    if closure and (options == "awp" or method == "free"):
        return False
    if optimizer == "lbfgs" and schedule == "one cycle inside":
        return False  # torch's OneCycleLR wants a momentum
    if method == "free" and options in ("awp", "accumulate"):
        return False
    if optimizer == "schedule-free" and schedule != "default":
        return False
    return not (optimizer == "lookahead" and schedule == "plateau")


def train(folder, scratch, data, method, optimizer, schedule, options, **further):
    """Start a new process's run, or resume it; return model and history."""
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    model = network()
    settings = {
        "epochs": EPOCHS,
        "lr": 0.05,
        "seed": 4,
        "optimizer": OPTIMIZERS[optimizer],
        "schedule": SCHEDULES[schedule],
        "validation": blobs(30),
        "options": Options(**OPTIONS[options]),
        "checkpoint": folder,
        "progress": False,
        **further,
    }
    source = DATA[data](scratch)
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        settings["batch_size"] = BATCH
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of SequentialLR
        if METHODS[method] is None:
            history = af.fit(model, source, **settings)
        else:
            history = af.adversarial_fit(
                model, source, eps=0.1, norm="linf", **METHODS[method], **settings
            )
    return model, history


def outcome(model, history):
    """Bytes that must be equal: weights, all buffers, and the history without its seconds."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
    return {name: t.detach().numpy().tobytes() for name, t in tensors}, rows, history.best
