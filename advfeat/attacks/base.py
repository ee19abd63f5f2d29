"""What every attack is: frozen settings, and ``init`` and ``step`` over a batch-first state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from advfeat import checks, losses, threat
from advfeat.attacks.pool import attack_batch
from advfeat.attacks.restricted import is_by_feature, restricted
from advfeat.attacks.samples import Batch, check_samples
from advfeat.attacks.tracing import OnStep, run_traced
from advfeat.losses import is_success
from advfeat.model import Network, Precision, attackable
from advfeat.threat import FeatureBounds, Norm

# A rise by less than this fraction of the objective is none: fixed steps around an optimum find
# slightly better values for ever.
_RISE = 1e-3


def track_patience(state: Any, stepped: Any, value: Tensor, finished: Tensor) -> Any:
    """Count each sample's steps without a rise of its objective; finished samples stay put.

    The states before and after the step have ``value_max``, the objective that counts as the
    largest so far, and ``waited``, the steps since it rose; ``value`` is the objective before the
    step.
    """
    value = value.to(state.value_max.dtype)
    # Not "greater": the first value_max is minus infinity, and an objective of NaN stops no sample.
    rose = ~finished & ~(value <= state.value_max + _RISE * state.value_max.abs())
    keeps = threat.per_sample(finished, state.current)
    return stepped._replace(
        current=torch.where(keeps, state.current, stepped.current),
        step=torch.where(finished, state.step, stepped.step),
        value_max=torch.where(rose, value, state.value_max),
        waited=torch.where(rose, 0, state.waited + 1),
    )


class Attack(ABC):
    """Base of all attacks; a subclass is a frozen dataclass of its settings.

    The state is a NamedTuple of tensors whose first axis is the sample, so samples can be
    dropped, gathered and refilled by `advfeat.attacks.pool`; nothing else passes from one step to
    the next, and no sample depends on another. An attack that `advfeat.robust_accuracy` can use
    has these fields in its state: ``inputs`` (clean), ``labels``, ``success`` (bool, whether
    ``result`` fools the model) and ``value`` (its own objective there).
    """

    bounds: FeatureBounds
    targeted: bool
    starts_at_result: ClassVar[bool] = False  # in an ensemble, where the attack before it ended

    @abstractmethod
    def init(self, net: Network, batch: Batch) -> Any:
        """State of a batch before its first step."""

    @abstractmethod
    def step(self, net: Network, state: Any) -> Any:
        """Advance every sample by one evaluation of the model; finished ones need not stay put."""

    @property
    @abstractmethod
    def max_evaluations(self) -> int:
        """Steps after which every sample is finished, whatever the model."""

    @abstractmethod
    def finished(self, state: Any) -> Tensor:
        """Samples for which another step changes nothing, bool ``(N,)``."""

    @abstractmethod
    def result(self, state: Any) -> Tensor:
        """The iterate to return, ``(N, ...)``."""

    @property
    def is_fixed_length(self) -> bool:
        """Whether every sample of a batch takes the same number of evaluations."""
        return False

    def evaluations(self, state: Any) -> int:
        """Steps after which every sample of this state is finished."""
        return self.max_evaluations

    def run(self, net: Network, state: Any) -> Any:
        """Take all steps of samples that are at their beginning, without checking who is done."""
        for _ in range(self.evaluations(state)):
            state = self.step(net, state)
        return state

    @property
    def is_random(self) -> bool:
        """Whether the result depends on the seed."""
        return "seed" in {field.name for field in fields(self)}  # type: ignore[arg-type]

    def stop_at_success(self) -> Self:
        """The same attack for evaluation: a sample is finished once it fools the model."""
        return self

    def with_seed(self, seed: int) -> Self:
        """The same attack with this seed, if it draws random numbers at all."""
        return replace(self, seed=seed) if self.is_random else self  # type: ignore[type-var]

    @checks.warns_once()
    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        index: Tensor | None = None,
        precision: Precision = "float32",
        train: bool = False,
        expectation: int = 1,
        extras: Mapping[str, Tensor] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Attack one batch; see `advfeat.attacks.pgd` for the arguments.

        ``expectation=k`` attacks the mean of k calls of a random model (EOT, Athalye et al. 2018),
        at k times the cost. ``on_step`` is called after every gradient step with an
        `advfeat.attacks.AttackStep`: step, loss, gradient norm, success and distance of all
        samples. `advfeat.plots.attack_steps` draws a list of them.

        Returns
        -------
        Tensor
            Shape of ``inputs``, float32 (float64 for float64 inputs), detached.
        """
        if not (on_step is None or callable(on_step)):
            raise TypeError(f"on_step={on_step!r}: expected a function of an AttackStep")
        settings: dict[str, Any] = {"precision": precision, "train": train}
        with attackable(model, expectation=expectation, **settings) as net:
            net.expect_extras(extras)
            batch = prepare_batch(net, inputs, labels, index, self.bounds, self.targeted, extras)
            attack = restricted(self, batch.inputs)
            if on_step is None:
                state = attack_batch(attack, net, batch)
            else:
                norm: Norm = getattr(self, "norm", "l2")
                state = run_traced(attack, net, batch, norm, self.targeted, on_step)
            adversarial: Tensor = attack.result(state)
            _warn_of_unmoved(self, net, batch, adversarial)
        return adversarial.contiguous()


def _warn_of_unmoved(attack: Any, net: Network, batch: Batch, adversarial: Tensor) -> None:
    """Warn where the clean input is returned though the model is right on it."""
    eps = getattr(attack, "eps", None)
    same = is_unmoved(adversarial, batch.inputs)
    if not (eps is None or is_by_feature(eps, batch.inputs)):
        same &= per_sample_eps(eps, batch.inputs) > 0
    if not bool(same.any()):
        return
    # Of the whole batch, for a random model's numbers belong to places in it.
    with net.given(batch.extras):
        logits = net.logits(adversarial)
    count = int((same & ~is_success(logits, batch.labels, attack.targeted)).sum())
    if count:
        warn_of_unmoved(count, len(same))


def is_unmoved(adversarial: Tensor, inputs: Tensor) -> Tensor:
    """Samples whose adversarial input is the clean one, bool ``(N,)``."""
    return (adversarial == inputs).flatten(1).all(1)


def warn_of_unmoved(count: int, total: int) -> None:
    """Warn of samples that gradient attacks left where they were."""
    checks.warn(
        f"{count} of {total} samples were left as they were: their gradient was zero or NaN at "
        "every step, so the attack says nothing about them; use an attack without gradients "
        "(advfeat.attacks.Square), or replace layers that are not differentiable",
        topic="zero gradient",  # given once: the inspection may have found the cause
    )


def prepare_batch(
    net: Network,
    inputs: Tensor,
    labels: Tensor,
    index: Tensor | None,
    bounds: FeatureBounds,
    targeted: bool = False,
    extras: Mapping[str, Any] | None = None,
) -> Batch:
    """Check the input, clip rounding off the bounds, and number the samples if nobody did."""
    name = "labels (targets)" if targeted else "labels"
    if index is None:
        checks.inputs(inputs, bounds)
        checks.same_device(inputs, net.device)
        checks.labels(labels, inputs)
        index = torch.arange(inputs.shape[0], device=inputs.device)
    else:
        check_samples(inputs, labels, index, bounds, net.classes, name)
        checks.same_device(inputs, net.device)
        checks.index(index, inputs)
        if net.classes is None:  # for the first batch the model tells it later
            name += f"[{int(index[labels.argmax()])}]"
    net.expect(labels, name)
    # Copied, for labels made in inference mode could not enter a gradient.
    labels = labels.to(torch.int64, copy=True)
    prepared = threat.clip(net.prepare(inputs), bounds, inplace=True)
    named = net.choose_extras(extras, prepared)
    with net.given(named):
        net.inspect(prepared, bounds)
    return Batch(prepared, labels, index, extras=named)


def per_sample_eps(eps: float | Tensor, inputs: Tensor) -> Tensor:
    """One radius for each sample, ``(N,)``."""
    count = inputs.shape[0]
    found = torch.as_tensor(eps, dtype=inputs.dtype, device=inputs.device)
    if found.ndim > 1 and found.numel() == count:
        found = found.flatten()
    if found.ndim > 1 or (found.ndim and found.shape[0] != count):
        cause = (
            f"expected a float, ({count},) for each sample, or for each feature a tensor that "
            f"broadcasts against one sample, {tuple(inputs.shape[1:])}: (1, ...) is never taken "
            "for samples"
        )
        checks.fail("eps.shape", tuple(found.shape), cause)
    return found.expand(count)


def random_points(
    state: Any, eps: Tensor, norm: Norm, bounds: FeatureBounds, uniform: Tensor
) -> Tensor:
    """Points of the balls around a state's inputs, in the bounds, by uniform numbers."""
    inputs = state.inputs
    free = threat.free_of(state.box)
    free = None if free is None else free.flatten(1)
    delta = threat.point_in_ball(uniform, eps, norm, free).view(inputs.shape)
    return threat.project(inputs + delta, inputs, eps, norm, threat.bounds_of(state.box, bounds))


def check_attack(attack: object, eps: object, norm: object, allow_targeted: bool = False) -> None:
    """Check that an attack can evaluate a dataset, and that no second ball is given."""
    if not isinstance(attack, Attack) or not hasattr(attack, "eps"):
        name = getattr(attack, "__name__", "")
        hint = f"; write {name}(...)" if isinstance(attack, type) else ""
        raise TypeError(f"attack={attack!r}: expected an attack such as advfeat.PGD(...){hint}")
    if eps is not None or norm is not None:
        checks.fail("eps, norm", (eps, norm), "the attack has its own; pass one or the other")
    if attack.targeted and not allow_targeted:
        checks.fail("attack", attack, "targeted, but the data give labels and no targets")
    if attack.eps is None:
        checks.fail("attack.eps", None, "it looks for the smallest perturbation; give it an eps")


def can_move(attack: object) -> bool:
    """Whether the radius is above 0 for some feature."""
    eps = getattr(attack, "eps", None)
    return bool((eps > 0).any()) if isinstance(eps, Tensor) else eps != 0


def checked_objective(
    loss: losses.LossName | losses.Objective, labels: Tensor, targeted: bool
) -> Callable[[Tensor], Tensor]:
    """What an attack maximises, as a function of the logits; a user's loss is checked."""
    objective = losses.objective(loss, labels, targeted)
    return lambda logits: checks.objective(objective(logits), logits)


def verified_logits(
    net: Network, candidate: Tensor, labels: Tensor, targeted: bool, counts: Tensor | None = None
) -> Tensor:
    """Logits, computed in low precision where that was asked for and nothing is claimed.

    ``counts`` are the samples whose success would be claimed, bool ``(N,)``; by default all.
    """
    logits = net.logits(candidate, low_precision=True)
    if net.low_precision:
        claimed = is_success(logits, labels, targeted)
        places = (claimed if counts is None else claimed & counts).nonzero().squeeze(1)
        if len(places):
            with net.selected(places):
                logits = logits.index_copy(0, places, net.logits(candidate[places]))
    return logits
