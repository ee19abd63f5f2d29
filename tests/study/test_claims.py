"""Verdicts on the paper's claims: closed cases, null cases, and several seeds in one call."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat import study, training
from advfeat.statistics import paired_difference
from advfeat.study._advice import advise
from advfeat.study._claims import Claim, Evidence, Outcomes, judge


def outcomes(accuracy, robust, shifted=0.0, count=400):
    """Of one model: exactly these fractions, of the first samples; shifted among the wrong ones."""
    place = torch.arange(count)
    return Outcomes(
        (place < accuracy * count)[None],
        {radius: (place < value * count)[None] for radius, value in robust.items()},
        (place >= (1 - shifted) * count)[None],
    )


def paper():
    """The paper's own numbers on CIFAR-10 (D_NR from images)."""
    at = (0.25, 0.5)

    def model(accuracy, *robust, shifted=0.0):
        return outcomes(accuracy, dict(zip(at, robust, strict=True)), shifted)

    return {
        "standard": model(0.9525, 0.0449, 0.0),
        "robust": model(0.9083, 0.8248, 0.7090),
        "D_R": model(0.8540, 0.4820, 0.2185),
        "D_NR": model(0.8768, 0.0082, 0.0),
        "D_rand": model(0.633, 0.0, 0.0),
        "D_rand control": model(0.252, 0.0, 0.0),
        "D_det": model(0.437, 0.0, 0.0, shifted=0.162),
        "D_det control": model(0.058, 0.0, 0.0, shifted=0.655),
    }


def control(name):
    return {"D_rand": "D_rand control", "D_det": "D_det control"}.get(name, "standard")


def test_the_papers_numbers_confirm_the_papers_claims():
    found = judge(paper(), norm="l2", chance=0.1, rarest=0.1, control=control)
    assert [claim.verdict for claim in found] == ["confirmed"] * 6
    of_d_r = next(claim for claim in found if claim.text.startswith("D_R:"))
    # At the radius where the standard model keeps nearest to half of its accuracy.
    assert of_d_r.evidence[0].text == "D_R - standard, l2 0.25"
    measured = paper()
    expected = paired_difference(measured["D_R"].robust[0.25], measured["standard"].robust[0.25])
    assert of_d_r.evidence[0].difference == expected


def test_radii_are_chosen_on_the_standard_and_the_robust_model_alone():
    # The robust model is furthest above the standard one at 1.5, where D_R and its control have
    # nothing left to differ in; at 0.75 the standard model is nearest to half of its accuracy.
    at = (0.375, 0.75, 1.5)

    def model(accuracy, *robust):
        return outcomes(accuracy, dict(zip(at, robust, strict=True)))

    measured = {
        "standard": model(0.98, 0.9, 0.6, 0.02),
        "robust": model(0.98, 0.97, 0.95, 0.8),
        "D_R": model(0.97, 0.93, 0.8, 0.0),
        "D_R control": model(0.98, 0.9, 0.6, 0.01),
        "D_NR": model(0.97, 0.7, 0.3, 0.0),
    }
    found = judge(measured, norm="l2", chance=0.1, rarest=0.1, control=lambda name: "D_R control")
    evidence = [each for claim in found for each in claim.evidence]
    differences = {each.text: round(each.difference.value, 6) for each in evidence}
    assert differences["robust - standard, l2 1.5"] == 0.78
    assert differences["D_R - D_R control, l2 0.75"] == 0.2
    assert differences["D_R - D_NR, l2 0.75"] == 0.5


def test_one_piece_of_evidence_against_it_turns_a_claim_down():
    measured = paper() | {"D_det": outcomes(0.37, {0.25: 0, 0.5: 0}, shifted=0.55)}
    found = judge(measured, norm="l2", chance=0.1, rarest=0.1, control=control)
    verdicts = {claim.text.split(":")[0]: claim.verdict for claim in found}
    assert verdicts["D_det"] == "not confirmed"
    assert verdicts["D_rand"] == "confirmed"
    # The same above chance, but level with its control.
    measured = paper() | {"D_det": outcomes(0.437, {0.25: 0, 0.5: 0}, shifted=0.437)}
    found = judge(measured, norm="l2", chance=0.1, rarest=0.1, control=control)
    assert [c.verdict for c in found if c.text.startswith("D_det:")] == ["undecided"]


def test_what_was_not_measured_is_left_out():
    measured = {name: paper()[name] for name in ("standard", "robust", "D_R")}
    found = judge(measured, norm="l2", chance=0.1, rarest=0.1, control=lambda name: None)
    assert [len(claim.evidence) for claim in found] == [1, 1]
    alone = {"standard": paper()["standard"]}
    assert judge(alone, norm="l2", chance=0.1, rarest=0.1, control=control) == ()


def test_what_is_against_the_paper_is_said_plainly():
    """A study of MNIST: D_R below the standard model, the control above D_det."""
    measured = {
        "standard": outcomes(0.985, {0.75: 0.777}, count=1000),
        "robust": outcomes(0.98, {0.75: 0.963}, count=1000),
        "D_R": outcomes(0.971, {0.75: 0.514}, count=1000),
        "D_det": outcomes(0.27, {0.75: 0.0}, shifted=0.305, count=1000),
        "D_det control": outcomes(0.358, {0.75: 0.0}, shifted=0.526, count=1000),
    }
    found = judge(measured, norm="l2", chance=0.1, rarest=0.1, control=control)
    notes = [each.note for claim in found for each in claim.evidence]
    text = "\n".join(note for note in notes if note)
    assert "D_R is less robust than standard: D_R - standard, l2 0.75 is -26.3" in text
    assert "D_det control teaches more than D_det: D_det - D_det control, accuracy is -8.8" in text
    assert "Undecided: D_det, original - shifted labels is -3.5" in text
    assert [note for each in judge(paper(), norm="l2", chance=0.1, rarest=0.1, control=control)
            for note in (one.note for one in each.evidence) if note] == []  # fmt: skip
    worse = {**measured, "D_det": outcomes(0.1, {0.75: 0.0}, shifted=0.6, count=1000)}
    found = judge(worse, norm="l2", chance=0.1, rarest=0.1, control=control)
    text = "\n".join(each.note or "" for claim in found for each in claim.evidence)
    assert "The model of D_det predicts shifted labels more often than original ones" in text


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
def test_models_that_guess_confirm_nothing(seeds):
    """100 studies of models that know nothing: each difference is wrong in at most 8%."""
    generator = torch.Generator().manual_seed(0)
    wrong = total = 0
    for _ in range(100):

        def guess(labels):
            answers = torch.randint(10, (seeds, 200), generator=generator)
            right, half = answers == labels, torch.rand(seeds, 200, generator=generator) < 0.5
            return Outcomes(right, {0.5: right & half}, answers == (labels + 1) % 10)

        labels = torch.randint(10, (200,), generator=generator)
        counts = labels.bincount(minlength=10) / 200
        constant = {"chance": float(counts.max()), "rarest": float(counts.min())}
        measured = {name: guess(labels) for name in paper()}
        found = judge(measured, norm="l2", **constant, control=control)
        evidence = [each for claim in found for each in claim.evidence]
        wrong += sum(each.verdict != "undecided" for each in evidence)
        total += len(evidence)
    assert wrong / total <= 0.08


def test_a_control_that_is_ahead_and_two_models_of_shifted_labels_are_explained():
    """The default call on 2,000 images of MNIST."""
    measured = {
        "standard": outcomes(0.962, {1.5: 0.386}, count=500),
        "robust": outcomes(0.958, {1.5: 0.752}, count=500),
        "D_R": outcomes(0.942, {1.5: 0.324}, count=500),
        "D_R control": outcomes(0.968, {1.5: 0.454}, count=500),
        "D_det": outcomes(0.030, {1.5: 0.0}, shifted=0.934, count=500),
        "D_det control": outcomes(0.030, {1.5: 0.0}, shifted=0.920, count=500),
    }
    given = {"norm": "l2", "chance": 0.146, "rarest": 0.08}
    found = judge(measured, **given, control=lambda name: f"{name} control")
    text = "\n".join(each.note or "" for claim in found for each in claim.evidence)
    assert "+29.8 points above D_R control there, and D_R passes on none of them" in text
    assert "predict shifted labels for 93.4% and 92.0%" in text
    measured["D_det"] = outcomes(0.6, {1.5: 0.0}, shifted=0.1, count=500)
    found = judge(measured, **given, control=lambda name: f"{name} control")
    text = "\n".join(each.note or "" for claim in found for each in claim.evidence)
    assert "predict shifted labels for" not in text


def test_less_than_the_commonest_class_is_not_misled():
    """Of labels 60 to 40 percent a model that guesses has half right; one that has 10% misleads."""

    def verdict(accuracy):
        measured = paper() | {"D_rand": outcomes(accuracy, {0.25: 0, 0.5: 0})}
        found = judge(measured, norm="l2", chance=0.6, rarest=0.4, control=lambda name: None)
        (evidence,) = next(c for c in found if c.text.startswith("D_rand:")).evidence
        return evidence.verdict, evidence.note

    assert verdict(0.7) == ("confirmed", None)
    undecided, note = verdict(0.5)
    assert undecided == "undecided"
    assert "-10.0" in note
    assert "guesses" in note
    against, note = verdict(0.1)
    assert against == "not confirmed"
    assert note.startswith("D_rand misleads")


def test_notes_name_the_number_and_the_remedy():
    accuracy = {"standard": 0.98, "robust": 0.80}
    made = {
        "D_det": {"success": 0.5},
        "D_det control": {"success": 0.46},
        "D_R": {"distance": 0.36, "distance_before": 1.0},
    }
    found = advise(accuracy, {0.5: 0.1, 1.0: 0.29}, made, "l2")
    for text, numbers in zip(
        found, (["80.0%", "98.0%"], ["+29.0", "l2 1"], ["50.0%"], ["46.0%"], ["36%"]), strict=True
    ):
        assert all(number in text for number in numbers)
    fine = {"D_det": {"success": 0.99}, "D_R": {"distance": 0.1, "distance_before": 1.0}}
    assert advise({"standard": 0.98, "robust": 0.95}, {0.5: 0.6}, fine, "l2") == []


# --- Through `run` ---


def data(seed, count=60):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    place = 0.35 * nn.functional.one_hot(labels, 3).float().repeat(1, 2)
    order = labels.argsort()  # sorted by class, as files on a disk are
    inputs = 0.6 * torch.rand(count, 6, generator=generator) + place
    return TensorDataset(inputs[order], labels[order])


RECIPE = study.Recipe(
    standard={"epochs": 2, "batch_size": 20, "lr": 0.5},
    robust={"steps": 2},
    sets={
        "D_R": {"layer": "0", "steps": 3},
        "D_R control": {},
        "D_det": {"steps": 3, "eps": 0.4},
        "D_det control": {},
    },
    fresh={"D_R": {"lr": 0.3}, "D_det": {"epochs": 3}},
    measured={"steps": 3},
    samples=30,
)


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def run(**changes):
    given = {"eps": 0.2, "norm": "l2", "recipe": RECIPE, "seed": 3, "device": "cpu", **changes}
    return study.run(network, data(0), data(1, 42), **given)


STAGES = [f"measure {name}" for name in ("standard", "robust", *RECIPE.sets)]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return run(seeds=3, out=tmp_path_factory.mktemp("seeds"), stages=STAGES)


@pytest.mark.slow
def test_a_control_is_trained_as_its_dataset_is():
    """The same first weights, steps and settings; the original images of the same samples."""
    found = run(stages=STAGES)
    work = found._found.work
    for name in ("D_R", "D_det"):
        own, other = (found.histories[n].rows for n in (name, f"{name} control"))
        assert len(own) == len(other)
        assert [epoch["lr"] for epoch in own] == [epoch["lr"] for epoch in other]
        first = [next(work._fresh(n).parameters()) for n in (name, f"{name} control")]
        assert torch.equal(*first)
    inputs, labels = data(0).tensors
    by_hand = work._fresh("D_R")
    af.fit(
        by_hand, TensorDataset(inputs[:30], labels[:30]), epochs=2, batch_size=20, lr=0.3,
        seed=work._training_seed("D_R"),
    )  # fmt: skip
    for one, same in zip(
        by_hand.parameters(), found.model("D_R control").parameters(), strict=True
    ):
        assert torch.equal(one, same)
    det, robust = found.dataset("D_det"), found.dataset("D_det control")
    assert det.manifest["settings"] == robust.manifest["settings"]
    assert det.manifest["model"] != robust.manifest["model"]
    differences = {e.text for claim in found.claims for e in claim.evidence}
    assert any(text.startswith("D_R - D_R control, l2") for text in differences)
    assert "D_det - D_det control, accuracy" in differences


def test_several_starts_take_no_more_steps_and_the_control_repeats_its_images():
    sets = {"D_R": {"layer": "0", "steps": 3, "starts": 2}, "D_R control": {}, "D_NR": {}}
    recipe = dataclasses.replace(RECIPE, sets=sets, fresh={"D_R": {"epochs": 4}})
    assert recipe.control("D_NR") is None
    found = run(recipe=recipe, stages=["train on D_R", "train on D_R control"])
    assert len(found.dataset("D_R")) == 60
    assert [len(found.histories[n].rows) for n in ("D_R", "D_R control")] == [2, 2]
    steps = [[e["steps"] for e in found.histories[n].rows if "steps" in e] for n in
             ("D_R", "D_R control")]  # fmt: skip
    assert steps[0] == steps[1]


def test_a_control_that_still_learns_its_samples_is_named_where_d_r_is_not_above_it():
    stages = [f"measure {name}" for name in ("standard", "robust", "D_R", "D_R control")]
    found = run(stages=stages)
    loss = found.histories["D_R control"].rows[-1]["loss"]
    assert loss > 0.1  # two epochs
    said = [note for note in found.notes if "training loss of D_R control" in note]
    assert len(said) == 1
    assert f"is {loss:.2g} at the end" in said[0]
    options = training.Options(label_smoothing=0.1)  # its loss is never near 0
    smooth = dataclasses.replace(RECIPE, standard={**RECIPE.standard, "options": options})
    assert not any("training loss" in note for note in run(stages=stages, recipe=smooth).notes)


def test_the_gap_is_noted_once_and_only_where_d_r_has_no_gain():
    names = ("standard", "robust", "D_R", "D_R control")
    found = run(stages=[f"measure {name}" for name in names])
    warned = study.Calibration({}, (), ("Nowhere 30 points",), {}, 0.0)
    early = run(stages=["measure standard"])
    assert "Nowhere" in str(type(early)(early._found.runs, warned))
    text = str(type(found)(found._found.runs, warned))
    assert "little robustness that D_R could pass on" in text
    assert "Nowhere" not in text  # the study has measured it itself
    right = torch.ones(1, 40, dtype=torch.bool)
    wrong = torch.arange(40)[None] % 2 > 0
    gain = Evidence("D_R - D_R control, l2 0.1", paired_difference(right, wrong))
    found._found.__dict__["claims"] = (Claim("D_R", (gain,)),)
    assert gain.verdict == "confirmed"
    assert not any("little robustness" in note for note in found.notes)


def test_chance_is_that_of_the_commonest_class_also_of_sorted_data():
    found = run(stages=["measure standard"])
    assert found.chance == pytest.approx(1 / 3)
    line = found.plot().lines[0]
    assert line.get_ydata()[0] == pytest.approx(100 / 3)
    inputs, labels = data(1, 42).tensors
    uneven = TensorDataset(inputs[:33], labels[:33])  # 14, 14, 5
    skewed = study.run(
        network, data(0), uneven, eps=0.2, norm="l2", recipe=RECIPE, seed=3,
        stages=["measure standard"],
    )  # fmt: skip
    assert skewed.chance == pytest.approx(14 / 33)


def test_without_a_control_of_its_own_training_must_be_the_same():
    recipe = study.Recipe(standard={"epochs": 2}, fresh={"D_det": {"lr": 0.01}})
    assert recipe.control("D_NR") == "D_R control"
    assert study.Recipe.paper().control("D_R") == "standard"
    assert study.Recipe.paper().control("D_det") == "D_det control"
    other = study.Recipe(standard={}, sets={"D_R": {}}, fresh={"D_R": {"lr": 0.01}})
    assert other.control("D_R") is None
    some = study.Recipe(standard={}, sets={"D_R": {}}, samples=30)
    assert some.control("D_R") is None


@pytest.mark.slow
def test_several_seeds_are_the_studies_of_each(three):
    assert [part.settings["seed"] for part in three.runs] == [3, 4, 5]
    alone = run(seed=4, stages=STAGES)
    assert three.runs[1].table("json") == alone.table("json")
    fractions = json.loads(three.table("json"))["D_R"]["accuracy"]
    assert [each["fraction"] for each in fractions] == [
        float(part.measured["D_R"].standard) for part in three.runs
    ]
    cell = three.table("csv").splitlines()[3].split(",")[1]
    values = [100 * each["fraction"] for each in fractions]
    assert cell == f"{sum(values) / 3:.1f} ({min(values):.1f} to {max(values):.1f})"
    first = three.claims[0].evidence[0].difference
    assert (first.repeats, first.samples) == (3, 42)
    radius = float(three.claims[0].evidence[0].text.split()[-1])
    both = [torch.stack([p.measured[n].robust[radius].correct for p in three.runs])
            for n in ("robust", "standard")]  # fmt: skip
    assert first == paired_difference(*both)
    assert "3 trainings of each model" in str(three)
    assert "One training of each model" in str(three.runs[0])


@pytest.mark.slow
def test_what_is_of_one_seed_is_asked_of_one_run(three):
    with pytest.raises(ValueError, match=r"3 seeds; take it from one of \.runs"):
        _ = three.measured
    assert set(three.runs[0].measured) == {"standard", "robust", *RECIPE.sets}
    assert three.settings["seed"] == [3, 4, 5]
    bars = three.plot()
    assert len(bars.get_xticklabels()) == 6


@pytest.mark.slow
def test_several_seeds_resume_and_grow(three):
    out = three._found.work.stages.folder.parent
    page = (out / "report.html").read_text()
    assert "lowest and highest of all seeds" in page
    assert "Claims of the paper" in page
    done = []
    more = run(seeds=4, out=out, stages=STAGES, on_stage=lambda name, seconds: done.append(name))
    assert len(more.runs) == 4
    assert more.runs[2].table("json") == three.runs[2].table("json")
    assert {part.settings["seed"] for part in more.runs} == {3, 4, 5, 6}


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"seeds": 0}, ValueError, "seeds=0"),
        ({"seeds": [1, 2]}, ValueError, "seed=3"),
        ({"seeds": [1, 1], "seed": None}, ValueError, "twice"),
        ({"seeds": "three", "seed": None}, TypeError, "seeds='three'"),
    ],
)
def test_bad_seeds_are_refused(changes, error, named):
    with pytest.raises(error, match=named):
        run(on_stage=lambda *_: pytest.fail("work was done"), **changes)


@pytest.mark.parametrize(
    ("sets", "named"),
    [
        ({"D_det noise control": {}}, "made of D_det"),
        ({"D_R": {}, "D_R control": {"steps": 3}}, "takes no settings"),
    ],
)
def test_controls_of_nothing_are_refused(sets, named):
    with pytest.raises(ValueError, match=named):
        study.Recipe(standard={}, sets=sets)
