"""FAB and FMN beside other libraries' on a curved model: the same points, or distances as small."""

import numpy as np
import pytest
import torch
from toys import NORMS, ORDER, adv_lib, batch, curved, predicted, sizes

from advfeat.attacks import fab, fmn

STEPS = 20


@pytest.fixture(scope="module")
def case():
    # Theirs compute in float32.
    model, x = curved(dtype=torch.float32), batch(60, dtype=torch.float32)
    return model, x, predicted(model, x)


def adv_lib_fab(model, x, y, norm, targets):
    attack = adv_lib("fast_adaptive_boundary").fab
    return attack(model, x, y, ORDER[norm], STEPS, restarts=targets, targeted_restarts=True)


def torchattacks_fab(model, x, y, norm, targets):
    ta = pytest.importorskip("torchattacks")
    name = {"l1": "L1", "l2": "L2", "linf": "Linf"}[norm]
    attack = ta.FAB(model, norm=name, steps=STEPS, multi_targeted=True, n_classes=4)
    closest, best = torch.full_like(x, torch.inf), np.full(len(x), np.inf)
    for target in range(2, 2 + targets):  # its count from the end: 2 is the likeliest wrong class
        attack.target_class = target
        found = attack.attack_single_run_targeted(x, y).detach()
        better = sizes(found, x, norm) < best
        closest[better], best = found[better], np.minimum(best, sizes(found, x, norm))
    return closest


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("peer", [adv_lib_fab, torchattacks_fab])
@pytest.mark.slow
def test_fab_finds_the_points_of_the_peers(case, peer, norm, targets):
    model, x, y = case
    theirs = peer(model, x, y, norm, targets)
    ours = fab(model, x, y, norm=norm, steps=STEPS, targets=targets)
    # Ours goes on until the answer is sure beyond rounding; at a corner the paths may part.
    longer = sizes(ours, x, norm) / sizes(theirs, x, norm) - 1
    assert (np.abs(longer) < 1e-3).mean() >= 0.95
    assert np.median(np.abs(longer)) < 1e-4
    apart = (ours - theirs).flatten(1).abs().amax(1)
    assert (apart < 1e-3).double().mean() >= 0.9


@pytest.mark.parametrize("norm", NORMS)
def test_fmn_comes_as_close_as_adv_libs_fmn(case, norm):
    model, x, y = case
    theirs = adv_lib("fast_minimum_norm").fmn(model, x, y, ORDER[norm], steps=100)
    ours = fmn(model, x, y, norm=norm, steps=100)
    assert (predicted(model, ours) != y).all()
    fooled = (predicted(model, theirs) != y).numpy()  # theirs finds nothing for some
    assert fooled.mean() > 0.3
    longer = sizes(ours, x, norm)[fooled] / sizes(theirs, x, norm)[fooled] - 1
    assert np.median(longer) < 1e-3
    assert np.quantile(longer, 0.9) < 0.01
