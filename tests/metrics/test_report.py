"""The report: its numbers are those of the single calls, its verdict warns, its page is whole."""

import json
import re
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import advfeat as af
from advfeat import pages
from advfeat.attacks import PGD, Square
from advfeat.metrics import Diagnosis, Report, _curve
from advfeat.metrics._diagnose import Finding
from advfeat.metrics._report._budget import Budget, Cost, Work
from advfeat.metrics._report._contents import Stages
from advfeat.metrics._report._drawing import _ticks
from advfeat.metrics._report._provenance import _name, size_text
from advfeat.metrics._report._samples import Drawn
from advfeat.metrics._report._verdict import _of_checks


def points(count=40, classes=3, features=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(count, features, generator=generator)
    return inputs, inputs[:, :classes].argmax(1)


class First(nn.Module):
    """Exact margins: the class is the largest of the first three features."""

    def forward(self, x):
        return x.flatten(1)[:, :3] * 4


@pytest.fixture
def short_stages(short_ensembles, short_boundary_search, monkeypatch):
    """Short attacks in every stage, for tests of what is reported and not of how strong it is."""
    monkeypatch.setattr(_curve, "_ROUNDS", 0)


@pytest.fixture(scope="module")
def found():
    data = TensorDataset(*points())
    return af.report(
        First(), data, eps=0.1, norm="linf", budget=None, other=First(), progress=False
    )


def test_the_numbers_are_those_of_a_linear_model(found):
    inputs, _ = points()
    first, second = inputs[:, :3].topk(2, dim=1).values.unbind(1)
    assert found.clean.count == 40
    assert found.robust.count == int((first - second > 0.2).sum())
    torch.testing.assert_close(found.curve.distance, (first - second) / 2, rtol=1e-3, atol=1e-4)
    assert found.robust.index.tolist() == list(range(40))
    assert sum(each.robust.total for each in found.classes) == 40
    assert sum(each.robust.count for each in found.classes) == found.robust.count
    assert found.left_out == ()
    assert ("may be lower" in found.verdict.summary) == (found.verdict.reliability != "green")
    # The same model twice: what fools one fools the other.
    assert found.transfer.fooled[0, 1] == found.transfer.fooled[0, 0]


def test_fragile_and_robust_samples_are_the_nearest_and_the_farthest(found):
    distance = found.curve.distance
    fragile = [each.index for each in found.examples if each.kind == "fragile"]
    robust = [each.index for each in found.examples if each.kind == "robust"]
    order = distance.argsort().tolist()
    assert fragile == order[: len(fragile)]
    assert robust == order[::-1][: len(robust)]
    for each in found.examples:
        assert (each.predicted != each.label) == (each.kind == "fragile")
        assert float((each.adversarial - each.clean).abs().max()) <= 0.1 + 1e-6


def test_text_page_and_json(found, tmp_path):
    text = str(found)
    for part in ("Robustness:", "Reliability", "seed 0", torch.__version__, "Croce and Hein"):
        assert part in text
    for part in ("Fast Adaptive", "Decoupling"):  # the curve's attacks are cited
        assert part in text
    path = tmp_path / "report.html"
    found.save(path)
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "@import" not in page
    assert "url(" not in page
    assert f"{found.verdict.reliability} light" in page
    assert "<img" not in page  # vectors have no pictures
    assert "srcdoc" in found._repr_html_()
    again = Report.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again.to_dict() == found.to_dict()
    assert str(again) == text
    assert "\n" not in repr(found)


MASK = torch.tensor([True, False, False, True, False])


def masked_distance(inputs, labels, mask):
    """How far the first features must move towards each other, those that may."""
    found = torch.full(labels.shape, torch.inf)
    for n, label in enumerate(labels.tolist()):
        for other in {0, 1, 2} - {label}:
            moving = int(mask[n, label]) + int(mask[n, other])
            if moving:
                gap = inputs[n, label] - inputs[n, other]
                found[n] = min(found[n], float(gap) / moving)
    return found


@pytest.mark.parametrize(
    "kind",
    ["one mask", *(pytest.param(k, marks=pytest.mark.slow) for k in ("masks", "eps by feature"))],
)
@pytest.mark.usefixtures("short_stages")
def test_a_report_in_a_restricted_ball_has_the_numbers_of_a_linear_model(kind):
    inputs, labels = points(24)
    inputs = 0.3 + 0.4 * inputs  # no face of the bounds is in reach
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(24, 5, generator=generator) < 0.6
    masks[:, 4] = True
    masks = masks if kind == "masks" else MASK.expand(24, 5)
    ball = {"eps": 0.1, "mask": masks if kind == "masks" else MASK}
    if kind == "eps by feature":
        ball = {"eps": 0.1 * MASK.float()}
    found = af.report(
        First(), TensorDataset(inputs, labels), **ball, norm="linf", budget=None, other=First(),
        progress=False, class_names=["a", "b", "c"],
    )  # fmt: skip
    distance = masked_distance(inputs, labels, masks)
    assert 0 < found.robust.count < 24
    assert torch.equal(found.robust.correct, distance > 0.1)
    unit = 0.1 if kind == "eps by feature" else 1.0
    measured = found.curve.distance * unit
    reachable = distance < 0.29
    torch.testing.assert_close(measured[reachable], distance[reachable], rtol=1e-3, atol=1e-4)
    assert (found.robust.adversarial == inputs)[~masks].all()
    assert found.transfer.fooled[0, 0] == pytest.approx(1 - found.robust.count / 24)
    assert ("by feature" if kind == "eps by feature" else "mask") in found.title
    assert "masked gradients was not checked" not in str(found)
    assert any("Two kinds of attacks agree" in text for _, text in found.verdict.reasons)
    again = Report.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert str(again) == str(found)
    assert again._repr_html_()


@pytest.mark.slow
@pytest.mark.usefixtures("short_stages")
def test_an_attack_of_its_own_must_have_the_mask_of_the_report():
    settings = {"eps": 0.1, "norm": "linf", "budget": None, "progress": False}
    with pytest.raises(ValueError, match="mask must be equal"):
        af.report(First(), points(), attack=PGD(eps=0.1, norm="linf", mask=MASK), **settings)
    with pytest.raises(ValueError, match="mask must be equal"):
        af.report(First(), points(), attack=PGD(eps=0.1, norm="linf"), mask=MASK, **settings)
    with pytest.raises(TypeError, match="mask"):
        af.report(First(), points(), mask=[True, False], **settings)
    attack = PGD(eps=0.1, norm="linf", mask=MASK)
    found = af.report(First(), points(), attack=attack, mask=MASK, **settings)
    assert (found.robust.adversarial == points()[0])[:, ~MASK].all()


@pytest.mark.slow
@pytest.mark.usefixtures("short_stages")
def test_images_are_shown_as_they_are(tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(30, 3, 8, 8, generator=generator)
    data = TensorDataset(inputs, First()(inputs).argmax(1))
    found = af.report(First(), data, eps=0.05, norm="linf", budget=None, progress=False)
    found.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 3 * len(
        found.examples
    )
    for kind in ("fragile", "robust"):
        assert 0 < sum(each.kind == kind for each in found.examples) <= 6


class Rounded(nn.Module):
    def forward(self, x):
        return torch.round(8 * x.flatten(1)[:, :3]) / 8


@pytest.mark.slow
@pytest.mark.usefixtures("short_stages")
def test_a_model_without_gradients_gets_no_green_light():
    inputs, _ = points(60)
    data = TensorDataset(inputs, Rounded()(inputs).argmax(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they are in the report
        found = af.report(Rounded(), data, eps=0.1, norm="linf", budget=None, progress=False)
    assert found.verdict.reliability == "red"
    assert found.verdict.light == "red"
    assert any("zero_gradients" in text for _, text in found.verdict.reasons)


@pytest.mark.parametrize(
    ("name", "value", "light"),
    [
        ("zero_gradients", 0.6, "red"),
        ("zero_gradients", 0.4, "yellow"),
        ("more_steps_help", 0.6, "yellow"),
        ("random_predictions", 0.1, "red"),
    ],
)
def test_the_light_of_a_finding_is_by_its_name_and_value(name, value, light):
    finding = Finding(name, value, 0.01, "samples", "do this")
    ((found, text),) = _of_checks(Diagnosis({name: finding}))
    assert found == light
    assert name in text


@pytest.mark.parametrize(("samples", "light"), [(31, "yellow"), (32, "green"), (None, "green")])
def test_checks_on_few_samples_are_no_green_light(samples, light):
    finding = Finding("zero_gradients", 0.0, 0.01, "samples", "do this")
    ((found, text),) = _of_checks(Diagnosis({"zero_gradients": finding}, samples))
    assert found == light
    assert ("only on 31 samples" in text) == (samples == 31)


def test_an_untrained_model_is_no_result():
    inputs, labels = points(60)
    data = TensorDataset(inputs, (labels + 1) % 3)
    found = af.report(First(), data, eps=0.1, norm="linf", budget=None, progress=False)
    assert found.verdict.reliability == "red"
    assert "normalisation" in str(found)
    assert any("right on no sample" in each for each in found.left_out)


@pytest.mark.slow
def test_one_attack_is_a_warning_and_robustness_unconfirmed():
    data = TensorDataset(*points())
    attack = PGD(eps=0.01, norm="linf")
    found = af.report(
        First(), data, eps=0.01, norm="linf", attack=attack, budget=None, progress=False
    )
    assert [type(each) for each in found.robust.attacks] == [PGD]
    assert found.verdict.reliability == "yellow"
    assert found.verdict.word("robustness") == "robust, but unconfirmed"
    assert "may be lower" in found.verdict.summary


class Slow(First):
    def forward(self, x):
        time.sleep(0.002 * len(x))
        return super().forward(x)


@pytest.mark.slow
def test_a_budget_is_kept_and_what_it_left_out_is_said():
    data = TensorDataset(*points(400))
    began = time.monotonic()
    found = af.report(Slow(), data, eps=0.1, norm="linf", budget=4, progress=False)
    assert time.monotonic() - began < 20
    assert any("ensemble" in each for each in found.left_out)
    assert any("curve" in each for each in found.left_out)
    assert "Left out" in str(found)
    assert found.verdict.reliability != "green"


class Mappings(Dataset):
    """Batches that are mappings, sorted by class."""

    def __init__(self):
        inputs, labels = points(30)
        order = labels.argsort()
        self.inputs, self.labels = inputs[order], labels[order]

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        Mappings(),
        DataLoader(Mappings(), batch_size=7, shuffle=True),
        list(DataLoader(Mappings(), batch_size=7)),
        points(30),
    ],
    ids=["mappings", "loader", "batches", "pair"],
)
@pytest.mark.usefixtures("short_stages")
def test_any_data(data):
    found = af.report(First(), data, eps=0.05, norm="l2", budget=None, samples=20, progress=False)
    assert found.robust.total == 20
    assert found.clean.count == 20


def test_the_first_samples_stand_for_all():
    drawn = Drawn(Mappings(), 20, None, seed=0)
    again = Drawn(Mappings(), None, None, seed=0)
    assert drawn.numbers == again.numbers[:20]
    assert len(set(again.labels(12).values())) == 3  # though the data are sorted by class


@pytest.mark.parametrize(
    ("bad", "error", "named"),
    [
        ({"eps": -1.0}, ValueError, "eps=-1.0"),
        ({"norm": "l3"}, ValueError, "norm='l3'"),
        ({"budget": 0}, ValueError, "budget=0"),
        ({"samples": 0}, ValueError, "samples=0"),
        ({"other": 3}, TypeError, "other"),
        ({"attack": PGD(eps=0.2, norm="linf")}, ValueError, "attack="),
        ({"attack": Square(eps=0.1, norm="l2")}, ValueError, "attack="),
        ({"epsilon": 0.1}, TypeError, "epsilon"),
        ({"class_names": "abc"}, TypeError, "class_names"),
        ({"class_names": ["a", "b"]}, ValueError, "2 names, but there is a label 2"),
        ({"other": nn.Linear(5, 2)}, ValueError, "the model has 2 classes"),
        ({"other": nn.Linear(4, 3)}, RuntimeError, "shapes"),
        ({"eps": 0.0 * MASK}, ValueError, "eps=0.0"),
        ({"mask": MASK.tolist()}, TypeError, "mask"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(bad, error, named):
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError

    with pytest.raises(error, match=named):
        af.report(Never(), points(), **{"eps": 0.1, "norm": "linf", **bad})


def test_parts_grow_and_stop_in_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("advfeat.metrics._report._budget.time.monotonic", lambda: clock[0])
    asked = []

    def run(start, stop):
        asked.append((start, stop))
        clock[0] += 0.1 * (stop - start)

    budget = Budget(10.0)
    _, done = budget.parts("work", 1000, run, first=8)
    assert asked[0] == (0, 8)
    assert [a for a, _ in asked[1:]] == [b for _, b in asked[:-1]]
    assert clock[0] <= 10.0
    assert done == asked[-1][1] < 1000
    assert budget.left_out == [f"work: {done} of 1000 samples"]
    clock[0] = 11.0
    assert budget.parts("more", 5, run) == ([], 0)
    assert budget.left_out[-1] == "more: all of it"
    assert budget.parts("needed", 5, run, required=True)[1] == 5


@pytest.mark.parametrize("shape", [(5, 7), (4, 6, 3)])
def test_a_png_is_read_back(shape):
    image = pytest.importorskip("PIL.Image")
    import io

    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    read = np.asarray(image.open(io.BytesIO(pages.png(pixels))))
    np.testing.assert_array_equal(read, pixels)


@pytest.mark.parametrize(
    ("eps", "bounds", "text"),
    [
        (8 / 255, (0.0, 1.0), "8/255"),
        (0.5, (0.0, 1.0), "0.5"),
        (1.5, (0.0, 1.0), "1.5"),
        (8 / 255, (-1.0, 1.0), "0.03137"),
        (torch.tensor([0.1, 0.2]), (0.0, 1.0), "0.1 to 0.2 by feature"),
    ],
)
def test_a_radius_is_written_as_papers_do(eps, bounds, text):
    assert size_text(eps, bounds) == text


@pytest.mark.parametrize("end", [1e-3, 0.0314, 0.9, 1.0, 2.55, 7.2, 40.0])
def test_ticks_are_round_numbers_that_reach_the_end_nearly(end):
    ticks = _ticks(end)
    assert 4 <= len(ticks) <= 9
    assert ticks[0] == 0
    assert ticks[-1] <= end * (1 + 1e-9) < ticks[-1] + 1.001 * ticks[1]
    assert float(f"{ticks[1]:.0e}") == pytest.approx(ticks[1])


def test_the_cost_of_a_stage_is_calls_and_samples():
    cost = Cost.of((4, 0.5), (32, 1.9))
    assert cost == pytest.approx((0.3, 0.05))
    work = Work(calls=10, gradients=20)
    assert cost.seconds(work, 7) == pytest.approx(10.0)
    assert cost.affordable(10.001, work) == 7
    assert cost.affordable(2.9, work) == 0
    # One batch, or a large one that was not slower.
    assert Cost.of((4, 0.5)) == Cost.of((4, 0.5), (4, 0.6)) == (0.0, 0.125)
    assert Cost.of((4, 0.5), (32, 0.4)).sample > 0


def test_a_stage_that_took_long_makes_the_next_ones_smaller():
    budget = Budget(10.0)
    budget.spent["work"] = 8.0
    stages = Stages(First(), None, budget, None, {}, (), True, 0, 1, {})
    stages._cost = Cost(0.1, 0.01)
    stages._correct_cost("work", Work(10, 10), 10)  # 2 seconds
    assert stages._cost == pytest.approx((0.4, 0.04))
    stages._correct_cost("work", Work(100, 10), 10)
    assert stages._cost == pytest.approx((0.4, 0.04))


def test_a_normalised_model_has_the_name_of_the_model_inside():
    assert _name(af.Normalize(af.Normalize(First(), 0.5, 0.5), 0.5, 0.5)) == "First"
