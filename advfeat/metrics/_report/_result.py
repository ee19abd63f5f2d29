"""`report`: everything to know about the robustness of one trained model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from advfeat import checks, pages, seeding
from advfeat.attacks import PGD, Attack, AutoAttack
from advfeat.attacks.settings import positive_eps
from advfeat.durable import as_path
from advfeat.loading import Data
from advfeat.metrics._accuracy import accuracy
from advfeat.metrics._choice import choose_attacks
from advfeat.metrics._outcome import Accuracy, accuracy_row, attack_name
from advfeat.metrics._report import _page
from advfeat.metrics._report._budget import Budget
from advfeat.metrics._report._contents import Contents, Stages
from advfeat.metrics._report._examples import Example, examples
from advfeat.metrics._report._fields import ClassAccuracy, ReportFields
from advfeat.metrics._report._provenance import (
    citations,
    paper_text,
    provenance,
    radius_of,
    size_text,
)
from advfeat.metrics._report._samples import Drawn
from advfeat.metrics._report._verdict import judge
from advfeat.progress import Meter
from advfeat.suggestions import suggests
from advfeat.tables import Table
from advfeat.threat import FeatureBounds, Norm, hull, same_bounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class Report(ReportFields):
    """What `report` found.

    ``print`` it, show it in a notebook, or `save` it as a page.

    Attributes
    ----------
    verdict
        `Verdict`: two traffic lights, ``robustness`` and ``reliability``, and the reasons.
    clean, robust
        `Accuracy` without an attack, and `RobustAccuracy`.
    curve
        `RobustnessCurve`, or None where there was no time.
    diagnosis
        `Diagnosis`, or None.
    transfer
        `TransferMatrix` between this model and the others, or None.
    classes
        Clean and robust accuracy of each class, of the samples that were attacked.
    examples
        The most fragile and the most robust samples.
    eps, norm, bounds, ball
        The ball, and in words; of bounds by feature the smallest and the largest.
    chance
        Fraction of the commonest class.
    left_out
        What there was no time for.
    seconds
        Of each stage.
    provenance
        Settings, versions and device.
    paper
        A paragraph for a paper.
    citations
        Whom to cite.
    class_names
        By label.
    """

    def _summary(self) -> str:
        return f"{self.clean:.1%} clean, {self.robust:.1%} under attack; {self.verdict._summary()}"

    def _content(self) -> Sequence[str | Table]:
        rows = [accuracy_row("without an attack", self.clean)]
        rows.append(accuracy_row("under attack", self.robust))
        counts = list(self.robust.broken_counts.items())
        parts: list[str | Table] = [self.title, *self.verdict._content(), ""]
        parts += [Table(("accuracy", "%", "samples", "95% interval"), rows), ""]
        parts += [Table(("broken by", "samples"), counts), ""]
        if self.curve is not None:
            parts += [f"curve: {self.curve}"]
        if self.diagnosis is not None:
            parts += ["", *self.diagnosis._content()]
        if self.transfer is not None:
            parts += ["", *self.transfer._content()]
        if len(self.classes) > 1:
            head = ("class", "samples", "clean %", "robust %", "95% interval")
            parts += ["", Table(head, [each.row() for each in self.shown_classes()])]
        parts += ["", self.paper, "Cite:", *(f"  {each}" for each in self.citations), ""]
        left = [f"Left out: {each}" for each in self.left_out]
        took = sum(self.seconds.values())
        return [*parts, *left, f"{took:.1f} s"]

    def _repr_html_(self) -> str:
        """The page, in a frame of its own."""
        body = pages.page(self.title, "", list(_page.sections(self)), style=_page.STYLE)
        quoted = body.replace("&", "&amp;").replace('"', "&quot;")
        return f'<iframe srcdoc="{quoted}" style="width:100%;height:46rem;border:0"></iframe>'

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML file that needs no network.

        Examples
        --------
        >>> report.save("report.html")  # doctest: +SKIP
        """
        lines = [f"{self.robust.total} samples", f"made with advfeat {self.provenance['advfeat']}"]
        parts = list(_page.sections(self))
        pages.write(as_path(path), self.title, ", ".join(lines), parts, style=_page.STYLE)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The curve; without one, what broke the samples."""
        return self.robust.plot(ax) if self.curve is None else self.curve.plot(ax)

    @classmethod
    def _from_fields(cls, values: dict[str, Any]) -> Report:
        # Lists come back as tuples.
        about = values["provenance"]
        return cls(**{**values, "provenance": {**about, "attacks": list(about["attacks"])}})


@suggests
def report(
    model: nn.Module,
    data: Data,
    *,
    eps: float | Tensor,
    norm: Norm,
    attack: Attack | AutoAttack | Sequence[Attack | AutoAttack] | str | None = None,
    other: nn.Module | Mapping[str, nn.Module] | None = None,
    budget: float | None = 45.0,
    samples: int | None = 1000,
    class_names: Sequence[str] | None = None,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    seed: int | torch.Generator | None = 0,
    batch_size: int | None = None,
    expectation: int = 1,
    progress: bool | None = None,
) -> Report:
    """Measure everything to know about the robustness of one trained model.

    Clean and robust accuracy, what broke the samples, signs of masked gradients, transfer to
    other models, robust accuracy at every radius, each class, the most fragile and the most robust
    samples, a verdict in plain words, and a paragraph for a paper. Stages are run in that order,
    each on as many samples as the time allows.

    Parameters
    ----------
    model, data, bounds, batch_size, expectation, progress
        As in `robust_accuracy`. Samples are drawn from the data at random, by ``seed``.
    eps, norm
        The ball, in the units of the inputs. With a radius for each feature, the distances of the
        curve are in multiples of it.
    mask
        As in `robust_accuracy`: features that may change, for all samples or by sample number.
    attack
        As in `robust_accuracy`; by default the ensemble ``fast``.
    other
        A second model, or several by name, to measure transfer between them and ``model``.
    budget
        Time for all stages together, in seconds (approximate); None is no limit. ``left_out``
        lists what was left out for lack of time.
    samples
        How many samples at most; None is all.
    class_names
        Names of the classes, in the order of the labels.
    seed
        Seed of the choice of samples and of the attacks.

    Returns
    -------
    Report
        Prints as text, shows as a page in a notebook; ``report.save("report.html")``.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> x = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    >>> data = torch.utils.data.TensorDataset(x, x.argmax(1))
    >>> found = af.report(torch.nn.Identity(), data, eps=0.1, norm="linf", budget=10)
    >>> found.clean
    1.0000 (60/60, 95% interval 0.9398 to 1.0000)
    """
    checks.model(model)
    norm = checks.norm(norm)
    others = _others(other)
    if budget is not None:
        checks.number("budget", budget, low=0.0, strict=True)
    if samples is not None:
        checks.count("samples", samples, low=1)
    checks.seed(seed)
    number = seeding.resolve(seed)
    positive_eps(eps)
    ball: dict[str, Any] = {"eps": eps, "norm": norm, "bounds": bounds, "mask": mask}
    attacks = _attacks(attack, ball, number)
    drawn = Drawn(data, samples, batch_size, number)
    names = _names(class_names, drawn)
    for each in others.values():  # what does not fit fails before the work, not after it
        accuracy(each, drawn.part(0, 64), progress=False)
    limit = Budget(budget)
    with Meter(progress, "report") as meter:
        settings = (ball, attacks, attack is None, number, expectation, others)
        contents = Stages(model, drawn, limit, meter, *settings).run()
        meter.stage("pictures")
        pictures = examples(model, drawn, contents, 6)
    return _composed(model, contents, pictures, ball, number, limit, drawn, names)


def _attacks(attack: Any, ball: dict[str, Any], seed: int) -> tuple[Attack, ...]:
    """Single attacks with their seeds; an error where their ball is another than the report's."""
    eps, norm, bounds, mask = (ball[name] for name in ("eps", "norm", "bounds", "mask"))
    own = PGD(eps=eps, norm=norm, bounds=bounds, mask=mask)  # checks the settings
    ball.update(eps=own.eps, bounds=own.bounds, mask=own.mask)
    if attack is None or isinstance(attack, str):
        return choose_attacks(attack, eps, norm, None, bounds, seed, mask)
    attacks = choose_attacks(attack, None, None, None, bounds, seed)
    for each in attacks:
        if not _same_ball(each, own):
            cause = f"its ball is not that of the report, {norm} {size_text(eps, own.bounds)}"
            checks.fail("attack", each, f"{cause}: norm, eps, bounds and mask must be equal")
    return attacks


def _same_ball(first: Any, second: Any) -> bool:
    masks = (None if mask is None else mask.cpu() for mask in (first.mask, second.mask))
    one, other = (torch.as_tensor(each.eps, device="cpu").double() for each in (first, second))
    return (
        first.norm == second.norm
        and one.shape == other.shape
        and torch.allclose(one, other, rtol=1e-6, atol=0.0)  # a radius may come in float32
        and same_bounds(first.bounds, second.bounds)
        and _same_mask(*masks)
    )


def _same_mask(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _others(other: nn.Module | Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    if other is None:
        return {}
    if isinstance(other, nn.Module):
        return {"other model": other}
    if not isinstance(other, Mapping) or not other:
        raise TypeError(f"other: expected a model or models by name, got {type(other).__name__}")
    for each in other.values():
        checks.model(each)
    return {str(name): each for name, each in other.items()}


def _names(given: Sequence[str] | None, drawn: Drawn) -> tuple[str, ...] | None:
    """Names of the classes, one for every label."""
    if given is None:
        return None
    if isinstance(given, (str, Mapping)):
        kind = type(given).__name__
        raise TypeError(f"class_names: expected a list of names in label order, got {kind}")
    names, largest = tuple(map(str, given)), max(drawn.labels(len(drawn)).values())
    if largest >= len(names):
        checks.fail("class_names", names, f"{len(names)} names, but there is a label {largest}")
    return names


def _composed(
    model: nn.Module,
    contents: Contents,
    pictures: tuple[Example, ...],
    ball: dict[str, Any],
    seed: int,
    budget: Budget,
    drawn: Drawn,
    names: tuple[str, ...] | None,
) -> Report:
    norm, bounds, eps = ball["norm"], hull(ball["bounds"]), ball["eps"]
    robust, size = contents.robust, size_text(eps, ball["bounds"], ball["mask"])
    eps = eps.cpu() if isinstance(eps, Tensor) else eps
    verdict = judge(
        contents.clean, robust, contents.curve, contents.diagnosis,
        eps=radius_of(eps), ball=f"{norm} {size}", chance=contents.chance,
        warnings=contents.warnings, ensemble=contents.ensemble,
    )  # fmt: skip
    about = provenance(model, robust.attacks, seed, norm, size, bounds)
    about["samples"] = f"{robust.total} of {drawn.available or 'a stream'}, drawn by the seed"
    low, high = robust.interval
    sentence = (
        f"On {robust.total} samples the model has {100 * robust.standard:.1f}% accuracy, and "
        f"{100 * robust:.1f}% (95% interval {100 * low:.1f} to {100 * high:.1f}) under attack."
    )
    others = ["MinimumPGD", "FAB", "SmoothedPGD"] if contents.curve is not None else []
    return Report(
        verdict=verdict, clean=contents.clean, robust=robust, curve=contents.curve,
        diagnosis=contents.diagnosis, transfer=contents.transfer,
        classes=_classes(contents, names), examples=pictures,
        eps=eps, norm=norm, bounds=(float(bounds[0]), float(bounds[1])), ball=f"{norm} {size}",
        chance=contents.chance,
        left_out=tuple(budget.left_out), seconds=dict(budget.spent), provenance=about,
        paper=paper_text(about, sentence, map(attack_name, robust.attacks)),
        citations=citations(robust.attacks, others, contents.diagnosis is not None),
        class_names=names,
    )  # fmt: skip


def _classes(contents: Contents, names: tuple[str, ...] | None) -> tuple[ClassAccuracy, ...]:
    robust = contents.robust
    labels = torch.tensor([contents.labels[number] for number in robust.index.tolist()])
    found = []
    for label in sorted(Counter(labels.tolist())):
        chosen = labels == label
        name = names[label] if names is not None and 0 <= label < len(names) else str(label)
        index = robust.index[chosen]
        found.append(
            ClassAccuracy(
                name,
                Accuracy.of(robust.standard.correct[chosen], index),
                Accuracy.of(robust.correct[chosen], index),
            )
        )
    return tuple(found)
