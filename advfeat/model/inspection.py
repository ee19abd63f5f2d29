"""Inspect a module once, before an attack or a measurement, and warn of what makes it doubtful.

Each check compares a few samples: two calls on the same samples, the values of the outputs, and
the gradient of the cross-entropy. A healthy module costs two forward passes and one backward pass
of those samples; only where something is suspicious, further passes find out what it is.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from advfeat import checks
from advfeat.model.access import logit_candidates, logits_of
from advfeat.model.formats import at_least_float32
from advfeat.model.state import own_state, random_state_kept, random_states, settings_of
from advfeat.threat import FeatureBounds

Forward: TypeAlias = Callable[[Tensor], object]
Select: TypeAlias = Callable[[Tensor | slice], AbstractContextManager[None]]
FromProbabilities: TypeAlias = Callable[[Tensor], Tensor]

# What a call goes by: input gradients of logits, clean predictions alone, or a layer's activations.
# "training" is that of predictions whose cross-entropy is trained on.
Purpose: TypeAlias = Literal["attack", "predictions", "features", "training"]
# Samples of the first batch that are inspected.
INSPECTED = 32
NO_GRADIENT = (
    "the model's output has no gradient by its input (detached, or computed outside autograd): "
    "gradient attacks cannot move, and robustness measured so means nothing; attack a "
    "differentiable version of the model, or use advfeat.attacks.Square"
)
_IN_ATTACKS = (
    "the losses of attacks expect logits, and a softmax hides gradients. Their logarithm is "
    "attacked here, which is exact where they are not rounded to 0 or 1; return the logits, the "
    "values before the softmax or sigmoid, to be sure"
)
_IN_TRAINING = (
    "the cross-entropy takes the softmax itself, and learns slowly from a second one. Return the "
    "logits, the values before the softmax or sigmoid, or pass loss="
)
# Functions whose values are between 0 and 1, by autograd's name, and those that become so by a
# shift, or by their own limits.
_BETWEEN_0_AND_1 = ("Sigmoid", "Hardsigmoid", "Softmax", "Exp")
_SHIFTED, _LIMITED = ("Tanh",), ("Hardtanh", "Clamp")
# As many functions from the output one of them is looked for, through these: the linear layer of
# a network with sigmoid units returns no probabilities.
_NEAR_THE_OUTPUT = 5
_PASSED = (
    *("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Mean", "Sum", "Stack", "Cat", "ToCopy", "Clone"),
    *("View", "Reshape", "Unsafe", "Squeeze", "Unsqueeze", "Slice", "Select", "Permute", "Alias"),
    *("Transpose", "TBackward", "Expand", "Unbind", "Split", "Index"),
)
# Fraction of the samples from which on a gradient of zero, or a lost margin, is worth a warning.
_FRACTION = 0.1
# Fraction of the bounds that data must use.
_SLIVER = 0.02
_LARGEST_PIXELS = (127, 127.5, 128, 255)
# Modules of which a single-batch call found nothing, with their structure and settings then.
_healthy: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()


class _Outputs(NamedTuple):
    """One forward pass on the inspected samples."""

    inputs: Tensor  # (n, ...) leaf
    raw: object  # as the module returned it
    logits: Tensor  # (n, C) at least float32, with its graph
    dtype: torch.dtype  # of the logits as returned


def inspect_module(
    forward: Forward,
    module: nn.Module,
    inputs: Tensor,
    bounds: FeatureBounds,
    *,
    purpose: Purpose,
    train: bool,
    select: Select,
    extras: tuple[str, ...] = (),
) -> FromProbabilities | None:
    """Warn of what is doubtful; return how to turn outputs into logits, None where they are."""
    part = inputs[:INSPECTED]
    if purpose != "predictions":
        _warn_of_unused_bounds(inputs, bounds)
    shape = (part.shape[1:], part.dtype, len(part) > 1, extras)
    settings = (purpose, train, shape, settings_of(module))
    if _healthy.get(module) == settings:
        return None
    with checks.warnings_counted() as count, random_state_kept(part.device):
        before = random_states(part.device), own_state(module)
        try:
            with select(slice(0, INSPECTED)):
                outputs = _outputs(forward, part)
        except Exception:
            if len(part) == len(inputs):
                raise
            outputs = _outputs(forward, inputs)  # of a fixed batch size
        if outputs is None:
            # A single sample may be padded by the call that follows, which raises the error else.
            if purpose == "features" or len(inputs) == 1:
                return None
            checks.logits(logits_of(forward(inputs)), inputs)
            return None
        varies = (random_states(part.device), own_state(module)) != before
        with select(slice(0, len(outputs.inputs))):
            if not train:
                _warn_of_changing_outputs(forward, module, outputs, varies, select)
            if purpose != "features":
                _warn_of_several_outputs(outputs)
                _warn_of_nan(outputs)
            from_probabilities = None
            if purpose == "training":
                _find_probabilities(forward, outputs, _IN_TRAINING)
            if purpose == "attack":
                from_probabilities = _find_probabilities(forward, outputs, _IN_ATTACKS)
                if from_probabilities is not None:
                    outputs = outputs._replace(logits=from_probabilities(outputs.logits))
                _warn_of_rounded_margins(outputs)
                _warn_of_bad_gradients(outputs)
    if not count():
        _healthy[module] = settings
    return from_probabilities


def _outputs(forward: Forward, inputs: Tensor) -> _Outputs | None:
    """None where the module returns no logits."""
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        raw = forward(leaf)
        try:
            logits = checks.logits(logits_of(raw), inputs)
        except (TypeError, ValueError):
            return None
        return _Outputs(leaf, raw, at_least_float32(logits), logits.dtype)


def _warn_of_unused_bounds(inputs: Tensor, bounds: FeatureBounds) -> None:
    smallest, largest = bounds
    if isinstance(smallest, torch.Tensor) or isinstance(largest, torch.Tensor):
        return  # by feature: chosen for these data
    # Bounds such as (-100, 100) are a way to say that there are none.
    if smallest < 0 and largest not in _LARGEST_PIXELS:
        return
    low, high = torch.stack(inputs.aminmax()).tolist()
    used = (high - low) / (largest - smallest)
    if 0 < used < _SLIVER:
        checks.warn(
            f"the inputs lie in [{low:.4g}, {high:.4g}], {100 * used:.2g}% of bounds={bounds}: "
            "eps may be in units of other data than these; pass the bounds of the data as the "
            "model takes them, such as (0.0, 1.0), and eps in the same units, such as 8/255",
            topic="bounds",
        )


def _warn_of_several_outputs(outputs: _Outputs) -> None:
    candidates = logit_candidates(outputs.raw, len(outputs.inputs))
    if len(candidates) > 1:
        shapes = " and ".join(str(("N", *shape[1:])).replace("'", "") for shape in candidates)
        checks.warn(
            f"the model returns several tensors that could be logits, of shapes {shapes}; the "
            "first is used. If that is not the logits, wrap the model so that it returns them "
            "alone, or first",
            topic="several outputs",
        )


def _warn_of_nan(outputs: _Outputs) -> None:
    count = int(outputs.logits.detach().isnan().any(1).sum())
    if count:
        checks.warn(
            f"the model returns NaN among the logits of {count} of {len(outputs.logits)} samples, "
            "which count as wrong: look for a division, logarithm or square root, or weights that "
            "diverged in training",
            topic="NaN",
        )


def _warn_of_changing_outputs(
    forward: Forward, module: nn.Module, outputs: _Outputs, varies: bool, select: Select
) -> None:
    """Compare with a call in which the second half of the samples is exchanged for the first.

    ``varies`` says that a call drew random numbers, or left something of the module changed.
    """
    inputs, count = outputs.inputs.detach(), len(outputs.inputs)
    half = -(-count // 2)
    exchanged = torch.cat([inputs[:half], inputs[:half]])[:count]
    same = torch.arange(count, device=inputs.device) % half
    tolerance = _rounding(module, outputs)

    def differ(given: Tensor, samples: Tensor) -> bool:
        with torch.no_grad(), select(samples):
            again = at_least_float32(checks.logits(logits_of(forward(given)), given))
        first = outputs.logits.detach()[samples]
        gap = (again - first).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().amax(1)
        return bool((gap > tolerance[samples]).any())

    every = torch.arange(count, device=inputs.device)
    changed = differ(exchanged, same)
    is_random = (changed and varies) or any(
        # More than one call: a model may alternate, or be random in some calls.
        differ(inputs, every)
        for _ in range(16 if varies else 2 * changed)
    )
    if is_random:
        checks.warn(
            "the model is random: two calls on the same inputs differ (noise, random crops, "
            "dropout that is on in evaluation mode, or a state that calls change). An attack then "
            "keeps the worst of many draws; use expectation=k to attack and judge the average of k "
            "calls, or switch the randomness off",
            topic="random",
        )
    elif changed:
        checks.warn(
            "the model's output for a sample depends on the other samples of the batch (BatchNorm "
            "without running statistics, or another statistic over the batch): no sample has a "
            "result of its own, and results change with batch_size; use fixed statistics in "
            "evaluation mode",
            topic="depends on the batch",
        )


def _rounding(module: nn.Module, outputs: _Outputs) -> Tensor:
    """By how much equal logits of each sample may differ, ``(n,)``."""
    finite = outputs.logits.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    types = {t.dtype for t in itertools.chain(module.parameters(), module.buffers())}
    types = {t for t in types if t.is_floating_point} | {outputs.dtype}
    eps = max(torch.finfo(t).eps for t in types if t.itemsize > 1)
    return 1e-4 * (finite.amax(1) - finite.amin(1)) + 8 * eps * finite.abs().amax(1)


def _find_probabilities(
    forward: Forward, outputs: _Outputs, advice: str
) -> FromProbabilities | None:
    """Warn of outputs that are probabilities, and return what makes logits of them."""
    if not _are_distributions(outputs.logits, outputs):
        found = _to_logit if _are_single_probabilities(outputs) else None
        kind = "each in [0, 1], from a sigmoid or clamp"
    else:
        # One-hot inputs of a linear model add up too, but not when they are scaled.
        scaled = _outputs(forward, 0.7 * outputs.inputs.detach())
        same = scaled is not None and _are_distributions(
            torch.cat([scaled.logits, outputs.logits]), outputs
        )
        found = _to_log if same else None
        kind = "not negative, with a constant sum"
    if found is not None:
        checks.warn(
            f"the model returns probabilities ({kind}), not logits: {advice}",
            topic="probabilities",
        )
    return found


def _are_distributions(values: Tensor, outputs: _Outputs) -> bool:
    values = values.detach()
    total = values.sum(1)
    tolerance = max(1e-4, 4 * torch.finfo(outputs.dtype).eps)
    mean = total.mean()
    level = bool(((total - mean).abs() <= tolerance * mean).all())
    # A constant model adds up too, whatever its outputs are.
    varies = bool((values - values[:1]).abs().amax() > 10 * tolerance * mean)
    return (
        level
        and bool((values >= 0).all())
        and bool(mean > 0)
        and (varies or _ends_between_0_and_1(outputs.logits.grad_fn))
    )


def _are_single_probabilities(outputs: _Outputs) -> bool:
    values = outputs.logits.detach()
    inside = bool(((values >= 0) & (values <= 1)).all())
    return inside and _ends_between_0_and_1(outputs.logits.grad_fn)


def _ends_between_0_and_1(node: Any) -> bool:
    """Whether the last functions of a model leave values between 0 and 1, whatever comes in."""
    shifted = False
    for _ in range(_NEAR_THE_OUTPUT):
        if node is None:
            return False
        name = node.name()
        if name.startswith(_BETWEEN_0_AND_1):
            return True
        if name.startswith(_SHIFTED):
            return shifted
        if name.startswith(_LIMITED):
            limits = [
                getattr(node, f"_saved_{end}", getattr(node, f"_saved_{end}_val", None))
                for end in ("min", "max")
            ]
            return shifted or limits == [0, 1]
        if not name.startswith(_PASSED):
            return False
        shifted |= name.startswith(("Add", "Sub", "Rsub"))
        node = next((n for n, _ in node.next_functions if n is not None), None)
    return False


def _to_log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def _to_logit(probabilities: Tensor) -> Tensor:
    return torch.logit(probabilities, eps=torch.finfo(probabilities.dtype).eps)


def _warn_of_rounded_margins(outputs: _Outputs) -> None:
    logits = outputs.logits.detach()
    top = logits.topk(2, dim=1).values
    exact = outputs.dtype in (torch.float32, torch.float64)
    # In float32 some dozen roundings pile up; lower precisions lie closer to their logits anyway.
    roundings, fraction = (64, _FRACTION) if exact else (1, 0.5)
    unit = roundings * torch.finfo(outputs.dtype).eps * top.abs().amax(1)
    lost = top.isfinite().all(1) & (top[:, 0] - top[:, 1] < unit)
    if float(lost.float().mean()) > fraction:
        checks.warn(
            f"the logits are near {top.mean().item():.3g}, and on {int(lost.sum())} of {len(lost)} "
            "samples the two largest differ by little more than their rounding: predictions and "
            "gradients there are noise; leave out the common offset of the logits, or compute "
            "them in float64 (model.double(), inputs.double())",
            topic="rounded margins",
        )


def _warn_of_bad_gradients(outputs: _Outputs) -> None:
    """Evaluate the gradient of the margin to the likeliest other class, which does not saturate."""
    logits = outputs.logits
    if not logits.requires_grad:
        return  # warned of at the first gradient step
    usable = ~logits.detach().isnan().any(1)
    with torch.enable_grad():
        ranked = logits.detach().topk(2, dim=1).indices
        pair = logits.gather(1, ranked)
        found: Any
        try:
            found = torch.autograd.grad(
                (pair[:, 1] - pair[:, 0]).sum(), outputs.inputs, allow_unused=True
            )[0]
        except RuntimeError:  # the real backward pass raises it too
            return
    if found is None:
        return
    flat = found.flatten(1)
    bad = ~flat.isfinite() & usable[:, None]
    count, total = int(bad.any(1).sum()), len(flat)
    if count:
        lost = int((flat.isnan().all(1) & usable).sum())
        checks.warn(
            f"the gradient has NaN or infinite entries on {count} of {total} samples"
            + (f", and is NaN throughout on {lost}" if lost else "")
            + ": NaN entries are not moved, infinite ones move like the largest, so robustness "
            "may be overestimated; look for a square root, a norm, a division or a logarithm at 0",
            topic="non-finite gradient",
        )
    zero = (flat == 0).all(1) & usable
    if int(zero.sum()) > _FRACTION * total:
        checks.warn(
            f"the gradient is exactly zero on {int(zero.sum())} of {total} samples: gradient "
            "attacks cannot move there, and robustness is overestimated (masked gradients). "
            "Attack without gradients (advfeat.attacks.Square, or AutoAttack with "
            "version='standard'), or replace layers that are not differentiable",
            topic="zero gradient",
        )
