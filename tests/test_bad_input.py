"""Bad input is refused before any work, by a message with the argument and the usual cause."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import advfeat as af
from advfeat.attacks import FMN, apgd, invert
from advfeat.attacks.inversion import Inversion
from advfeat.metrics import robustness_curve

X, Y = torch.linspace(0, 1, 24).view(6, 4), torch.arange(6) % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def rows(x=X, y=Y):
    return TensorDataset(x, y)


# Each takes the model and what is bad about the call.


def pgd(m, x=X, y=Y, **bad):
    af.pgd(m, x, y, **({"eps": 0.1, "norm": "l2"} | bad))


def robust(m, data=None, **bad):
    data = rows() if data is None else data
    options = {} if "attack" in bad else {"eps": 0.1, "norm": "l2"}
    options |= {} if "attack" in bad else {"steps": 2}
    af.robust_accuracy(m, data, **(options | bad))


def fit(m, data=None, **bad):
    af.fit(m, rows() if data is None else data, **({"epochs": 1} | bad))


def adversarial(m, data=None, **bad):
    options = {} if "attack" in bad else {"eps": 0.1, "norm": "l2"}
    data = rows() if data is None else data
    af.adversarial_fit(m, data, **(options | {"epochs": 1, "steps": 2} | bad))


def robust_set(m, data=None, **bad):
    af.construct_robust_dataset(m, rows() if data is None else data, **({"steps": 2} | bad))


def det_set(m, data=None, **bad):
    af.construct_det_dataset(m, rows() if data is None else data, **({"steps": 2} | bad))


def rand_set(m, data=None, **bad):
    af.construct_rand_dataset(m, rows() if data is None else data, **({"steps": 2} | bad))


class Returning(nn.Module):
    """A model whose output is made from its logits."""

    def __init__(self, make):
        super().__init__()
        self.net = network()
        self.make = make

    def forward(self, x):
        return self.make(self.net(x))


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield X[0], 0


class Bare(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, row):
        return X[row]


class Keyed(Bare):
    def __getitem__(self, row):
        return {"pixels": X[row], "label": 0}


class Named(Bare):
    def __getitem__(self, row):
        return X[row], "cat"


WITH_NAN = X.clone().index_fill_(0, torch.tensor([5]), torch.nan)
ATTACK = af.PGD(eps=0.1, norm="l2")
PER_SAMPLE = af.PGD(eps=torch.full((6,), 0.1), norm="l2")
V, T = ValueError, TypeError

# id: (call, error, argument, cause)
CASES = {
    # inputs
    "normalised outside": (lambda m: pgd(m, X * 4 - 2), V, "inputs", "normalisation"),
    "images to 255": (lambda m: pgd(m, X * 255), V, "inputs", "divide by 255"),
    "NaN": (lambda m: pgd(m, X * torch.nan), V, "inputs", "finite"),
    "infinity": (lambda m: pgd(m, X / 0), V, "inputs", "finite"),
    "integer images": (lambda m: pgd(m, (X * 255).byte()), T, "inputs", r"float\(\) / 255"),
    "complex images": (lambda m: pgd(m, X + 0j), T, "inputs", "complex64"),
    "numpy inputs": (lambda m: pgd(m, X.numpy()), T, "inputs", "torch.Tensor"),
    "rank 1": (lambda m: pgd(m, X[0], Y[:1]), V, "inputs.shape", r"x\[None\]"),
    "empty batch": (lambda m: pgd(m, X[:0], Y[:0]), V, "inputs.shape", "empty batch"),
    "meta inputs": (lambda m: pgd(m, X.to("meta")), V, "inputs.device", "meta"),
    "model elsewhere": (
        lambda m: pgd(nn.Linear(4, 3, device="meta"), X),
        V,
        "model",
        "on the meta device",
    ),
    "index of another length": (
        lambda m: ATTACK(m, X, Y, index=torch.arange(5)),
        V,
        "index",
        r"\(6,\)",
    ),
    "index no integers": (lambda m: ATTACK(m, X, Y, index=X[:, 0]), T, "index", "integer"),
    # labels
    "label beyond classes": (lambda m: pgd(m, y=Y + 1), V, "labels", "3 classes"),
    "target beyond classes": (
        lambda m: pgd(m, y=Y + 1, targeted=True),
        V,
        r"labels \(targets\)",
        "3 classes",
    ),
    "negative label": (lambda m: pgd(m, y=Y - 1), V, "labels", "start at 0"),
    "float labels": (lambda m: pgd(m, y=Y.float()), T, "labels", r"\.long\(\)"),
    "bool labels": (lambda m: pgd(m, y=Y > 0), T, "labels", "torch.bool"),
    "one-hot labels": (lambda m: pgd(m, y=F.one_hot(Y)), V, "labels.shape", "argmax"),
    "labels as a column": (lambda m: pgd(m, y=Y[:, None]), V, "labels.shape", r"\(6,\)"),
    "too few labels": (lambda m: pgd(m, y=Y[:5]), V, "labels.shape", r"\(6,\)"),
    "one label": (lambda m: pgd(m, y=Y[0]), V, "labels.shape", "one label"),
    "a list of labels": (lambda m: pgd(m, y=Y.tolist()), T, "labels", "torch.Tensor"),
    "labels elsewhere": (lambda m: pgd(m, y=Y.to("meta")), V, "labels.device", "cpu"),
    # eps, norm, bounds
    "eps negative": (lambda m: pgd(m, eps=-0.1), V, "eps", "at least 0"),
    "eps NaN": (lambda m: pgd(m, eps=float("nan")), V, "eps", "finite"),
    "eps infinite": (lambda m: pgd(m, eps=float("inf")), V, "eps", "finite"),
    "eps a string": (lambda m: pgd(m, eps="0.5"), T, "eps", "number"),
    "eps None": (lambda m: pgd(m, eps=None), T, "eps", "number"),
    "eps 8 in linf": (lambda m: pgd(m, eps=8, norm="linf"), V, "eps", "8/255"),
    "eps 8 from numpy": (lambda m: pgd(m, eps=np.float32(8), norm="linf"), V, "eps", "8/255"),
    "eps 8 a sample": (
        lambda m: pgd(m, eps=torch.full((6,), 8.0), norm="linf"),
        V,
        "eps",
        "8/255",
    ),
    "eps for another batch": (lambda m: pgd(m, eps=torch.ones(5)), V, "eps.shape", r"\(6,\)"),
    "eps of other features": (lambda m: pgd(m, eps=torch.ones(1, 5)), V, "eps.shape", "one sample"),
    "eps integers": (lambda m: pgd(m, eps=torch.ones(6).int()), T, "eps", "floating"),
    "eps negative once": (lambda m: pgd(m, eps=-X[:, 0] + 0.1), V, "eps", "at least 0"),
    "eps NaN once": (lambda m: pgd(m, eps=WITH_NAN[:, 0]), V, "eps", "finite"),
    "norm None": (lambda m: pgd(m, norm=None), V, "norm", "'l2'"),
    "bounds reversed": (lambda m: pgd(m, bounds=(1.0, 0.0)), V, "bounds", "reversed"),
    "bounds equal": (lambda m: pgd(m, bounds=(1.0, 1.0)), V, "bounds", "below"),
    "bounds NaN": (lambda m: pgd(m, bounds=(0.0, float("nan"))), V, "bounds", "finite"),
    "bounds of strings": (lambda m: pgd(m, bounds=("0", "1")), T, "bounds", "number"),
    "three bounds": (lambda m: pgd(m, bounds=(0.0, 0.5, 1.0)), T, "bounds", "tuple"),
    # other settings
    "steps 0": (lambda m: pgd(m, steps=0), V, "steps", "at least 1"),
    "steps -1": (lambda m: pgd(m, steps=-1), V, "steps", "at least 1"),
    "steps 2.5": (lambda m: pgd(m, steps=2.5), T, "steps", "integer"),
    "steps NaN": (lambda m: pgd(m, steps=float("nan")), T, "steps", "integer"),
    "steps True": (lambda m: pgd(m, steps=True), T, "steps", "integer"),
    "step size 0": (lambda m: pgd(m, step_size=0.0), V, "step_size", "above 0"),
    "step size NaN": (lambda m: pgd(m, step_size=float("nan")), V, "step_size", "finite"),
    "step size a string": (lambda m: pgd(m, step_size="auto"), T, "step_size", "number"),
    "restarts 0": (lambda m: pgd(m, restarts=0), V, "restarts", "at least 1"),
    "patience 0": (lambda m: pgd(m, patience=0), V, "patience", "at least 1"),
    "patience with restarts": (lambda m: pgd(m, patience=3, restarts=2), V, "patience", "restarts"),
    "momentum 1": (lambda m: robust_set(m, momentum=1.0), V, "momentum", "below 1"),
    "momentum < 0": (lambda m: robust_set(m, momentum=-0.1), V, "momentum", "at least 0"),
    "momentum negative": (lambda m: pgd(m, momentum=-0.1), V, "momentum", "at least 0"),
    "loss unknown": (lambda m: pgd(m, loss="ce"), V, "loss", "'cross_entropy'"),
    "loss a number": (lambda m: pgd(m, loss=5), T, "loss", "callable"),
    "loss averaged": (lambda m: pgd(m, loss=F.cross_entropy), V, "loss", "each sample"),
    "loss of logits": (lambda m: pgd(m, loss=lambda z, y: z), V, "loss", "each sample"),
    "loss no tensor": (lambda m: pgd(m, loss=lambda z, y: 1.0), T, "loss", "each sample"),
    "returns unknown": (lambda m: pgd(m, returns="worst"), V, "returns", "'best'"),
    "seed a float": (lambda m: pgd(m, seed=1.0), T, "seed", "integer"),
    "seed a bool": (lambda m: pgd(m, seed=True), T, "seed", "integer"),
    "precision unknown": (lambda m: pgd(m, precision="float16"), V, "precision", "'bfloat16'"),
    "fgsm eps": (lambda m: af.fgsm(m, X, Y, eps=-1.0, norm="l2"), V, "eps", "at least 0"),
    # models
    "a function as model": (lambda m: pgd(lambda x: x), T, "model", "Module"),
    "a class as model": (lambda m: pgd(nn.Linear), T, "model", "Module"),
    "one logit": (lambda m: pgd(Returning(lambda z: z[:, :1])), V, "model output", "two classes"),
    "no class axis": (lambda m: pgd(Returning(lambda z: z[:, 0])), V, "model output", r"\(6, C\)"),
    "3-D logits": (lambda m: pgd(Returning(lambda z: z[None])), V, "model output", r"\(6, C\)"),
    "pooled batch": (lambda m: pgd(Returning(lambda z: z[:1])), V, "model output", r"\(6, C\)"),
    "integer logits": (lambda m: pgd(Returning(lambda z: z.int())), T, "model", "floating"),
    "text for logits": (lambda m: pgd(Returning(lambda z: "cat")), T, "model", "str"),
    "dictionary without logits": (
        lambda m: pgd(Returning(lambda z: {"scores": z})),
        T,
        "model",
        "'logits'",
    ),
    # inversion
    "no layer of this name": (
        lambda m: invert(m, X, X, layer="head"),
        V,
        "layer",
        "no layer of this name",
    ),
    "the model as layer": (lambda m: invert(m, X, X, layer=""), V, "layer", "no layer"),
    "layer of another model": (
        lambda m: invert(m, X, X, layer=network()[0]),
        V,
        "layer",
        "not part of the model",
    ),
    "layer a number": (lambda m: invert(m, X, X, layer=2), T, "layer", "name"),
    "no Linear": (lambda m: invert(nn.Softmax(1), X, X), V, "layer", "no nn.Linear"),
    "layer of no activations": (
        lambda m: invert(m, X, X, layer=lambda x: x.sum()),
        V,
        "layer",
        r"\(N, \.\.\.\)",
    ),
    "start of another shape": (lambda m: invert(m, X, X[:5]), V, "start.shape", r"\(6, 4\)"),
    "start no tensor": (lambda m: invert(m, X, X.numpy()), T, "start", "torch.Tensor"),
    "start NaN": (lambda m: invert(m, X, WITH_NAN), V, "start", "finite"),
    "start to 255": (lambda m: invert(m, X, X * 255), V, "start", "255"),
    "inversion of a list": (lambda m: invert(m, X.tolist(), X), T, "inputs", "torch.Tensor"),
    "inversion steps": (lambda m: invert(m, X, X, steps=0), V, "steps", "at least 1"),
    "inversion step size": (lambda m: invert(m, X, X, step_size=-1), V, "step_size", "above 0"),
    # data
    "no data": (lambda m: af.accuracy(m, None), T, "data", "NoneType"),
    "a generator": (lambda m: robust(m, (b for b in [(X, Y)])), T, "data", "generator"),
    "an empty list": (lambda m: robust(m, []), V, "data", "no batches"),
    "an empty dataset": (lambda m: robust(m, rows(X[:0], Y[:0])), V, "data", "no samples"),
    "an empty loader": (
        lambda m: fit(m, DataLoader(rows(), batch_size=9, drop_last=True)),
        V,
        "data",
        "no batches",
    ),
    "a bare iterable dataset": (lambda m: robust(m, Endless()), T, "data", "DataLoader"),
    "an endless loader": (lambda m: robust(m, DataLoader(Endless())), T, "data", "no length"),
    "training without end": (lambda m: fit(m, DataLoader(Endless())), T, "data", "no length"),
    "no labels": (lambda m: robust(m, Bare()), T, "data", r"\(inputs, labels"),
    "unknown keys": (lambda m: robust(m, Keyed()), V, "batch keys", "pixels"),
    "names for labels": (lambda m: robust(m, Named()), T, "data", "labels"),
    "batch size 0": (lambda m: robust(m, batch_size=0), V, "batch_size", "at least 1"),
    "training batch size 0": (lambda m: fit(m, batch_size=0), V, "batch_size", "at least 1"),
    "accuracy of NaN": (lambda m: af.accuracy(m, rows(X * torch.nan)), V, "inputs", "finite"),
    "accuracy beyond classes": (lambda m: af.accuracy(m, rows(y=Y + 1)), V, "labels", "3 classes"),
    "accuracy of a function": (lambda m: af.accuracy(len, rows()), T, "model", "Module"),
    # robust accuracy
    "no ball": (lambda m: af.robust_accuracy(m, rows()), V, "eps, norm", "both are needed"),
    "no norm": (lambda m: robust(m, norm=None), V, "eps, norm", "both are needed"),
    "bounds beside an attack": (
        lambda m: robust(m, attack=ATTACK, bounds=(-1.0, 1.0)),
        V,
        "bounds",
        "its own",
    ),
    "bounds beside a curve's attack": (
        lambda m: robustness_curve(m, rows(), norm="l2", attack=FMN(norm="l2"), bounds=(-1.0, 1.0)),
        V,
        "bounds",
        "its own",
    ),
    "a ball beside an attack": (lambda m: robust(m, attack=ATTACK, eps=0.1), V, "eps, norm", "own"),
    "attack a class": (lambda m: robust(m, attack=af.PGD), T, "attack", "PGD"),
    "attack without a ball": (lambda m: robust(m, attack=Inversion()), T, "attack", "PGD"),
    "attack targeted": (
        lambda m: robust(m, attack=af.PGD(eps=0.1, norm="l2", targeted=True)),
        V,
        "attack",
        "targeted",
    ),
    "attack a radius a row": (lambda m: robust(m, attack=PER_SAMPLE), V, "eps.shape", "one sample"),
    "attacks none": (lambda m: robust(m, attack=[]), V, "attack", "no attack at all"),
    "attacks and a name": (lambda m: robust(m, attack=[ATTACK, "pgd"]), T, "attack", "PGD"),
    "attacks in different boxes": (
        lambda m: robust(m, attack=[ATTACK, af.PGD(eps=0.1, norm="l2", bounds=(-1.0, 1.0))]),
        V,
        "attack",
        "different bounds",
    ),
    "attack without a radius": (
        lambda m: robust(m, attack=FMN(norm="l2")),
        V,
        "attack.eps",
        "give it an eps",
    ),
    "steps beside an attack": (lambda m: robust(m, attack=ATTACK, steps=3), V, "eps, norm", "own"),
    "robust steps 0": (lambda m: robust(m, steps=0), V, "steps", "at least 1"),
    "apgd eps for another batch": (
        lambda m: apgd(m, X, Y, eps=torch.ones(5), norm="l2"),
        V,
        "eps.shape",
        r"\(6,\)",
    ),
    "eps a radius a row": (
        lambda m: robust(m, eps=torch.full((6,), 0.1)),
        V,
        "eps.shape",
        "one sample",
    ),
    "data normalised": (
        lambda m: robust(m, rows(X * 4 - 2)),
        V,
        "inputs",
        "normalisation",
    ),
    "data one-hot": (lambda m: robust(m, rows(y=F.one_hot(Y))), V, "labels.shape", "argmax"),
    "robust seed": (lambda m: robust(m, seed="7"), T, "seed", "integer"),
    "robust precision": (lambda m: robust(m, precision="half"), V, "precision", "'bfloat16'"),
    # training
    "epochs 0": (lambda m: fit(m, epochs=0), V, "epochs", "at least 1"),
    "epochs 1.5": (lambda m: fit(m, epochs=1.5), T, "epochs", "integer"),
    "lr 0": (lambda m: fit(m, lr=0.0), V, "lr", "above 0"),
    "lr NaN": (lambda m: fit(m, lr=float("nan")), V, "lr", "finite"),
    "training momentum": (lambda m: fit(m, momentum=-1), V, "momentum", "at least 0"),
    "weight decay": (lambda m: fit(m, weight_decay=-1), V, "weight_decay", "at least 0"),
    "optimizer a name": (lambda m: fit(m, optimizer="adam"), T, "optimizer", "callable"),
    "optimizer a class of none": (lambda m: fit(m, optimizer=list), T, "optimizer", "list"),
    "schedule a name": (lambda m: fit(m, schedule="cosine"), V, "schedule", "one_cycle"),
    "augment no function": (lambda m: fit(m, augment=5), T, "augment", "callable"),
    "on_epoch no function": (lambda m: fit(m, on_epoch=[]), T, "on_epoch", "callable"),
    "training seed": (lambda m: fit(m, seed=0.5), T, "seed", "integer"),
    "nothing to train": (lambda m: fit(m.requires_grad_(False)), V, "model", "frozen"),
    "training a function": (lambda m: fit(len), T, "model", "Module"),
    "training beyond classes": (lambda m: fit(m, rows(y=Y + 1)), V, "labels", "3 classes"),
    "training on negatives": (lambda m: fit(m, rows(y=Y - 1)), V, "labels", "start at 0"),
    "training on one-hot": (lambda m: fit(m, rows(y=F.one_hot(Y))), V, "labels.shape", "argmax"),
    "training one logit": (lambda m: fit(Returning(lambda z: z[:, 0])), V, "model output", "C"),
    "no ball to train in": (
        lambda m: af.adversarial_fit(m, rows(), epochs=1),
        V,
        "eps, norm",
        "both are needed",
    ),
    "training eps 0": (lambda m: adversarial(m, eps=0.0), V, "eps", "above 0"),
    "training eps 8": (lambda m: adversarial(m, eps=8, norm="linf"), V, "eps", "8/255"),
    "a ball beside a training attack": (
        lambda m: adversarial(m, attack=ATTACK, norm="l2"),
        V,
        "eps, norm",
        "own",
    ),
    "training attack a name": (lambda m: adversarial(m, attack="pgd"), T, "attack", "PGD"),
    "training attack targeted": (
        lambda m: adversarial(m, attack=af.PGD(eps=0.1, norm="l2", targeted=True)),
        V,
        "attack",
        "targeted",
    ),
    "training mode": (lambda m: adversarial(m, attack_mode="test"), V, "attack_mode", "'eval'"),
    "mix 1.5": (lambda m: adversarial(m, mix=1.5), V, "mix", "fraction"),
    "mix a word": (lambda m: adversarial(m, mix="half"), T, "mix", "number"),
    "training normalised": (
        lambda m: adversarial(m, rows(X * 4 - 2)),
        V,
        "inputs",
        "normalisation",
    ),
    "training to 255": (lambda m: adversarial(m, rows(X * 255)), V, "inputs", "255"),
    "adversarial seed": (lambda m: adversarial(m, seed=0.5), T, "seed", "integer"),
    "adversarial precision": (
        lambda m: adversarial(m, precision="half"),
        V,
        "precision",
        "'bfloat16'",
    ),
    # constructed sets
    "shift 0": (lambda m: det_set(m, shift=0), V, "shift", "equals its label"),
    "shift of all classes": (lambda m: det_set(m, shift=3), V, "shift", "equals its label"),
    "shift -1": (lambda m: det_set(m, shift=-1), V, "shift", "at least 0"),
    "set eps 0": (lambda m: det_set(m, eps=0.0), V, "eps", "above 0"),
    "set eps a radius a row": (
        lambda m: rand_set(m, eps=torch.ones(6)),
        V,
        "eps.shape",
        "one sample",
    ),
    "set norm": (lambda m: rand_set(m, norm="l3"), V, "norm", "'l2'"),
    "set seed": (lambda m: rand_set(m, seed=0.5), T, "seed", "integer"),
    "set steps": (lambda m: det_set(m, steps=0), V, "steps", "at least 1"),
    "set of a function": (lambda m: det_set(len), T, "model", "Module"),
    "set normalised": (
        lambda m: det_set(m, rows(X * 4 - 2)),
        V,
        r"inputs\[0\]",
        "normalisation",
    ),
    "set of an iterable": (
        lambda m: robust_set(m, [(X, Y)]),
        V,
        "data",
        "map-style",
    ),
    "set layer unknown": (lambda m: robust_set(m, layer="fc"), V, "layer", "no layer of this name"),
    "set layer foreign": (
        lambda m: robust_set(m, layer=network()[0]),
        V,
        "layer",
        "not part of the model",
    ),
    "set without Linear": (lambda m: robust_set(nn.Softmax(1)), V, "layer", "no nn.Linear"),
    "set start unknown": (lambda m: robust_set(m, start="image"), V, "start", "'images'"),
    "set start a list": (lambda m: robust_set(m, start=X.tolist()), T, "start", "torch.Tensor"),
    "set starts too few": (lambda m: robust_set(m, start=X[:5]), V, "start.shape", "6"),
    "set starts misshapen": (lambda m: robust_set(m, start=X[:, :3]), V, "start.shape", "images"),
    "set starts NaN": (lambda m: robust_set(m, start=WITH_NAN), V, "start", "finite"),
    "set starts to 255": (lambda m: robust_set(m, start=X * 255), V, "start", "255"),
    "set of one row": (
        lambda m: robust_set(m, rows(X[:1], Y[:1])),
        V,
        "start",
        "no other image",
    ),
    "set batch size": (lambda m: robust_set(m, batch_size=0), V, "batch_size", "at least 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_by_name_and_cause(case):
    call, error, argument, cause = CASES[case]
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error) as caught:
        call(model)
    message = str(caught.value)
    assert type(caught.value) is error
    assert re.match(rf"{argument}\b|{argument}[=:]", message), message
    assert re.search(cause, message), message
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(m.training for m in model.modules())


def test_starts_are_refused_before_the_first_batch():
    # The bad row is the last: the rows before it are not worked on first.
    model, calls = network(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="start"):
        robust_set(model, start=WITH_NAN, batch_size=1)
    assert not calls


def test_a_bad_callback_is_refused_before_the_first_epoch():
    model, calls = network(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for bad in ({"on_epoch": 5}, {"schedule": 5}):
        with pytest.raises(TypeError):
            fit(model, **bad)
    assert not calls


@pytest.mark.parametrize(
    ("inputs", "labels", "error", "message"),
    [
        (lambda x: x.to_sparse(), lambda y: y, ValueError, "to_dense"),
        (lambda x: x.to(torch.complex64), lambda y: y, TypeError, "view_as_real"),
        (lambda x: x, lambda y: y.to(torch.uint16), TypeError, r"uint16.*\.long"),
        (lambda x: torch.arange(4), lambda y: y, TypeError, r"\(inputs, labels"),
    ],
)
def test_tensors_of_unusual_types_are_named(inputs, labels, error, message):
    x, y = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(error, match=message):
        af.pgd(torch.nn.Linear(3, 2), inputs(x), labels(y), eps=0.1, norm="l2")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": torch.rand(4, 3), "y": torch.zeros(4)}, r"mapping.*'x', 'y'"),
        ([(torch.rand(4, 3),)], "without labels"),
        ("data/train", "data: a path, 'data/train'"),
        (iter([(X, Y)]), "one pass, pass the loader"),
    ],
)
def test_data_without_labels_or_in_a_mapping_are_named(data, message):
    with pytest.raises(TypeError, match=message):
        af.accuracy(torch.nn.Linear(3, 2), data)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 2).state_dict(), "load_state_dict"),
        (nn.Linear, "an object of the class"),
        (rows(), "got TensorDataset$"),
    ],
)
def test_what_is_no_model_is_named(model, message):
    with pytest.raises(TypeError, match=message):
        af.accuracy(model, rows())


@pytest.mark.parametrize("attack", [af.PGD, af.pgd])
def test_an_attack_that_is_no_object_is_named_before_its_ball(attack):
    with pytest.raises(TypeError, match="expected an attack such as"):
        af.robust_accuracy(network(), rows(), eps=0.1, norm="l2", attack=attack)


def test_what_is_no_constructed_dataset_or_tensor_is_named():
    with pytest.raises(TypeError, match="expected a ConstructedDataset, got TensorDataset"):
        af.datasets.inspect(rows())
    with pytest.raises(TypeError, match="from_numpy"):
        af.pgd(network(), X.numpy(), Y, eps=0.1, norm="l2")


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("x", float("nan"), "='NaN or"),
        ("x", 1.5, "="),
        ("y", 7, "=7: the model has 3 classes"),
        ("y", -1, "=-1: class indices start at 0"),
    ],
)
@pytest.mark.parametrize("wrap", [rows, lambda x, y: [(x[:3], y[:3]), (x[3:], y[3:])]])
def test_evaluation_names_the_bad_sample(place, value, named, wrap):
    x, y = X.clone(), Y.clone()
    {"x": x, "y": y}[place][4] = value
    name = {"x": "inputs", "y": "labels"}[place]
    with pytest.raises(ValueError, match=rf"^{name}\[4\]{named}"):
        robust(network(), wrap(x, y), batch_size=2)
    if value != 1.5:  # accuracy has no bounds
        with pytest.raises(ValueError, match=rf"^{name}\[4\]{named}"):
            af.accuracy(network(), wrap(x, y))


def test_a_bad_label_is_found_before_the_attack():
    labels = Y.clone()
    labels[5] = 3
    model, seen = network(), []
    model.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))
    with pytest.raises(ValueError, match=r"labels\[5\]=3"):
        robust(model, TensorDataset(X, labels), batch_size=2, steps=50)
    assert len(seen) < 10
