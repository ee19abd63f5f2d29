"""Do a model's input gradients mean something to the eye? And where do its layers give way?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from advfeat import checks, losses, plots, seeding, threat
from advfeat.analysis._features import (
    attack_features,
    batches,
    feature_attack,
    named_models,
    nearby,
)
from advfeat.attacks import Batch
from advfeat.loading import Data
from advfeat.model import Layer, Network, attackable
from advfeat.progress import with_progress
from advfeat.results import Result
from advfeat.tables import Table
from advfeat.threat import Bounds, Norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = ("image", "class means", "local")


@dataclass(frozen=True, eq=False, repr=False)
class Alignment(Result):
    """How input gradients of several models line up; see `alignment`.

    Attributes
    ----------
    cosines
        For each model, for each of ``"image"``, ``"class means"`` and ``"local"``, the cosine of
        every sample, float32 ``(N,)``.
    inputs, labels
        The samples, in order.
    gradients
        For each model the gradients, the shape of ``inputs``.
    """

    cosines: Mapping[str, Mapping[str, Tensor]]
    inputs: Tensor
    labels: Tensor
    gradients: Mapping[str, Tensor]

    def mean(self, model: str, measure: str) -> float:
        """Mean cosine of a model."""
        return float(self.cosines[model][measure].mean())

    def _summary(self) -> str:
        means = (f"{name} {self.mean(name, MEASURES[0]):.3f}" for name in self.cosines)
        return f"{len(self.labels)} samples, cosine with the {MEASURES[0]}: {', '.join(means)}"

    def _content(self) -> Sequence[str | Table]:
        def cell(values: Tensor) -> str:
            mean = f"{float(values.mean()):.3f}"
            if len(values) == 1:  # it has no standard error
                return mean
            return f"{mean} +- {float(values.std()) / len(values) ** 0.5:.3f}"

        rows = [(name, *(cell(found[m]) for m in MEASURES)) for name, found in self.cosines.items()]
        return [Table(("cosine of gradient and", *MEASURES), rows)]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean cosines of each model."""
        axes = plots.new_axes(ax)
        means = {n: [self.mean(n, m) for m in MEASURES] for n in self.cosines}
        plots.grouped(axes, means, MEASURES)
        axes.set(ylabel="mean cosine with the gradient")
        return axes

    def pictures(self, count: int = 6) -> Figure:
        """Saliency pictures: the first samples, and below them each model's gradients there."""
        shown = {"input": plots.stretched(self.inputs[:count])}
        for name, gradients in self.gradients.items():
            # At three standard deviations white or black, zero grey.
            spread = threat.per_sample(3 * gradients.flatten(1).std(1) + 1e-12, gradients)
            shown[name] = (0.5 + gradients / (2 * spread))[:count]
        return plots.samples(shown, labels={"input": self.labels[:count].tolist()})


def alignment(
    models: Mapping[str, nn.Module],
    data: Data,
    *,
    eps: float,
    norm: Norm = "l2",
    draws: int = 4,
    bounds: Bounds = (0.0, 1.0),
    seed: int | torch.Generator | None = None,
    batch_size: int | None = None,
) -> Alignment:
    """Compare models by how their input gradients line up.

    The gradient is that of the label's logit minus the largest other logit (so a sure answer has
    one too). Its cosine is taken with three things. ``"image"``: the input, less the mean of all
    inputs. ``"class means"``: the mean of the label's class less that of the other class, which
    theorem 3 of the paper speaks of. ``"local"``: the gradient at a random point of the ball, the
    mean of ``draws``.

    Parameters
    ----------
    models
        Models by name, ``{"standard": model, "robust": other}``; on one device.
    data
        A dataset, a loader or a list of batches, ``(inputs, labels)``. All inputs are held in
        memory, and a gradient of each for every model: a few hundred samples are enough.
    eps, norm
        Radius and norm of the ball of the random points, in the units of the inputs.
    draws
        Number of random points for each sample.
    bounds, batch_size
        As in `advfeat.accuracy` and `advfeat.robust_accuracy`.
    seed
        Seed of the random points: an integer or a generator; None draws one number from torch's
        default generator.

    Returns
    -------
    Alignment
        Cosines from -1 to 1 of every model and sample; ``mean(model, kind)`` is their mean. The
        gradients are kept for pictures.

    Raises
    ------
    ValueError
        ``eps`` is negative, ``draws`` below 1, or an input NaN or outside ``bounds``.
    TypeError
        ``models`` is not a mapping from names to modules.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.rand(20, 6), torch.arange(20) % 3)
    >>> found = analysis.alignment({"mine": torch.nn.Linear(6, 3)}, data, eps=0.1, seed=0)
    >>> round(found.mean("mine", "local"), 3)  # a linear model has one gradient
    1.0
    """
    named = named_models(models)
    checks.number("eps", eps, low=0.0)
    norm = checks.norm(norm)
    checks.count("draws", draws, low=1)
    checks.seed(seed)
    seed = seeding.resolve(seed)
    cosines, gradients = {}, {}
    for name, model in named.items():
        with attackable(model) as net:
            prepared = batches(net, model, data, bounds, batch_size)
            inputs = torch.cat([batch.inputs for batch in prepared])
            labels = torch.cat([batch.labels for batch in prepared])
            with net.given(prepared[0].extras):
                classes = net.class_count(prepared[0].inputs)
            means = _class_means(inputs, labels, classes)
            found = [
                _cosines(net, b, inputs.mean(0), means, eps, norm, draws, seed) for b in prepared
            ]
        parts = [torch.cat(part).cpu() for part in zip(*found, strict=True)]
        gradients[name] = parts.pop()
        cosines[name] = dict(zip(MEASURES, parts, strict=True))
    return Alignment(cosines, inputs.cpu(), labels.cpu(), gradients)


def _cosines(
    net: Network,
    batch: Batch,
    middle: Tensor,
    means: Tensor,
    eps: float,
    norm: Norm,
    draws: int,
    seed: int,
) -> tuple[Tensor, ...]:
    """The three cosines of a batch's samples, and their gradients."""
    with net.given(batch.extras):
        gradient, other = _gradient(net, batch.inputs, batch.labels)
    local = torch.zeros(len(gradient), dtype=gradient.dtype, device=gradient.device)
    for near in nearby(batch, draws, eps, norm, seed):
        # Against the same class, so that only the place differs.
        with net.given(batch.extras):
            moved, _ = _gradient(net, near, batch.labels, other)
        local += _cosine(gradient, moved) / draws
    return (
        _cosine(gradient, batch.inputs - middle),
        _cosine(gradient, means[batch.labels] - means[other]),
        local,
        gradient,
    )


def _gradient(
    net: Network, inputs: Tensor, labels: Tensor, other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of the label's logit minus another's, by default the largest; and which it is."""
    if other is None:
        logits = net.logits(inputs)
        other = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
    rivals = other

    def lead(logits: Tensor) -> Tensor:
        return -losses.towards("margin", logits, labels, rivals)

    return net.logits_gradient(inputs, lead).gradient, rivals


def _class_means(inputs: Tensor, labels: Tensor, classes: int) -> Tensor:
    counts = torch.bincount(labels, minlength=classes).clamp_min(1)
    sums = torch.zeros(classes, *inputs.shape[1:], dtype=inputs.dtype, device=inputs.device)
    return sums.index_add_(0, labels, inputs) / threat.per_sample(counts.to(inputs.dtype), sums)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    units = [threat.steepest(part.flatten(1), "l2") for part in (first, second)]
    return (units[0] * units[1]).sum(1)


@dataclass(frozen=True, eq=False, repr=False)
class LayerRobustness(Result):
    """How far an attack moves each layer, against how far inputs are apart there.

    Attributes
    ----------
    ratios
        R(g) of each layer, by name.
    eps, norm
        The ball.
    """

    ratios: Mapping[str, float]
    eps: float
    norm: Norm

    def _summary(self) -> str:
        return f"{len(self.ratios)} layers, {self.norm} {self.eps:g}"

    def _content(self) -> Sequence[str | Table]:
        return [Table(("layer", "R(g)"), list(self.ratios.items()))]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The ratio of each layer, in order."""
        axes = plots.new_axes(ax, max(4.0, 0.9 * len(self.ratios) + 2), 3.4)
        plots.lines(axes, range(len(self.ratios)), {"R(g)": list(self.ratios.values())})
        axes.set_xticks(range(len(self.ratios)), list(self.ratios))
        axes.set(xlabel="layer", ylabel=f"R(g), {self.norm} {self.eps:g}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        return axes


def layer_robustness(
    model: nn.Module,
    data: Data,
    *,
    layers: Sequence[Layer],
    eps: float,
    norm: Norm,
    steps: int = 20,
    bounds: Bounds = (0.0, 1.0),
    seed: int | torch.Generator | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> LayerRobustness:
    """Measure how far an attack moves the activations of each layer.

    For each layer g it is R(g) = E max ||g(x') - g(x)|| / E ||g(x1) - g(x2)||, where x' is in the
    ball around x, and x1 and x2 are two different samples (the authors' answer to Nakano, Distill
    2019). With R = 0 the attack does not move the layer at all; with R = 1 it moves it as far as
    another input would.

    Parameters
    ----------
    model
        Any module.
    data
        A dataset, a loader or a list of batches, at least two samples. All pairs are compared, so
        pass a few hundred.
    layers
        One or more layers, each as ``layer`` of `advfeat.construct_robust_dataset`: a module's
        name, a module, a callable of the inputs, or None for the penultimate layer.
    eps, norm, bounds
        The ball, in the units of the inputs, and the valid range.
    steps
        Number of PGD steps on the distance, from a random start (at the input itself the distance
        has no gradient).
    seed
        Seed of the starts: an integer or a generator; None draws one number from torch's default
        generator.
    batch_size
        As in `advfeat.robust_accuracy`.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    LayerRobustness
        ``ratios``: R(g) by the name of the layer, a float from 0.

    Raises
    ------
    ValueError
        ``layers`` is empty or names no module of the model, there is only one sample, or ``eps``
        is not above 0.
    TypeError
        ``model`` is no module.

    Examples
    --------
    >>> import torch
    >>> from advfeat import analysis
    >>> data = torch.utils.data.TensorDataset(torch.eye(4), torch.arange(4))
    >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 4))
    >>> found = analysis.layer_robustness(model, data, layers=["0"], eps=0.5, norm="l2", seed=0)
    >>> 0 < found.ratios["0"] <= 0.5 / 2**0.5
    True
    """
    checks.seed(seed)
    seed = seeding.resolve(seed)
    if not layers:
        checks.fail("layers", layers, "expected at least one")
    ratios = {}
    for place, layer in with_progress(
        list(enumerate(layers)), total=len(layers), label="layer robustness", progress=progress
    ):
        with attackable(model, layer=layer) as net:
            goals, reached = [], []
            for batch in batches(net, model, data, bounds, batch_size):
                with net.given(batch.extras):
                    goal = net.features(batch.inputs)
                attack = feature_attack(eps, norm, steps, bounds, _away_from(goal))
                attack = dataclasses.replace(attack, random_start=True, seed=seed)
                moved = attack_features(net, batch, attack)
                goals.append(goal)
                with net.given(batch.extras):
                    reached.append(threat.size(net.features(moved) - goal, "l2"))
        if sum(map(len, goals)) < 2:
            checks.fail("data", "one sample", "its distance to other samples is needed")
        spread = torch.pdist(torch.cat(goals)).mean()
        ratios[_name(layer, place)] = float(torch.cat(reached).mean() / spread)
    return LayerRobustness(ratios, eps, norm)


def _away_from(goal: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Squared distance of every sample's features to where they were."""
    return lambda features, _: (features - goal).square().sum(1)


def _name(layer: Layer, place: int) -> str:
    if layer is None:
        return "penultimate"
    return layer if isinstance(layer, str) else f"{place}: {type(layer).__name__}"
