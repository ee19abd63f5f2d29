"""Projected gradient descent (Madry et al. 2018) and its one-step form, FGSM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from advfeat import checks, seeding, threat
from advfeat.attacks._l1_step import ascend_l1
from advfeat.attacks.base import (
    Attack,
    checked_objective,
    per_sample_eps,
    random_points,
    track_patience,
)
from advfeat.attacks.restricted import check_not_restricted
from advfeat.attacks.samples import Batch
from advfeat.attacks.settings import canonical
from advfeat.losses import LossName, Objective, is_success
from advfeat.model import Evaluation, Network, Precision
from advfeat.suggestions import suggests
from advfeat.threat import FeatureBounds, Norm

Returns: TypeAlias = Literal["last", "best", "first"]


class PGDState(NamedTuple):
    """State of PGD; ``x_best`` is empty, ``(N, 0)``, where only the last iterate counts."""

    inputs: Tensor  # (N, ...) clean
    labels: Tensor  # (N,) int64
    eps: Tensor  # (N,)
    step_size: Tensor  # (N,)
    low: Tensor  # (N, ...) threat.limits_of the inputs
    high: Tensor  # (N, ...)
    keys: Tensor  # (N,) int64, random keys
    step: Tensor  # (N,) int64, steps taken, in all restarts
    current: Tensor  # (N, ...)
    velocity: Tensor  # (N, ...), or (N, 0) without momentum
    value_max: Tensor  # (N,) objective that counts as the largest so far, for patience
    waited: Tensor  # (N,) int64, steps since it rose
    x_best: Tensor  # (N, ...), the best iterate so far
    value: Tensor  # (N,) objective there
    success: Tensor  # (N,) bool, whether it fools the model
    box: Tensor  # (N, 2, ...) bounds of each sample, or (N, 0) where they are the attack's


@suggests
@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent as a value: settings that can be passed around and compared.

    See `pgd` for the meaning of each setting. Call it on a batch, or give it to
    `advfeat.robust_accuracy` and `advfeat.adversarial_fit`.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(4, 3)
    >>> attack = PGD(eps=0.1, norm="l2", steps=5)
    >>> attack(model, torch.rand(2, 4), torch.tensor([0, 2])).shape
    torch.Size([2, 4])
    """

    eps: float | Tensor
    norm: Norm
    steps: int = 10
    step_size: float | None = None
    targeted: bool = False
    random_start: bool = False
    restarts: int = 1
    momentum: float = 0.0
    patience: int | None = None
    loss: LossName | Objective = "cross_entropy"
    returns: Returns = "last"
    bounds: FeatureBounds = (0.0, 1.0)
    mask: Tensor | None = None
    seed: int | torch.Generator | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        canonical(self)
        checks.count("steps", self.steps, low=1)
        if self.step_size is not None:
            checks.number("step_size", self.step_size, low=0.0, strict=True)
        checks.count("restarts", self.restarts, low=1)
        checks.number("momentum", self.momentum, low=0.0)
        if self.patience is not None:
            checks.count("patience", self.patience, low=1)
            if self.restarts > 1:
                checks.fail(
                    "patience", self.patience, "a sample that stops would miss its restarts"
                )
        checks.loss(self.loss)
        checks.one_of("returns", self.returns, ("last", "best", "first"))
        checks.seed(self.seed)

    def init(self, net: Network, batch: Batch) -> PGDState:
        """Put every sample at its start: the clean input, or a random point of the ball."""
        check_not_restricted(self, batch)
        inputs, labels = batch.inputs, batch.labels
        count = inputs.shape[0]
        random = self.random_start or self.restarts > 1
        keys = batch.ids
        if self.is_random:
            keys = seeding.keys(seeding.resolve(self.seed), batch.ids)
        eps = per_sample_eps(self.eps, inputs)
        size = eps * self._default_step
        bounds = threat.bounds_of(batch.box, self.bounds)
        low, high = threat.limits_of(inputs, eps, self.norm, bounds)
        state = PGDState(
            inputs=inputs,
            labels=labels,
            eps=eps,
            step_size=size if self.step_size is None else torch.full_like(eps, self.step_size),
            low=low,
            high=high,
            keys=keys,
            step=torch.zeros_like(labels),
            current=inputs if batch.start is None else batch.start,
            velocity=torch.zeros_like(inputs) if self.momentum else inputs.new_empty(count, 0),
            value_max=inputs.new_full((count,), -torch.inf),
            waited=torch.zeros_like(labels),
            x_best=inputs if self._keeps else inputs.new_empty(count, 0),
            value=inputs.new_full((count,), -torch.inf),
            success=torch.zeros_like(labels, dtype=torch.bool),
            box=batch.state_box,
        )
        return state._replace(current=self._random_starts(state)) if random else state

    def step(self, net: Network, state: PGDState) -> PGDState:
        """Move every sample by one gradient step; at the end of a restart, begin the next."""
        evaluation = self._evaluate(net, state)
        if self._keeps:
            state = self._keep(state, evaluation)
        stepped = self._moved(state, evaluation.gradient)
        if self.patience is not None:
            stepped = track_patience(state, stepped, evaluation.value, self.finished(state))
        return self._restarted(stepped) if self.restarts > 1 else stepped

    def run(self, net: Network, state: PGDState) -> PGDState:
        """Take all steps, and evaluate the last iterate too where the best one is returned."""
        for _ in range(self.restarts * self._round - 1):
            state = self.step(net, state)
        return self._settled(net, state) if self._keeps else state

    @property
    def is_random(self) -> bool:
        """Whether a start is random."""
        return self.random_start or self.restarts > 1

    def stop_at_success(self) -> Self:
        """The same attack, which returns the first success."""
        return replace(self, returns="first")

    @property
    def is_fixed_length(self) -> bool:
        """Whether no sample stops early, at a success or for want of patience."""
        return self.returns != "first" and self.patience is None

    def finished(self, state: PGDState) -> Tensor:
        """Samples whose steps or patience are spent, or whose first success is returned."""
        spent = state.step >= self.max_evaluations
        if self.patience is not None:
            spent |= state.waited >= self.patience
        return spent | state.success if self.returns == "first" else spent

    def result(self, state: PGDState) -> Tensor:
        """The last iterate, or the one that was kept."""
        return state.x_best if self._keeps else state.current

    @property
    def _default_step(self) -> float:
        """Length of a step as a fraction of the radius."""
        return min(1.0, 2.5 / self.steps)

    @property
    def _keeps(self) -> bool:
        return self.returns != "last" or self.restarts > 1

    @property
    def _round(self) -> int:
        """Evaluations of a restart: one before each step and one of the last iterate."""
        return self.steps + 1

    @property
    def max_evaluations(self) -> int:
        """All steps of all restarts; where an iterate is kept, the last one is evaluated too."""
        return self.restarts * self._round if self._keeps else self.steps

    def _evaluate(self, net: Network, state: PGDState) -> Evaluation:
        return net.logits_gradient(state.current, self._objective(state))

    def _objective(self, state: PGDState) -> Callable[[Tensor], Tensor]:
        return checked_objective(self.loss, state.labels, self.targeted)

    def _settled(self, net: Network, state: PGDState) -> PGDState:
        logits = net.logits(state.current)
        value = self._objective(state)(logits)
        return self._keep(state, Evaluation(state.current, value, logits))

    def _keep(self, state: PGDState, found: Evaluation) -> PGDState:
        """Keep the current iterate of each sample where it is better than the one kept so far."""
        hits = is_success(found.output, state.labels, self.targeted)
        # Not "greater": an objective of NaN must not leave the clean input in place.
        better = ~(found.value <= state.value)
        phase = state.step % self._round
        if self.returns == "last":
            better &= phase == self.steps
        else:
            better.logical_and_(phase)
        if self.returns == "first":
            better = ~state.success & (hits | better)
        return state._replace(
            x_best=threat.choose(better, state.current, state.x_best),
            value=torch.where(better, found.value.to(state.value.dtype), state.value),
            success=torch.where(better, hits, state.success),
        )

    def _moved(self, state: PGDState, gradient: Tensor) -> PGDState:
        velocity = state.velocity
        if self.momentum:
            # Accumulated at unit l1 size, as in MI-FGSM (Dong et al. 2018).
            length = threat.size(gradient, "l1").clamp_min(torch.finfo(gradient.dtype).tiny)
            unit = gradient / threat.per_sample(length, gradient)
            # A gradient that is not finite counts for nothing, and is not remembered.
            unit.masked_fill_(~threat.per_sample(torch.isfinite(length), unit), 0.0)
            velocity = gradient = self.momentum * velocity + unit
        size = threat.per_sample(state.step_size, state.current)
        bounds = threat.bounds_of(state.box, self.bounds)
        if self.norm == "l1":
            moved = ascend_l1(state.current, gradient, state.step_size, bounds)
        elif self.norm == "l2":
            moved = threat.ascend_l2(state.current, gradient, size)
        else:
            moved = torch.addcmul(state.current, gradient.sign(), size)
        limits = state.low, state.high
        own = self.norm == "linf"  # in l2 a point in the ball is to stay as it is
        moved = threat.project(
            moved,
            state.inputs,
            state.eps,
            self.norm,
            bounds,
            limits,
            inplace=own,
        )
        return state._replace(current=moved, velocity=velocity, step=state.step + 1)

    def _restarted(self, state: PGDState) -> PGDState:
        due = state.step % self._round == 0
        # On an accelerator this is the one value that a step reads back.
        if threat.known_none(due) or not bool(due.any()):
            return state
        current = threat.choose(due, self._random_starts(state), state.current)
        velocity = state.velocity * threat.per_sample(~due, state.velocity)
        return state._replace(current=current, velocity=velocity)

    def _random_starts(self, state: PGDState) -> Tensor:
        numbers = seeding.uniform(
            state.keys, state.step // self._round, state.inputs[0].numel() + 1
        )
        return random_points(state, state.eps, self.norm, self.bounds, numbers)


@suggests
@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """The fast gradient sign method (Goodfellow et al. 2015): one step of PGD; see `fgsm`.

    Examples
    --------
    >>> FGSM(eps=0.1, norm="linf").steps
    1
    """

    steps: int = field(default=1, init=False)


@suggests
def pgd(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm,
    steps: int = 10,
    step_size: float | None = None,
    targeted: bool = False,
    random_start: bool = False,
    restarts: int = 1,
    momentum: float = 0.0,
    patience: int | None = None,
    loss: LossName | Objective = "cross_entropy",
    returns: Returns = "last",
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    precision: Precision = "float32",
    expectation: int = 1,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Attack one batch by projected gradient descent (Madry et al. 2018).

    The model is evaluated in eval mode: without dropout, and with BatchNorm's running statistics.
    Its flags, gradients and buffers do not change.

    Parameters
    ----------
    model
        Any module that returns class logits ``(N, C)``: a tensor, the first item of a tuple, the
        entry ``"logits"`` of a dict, or an attribute ``.logits``.
    inputs
        Floating point, ``(N, ...)`` of any rank from 2, within ``bounds``.
    labels
        Class indices ``(N,)``: true labels, or the targets when ``targeted``.
    eps
        Radius of the ball in the units of ``inputs`` (so 8/255, not 8): a float; one for each
        sample, ``(N,)`` or ``(N, 1, ...)``; or a radius for each feature or channel, a tensor that
        broadcasts against one sample (``(1, d)``, ``(C, 1, 1)``). The ball is then that of
        ``||delta / eps||_p <= 1``: in linf ``|delta_i| <= eps_i``, in l2 and l1 an ellipsoid and a
        weighted cross-polytope. A feature of radius 0 is fixed, and ``step_size`` is in multiples
        of ``eps``.
    norm
        ``"l1"``, ``"l2"`` or ``"linf"``.
    steps
        Number of gradients for each restart.
    step_size
        Length of a step in ``norm``. Default ``2.5 * eps / steps`` (Madry et al. 2018), at most
        ``eps``; the paper's own runs use ``eps / 5``.
    targeted
        Whether ``labels`` are the classes to reach.
    random_start
        Start at a uniform random point of the ball, not at the input. With several restarts this
        is always so.
    restarts
        Number of runs from different random starts; the result with the largest objective is
        returned.
    momentum
        Decay of accumulated gradients (MI-FGSM, Dong et al. 2018); 0 is plain PGD.
    patience
        Stop a sample when its objective has not increased by a thousandth of itself in this many
        steps. By default every sample takes all steps. Not with restarts.
    loss
        ``"cross_entropy"``, ``"margin"``, ``"dlr"``, or a callable of logits and labels that
        returns one value for each sample that grows as the model is more wrong about the labels;
        with ``targeted`` its negative is climbed, as for the named losses.
    returns
        ``"last"``: the iterate after the last step, as in the paper. ``"best"``: the one with the
        largest objective. ``"first"``: the first misclassified one; if there is none, the best.
        A failed attack returns a perturbed input too.
    bounds
        Lowest and highest valid input, ``(low, high)``, for every result: numbers, or tensors that
        broadcast against one sample.
    mask
        Features that may change, None for all: a bool (or 0-1) tensor that broadcasts against one
        sample, or one for each sample, ``(N, ...)``. In a call with ``index``, and for a dataset,
        ``mask[i]`` is that of sample number ``i``.
    seed
        An integer, a generator, or None for one draw from torch's default generator (only where
        a start is random).
    precision
        ``"bfloat16"`` takes the gradients in bfloat16 where the hardware has it.
    expectation
        For random models: use the mean logits of this many calls (EOT, Athalye et al. 2018), always
        with the same random numbers. The cost grows by the same factor.
    extras
        Further arguments of the model's ``forward`` by name, each of shape ``(N, ...)``, such as
        ``{"attention_mask": mask}``. Entry ``i`` belongs to sample ``i``.

    Returns
    -------
    Tensor
        Adversarial inputs, the shape of ``inputs``, float32 (float64 for float64 inputs), within
        ball and bounds to 1e-6.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause, before any work is done.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    >>> x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    >>> x_adv = af.pgd(model, x, y, eps=0.5, norm="l2", steps=20)
    >>> bool(((x_adv - x).flatten(1).norm(dim=1) <= 0.5 + 1e-6).all())
    True
    """
    attack = PGD(
        eps=eps,
        norm=norm,
        steps=steps,
        step_size=step_size,
        targeted=targeted,
        random_start=random_start,
        restarts=restarts,
        momentum=momentum,
        patience=patience,
        loss=loss,
        returns=returns,
        bounds=bounds,
        mask=mask,
        seed=seed,
    )
    return attack(
        model, inputs, labels, precision=precision, expectation=expectation, extras=extras
    )


@suggests
def fgsm(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm,
    step_size: float | None = None,
    targeted: bool = False,
    random_start: bool = False,
    loss: LossName | Objective = "cross_entropy",
    bounds: FeatureBounds = (0.0, 1.0),
    mask: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    precision: Precision = "float32",
    expectation: int = 1,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Attack one batch by the fast gradient sign method: a single step (Goodfellow et al. 2015).

    The arguments are those of `pgd`. ``step_size`` defaults to ``eps``; with ``random_start`` the
    fast adversarial training of Wong et al. (2020) uses ``1.25 * eps``.

    Parameters
    ----------
    model, inputs, labels, eps, norm, step_size, targeted, random_start, loss, bounds, seed, \
    precision
        As in `pgd`; ``step_size`` defaults to ``eps``.

    Returns
    -------
    Tensor
        Adversarial inputs with the shape, dtype and device of ``inputs``.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause.

    Examples
    --------
    >>> import torch
    >>> import advfeat as af
    >>> model = torch.nn.Linear(4, 3)
    >>> x_adv = af.fgsm(model, torch.rand(2, 4), torch.tensor([0, 2]), eps=0.1, norm="linf")
    """
    attack = FGSM(
        eps=eps,
        norm=norm,
        step_size=step_size,
        targeted=targeted,
        random_start=random_start,
        loss=loss,
        bounds=bounds,
        mask=mask,
        seed=seed,
    )
    return attack(
        model, inputs, labels, precision=precision, expectation=expectation, extras=extras
    )
