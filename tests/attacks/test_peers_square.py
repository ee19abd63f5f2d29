"""Square Attack beside torchattacks' on digits: it fools as many with as few queries."""

import pytest
import torch

from advfeat.attacks import square

# Balls in which few queries fool some digits and more queries more.
QUERIES = 100
BALLS = {"l2": 0.9, "linf": 0.12}


@pytest.mark.slow
@pytest.mark.parametrize("norm", BALLS)
def test_it_fools_as_many_digits_as_torchattacks(standard, digits, norm):
    ta = pytest.importorskip("torchattacks")
    x, y = digits[1].tensors
    right = standard(x).argmax(1) == y
    x, y = x[right][:150], y[right][:150]
    name = {"l2": "L2", "linf": "Linf"}[norm]
    rates = {"ours": [], "theirs": []}
    for seed in range(2):
        peer = ta.Square(standard, norm=name, eps=BALLS[norm], n_queries=QUERIES, seed=seed)
        found = square(standard, x, y, eps=BALLS[norm], norm=norm, queries=QUERIES, seed=seed)
        for whose, x_adv in (("ours", found), ("theirs", peer(x, y))):
            with torch.no_grad():
                rates[whose].append((standard(x_adv).argmax(1) != y).double().mean().item())
    ours, theirs = (torch.tensor(rates[whose]).mean().item() for whose in ("ours", "theirs"))
    assert 0.2 < theirs < 0.8
    assert ours >= theirs - 0.03
