"""Signs that a robust accuracy is not what it looks like."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from advfeat import checks, losses, plots, seeding
from advfeat.attacks import APGD, FAB, PGD, Attack, Batch, SmoothedPGD, Square
from advfeat.attacks.base import per_sample_eps, prepare_batch
from advfeat.attacks.ensemble import seed_attacks
from advfeat.attacks.misleading import check_gradients, check_size
from advfeat.attacks.pool import attack_batch
from advfeat.attacks.restricted import entered, restricted
from advfeat.attacks.samples import concat_samples, select_samples
from advfeat.attacks.settings import positive_eps
from advfeat.loading import Data, Source
from advfeat.losses import is_success
from advfeat.model import Network, attackable, device_of
from advfeat.progress import Meter, shows_evaluations
from advfeat.results import Result
from advfeat.suggestions import suggests
from advfeat.tables import Table
from advfeat.threat import FeatureBounds, Norm, bounds_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, repr=False)
class Finding(Result):
    """One check: what was measured, and what it means."""

    name: str
    value: float  # what was measured
    limit: float  # above this it is suspicious
    meaning: str
    advice: str

    @property
    def suspicious(self) -> bool:
        """Whether the value is above the limit."""
        return self.value > self.limit

    @property
    def mark(self) -> str:
        """``"WARNING"`` or ``"ok"``."""
        return "WARNING" if self.suspicious else "ok"

    def _summary(self) -> str:
        return f"{self.name}: {self.value:.4g}, limit {self.limit:g}, {self.mark}"

    def _content(self) -> Sequence[str | Table]:
        line = f"{self.mark:8}{self.name}: {self.value:.4g} (limit {self.limit:g}), {self.meaning}"
        return [f"{line}\n        -> {self.advice}" if self.suspicious else line]


@dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """All checks of `diagnose`, by name.

    Attributes
    ----------
    findings
        By the name of the check, also as ``diagnosis[name]``: its ``value``, the ``limit`` above
        which it is ``suspicious``, its ``meaning``, and ``advice``.
    samples
        How many samples were checked, those that the model gets right; None where not known.
    """

    findings: dict[str, Finding]
    samples: int | None = None

    @property
    def suspicious(self) -> tuple[str, ...]:
        """Names of the checks that found something."""
        return tuple(name for name, finding in self.findings.items() if finding.suspicious)

    def __getitem__(self, name: str) -> Finding:
        """The check of this name."""
        return self.findings[name]

    def _summary(self) -> str:
        return f"{len(self.findings)} checks, suspicious: {', '.join(self.suspicious) or 'none'}"

    def __str__(self) -> str:
        """A line for each check."""
        return "\n".join(map(str, self.findings.values()))

    def _content(self) -> Sequence[str | Table]:
        part = [
            (
                f.name,
                "WARNING" if f.suspicious else "ok",
                f"{f.value:.4g}",
                f"{f.limit:g}",
                f.meaning,
            )
            for f in self.findings.values()
        ]
        advice = [f"{name}: {self[name].advice}" for name in self.suspicious]
        return [Table(("check", "result", "value", "limit", "meaning"), part), *advice]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Value of each check as a bar, its limit as a line."""
        ax = plots.new_axes(ax, 6.4, 0.4 * len(self.findings) + 1.2)
        found = self.findings.values()
        plots.limits(ax, {f.name: (f.value, f.limit) for f in found}, xlabel="fraction of samples")
        return ax


@suggests
def diagnose(
    model: nn.Module,
    data: Data,
    *,
    eps: float | Tensor,
    norm: Norm,
    samples: int = 128,
    queries: int = 1000,
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Look for signs of gradient masking, or of a random or non-differentiable defence.

    Such models stop gradient attacks without being robust (Athalye et al. 2018; Carlini et al.
    2019), and a robust accuracy measured on them is too high. Each check is a number with a limit.

    Parameters
    ----------
    model, data, progress
        As in `robust_accuracy`.
    eps, norm, bounds, mask
        Those of the result in question, as in `robust_accuracy`. With a mask, gradients are those
        by the features that may change.
    samples
        Samples evaluated, from the beginning of ``data``, those that are right.
    queries
        Forward passes of the black-box attack, on the samples that gradient attacks leave.
    seed
        Of random numbers; None draws one number from torch's default generator.

    Returns
    -------
    Diagnosis
        ``print`` it; ``diagnosis.suspicious`` are the names of checks that found something, which
        a warning gives too, with what to do.

        ``random_predictions``: fraction of samples whose logits differ between two calls.
        ``zero_gradients``: fraction whose loss has a zero gradient by the input, or NaN.
        ``misleading_gradients``: fraction whose margin has a gradient of zero, or one that does not
        predict how the margin changes when all features move a little at random.
        ``black_box_wins``: fraction that Square fools and APGD, on either loss, does not.
        ``boundary_search_wins``: fraction that FAB fools and APGD does not.
        ``smoothed_gradients_win``: fraction that `advfeat.attacks.SmoothedPGD` fools and APGD
        does not.
        ``more_steps_help``: fraction that APGD fools by 100 steps from 2 starts and not by 25.
        ``large_eps_resists``: accuracy under PGD in a ball that covers the whole valid range, with
        all features free.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> from advfeat.metrics import diagnose
    >>> class Quantised(torch.nn.Module):
    ...     def forward(self, x):
    ...         return torch.round(8 * x) / 8
    >>> data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     diagnosis = diagnose(Quantised(), data, eps=0.6, norm="linf", seed=0)
    >>> "zero_gradients" in diagnosis.suspicious
    True
    """
    positive_eps(eps)
    attack = APGD(eps=eps, norm=norm, bounds=bounds, mask=mask, steps=25)  # checks its settings
    checks.count("samples", samples, low=1)
    checks.count("queries", queries, low=1)
    checks.seed(seed)
    number = seeding.resolve(seed)
    with Meter(progress, "diagnose", _ATTACKS) as meter:
        findings, count = _findings(model, data, attack, samples, queries, number, meter)
    diagnosis = Diagnosis({finding.name: finding for finding in findings}, count)
    if diagnosis.suspicious:
        signs = "\n".join(str(diagnosis[name]) for name in diagnosis.suspicious)
        warnings.warn(f"the model may be less robust than it looks\n{signs}", stacklevel=3)
    return diagnosis


_ATTACKS = 7  # runs of the checks

# Of each check: the limit above which it is suspicious, what was measured, what to do.
_CHECKS: dict[str, tuple[float, str, str]] = {
    "random_predictions": (
        0.0,
        "samples whose logits change between two calls",
        "the model is random: attack its average over many calls (an expectation over "
        "transformations), and report the accuracy of the average; or a "
        "sample's logits depend on the rest of the batch (BatchNorm without running statistics), "
        "and no sample has a result of its own",
    ),
    "zero_gradients": (
        0.01,
        "samples whose cross-entropy has a gradient of zero, or NaN, by the input",
        "gradient attacks cannot move there: replace layers that are not differentiable "
        "by a differentiable stand-in (BPDA); where the logits are huge, attack with "
        "loss='dlr' or 'margin'; in any case with Square",
    ),
    "misleading_gradients": (
        0.05,
        "samples whose gradient does not predict how the output changes nearby",
        "gradient attacks are lost there: attack the model without the layer that is not "
        "differentiable, or has a backward pass of its own, or use AutoAttack(version='strong')",
    ),
    "black_box_wins": (
        0.02,
        "samples that random search fools and gradient attacks do not",
        "gradients are masked: trust the black-box number, or attack the model without "
        "the part that masks them",
    ),
    "boundary_search_wins": (
        0.05,
        "samples that FAB fools and APGD does not",
        "ascending a loss does not lead to the boundary here: use AutoAttack(version='strong')",
    ),
    "smoothed_gradients_win": (
        0.05,
        "samples that smoothed gradients fool and plain ones do not",
        "gradients are masked, for example by dead ReLUs or saturated units: trust "
        "SmoothedPGD's number, or use AutoAttack(version='strong')",
    ),
    "more_steps_help": (
        0.10,
        "samples that 100 steps from 2 starts fool and 25 steps do not",
        "short attacks have not converged: use AutoAttack, or more steps and restarts",
    ),
    "large_eps_resists": (
        0.05,
        "samples that PGD cannot fool though every valid input is allowed",
        "no model can be right there: the attack fails, so it fails at smaller eps too",
    ),
}


def _findings(
    model: nn.Module,
    data: Data,
    attack: APGD,
    samples: int,
    queries: int,
    seed: int,
    meter: Meter,
) -> tuple[list[Finding], int]:
    """What each check found, and on how many samples."""
    ball: dict[str, Any] = {
        name: getattr(attack, name) for name in ("eps", "norm", "bounds", "mask")
    }
    low, high = attack.bounds
    with attackable(model, purpose=None) as net, warnings.catch_warnings():
        # A detached input is what one of the checks is for.
        warnings.filterwarnings("ignore", "the model's output has no gradient")
        batch = _correct_samples(net, model, data, samples, attack.bounds)
        shown: dict[str, str] = {}
        net.on_gradient = net.on_logits = shows_evaluations(meter, shown)

        def fooled(*attacks: Attack, only: Tensor | None = None) -> Tensor:
            """Whether one of the attacks fools each sample; False outside ``only``."""
            chosen = torch.arange(len(batch.ids), device=batch.ids.device)
            chosen = chosen if only is None else chosen[only]
            found = torch.zeros_like(batch.ids, dtype=torch.bool)
            shown["attack"] = type(attacks[0]).__name__
            meter.update(figures=shown)
            if len(chosen):
                part = select_samples(batch, chosen)
                runs = (restricted(a.stop_at_success()) for a in seed_attacks(attacks, seed))
                wins = [attack_batch(attack, net, part).success for attack in runs]
                found[chosen] = torch.stack(wins).any(0)
            return found

        short = fooled(attack)
        long = fooled(APGD(**ball, steps=100, restarts=2))
        gradient = short | long
        gradient |= fooled(APGD(**ball, steps=50, loss="dlr", targets=4), only=~gradient)
        others = {
            "black_box_wins": Square(**ball, queries=queries),
            "boundary_search_wins": FAB(**ball, steps=50),
            "smoothed_gradients_win": SmoothedPGD(**ball, steps=60),
        }
        wins = {name: _fraction(fooled(one, only=~gradient)) for name, one in others.items()}
        # The whole valid range, whatever the norm: a step of l1 would move one entry at a time.
        anywhere = fooled(PGD(eps=high - low, norm="linf", steps=50, bounds=attack.bounds))
        # By the features that may change.
        plain, inside, entered_batch = entered(attack, net, batch)
        values = {
            "random_predictions": _fraction(_changing(net, batch)),
            "zero_gradients": _fraction(_without_gradient(inside, entered_batch)),
            "misleading_gradients": _fraction(_misled(inside, entered_batch, plain)),
            "more_steps_help": _fraction(long & ~short),
            "large_eps_resists": 1 - _fraction(anywhere),
            **wins,
        }
    findings = [Finding(name, values[name], *check) for name, check in _CHECKS.items()]
    return findings, len(batch.ids)


def _correct_samples(
    net: Network, model: nn.Module, data: Data, samples: int, bounds: FeatureBounds
) -> Batch:
    """The first samples of the data, those of them that the model gets right."""
    source, found, seen = Source(data), [], 0
    for part in source.batches(device_of(model)):
        kept = slice(None, samples - seen)
        fields = (part.inputs[kept], part.labels[kept], part.ids[kept])
        entries = {n: v if v is None else v[kept] for n, v in part.entries.items()}
        batch = prepare_batch(net, *fields, bounds, extras=entries)
        with net.given(batch.extras):
            right = is_success(net.logits(batch.inputs), batch.labels, targeted=True)
        found.append(select_samples(batch, right.nonzero().squeeze(1)))
        seen += len(batch.ids)
        if seen >= samples:
            break
    correct: Batch = functools.reduce(concat_samples, found)
    if not len(correct.ids):
        checks.fail("data", f"{seen} samples", "the model is right on none of them")
    return correct


def _without_gradient(net: Network, batch: Batch) -> Tensor:
    objective = losses.objective("cross_entropy", batch.labels, targeted=False)
    with net.given(batch.extras):
        gradient = net.logits_gradient(batch.inputs, objective).gradient
    peak = gradient.flatten(1).abs().amax(1)
    # One entry that is not finite is enough: no attack goes by such a gradient.
    return (peak == 0) | ~peak.isfinite()


def _misled(net: Network, batch: Batch, attack: APGD) -> Tensor:
    size = check_size(per_sample_eps(attack.eps, batch.inputs), attack.norm, batch.inputs)
    bounds = bounds_of(batch.box, attack.bounds)
    with net.given(batch.extras):
        return check_gradients(net, batch.inputs, batch.labels, size, bounds).misled


def _changing(net: Network, batch: Batch) -> Tensor:
    # Each half by itself: an answer that depends on the rest of the batch changes too.
    half = -(-len(batch.ids) // 2)
    second = []
    with net.given(batch.extras):
        first = net.logits(batch.inputs)
        for part in (slice(0, half), slice(half, None)):
            with net.selected(part):
                if len(batch.inputs[part]):
                    second.append(net.logits(batch.inputs[part]))
    finite = first.masked_fill(~first.isfinite(), 0.0)
    size, spread = finite.abs().amax(1), finite.amax(1) - finite.amin(1)
    # Parallel sums differ by rounding; a random model differs by far more.
    rounding = 8 * torch.finfo(net.dtype or first.dtype).eps * size
    return (first - torch.cat(second)).abs().amax(1) > 1e-4 * spread + rounding


def _fraction(flags: Tensor) -> float:
    return flags.float().mean().item()
