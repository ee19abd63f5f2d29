"""Runs of every kind, ended in the middle of an epoch, and resumed: the same bytes as uncut.

`tests/benchmarks/bench_resume.py` does it in processes that are killed, for many more combinations.
"""

import signal

import combinations
import pytest

FIRST = ("tensors", "pgd", "sgd", "default", "none")


class Cut(Exception):  # noqa: N818
    """The end of a process, for a test."""


def varied():
    """Every kind once, others as in the first combination; and some of several kinds."""
    for place, kinds in enumerate(
        (
            combinations.DATA,
            combinations.METHODS,
            combinations.OPTIMIZERS,
            combinations.SCHEDULES,
            combinations.OPTIONS,
        )
    ):
        for kind in kinds:
            yield (*FIRST[:place], kind, *FIRST[place + 1 :])
    yield from (
        ("owning", "trades", "adam", "warm-up", "ema"),
        ("generator", "mart", "lookahead", "one cycle", "accumulate"),
        ("by numpy", "free", "adam", "plateau", "ema"),
        ("stream", "fast", "sgd", "parts", "awp"),
        ("global", "standard", "schedule-free", "default", "ema"),
        ("constructed", "mix", "sam", "plateau", "accumulate"),
    )


def cut(folder, scratch, combination, step, number):
    """Run until a step, and end: by SIGTERM, which saves first, or at once, which does not."""

    def on_step(row):
        if row["step"] == step:
            if number is None:
                raise Cut
            signal.raise_signal(number)

    def handler(*_):
        raise Cut

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Cut):
            combinations.train(folder, scratch, *combination, on_step=on_step)
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.slow
@pytest.mark.parametrize("combination", dict.fromkeys(varied()), ids="-".join)
def test_cut_and_resumed_is_uncut_byte_for_byte(combination, tmp_path):
    whole = combinations.outcome(*combinations.train(None, tmp_path, *combination))
    step = 6 if combination[4] != "patience" else 2
    cut(tmp_path / "run", tmp_path, combination, step, signal.SIGTERM)
    cut(tmp_path / "run", tmp_path, combination, step + 1, None)
    found = combinations.outcome(*combinations.train(tmp_path / "run", tmp_path, *combination))
    assert found[1:] == whole[1:]
    assert found[0] == whole[0]
