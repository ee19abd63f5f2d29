"""Loops that do not wait: no step reads a value back or makes a constant, but for one at a restart.

On an accelerator every value that Python reads waits until the device has caught up, and every
constant is copied there. Both are operators that a dispatch mode sees, so no accelerator is needed.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import NORMS, batch, curved, predicted

from advfeat import threat
from advfeat.attacks import APGD, FAB, FMN, PGD, MinimumPGD, Square
from advfeat.attacks.base import prepare_batch
from advfeat.model import attackable

READS = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero"}
CONSTANTS = {"aten.lift_fresh", "aten.full"}  # scalar_tensor is torch's own, in backward passes
EPS = {"l1": 0.3, "l2": 0.1, "linf": 0.03}
STEPS = 12


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[f"aten.{func.__name__.split('.')[0]}"] += 1
        return func(*args, **(kwargs or {}))

    def of(self, names):
        return sum(self.counts[name] for name in names)


def attacks(norm):
    eps = EPS[norm]
    return {
        "pgd": PGD(eps=eps, norm=norm, steps=STEPS),
        "pgd, best": PGD(
            eps=eps, norm=norm, steps=STEPS, returns="best", random_start=True, seed=0
        ),
        "pgd, momentum": PGD(eps=eps, norm=norm, steps=STEPS, step_size=0.1, momentum=0.9),
        "pgd, restarts": PGD(eps=eps, norm=norm, steps=2, restarts=4, seed=0),
        "apgd": APGD(eps=eps, norm=norm, steps=STEPS, seed=0),
        "apgd, targets": APGD(eps=eps, norm=norm, steps=3, targets=3, loss="dlr", seed=0),
        "square": Square(eps=eps, norm=norm, queries=STEPS, seed=0),
        "fab": FAB(norm=norm, steps=STEPS // 3, targets=3),
        "fmn": FMN(norm=norm, steps=STEPS, targets=3),
        "minimum pgd": MinimumPGD(norm=norm, steps=STEPS, targets=3, seed=0),
    }


def steps(attack):
    """The state after some steps, and the operators that ran in them but for the first."""
    model, x = curved(), batch(4)
    with attackable(model) as net:
        state = attack.init(net, prepare_batch(net, x, predicted(model, x), None, (0.0, 1.0)))
        state = attack.step(net, state)  # constants are made here
        with Operators() as operators:
            for _ in range(STEPS - 2):
                state = attack.step(net, state)
    return state, operators


@pytest.mark.parametrize("accelerator", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", attacks("l2"))
@pytest.mark.parametrize("norm", NORMS)
def test_no_step_waits_for_the_device(monkeypatch, norm, name, accelerator):
    if accelerator:  # there, nothing is known without waiting
        monkeypatch.setattr(threat, "known_none", lambda mask: False)
    _, operators = steps(attacks(norm)[name])
    several = name in ("pgd, restarts", "apgd, targets")
    # With several rounds a step asks whether one begins.
    reads = READS
    if name == "fab":  # to_hyperplane compares, on the CPU alone
        reads = READS - {"aten.equal"}
    assert operators.of(reads) <= (STEPS - 2 if several else 0), operators.counts
    assert operators.of(CONSTANTS) == 0, operators.counts


def test_the_count_sees_reads_and_constants():
    mask = torch.tensor([True, False])
    with Operators() as operators:
        bool(mask.any())
        mask.nonzero()
        float(mask.sum())
        torch.tensor([1.0])
        torch.full((2,), 1.0)
    assert operators.of(READS) == 3
    assert operators.of(CONSTANTS) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", attacks("l2"))
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_left_out_where_nothing_is_due_changes_nothing(monkeypatch, norm, name):
    expected, _ = steps(attacks(norm)[name])
    monkeypatch.setattr(threat, "known_none", lambda mask: False)
    found, _ = steps(attacks(norm)[name])
    for field in ("current", "value", "success"):
        ours, theirs = getattr(found, field), getattr(expected, field)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
