"""Drives attacks over a stream of rows, each with a pool of those that still resist."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advfeat.attacks import Attack, Batch
from advfeat.attacks.base import concat_samples, is_success, select_samples
from advfeat.model import Network

# The pool is refilled when this share of it is free: a row's start can cost a forward pass, and
# starting rows one by one would waste it.
_REFILL = 0.25
RESISTED = -1


class Verdict(NamedTuple):
    """Samples that are settled."""

    ids: Tensor  # (N,) int64
    inputs: Tensor  # (N, ...) clean
    labels: Tensor  # (N,) int64
    adversarial: Tensor  # (N, ...) as the last attack on the row returns it
    success: Tensor  # (N,) bool, by a float32 forward pass on ``adversarial``
    value: Tensor  # (N,) that attack's objective there
    attack: Tensor  # (N,) int64, place of the attack that fooled the model, -1 where none did


def worst_case(
    attacks: Sequence[Attack], net: Network, batches: Iterable[Batch], pool_size: int
) -> Iterator[Verdict]:
    """Attack rows by one attack after another, until one of them fools the model.

    Every row goes through the attacks on its own: what resists one enters the pool of the next, as
    soon as there is room. Memory holds the pools alone, however many rows there are.
    """
    settled: deque[Verdict] = deque()
    for place, attack in enumerate(attacks):
        standing = _standing(survivors(attack, net, batches, pool_size), place, settled)
        batches = (Batch(rows.inputs, rows.labels, rows.ids) for rows in standing)
    for verdict in standing:
        while settled:
            yield settled.popleft()
        yield verdict
    yield from settled


def _standing(
    verdicts: Iterable[Verdict], place: int, settled: deque[Verdict]
) -> Iterator[Verdict]:
    """Pass on the rows that resisted, and set the others aside."""
    for verdict in verdicts:
        fooled = select_samples(verdict, verdict.success.nonzero().squeeze(1))
        resisted = select_samples(verdict, (~verdict.success).nonzero().squeeze(1))
        if len(fooled.ids):
            settled.append(fooled._replace(attack=torch.full_like(fooled.ids, place)))
        if len(resisted.ids):
            yield resisted


def survivors(
    attack: Attack, net: Network, batches: Iterable[Batch], pool_size: int
) -> Iterator[Verdict]:
    """Attack rows until each is fooled or its steps are spent.

    A pool of ``pool_size`` rows is kept nearly full: finished rows leave, new ones come in, each
    with its own step counter. A row's result does not depend on the pool or on its companions.

    Parameters
    ----------
    attack
        Its rows should be finished once they fool the model; see `Attack.stop_at_success`.
    net
        The frozen model.
    batches
        Samples to attack, in any portions.
    pool_size
        Samples that are attacked together.
    """
    queue = _Queue(batches)
    state: Any = None
    ids = torch.empty(0, dtype=torch.int64)
    while True:
        free = pool_size - len(ids)
        if free >= _REFILL * pool_size and (batch := queue.take(free)) is not None:
            fresh = attack.init(net, batch)
            state = fresh if state is None else concat_samples(state, fresh)
            ids = torch.cat([ids.to(batch.ids.device), batch.ids])
        if len(ids) == 0:
            return
        state = attack.step(net, state)
        done = attack.finished(state)
        if net.low_precision:
            state = _settled_in_float32(attack, net, state, done)
            done = attack.finished(state)
        if bool(done.any()):
            leaving, staying = done.nonzero().squeeze(1), (~done).nonzero().squeeze(1)
            yield _verdict(attack, select_samples(state, leaving), ids[leaving])
            state, ids = select_samples(state, staying), ids[staying]


class _Queue:
    """Samples of batches of any size, handed out in the numbers that are asked for."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self._held: Batch | None = None

    def take(self, count: int) -> Batch | None:
        """Up to ``count`` rows; None when there are none left."""
        held = [] if self._held is None else [self._held]
        have = sum(len(batch.ids) for batch in held)
        while have < count and (batch := next(self._batches, None)) is not None:
            held.append(batch)
            have += len(batch.ids)
        if not have:
            return None
        rows = [torch.cat(parts) for parts in zip(*(batch[:3] for batch in held), strict=True)]
        self._held = Batch(*(field[count:] for field in rows)) if have > count else None
        return Batch(*(field[:count] for field in rows))


def _settled_in_float32(attack: Attack, net: Network, state: Any, done: Tensor) -> Any:
    """Correct what a low-precision pass says of the rows that would leave."""
    rows = done.nonzero().squeeze(1)
    if not len(rows):
        return state
    logits = net.logits(attack.result(state)[rows])
    success = state.success.clone()
    success[rows] = is_success(logits, state.labels[rows], attack.targeted)
    return state._replace(success=success)


def _verdict(attack: Attack, state: Any, ids: Tensor) -> Verdict:
    result, nobody = attack.result(state), torch.full_like(ids, RESISTED)
    return Verdict(ids, state.inputs, state.labels, result, state.success, state.value, nobody)
