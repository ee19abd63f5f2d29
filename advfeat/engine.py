"""Drives an attack over a stream of rows, with a pool of those that still resist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advfeat.attacks import Attack, Batch
from advfeat.attacks._attack import argmax_hits
from advfeat.model import Network


class Verdict(NamedTuple):
    """Rows that left the pool."""

    ids: Tensor  # (N,) int64
    adversarial: Tensor  # (N, ...)
    success: Tensor  # (N,) bool, from a float32 forward pass of ``adversarial``


def survivors(
    attack: Attack, net: Network, batches: Iterable[Batch], pool_size: int
) -> Iterator[Verdict]:
    """Attack rows until each is fooled or its steps are spent.

    A pool of ``pool_size`` rows is kept full: finished rows leave, new ones come in, each with its
    own step counter. A row's result does not depend on the pool or on its companions.

    Parameters
    ----------
    attack
        Returns the first success, so that a fooled row is finished.
    net
        The frozen model.
    batches
        Rows to attack, in any portions.
    pool_size
        Rows that are attacked together.
    """
    waiting = iter(batches)
    reserve: Any = None
    pool: Any = None
    while True:
        while _count(pool) < pool_size:
            if _count(reserve) == 0:
                batch = next(waiting, None)
                if batch is None:
                    break
                reserve = (attack.init(net, batch), batch.ids)
            free = pool_size - _count(pool)
            pool = _join(pool, _rows(reserve, slice(None, free)))
            reserve = _rows(reserve, slice(free, None))
        if _count(pool) == 0:
            return
        state, index = pool
        state = _confirmed(attack, net, attack.step(net, state))
        done = attack.finished(state)
        if bool(done.any()):
            result = _rows((state, index), done)
            yield Verdict(result[1], attack.result(result[0]), result[0].success)
            state, index = _rows((state, index), ~done)
        pool = (state, index)


def _confirmed(attack: Attack, net: Network, state: Any) -> Any:
    """Decide in float32, after low-precision steps, about the rows that are about to leave.

    A success that a float32 pass does not see is taken back, one that only it sees is added.
    """
    if not net.low_precision:
        return state
    leaving = attack.finished(state).nonzero().squeeze(1)
    if len(leaving) == 0:
        return state
    logits = net.logits(attack.result(state)[leaving])
    success = state.success.clone()
    success[leaving] = argmax_hits(logits, state.labels[leaving], attack.targeted)
    return state._replace(success=success)


def _count(pool: Any) -> int:
    return 0 if pool is None else len(pool[1])


def _rows(pool: Any, rows: slice | Tensor) -> Any:
    state, index = pool
    return type(state)(*(field[rows] for field in state)), index[rows]


def _join(first: Any, second: Any) -> Any:
    if _count(first) == 0:
        return second
    pairs = zip(first[0], second[0], strict=True)
    state = type(first[0])(*(torch.cat(pair) for pair in pairs))
    return state, torch.cat([first[1], second[1]])
