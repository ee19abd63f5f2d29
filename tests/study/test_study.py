"""The whole paper in one call: the same numbers as by hand, once each, whenever it is killed."""

import csv
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset

import advfeat as af
from advfeat import pages, plots, study
from advfeat.statistics import paired_difference
from advfeat.study._data import Shifted
from advfeat.study._explorer import explorer
from advfeat.study._result import Study
from advfeat.study._run import _folders

RADII = [0.1, 0.2]
RECIPE = study.Recipe(
    standard={"epochs": 2, "batch_size": 20, "lr": 0.5},
    robust={"steps": 2},
    sets={
        "D_R": {"layer": "0", "steps": 3},
        "D_R control": {},
        "D_NR from noise": {"layer": "0", "steps": 3, "start": "noise"},
        "D_rand": {"steps": 3},
        "D_det": {"steps": 3, "eps": 0.4},
        "D_det control": {},
        "D_det noise control": {},
        "D_det moved control": {},
    },
    fresh={"D_rand": {"lr": 0.2}},
    measured={"steps": 3},
    transfer={"samples": 30, "steps": 3},
)
STAGES = [
    "train standard", "train robust",
    "make D_R", "make D_NR from noise", "make D_rand", "make D_det", "make D_det control",
    "make D_det noise control", "make D_det moved control",
    "train on D_R", "train on D_R control", "train on D_NR from noise", "train on D_rand",
    "train on D_det", "train on D_det control", "train on D_det noise control",
    "train on D_det moved control",
    "measure standard", "measure robust", "measure D_R", "measure D_R control",
    "measure D_NR from noise", "measure D_rand", "measure D_det", "measure D_det control",
    "measure D_det noise control", "measure D_det moved control",
    "transfer", "leakage",
]  # fmt: skip


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def rows(seed, count=60):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    place = 0.35 * nn.functional.one_hot(labels, 3).float().repeat(1, 2)
    return TensorDataset(0.6 * torch.rand(count, 6, generator=generator) + place, labels)


TRAIN, TEST = rows(0), rows(1, 40)


def run(**changes):
    given = {"eps": 0.2, "norm": "l2", "at": RADII, "recipe": RECIPE, "seed": 3, **changes}
    return study.run(network, TRAIN, TEST, **given)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(out=tmp_path_factory.mktemp("study"))


def changed(**parts):
    return dataclasses.replace(RECIPE, **parts)


# --- The numbers ---


def test_every_number_is_that_of_the_call_behind_it(found):
    assert list(found.measured) == ["standard", "robust", *RECIPE.sets]
    for name, measured in found.measured.items():
        model = found.model(name)
        assert torch.equal(measured.standard.correct, af.accuracy(model, TEST).correct)
        for radius, robust in measured.robust.items():
            by_hand = af.robust_accuracy(model, TEST, eps=radius, norm="l2", steps=3)
            assert torch.equal(robust.correct, by_hand.correct)
    assert list(found.measured["D_R"].robust) == RADII


def test_as_label_plus_one_counts_the_class_after_the_true_one(found):
    inputs, labels = TEST.tensors
    for name, measured in found.measured.items():
        with torch.no_grad():
            said = found.model(name).eval()(inputs).argmax(1)
        assert measured.shifted.count == int((said == (labels + 1) % 3).sum())
        assert not bool((measured.shifted.correct & measured.standard.correct).any())


def test_each_set_comes_from_the_model_that_the_paper_takes(found):
    inputs, labels = TRAIN.tensors
    d_det, control = found.dataset("D_det"), found.dataset("D_det control")
    for made, source in ((d_det, "standard"), (control, "robust")):
        assert torch.equal(made.labels, (labels + 1) % 3)
        said = found.model(source)(made.images).argmax(1)
        assert torch.equal(said == made.labels, made.field("success"))
        assert float((made.images - inputs).norm(dim=1).max()) <= 0.4 + 1e-6
    first = {
        name: found.model(source)[0](found.dataset(name).images) - found.model(source)[0](inputs)
        for name, source in (("D_R", "robust"), ("D_NR from noise", "standard"))
    }
    for name, gap in first.items():
        torch.testing.assert_close(gap.norm(dim=1), found.dataset(name).field("distance"))


def test_the_models_are_those_that_the_functions_train(found):
    """The model of D_det is what `fit` makes of the set, from weights and seed of its own."""
    again = run()  # in memory
    for name in found.measured:
        for one, other in zip(
            found.model(name).parameters(), again.model(name).parameters(), strict=True
        ):
            assert torch.equal(one, other)
    starts = [next(found._found.work._fresh(n).parameters()) for n in ("standard", "robust", "D_R")]
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_samples_limits_the_sets_and_not_the_models(tmp_path):
    some = run(recipe=changed(samples=24), stages=["make D_det", "train standard"])
    assert len(some.dataset("D_det")) == 24
    whole = run(stages=["train standard"])
    assert some.histories["standard"].rows[0]["loss"] == whole.histories["standard"].rows[0]["loss"]


def test_a_loader_counts_as_the_samples_it_covers():
    loader = DataLoader(TRAIN, sampler=SubsetRandomSampler(range(0, 60, 2)), batch_size=7)
    by_loader = study.run(
        network, loader, TEST, eps=0.2, norm="l2", recipe=RECIPE, seed=3, stages=["make D_det"]
    )
    by_subset = study.run(
        network, Subset(TRAIN, range(0, 60, 2)), TEST, eps=0.2, norm="l2", recipe=RECIPE, seed=3,
        stages=["make D_det"],
    )  # fmt: skip
    assert torch.equal(by_loader.dataset("D_det").images, by_subset.dataset("D_det").images)


def test_shifted_labels_go_round():
    model = nn.Linear(6, 5)
    shifted = Shifted(TensorDataset(torch.rand(5, 6), torch.arange(5)), model)
    assert [int(label) for _, label in shifted] == [1, 2, 3, 4, 0]


# --- Once each ---


@pytest.mark.slow
def test_stages_are_done_in_order_and_only_once(tmp_path):
    done = []
    first = run(out=tmp_path, on_stage=lambda name, seconds: done.append((name, seconds)))
    assert [name for name, _ in done] == STAGES == list(first.seconds)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.suffix in (".pt", ".npy")}
    again = run(out=tmp_path)
    assert again.table("json") == first.table("json")
    assert again.seconds == first.seconds
    assert {p: p.stat().st_mtime_ns for p in written} == written


@pytest.mark.slow
def test_a_stage_alone_does_what_it_needs_and_no_more(tmp_path):
    part = run(out=tmp_path, stages=["train on D_det"])
    assert {p.name for p in (tmp_path / "models").iterdir()} == {"standard", "D_det"}
    assert list(part.measured) == []
    assert "D_det" in part.histories
    assert "D_R" not in part.histories
    whole = run(out=tmp_path)
    assert whole.table("json") == run().table("json")


class _Cut(Exception):  # noqa: N818 - no error
    pass


@pytest.mark.slow
def test_cut_after_any_stage_it_goes_on_to_the_same_table(tmp_path, found):
    def cut(name, seconds):
        raise _Cut

    for _ in STAGES:
        with pytest.raises(_Cut):
            run(out=tmp_path, stages=STAGES, on_stage=_after(cut, tmp_path))
    assert run(out=tmp_path).table("json") == found.table("json")


def _after(cut, folder):
    """Cut where a stage was really done, not found."""
    before = len(list((folder / "stages").glob("*.json"))) if (folder / "stages").exists() else 0

    def on_stage(name, seconds):
        if len(list((folder / "stages").glob("*.json"))) > before or before == len(STAGES):
            cut(name, seconds)

    return on_stage


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import test_study
test_study.run(out={out!r})
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_table(tmp_path, found):
    """SIGKILL, in the middle of whatever goes on, until a run comes through."""
    out = tmp_path / "study"
    script = KILLED.format(tests=os.path.dirname(__file__), out=str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = 0
    for stages in (1, 6, 13):
        process = subprocess.Popen([sys.executable, "-c", script], env=environment)
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if len(list((out / "stages").glob("*.json"))) >= stages:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 1
    assert run(out=out).table("json") == found.table("json")


@pytest.mark.slow
def test_two_ranks_share_the_work(tmp_path, found):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch.distributed as dist; dist.init_process_group('gloo')\n"
        + KILLED.format(tests=os.path.dirname(__file__), out=str(tmp_path / "study"))
        + "import torch.distributed as dist; dist.destroy_process_group()\n"
    )
    # Models and sets of an earlier call are read by both, whoever measures them.
    run(out=tmp_path / "study", stages=["train on D_det", "train robust"])
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)],
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300,
    )  # fmt: skip
    shared = run(out=tmp_path / "study")  # reads what the ranks have done
    for one, other in zip(
        shared.model("standard").parameters(), found.model("standard").parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert list(shared.measured) == list(found.measured)


# --- Folders that hold something else ---


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"eps": 0.3}, "eps=0.2 there, 0.3 here"),
        ({"norm": "linf"}, "norm"),
        ({"seed": 4}, "seed=3 there, 4 here"),
        ({"recipe": changed(standard={"epochs": 3})}, "epochs=2 there, 3 here"),
        ({"recipe": changed(measured={"steps": 4})}, "steps=3 there, 4 here"),
        ({"recipe": changed(sets={**RECIPE.sets, "D_R": {"layer": "0"}})}, "steps=3 there, None"),
        ({"at": [0.15]}, "at"),
    ],
)
def test_other_settings_are_refused_and_named(found, changes, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        run(out=found._found.work.stages.folder, **changes)


def test_other_data_and_another_model_are_refused(found):
    out = found._found.work.stages.folder
    given = {"eps": 0.2, "norm": "l2", "at": RADII, "recipe": RECIPE, "seed": 3, "out": out}
    with pytest.raises(ValueError, match=r"train\.sha256"):
        study.run(network, rows(5), TEST, **given)
    with pytest.raises(ValueError, match=r"model\.sha256"):
        study.run(lambda: nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3)), TRAIN, TEST, **given)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folders = [place.folder for place, _ in _folders("~/study", None, [1, 2])]
    assert folders == [tmp_path / "study" / "seed-1", tmp_path / "study" / "seed-2"]
    assert _folders("~/study", 0, None)[0][0].folder == tmp_path / "study"


@pytest.mark.slow
def test_without_a_seed_a_folder_keeps_its_own(tmp_path):
    torch.manual_seed(11)
    first = run(out=tmp_path, seed=None, stages=["train standard"])
    torch.manual_seed(12)
    assert run(out=tmp_path, seed=None).settings["seed"] == first.settings["seed"]


def test_a_broken_result_is_named(tmp_path):
    run(out=tmp_path, stages=["train standard"])
    (tmp_path / "stages" / "train-standard.json").write_text('{"settings": {')
    with pytest.raises(ValueError, match=r"train-standard\.json.*delete it"):
        run(out=tmp_path, stages=["train standard"])


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"eps": 0.0}, ValueError, "eps=0.0"),
        ({"norm": "l3"}, ValueError, "norm='l3'"),
        ({"at": [0.1, -1.0]}, ValueError, "at=-1.0"),
        ({"bounds": (1.0, 0.0)}, ValueError, "bounds"),
        ({"recipe": "long"}, ValueError, "recipe='long'"),
        ({"at": [0.1, 0.2, 0.1]}, ValueError, "a radius occurs twice"),
        ({"at": [0.1, 0.1 + 1e-9]}, ValueError, "a radius occurs twice"),
        ({"stages": ["make D_X"]}, ValueError, "stages='make D_X'"),
        ({"stages": "make D_R"}, TypeError, "expected a list of names"),
        ({"precision": "float8"}, ValueError, "precision='float8'"),
        ({"seed": 1.5}, TypeError, r"seed=1\.5"),
        ({"out": 3}, TypeError, "out=3"),
        ({"eps": 8, "norm": "linf"}, ValueError, "8/255"),
    ],
)
def test_bad_input_is_refused_before_any_work(changes, error, named):
    with pytest.raises(error, match=named):
        run(on_stage=lambda *_: pytest.fail("work was done"), **changes)


def test_a_model_in_place_of_a_function_is_refused():
    with pytest.raises(TypeError, match="make_model"):
        study.run(network(), TRAIN, TEST, eps=0.1, norm="l2")
    with pytest.raises(TypeError, match="make_model: made int"):
        study.run(lambda: 3, TRAIN, TEST, eps=0.1, norm="l2")
    with pytest.raises(ValueError, match="train="):
        study.run(network, [TRAIN.tensors], TEST, eps=0.1, norm="l2")
    with pytest.raises(ValueError, match="sets="):
        study.Recipe(standard={}, sets={"D_X": {}})


# --- What it shows ---


@pytest.mark.slow
def test_models_that_share_trained_parameters_are_refused_and_frozen_ones_not():
    whole, body = network(), nn.Linear(6, 8)
    makers = [lambda: whole, lambda: nn.Sequential(body, nn.ReLU(), nn.Linear(8, 3))]
    stages = ["train standard"]
    for make_model in makers:
        with pytest.raises(ValueError, match="make_model: made the same parameters twice"):
            study.run(make_model, TRAIN, TEST, eps=0.1, norm="l2", recipe=RECIPE, stages=stages)
        with pytest.raises(ValueError, match="make_model: made the same parameters twice"):
            study.calibrate(make_model, TRAIN, eps=0.1, norm="l2")
    body.requires_grad_(False)
    study.run(makers[1], TRAIN, TEST, eps=0.1, norm="l2", recipe=RECIPE, stages=stages)


def test_a_pair_of_tensors_is_data():
    data = TRAIN.tensors, tuple(tensor.numpy() for tensor in TEST.tensors)
    settings = {"eps": 0.1, "norm": "l2", "recipe": RECIPE, "stages": ["train standard"], "seed": 0}
    found, same = study.run(network, *data, **settings), study.run(network, TRAIN, TEST, **settings)
    assert found.settings == same.settings


class Augmented(Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, index):
        x, y = TRAIN[index]
        return (x.flip(0) if torch.rand(()) < 0.5 else x), y


@pytest.mark.parametrize("place", [0, 1])
def test_data_that_are_augmented_at_random_are_refused(place):
    data = [TRAIN, TEST]
    data[place] = Augmented()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=("train", "test")[place] + "='Augmented': reading"):
        study.run(network, *data, eps=0.1, norm="l2", recipe=RECIPE, stages=["train standard"])
    assert torch.equal(torch.get_rng_state(), before)


def test_no_calibration_in_a_folder_that_was_begun_with_a_recipe(tmp_path):
    run(out=tmp_path, stages=["train standard"])
    with pytest.raises(ValueError, match=r"recipe='auto': the study in out=.* pass the same"):
        run(out=tmp_path, recipe="auto")


def test_tables_agree_with_each_other(found):
    rows = list(csv.reader(io.StringIO(found.table("csv"))))
    assert rows[0] == ["trained on", "accuracy", "l2 0.1", "l2 0.2", "shifted labels"]
    as_json = json.loads(found.table("json"))
    for name, *cells in rows[1:]:
        fractions = [f"{100 * each['fraction']:.1f}" for each in as_json[name].values()]
        assert cells == fractions
        assert f"| {name} | {' | '.join(cells)} |" in found.table("markdown")
        assert any(line.split()[-4:] == cells for line in str(found).splitlines())


def test_the_report_stands_alone(found):
    page = (found._found.work.stages.folder / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 2  # accuracies and trainings; rows, no images
    assert "No picture" in page
    for name, measured in found.measured.items():
        assert f"<td>{name}</td><td>{100 * measured.standard:.1f} (" in page
    assert f"&quot;seed&quot;: {found.settings['seed']}" in page


def test_pictures_of_the_report_are_scrolled_on_a_narrow_screen_not_shrunk(found):
    page = (found._found.work.stages.folder / "report.html").read_text()
    pictures = re.findall(r'<div class="wide"><img alt="[^"]*" style="min-width: min', page)
    assert len(pictures) == page.count("<img")


def test_a_transfer_rate_of_no_example_is_no_number(found, tmp_path, monkeypatch):
    of_none = dataclasses.replace(found.transfer, fooled=torch.full((2, 10), torch.nan))
    monkeypatch.setattr(found._found.runs[0], "transfer", of_none)
    found.save_report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<td>none</td>" in page
    assert "<td>nan</td>" not in page


def test_the_report_without_matplotlib_says_what_to_install(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found.save_report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "pip install &#x27;advfeat[plots]&#x27;" in page
    assert "data:image" not in page
    assert "<td>D_rand</td>" in page


def test_the_report_shows_the_same_samples_in_every_set_class_by_class():
    images = TensorDataset(torch.rand(12, 1, 4, 4), torch.arange(12) % 3)
    recipe = study.Recipe(
        standard={"epochs": 1}, sets={"D_NR": {"steps": 1}, "D_det": {"steps": 1}}
    )
    seen = study.run(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), images, images, eps=0.1, norm="l2",
        recipe=recipe, seed=0, stages=["make D_NR", "make D_det"],
    )  # fmt: skip
    _, *parts = explorer(seen._found.runs[0], (0.0, 1.0))
    assert [re.search("<summary>(.*?)</summary>", part)[1] for part in parts] == [
        "class 0", "class 1", "class 2",
    ]  # fmt: skip
    for label, part in enumerate(parts):
        assert re.findall("<th>(.*?)</th>", part) == ["original", "D_NR", "D_det"]
        assert re.findall("<br>(.*?)</td>", part) == 4 * [*2 * [str(label)], str((label + 1) % 3)]
        original, inverted, _ = re.findall('src="(.*?)"', part)[:3]
        number = label  # the class's first sample
        assert original == pages.image_uri(images.tensors[0][number], (0.0, 1.0))
        made = seen.dataset("D_NR")
        place = made.field("index").tolist().index(number)
        assert inverted == pages.image_uri(made.images[place], (0.0, 1.0))


def test_studies_are_compared_on_the_same_samples(found):
    other = run(seed=7, stages=["measure standard", "measure D_rand"])
    compared = found.compare(other)
    assert list(compared.differences) == ["standard", "D_rand"]
    for name, columns in compared.differences.items():
        ours, theirs = found.measured[name], other.measured[name]
        expected = paired_difference(ours.standard.correct, theirs.standard.correct)
        assert str(columns["accuracy"]) == str(expected)
        assert set(columns) == {"accuracy", "l2 0.1", "l2 0.2"}
    same = found.compare(found)
    assert all(
        each.value == 0 for columns in same.differences.values() for each in columns.values()
    )
    with pytest.raises(ValueError, match="both studies have measured no model"):
        found.compare(run(seed=7, stages=["train standard"]))
    other = study.run(
        network, TRAIN, rows(2, 40), eps=0.2, norm="l2", at=RADII, recipe=RECIPE, seed=3,
        stages=["train standard"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="a study of other test data"):
        found.compare(other)


@pytest.mark.slow
def test_pictures_show_every_model_and_set():
    images = TensorDataset(torch.rand(12, 1, 4, 4), torch.arange(12) % 3)
    recipe = study.Recipe(standard={"epochs": 1}, sets={"D_det": {"steps": 1}})
    seen = study.run(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), images, images, eps=0.1, norm="l2",
        recipe=recipe, seed=0, stages=["measure standard", "measure D_det"],
    )  # fmt: skip
    bars = seen.plot()
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["standard", "D_det"]
    assert isinstance(seen, Study)
    grid = seen.pictures().axes
    assert [axes.get_ylabel() for axes in grid[::8]] == ["original", "D_det"]
    assert grid[8].get_xlabel() == "1"  # the label after 0
    curves = seen.curves().axes
    assert len(curves[0].lines) == len(seen.histories) == 2


def test_trainings_refuse_nothing_to_draw():
    with pytest.raises(ValueError, match="histories"):
        plots.trainings({})


# --- Recipes ---


def test_the_paper_recipe_is_the_papers():
    recipe = study.Recipe.paper()
    assert recipe.training("standard")["epochs"] == 150
    assert recipe.training("robust")["steps"] == 7
    assert recipe.training("D_rand")["lr"] == 0.01
    assert recipe.training("D_det")["augment"] is None
    assert recipe.training("D_R")["augment"] is af.training.crop_flip
    assert recipe.sets["D_NR"] == {"steps": 1000, "step_size": 0.1}
    assert recipe.sets["D_R from noise"]["steps"] == 10_000
    short = recipe.with_epochs(2)
    assert {short.training(name)["epochs"] for name in ("standard", "robust", *recipe.sets)} == {2}


def test_one_cycle_by_name_is_torchs_own():
    """Its peak at ``lr``, over all steps of the training: a last batch of 2 of 60 counts."""
    rates = []
    af.fit(
        nn.Linear(6, 3), TRAIN, epochs=3, batch_size=29, lr=0.4, schedule="one_cycle", seed=0,
        on_step=lambda row: rates.append(row["lr"]),
    )  # fmt: skip
    own = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(own, 0.4, total_steps=9)
    expected = []
    for _ in range(9):
        expected.append(own.param_groups[0]["lr"])
        own.step()
        schedule.step()
    assert rates == pytest.approx(expected)
    with pytest.raises(ValueError, match="schedule='two_cycle'"):
        af.fit(nn.Linear(6, 3), TRAIN, epochs=1, schedule="two_cycle")
