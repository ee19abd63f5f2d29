"""Random models with data, and an independent reference for what is measured on them."""

import warnings
from collections import namedtuple
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import advfeat as af

COUNT, EPS, STEPS = 12, 0.06, 4
SHAPES = [(7,), (4, 3), (1, 6, 6), (3, 8, 8), (2, 3, 4, 4)]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
Output = namedtuple("Output", ["logits", "hidden"])


class Recurrent(nn.Module):
    def __init__(self, kind, width, classes):
        super().__init__()
        self.body, self.head = kind(width, 8, batch_first=True), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.body(x.flatten(2) if x.ndim > 3 else x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.embed, self.head = nn.Linear(width, 8), nn.Linear(8, classes)
        self.body = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.head(self.body(self.embed(x)).mean(1))


def mlp(width, classes, choose):
    activation = choose([nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU])
    norm = choose([nn.Identity, nn.BatchNorm1d, nn.LayerNorm])(16)
    drop = nn.Dropout(choose([0.0, 0.5]))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(width, 16), norm, activation(), drop, nn.Linear(16, classes)
    )


def convolutional(channels, classes, choose):
    norm = choose([nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.Identity()])
    activation = choose([nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.SiLU()])
    pool = choose([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)])
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), norm, activation,
        nn.Conv2d(8, 8, 3, padding=1, groups=choose([1, 8])), activation, pool, nn.Flatten(),
        nn.Linear(8, classes),
    )  # fmt: skip


class Model(nn.Module):
    """A body in a type of its own, behind preprocessing in the inputs' type."""

    def __init__(self, body, dtype, mean, scale, output):
        super().__init__()
        self.body, self.dtype, self.scale, self.output = body.to(dtype), dtype, scale, output
        self.register_buffer("mean", torch.tensor(mean))

    def forward(self, x):
        x = (x - self.mean.to(x.dtype)) / 0.3
        return OUTPUTS[self.output](self.scale * self.body(x.to(self.dtype)))


OUTPUTS = {
    "tensor": lambda z: z,
    "tuple": lambda z: (z, z.sum()),
    "dict": lambda z: {"loss": z.sum(), "logits": z},
    "object": lambda z: SimpleNamespace(logits=z),
    "namedtuple": lambda z: Output(z, None),
    "log_softmax": lambda z: z.log_softmax(1),
    "softmax": lambda z: z.softmax(1),
}


class Holding(nn.Module):
    """A user's own wrapper, with an input that is changed in place."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.mul_(1.0))


WRAPPERS = {
    "none": lambda m: m,
    "data parallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "normalised": lambda m: af.Normalize(m, 0.0, 1.0),
    "in place": Holding,
    "averaged": torch.optim.swa_utils.AveragedModel,
}


def random_model(seed):
    """A model in a random mode, its inputs, and a description."""
    generator = torch.Generator().manual_seed(seed)

    def choose(options):
        options = list(options)
        return options[int(torch.randint(len(options), (), generator=generator))]

    shape, dtype, classes = choose(SHAPES), choose(DTYPES), choose([2, 3, 5])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kinds = ["mlp"]
        if len(shape) == 2:
            kinds += ["LSTM", "GRU", "attention"]
        if len(shape) == 3:
            kinds += ["convolutional", "convolutional"]
        kind, width = choose(kinds), torch.Size(shape).numel()
        body = {
            "mlp": lambda: mlp(width, classes, choose),
            "LSTM": lambda: Recurrent(nn.LSTM, shape[1], classes),
            "GRU": lambda: Recurrent(nn.GRU, shape[1], classes),
            "attention": lambda: Attention(shape[1], classes),
            "convolutional": lambda: convolutional(shape[0], classes, choose),
        }[kind]()
        x = torch.rand(COUNT, *shape)
    output, wrapper = choose(OUTPUTS), choose(WRAPPERS)
    scale, mode = choose([1.0, 5.0, 1e4]), choose([True, False])
    model = Model(body, dtype, choose([0.0, 0.5]), scale, output)
    model = WRAPPERS[wrapper](model).train(mode)
    described = f"{seed}: {kind} {shape} {dtype} {output} x{scale:.0f} {wrapper} train={mode}"
    return model, x, described


# --- The reference: nothing of advfeat in it ---


def reference_logits(model, x):
    output = model(x.clone())
    output = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)
    return (output[0] if isinstance(output, tuple) else output).float()


def reference_pgd(model, x, y, sign):
    """PGD in linf: steps of 2.5 eps / steps along the sign of the gradient."""
    size, current = 2.5 * EPS / STEPS, x.clone()
    for _ in range(STEPS):
        current.requires_grad_()
        loss = F.cross_entropy(reference_logits(model, current), y, reduction="sum")
        (gradient,) = torch.autograd.grad(sign * loss, current)
        with torch.no_grad():
            current = current + size * gradient.sign()
            current = torch.minimum(torch.maximum(current, x - EPS), x + EPS).clamp(0, 1)
    return current.detach()


def model_scale(described):
    return float(described.split(" x")[1].split(" ")[0])


def check(seed):
    """Compare the library with the reference; return the description, and what was warned of."""
    model, x, described = random_model(seed)
    modes = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    original = x.clone()
    own = model.eval()
    with torch.no_grad():
        y = reference_logits(own, x).argmax(1)
    attacked = reference_pgd(own, x, y, 1)
    classes = reference_logits(own, x).shape[1]
    targets = (y + 1) % classes
    aimed = reference_pgd(own, x, targets, -1)
    with torch.no_grad():
        robust = reference_logits(own, attacked).argmax(1) == y
        hits = reference_logits(own, aimed).argmax(1) == targets
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    data = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    ball = {"eps": EPS, "norm": "linf", "steps": STEPS}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clean = af.accuracy(model, data)
        found = af.pgd(model, x, y, **ball)
        measured = af.robust_accuracy(model, data, **ball)
        made = af.construct_det_dataset(
            model, data, step_size=2.5 * EPS / STEPS, **ball, batch_size=5
        )
    warned = sorted({str(w.message)[:60] for w in caught if w.category is af.checks.ResultWarning})
    assert [m.training for m in model.modules()] == modes, described
    assert torch.equal(x, original), described
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), (described, name)
    assert clean == 1.0, described
    assert torch.equal(made.labels, targets), described
    assert (found - x).abs().max() <= EPS + 1e-6, described
    with torch.no_grad():
        own = reference_logits(model.eval(), found).argmax(1) == y
        reached = reference_logits(model, made.images).argmax(1) == targets
    # What is recorded is what the model says of what is returned.
    assert int((reached != made.field("success")).sum()) <= 1, described
    if not warned:
        # One sample may differ, where rounding turns a sign. The library may be stronger: its
        # cross-entropy does not saturate, and robust_accuracy takes the first success.
        assert int(own.sum()) <= int(robust.sum()) + 1, described
        assert measured.count <= int(robust.sum()) + 1, described
        assert int(reached.sum()) >= int(hits.sum()) - 1, described
        if model_scale(described) < 1e4:
            assert int((own != robust).sum()) <= 1, described
            assert int((reached != hits).sum()) <= 1, described
    return described, warned
