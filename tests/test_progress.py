"""Progress: one line in a terminal, whole lines in a log, stages within stages."""

import io
import sys

import pytest

from advfeat import progress
from advfeat.progress import Meter, with_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def stream(monkeypatch, kind):
    found = kind()
    monkeypatch.setattr(sys, "stderr", found)
    return found


def test_a_terminal_has_one_line_with_the_time_left(monkeypatch, clock):
    shown = stream(monkeypatch, Terminal)
    with Meter(None, "attack", 10) as meter:
        clock.now = 2.0
        meter.update(4)
        assert shown.getvalue().split("\r")[-1].strip() == "attack 4/10, 0:02, 0:03 left"
    assert "\n" not in shown.getvalue()
    assert shown.getvalue().endswith("\r")


def test_a_stage_with_a_limit_has_no_more_time_left_than_that(monkeypatch, clock):
    shown = stream(monkeypatch, Terminal)
    with Meter(None, "report") as meter:
        meter.stage("robust accuracy", 100, seconds=10.0)
        clock.now = 4.0
        meter.update(2)
        line = shown.getvalue().split("\r")[-1].strip()
        assert line == "report: robust accuracy 2/100, 0:04, 0:06 left"


@pytest.mark.parametrize(("asked", "first"), [(None, 10.0), (True, 2.0)])
def test_a_log_has_lines_at_intervals(monkeypatch, clock, asked, first):
    shown = stream(monkeypatch, io.StringIO)
    with Meter(asked, "attack", 100) as meter:
        for second in range(1, 76):
            clock.now = float(second)
            meter.update()
            if second < first:
                assert shown.getvalue() == ""
    lines = shown.getvalue().splitlines()
    assert lines[0] == f"attack {first:.0f}/100, 0:{first:02.0f}, " + lines[0].split(", ", 2)[2]
    assert len(lines) == 4  # three at intervals of 30 seconds, and the end
    assert lines[-1] == "attack: done in 1:15"


def test_a_short_call_is_silent_in_a_log(monkeypatch):
    shown = stream(monkeypatch, io.StringIO)
    assert list(with_progress([1, 2, 3], total=3, label="x", progress=None)) == [1, 2, 3]
    assert shown.getvalue() == ""


def test_nothing_is_shown_where_nothing_is_wanted(monkeypatch, clock):
    shown = stream(monkeypatch, Terminal)
    with Meter(False, "attack", 3) as meter:
        clock.now = 100.0
        meter.stage("next", 3)
        meter.update()
    assert list(with_progress([1, 2, 3], total=3, label="x", progress=False)) == [1, 2, 3]
    assert shown.getvalue() == ""


def test_an_inner_meter_continues_the_line_of_the_outer_one(monkeypatch, clock):
    shown = stream(monkeypatch, Terminal)
    with Meter(None, "study", 5) as outer:
        outer.update()
        clock.now = 1.0
        outer.stage("train robust")
        with Meter(None, "training", 50, unit="img") as inner:
            clock.now = 2.0
            inner.update(10, {"loss": "0.5"})
            line = shown.getvalue().split("\r")[-1]
            assert line.startswith("study: train robust | training 10/50 img, 0:01, 0:04 left")
            assert "10 img/s, loss=0.5" in line


def test_an_abandoned_loop_leaves_no_line_behind(monkeypatch):
    shown = stream(monkeypatch, Terminal)
    for _ in with_progress(range(5), total=5, label="abandoned", progress=True):
        break
    with Meter(True, "next", 1):
        assert "abandoned" not in shown.getvalue().split("\r")[-1]


def test_a_closed_stream_stops_no_work(monkeypatch, clock):
    shown = stream(monkeypatch, Terminal)
    with Meter(True, "attack", 2) as meter:
        shown.close()
        monkeypatch.setattr(progress, "_overwrites", lambda: True)
        clock.now = 1.0
        meter.update()


def test_total_unknown(monkeypatch, clock):
    shown = stream(monkeypatch, Terminal)
    with Meter(True, "read") as meter:
        clock.now = 1.0
        meter.update(7)
    assert "read 7, 0:01" in shown.getvalue()
    assert "left" not in shown.getvalue()


@pytest.mark.slow
def test_evaluations_name_the_attack_and_count_samples(monkeypatch):
    import torch
    from torch.utils.data import TensorDataset

    import advfeat as af
    from advfeat.metrics import diagnose, robustness_curve

    monkeypatch.setattr(progress, "_REDRAW", 0.0)
    model = torch.nn.Linear(6, 3)
    inputs = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    labels = model(inputs).argmax(1)
    labels[:3] = (labels[:3] + 1) % 3  # wrong without an attack
    data, ball = TensorDataset(inputs, labels), {"eps": 0.02, "norm": "linf"}
    for run, *said in (
        (
            lambda: af.robust_accuracy(model, data, **ball, seed=0),
            "robust accuracy 20/20 samples",
            ", evaluations=20",
        ),
        (
            lambda: robustness_curve(model, data, norm="l2"),
            "robustness curve 20/20 samples",
            "attack=FAB 3/3, gradients=20",
        ),
        (
            lambda: diagnose(model, data, **ball, seed=0),
            "diagnose 7/7",
            "attack=Square, evaluations=9",
        ),
        (lambda: af.report(model, data, **ball, budget=0.5), "report: robust accuracy"),
    ):
        shown = stream(monkeypatch, Terminal)
        run()
        assert all(part in shown.getvalue() for part in said)
        assert "\n" not in shown.getvalue()


def test_what_an_earlier_process_did_says_nothing_of_the_rate(monkeypatch, clock):
    shown = stream(monkeypatch, Terminal)
    with Meter(None, "training", 100, unit="img", done=20) as meter:
        for second in (1.0, 2.0):  # reading on to where the work begins
            clock.now = second
            meter.skip(20)
        line = shown.getvalue().split("\r")[-1]
        assert "60/100" in line
        assert "left" not in line
        assert "/s" not in line
        clock.now = 6.0
        meter.update(8)  # in 4 seconds
        line = shown.getvalue().split("\r")[-1].strip()
        assert line == "training 68/100 img, 0:04, 0:16 left, 2 img/s"
