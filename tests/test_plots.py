"""Pictures: what is drawn is what was given, without a window."""

import io
import sys

import pytest
import torch

from advfeat import plots
from advfeat.metrics import Accuracy


def rendered(figure):
    """Draw a figure for good; warnings of the layout are errors."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_nothing_is_registered_with_pyplot():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    rendered(plots.bars({"D": {"accuracy": 0.5}}))
    rendered(plots.samples({"x": torch.rand(2, 1, 4, 4)}))
    assert plt.get_fignums() == before


def test_bars_have_the_heights_intervals_and_hatches():
    share = Accuracy.of(torch.arange(100) < 40)
    figure = plots.bars({"D": {"a": share, "b": 0.1}, "D_R": {"a": 0.7, "b": 0.2}}, chance=0.1)
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([40, 70, 10, 20])
    low, high = share.interval
    segments = [s for part in axes.collections for s in part.get_segments()]
    assert segments[0][:, 1].tolist() == pytest.approx([100 * low, 100 * high])
    assert axes.patches[0].get_hatch() != axes.patches[2].get_hatch()
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(names) == ["a", "b", "chance"]
    assert len(rendered(figure)) > 1000


def test_a_group_may_lack_a_bar():
    figure = plots.bars({"D": {"a": 0.5}, "D_R": {"b": 0.2}})
    assert len(figure.axes[0].patches) == 2


def test_curves_split_the_loss_from_the_accuracies():
    rows = [
        {"epoch": e, "loss": 2.0 / e, "accuracy": 0.1 * e, "val_accuracy": 0.08 * e, "lr": 0.1}
        for e in range(1, 4)
    ]
    left, right = plots.curves(rows).axes
    assert left.lines[0].get_ydata().tolist() == pytest.approx([2, 1, 2 / 3])
    assert [line.get_label() for line in right.lines] == ["accuracy", "validation accuracy"]
    assert right.lines[1].get_ydata().tolist() == pytest.approx([8, 16, 24])
    assert right.lines[0].get_linestyle() != right.lines[1].get_linestyle()
    (only,) = plots.curves(rows, quantities=["lr"]).axes
    assert only.get_ylabel() == "lr"
    with pytest.raises(ValueError, match="quantities"):
        plots.curves(rows, quantities=["speed"])
    with pytest.raises(ValueError, match="no epoch"):
        plots.curves([])


def test_robustness_curves_are_shares_above_each_distance():
    distance = torch.tensor([0.0, 0.0, 0.3, 0.1, torch.inf])
    figure = plots.robustness_curves({"m": distance}, norm="l2", largest=1.0)
    x, y = figure.axes[0].lines[0].get_data()
    curve = dict(zip((round(float(v), 4) for v in x), y.tolist(), strict=True))
    assert curve == {
        0.0: pytest.approx(60),
        0.1: pytest.approx(40),
        0.3: pytest.approx(20),
        1.0: curve[1.0],
    }
    assert curve[1.0] == pytest.approx(20)
    rendered(figure)


def test_the_curve_of_a_model_that_is_wrong_on_every_sample():
    (axes,) = plots.robustness_curves({"none": torch.zeros(4)}, norm="l2").axes
    assert axes.get_xlim() == (0.0, 1.0)


def test_the_curve_of_many_samples_is_thinned_and_exact_at_every_step():
    distance = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    distance[:7] = torch.nan  # not robust
    distance[7:10] = torch.inf
    axes = plots.robustness_curves({"m": distance}, largest=1.0).axes[0]
    x, y = (part[:-1] for part in axes.lines[0].get_data())
    assert 1000 < len(x) <= 2000
    assert (x[0], y[0]) == (0.0, pytest.approx(100 * (50_000 - 7) / 50_000, abs=0.01))
    for at in (0, 17, 900, -1):
        expected = 100 * float((distance.double() > x[at]).double().mean())
        assert y[at] == pytest.approx(expected, abs=1e-9)


def test_differences_are_magnified_and_say_how_much():
    x = torch.full((2, 1, 3, 3), 0.5)
    y = x.clone()
    y[0, 0, 0, 0] += 0.1
    y[1, 0, 1, 1] -= 0.05
    figure = plots.differences(x, y, labels={"source": [3, 4], "result": [4, 5]})
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert figure.axes[4].get_ylabel() == "difference\nx 5"
    assert float(shown[4][0, 0]) == pytest.approx(1.0)
    assert float(shown[5][1, 1]) == pytest.approx(0.25)
    assert float(shown[5][0, 0]) == pytest.approx(0.5)
    assert [axes.get_xlabel() for axes in figure.axes[:4]] == ["3", "4", "4", "5"]
    rendered(figure)
    with pytest.raises(ValueError, match=r"result\.shape"):
        plots.differences(x, y[:1])


def test_colour_images_and_other_bounds():
    x = torch.rand(2, 3, 4, 5) * 2 - 1
    figure = plots.samples({"x": x, "fewer": x[:1]}, bounds=(-1.0, 1.0))
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (4, 5, 3)
    assert torch.tensor(shown).numpy() == pytest.approx((x[0].movedim(0, -1).numpy() + 1) / 2)
    assert not figure.axes[3].images
    with pytest.raises(ValueError, match=r"images\.shape"):
        plots.samples({"x": torch.rand(2, 6)})
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.samples({})


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"advfeat\[plots\]"):
        plots.new_figure()


def test_colours_differ_in_grey():
    """No two neighbours of the palette have the same brightness and the same dash and marker."""
    kinds = [
        (s["marker"], str(s["linestyle"])) for s, _ in zip(plots.styles(), range(5), strict=False)
    ]
    assert len(set(kinds)) == 5


def test_thirty_series_differ_in_colour_or_marker():
    kinds = {(s["color"], s["marker"]) for s, _ in zip(plots.styles(), range(30), strict=False)}
    assert len(kinds) == 30
