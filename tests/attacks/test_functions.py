"""The functions that users call, beside the configurations behind them."""

import dataclasses
import inspect

import pytest
from toys import batch, curved, predicted

from advfeat import attacks

PAIRS = {
    attacks.pgd: attacks.PGD,
    attacks.fgsm: attacks.FGSM,
    attacks.apgd: attacks.APGD,
    attacks.square: attacks.Square,
    attacks.fab: attacks.FAB,
    attacks.fmn: attacks.FMN,
}


@pytest.mark.parametrize("function", PAIRS, ids=lambda function: function.__name__)
def test_a_function_has_the_defaults_of_its_configuration(function):
    fields = {field.name: field for field in dataclasses.fields(PAIRS[function])}
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name in fields and parameter.default is not inspect.Parameter.empty
    }
    assert defaults
    assert defaults == {name: fields[name].default for name in defaults}


def test_published_defaults():
    # 100 steps and 9 targets in AutoAttack's APGD and FAB, 5000 queries from p = 0.8 in Square.
    assert attacks.APGD(eps=1.0, norm="l2").steps == 100
    assert (attacks.FAB(norm="l2").steps, attacks.FAB(norm="l2").targets) == (100, 9)
    square = attacks.Square(eps=1.0, norm="l2")
    assert (square.queries, square.p_init) == (5000, 0.8)


def test_patience_refuses_even_one_restart():
    model, x = curved(), batch()
    with pytest.raises(ValueError, match="patience"):
        attacks.pgd(model, x, predicted(model, x), eps=0.1, norm="l2", restarts=2, patience=3)
