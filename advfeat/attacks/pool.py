"""The one driver of attacks: samples come in, take steps together, and leave when they are done.

Batch calls, evaluation, ensembles and constructions all go through a `Pool`. A sample's result does
not depend on the pool or on the other samples in it, but for rounding.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from advfeat import losses
from advfeat.attacks.restricted import restricted
from advfeat.attacks.samples import (
    Batch,
    concat_samples,
    sample_count,
    sample_shapes,
    select_samples,
)
from advfeat.model import Network

ROBUST = -1


class Steps(Protocol):
    """What the driver asks of an attack; see `advfeat.attacks.Attack`."""

    @property
    def targeted(self) -> bool:
        """Whether labels are targets."""

    @property
    def starts_at_result(self) -> bool:
        """Whether it starts where the attack before it ended."""

    def init(self, net: Network, batch: Batch) -> Any:
        """State of a batch before its first step."""

    def step(self, net: Network, state: Any) -> Any:
        """Advance every sample by one evaluation of the model."""

    def run(self, net: Network, state: Any) -> Any:
        """Take all steps of samples that all take equally many."""

    def finished(self, state: Any) -> Tensor:
        """Samples for which another step changes nothing."""

    def result(self, state: Any) -> Tensor:
        """The iterate to return."""

    @property
    def is_fixed_length(self) -> bool:
        """Whether every sample of a batch takes the same number of evaluations."""


@dataclass(frozen=True)
class Policy:
    """When samples enter and leave a pool.

    Parameters
    ----------
    refill
        Free fraction of the pool from which on it is refilled: a sample's start can cost a forward
        pass, and starting samples one by one would waste it.
    leave
        Finished fraction of the pool from which on finished samples leave; above 0 only for an
        attack whose steps leave finished samples as they are.
    check_every
        Steps between two checks of who is finished. A check waits for the device, once.
    portion
        Samples that enter together; by default as many as there are free places.
    """

    refill: float = 0.25
    leave: float = 0.0
    check_every: int = 1
    portion: int | None = None


# Samples that all take equally many evaluations enter together and leave together.
_FIXED_LENGTH = Policy(refill=1.0)


class Pool:
    """Samples under one attack.

    Parameters
    ----------
    attack
        Its samples leave once they are finished; see `Attack.stop_at_success`.
    net
        The frozen model.
    size
        Samples that are attacked together.
    begin
        From samples as they were added, what is kept beside their state, and the state. What is
        kept has ``extras``, the further arguments of forward for these samples.
    policy
        When samples enter and leave, where they need not all take equally many evaluations.
    verified
        Recheck in float32 the success of samples that are about to leave.
    """

    def __init__(
        self,
        attack: Steps,
        net: Network,
        size: int,
        begin: Callable[[Any], tuple[Any, Any]],
        policy: Policy | None = None,
        verified: bool = False,
    ) -> None:
        self._attack, self._net, self._size, self._begin = attack, net, size, begin
        self._policy = _FIXED_LENGTH if attack.is_fixed_length else policy or Policy()
        self._verified = verified and net.low_precision
        self._waiting = _Queue()
        self._held: tuple[Any, Any] | None = None
        self._count = 0
        self.closed = False

    def add(self, samples: Any) -> None:
        """Let samples wait for a place."""
        self._waiting.add(samples)

    def close(self) -> None:
        """Nothing more will be added."""
        self.closed = True

    @property
    def is_empty(self) -> bool:
        """Whether no sample is under attack or waits."""
        return not self._count and not len(self._waiting)

    @property
    def is_ready(self) -> bool:
        """Whether a step needs no more samples to be added first."""
        if self.is_empty:
            return False
        return self.closed or not self._has_places or len(self._waiting) >= self._wanted

    def advance(self) -> tuple[Any, Any] | None:
        """Take steps; return samples that left, what was kept beside them and their state."""
        self._refill()
        assert self._held is not None
        kept, state = self._held
        with self._net.given(kept.extras):
            if self._attack.is_fixed_length:
                self._held, self._count = None, 0
                return kept, self._attack.run(self._net, state)
            for _ in range(self._policy.check_every):
                state = self._attack.step(self._net, state)
            state, done = self._finished(state)
        # The one value a step reads back.
        flags = done.cpu()
        leaving, staying = flags.nonzero().squeeze(1), (~flags).nonzero().squeeze(1)
        self._held = kept, state
        last = self.closed and not len(self._waiting)
        if not len(leaving) or (len(leaving) < self._policy.leave * self._size and not last):
            return None
        self._count = len(staying)
        if not self._count:
            self._held = None
            return kept, state
        left = select_samples((kept, state), leaving.to(done.device))
        self._held = select_samples((kept, state), staying.to(done.device))
        return left  # type: ignore[no-any-return]

    @property
    def _has_places(self) -> bool:
        free = self._size - self._count
        return free >= max(self._policy.refill * self._size, self._policy.portion or 1)

    @property
    def _wanted(self) -> int:
        return self._policy.portion or self._size - self._count

    def _refill(self) -> None:
        while self._has_places and len(self._waiting):
            samples = self._waiting.take(self._wanted)
            started = self._begin(samples)
            self._held = started if self._held is None else concat_samples(self._held, started)
            self._count += sample_count(samples)

    def _finished(self, state: Any) -> tuple[Any, Tensor]:
        """The state, and who is finished in it."""
        attack, net = self._attack, self._net
        done = attack.finished(state)
        if not self._verified:
            return state, done
        chosen = done.nonzero().squeeze(1)
        if not len(chosen):
            return state, done
        with net.selected(chosen):
            logits = net.logits(attack.result(state)[chosen])
        success = state.success.clone()
        success[chosen] = losses.is_success(logits, state.labels[chosen], attack.targeted)
        state = state._replace(success=success)
        return state, attack.finished(state)


class _Queue:
    """Samples in the order they came, handed out in the numbers that are asked for."""

    def __init__(self) -> None:
        self._parts: deque[Any] = deque()
        self._offset = 0  # samples of the first part that are gone
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, samples: Any) -> None:
        if count := sample_count(samples):
            self._parts.append(samples)
            self._count += count

    def take(self, count: int) -> Any:
        """Up to ``count`` samples."""
        parts: list[Any] = []
        wanted = min(count, self._count)
        self._count -= wanted
        while wanted:
            part = self._parts[0]
            rest = sample_count(part) - self._offset
            use = min(rest, wanted)
            whole = use == sample_count(part)
            chosen = slice(self._offset, self._offset + use)
            parts.append(part if whole else select_samples(part, chosen))
            self._offset += use
            wanted -= use
            if use == rest:
                self._parts.popleft()
                self._offset = 0
        return concat_samples(*parts)


def drive(pool: Pool, samples: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Attack a stream of samples; give them, and their states, as they leave."""
    for part in samples:
        pool.add(part)
        while pool.is_ready:
            if (left := pool.advance()) is not None:
                yield left
    pool.close()
    while not pool.is_empty:
        if (left := pool.advance()) is not None:
            yield left


def attack_batch(attack: Steps, net: Network, batch: Batch) -> Any:
    """Attack one batch, and return its last state, in the order of the batch."""
    if attack.is_fixed_length:
        with net.given(batch.extras):
            return attack.run(net, attack.init(net, batch))
    pool = _evaluation_pool(attack, net, len(batch.ids), verified=False)
    tags, states = zip(*drive(pool, _numbered([batch])), strict=True)
    return select_samples(concat_samples(*states), torch.cat([t.place for t in tags]).argsort())


# --- Several attacks, one after another ---


class Verdict(NamedTuple):
    """Samples whose evaluation is over."""

    place: Tensor  # (N,) int64, how many samples came before
    ids: Tensor  # (N,) int64
    inputs: Tensor  # (N, ...) clean
    labels: Tensor  # (N,) int64
    adversarial: Tensor  # (N, ...) as the last attack on the sample returns it
    success: Tensor  # (N,) bool, by a float32 forward pass on ``adversarial``
    value: Tensor  # (N,) that attack's objective there
    attack: Tensor  # (N,) int64, number of the attack that fooled the model, -1 where none did
    extras: Mapping[str, Tensor] | None  # further arguments of forward, (N, ...) each


class _Entry(NamedTuple):
    """Samples on their way to an attack."""

    place: Tensor
    batch: Batch


class _Tag(NamedTuple):
    """What a pool keeps beside a state that holds inputs and labels itself."""

    place: Tensor
    ids: Tensor
    extras: Mapping[str, Tensor] | None


def worst_case(
    attacks: Sequence[Steps], net: Network, batches: Iterable[Batch], pool_size: int
) -> Iterator[Verdict]:
    """Attack samples by one attack after another, until one of them fools the model.

    Every sample goes through the attacks on its own: what is still robust after one waits for a
    place in the pool of the next. Memory holds the pools alone, however many samples there are and
    whatever becomes of them: verdicts are given as they fall.
    """
    attacks = [restricted(attack) for attack in attacks]
    # Samples of one shape after the other, where batches are padded to lengths of their own.
    for _, entries in itertools.groupby(_numbered(batches), lambda e: sample_shapes(e.batch)):
        yield from _worst_case(attacks, net, entries, pool_size)


def _worst_case(
    attacks: Sequence[Steps], net: Network, entries: Iterator[_Entry], pool_size: int
) -> Iterator[Verdict]:
    if not attacks:
        for place, batch in entries:
            nobody, nothing = torch.full_like(batch.ids, ROBUST), batch.inputs[:0].flatten()
            value = nothing.new_full(batch.ids.shape, torch.nan)
            known = (batch.ids, batch.inputs, batch.labels, batch.inputs)
            never = torch.zeros_like(nobody, dtype=torch.bool)
            yield Verdict(place, *known, never, value, nobody, batch.extras)
        return
    pools = [_evaluation_pool(attack, net, pool_size) for attack in attacks]
    while True:
        number = next((n for n in reversed(range(len(pools))) if pools[n].is_ready), None)
        if number is None:
            if pools[-1].closed:
                return
            if (entry := next(entries, None)) is None:
                pools[0].close()
            else:
                pools[0].add(entry)
        elif (left := pools[number].advance()) is not None:
            fooled, robust = _split(_verdict(attacks[number], *left))
            if len(fooled.ids):
                yield fooled._replace(attack=torch.full_like(fooled.ids, number))
            if len(robust.ids) and number + 1 < len(pools):
                start = robust.adversarial if attacks[number + 1].starts_at_result else None
                batch = Batch(robust.inputs, robust.labels, robust.ids, start, robust.extras)
                pools[number + 1].add(_Entry(robust.place, batch))
            elif len(robust.ids):
                yield robust
        for before, after in itertools.pairwise(pools):
            if before.closed and before.is_empty:
                after.close()


def _evaluation_pool(attack: Steps, net: Network, size: int, *, verified: bool = True) -> Pool:
    def begin(entry: _Entry) -> tuple[_Tag, Any]:
        batch = entry.batch
        with net.given(batch.extras):
            return _Tag(entry.place, batch.ids, batch.extras), attack.init(net, batch)

    return Pool(attack, net, size, begin, verified=verified)


def _numbered(batches: Iterable[Batch]) -> Iterator[_Entry]:
    count = 0
    for batch in batches:
        after = count + len(batch.ids)
        yield _Entry(torch.arange(count, after, device=batch.ids.device), batch)
        count = after


def _verdict(attack: Steps, tag: _Tag, state: Any) -> Verdict:
    nobody = torch.full_like(tag.ids, ROBUST)
    return Verdict(
        tag.place,
        tag.ids,
        state.inputs,
        state.labels,
        attack.result(state),
        state.success,
        state.value,
        nobody,
        tag.extras,
    )


def _split(verdict: Verdict) -> tuple[Verdict, Verdict]:
    """Samples on which the model was fooled, and those on which it was not."""
    flags = verdict.success.cpu()
    if bool(flags.all()) or not bool(flags.any()):
        none = select_samples(verdict, slice(0, 0))
        return (verdict, none) if bool(flags.all()) else (none, verdict)
    device = verdict.success.device
    fooled, robust = (f.nonzero().squeeze(1).to(device) for f in (flags, ~flags))
    return select_samples(verdict, fooled), select_samples(verdict, robust)
