"""What inspect tells of a set, and the two controls beside it."""

import numpy as np
import pytest
import torch
from builds import CLASSES, METHODS, SAMPLES, build, dataset

import advfeat as af
from advfeat import threat
from advfeat.datasets import inspect, moved_control, noise_control


def made_by_hand():
    images = np.linspace(0, 1, 5 * 4, dtype=np.float32).reshape(5, 1, 2, 2)
    images[4] = images[2]
    fields = {
        "images": images,
        "labels": np.array([0, 2, 2, 0, 2]),
        "source_labels": np.array([0, 1, 0, 1, 2]),
        "success": np.array([True, True, False, False, True]),
        "size": np.array([0.1, 0.2, 0.3, 0.4, 0.5], np.float32),
        "distance_before": np.full(5, 4.0, np.float32),
        "distance": np.arange(5, dtype=np.float32),
    }
    return af.ConstructedDataset(fields, {"method": "by hand"})


def test_every_number_by_hand():
    found = inspect(made_by_hand())
    assert found.samples == 5
    assert found.label_counts == (2, 0, 3)
    assert (found.lowest, found.outside, found.duplicates) == (0.0, 0, 2)
    assert found.highest == pytest.approx(15 / 19)
    assert found.success == pytest.approx(0.6)
    assert found.own_label == pytest.approx(0.4)
    assert (found.distance_before, found.distance) == (4.0, 2.0)
    assert sum(found.size_counts) == 5
    assert (found.size_edges[0], found.size_edges[-1]) == pytest.approx((0.1, 0.5))
    assert found.rounding is None
    text = str(found)
    for told in (
        "5 samples",
        "3 classes of 0 to 3",
        "2 duplicates",
        "attack success: 0.6",
        " to 0.5: 1",
    ):
        assert told in text


@pytest.mark.parametrize("bad", [-0.01, 1.01, np.nan])
def test_images_outside_the_bounds_are_counted(bad):
    made = made_by_hand()
    made.fields["images"][3, 0, 1, 1] = bad
    assert inspect(made).outside == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_set_of_each_kind_is_inspected(method, dtype, tmp_path):
    found = inspect(build(method, tmp_path / "set", dtype=dtype))
    assert found.method == method
    assert found.outside == 0
    assert (found.success is None) == (method in {"D_R", "D_NR"})
    assert (found.distance is None) == (method in {"D_det", "D_rand"})
    assert (found.rounding is None) == (dtype == "float32")
    assert str(found)


# --- Controls ---


def bases(method, made):
    field = "start_index" if method == "D_R" else "index"
    return dataset().tensors[0][made.field(field)]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("D_R", {}),
        ("D_det", {}),
        ("D_det", {"norm": "linf"}),
        ("D_det", {"norm": "l1"}),
        ("D_rand", {"bounds": (-1.0, 2.0)}),
    ],
)
def test_noise_has_the_norm_of_the_perturbation_and_nothing_else_of_it(method, options):
    made = build(method, **options)
    control = noise_control(made, dataset(), seed=0)
    assert torch.equal(control.labels, made.labels)
    assert torch.equal(control.field("index"), made.field("index"))
    low, high = options.get("bounds", (0.0, 1.0))
    assert control.images.min() >= low
    assert control.images.max() <= high
    noise = control.images - bases(method, control)
    sizes = threat.size(noise, options.get("norm", "l2"))
    torch.testing.assert_close(sizes, made.field("size"), rtol=0, atol=2e-3)
    torch.testing.assert_close(sizes, control.field("size"))
    perturbation = made.images - bases(method, made)
    alike = torch.cosine_similarity(noise.flatten(1), perturbation.flatten(1))
    assert alike.mean().abs() < 0.3


@pytest.mark.parametrize("method", ["D_R", "D_det", "D_rand"])
def test_each_perturbation_is_moved_to_another_image_with_its_label(method):
    made = build(method, bounds=(-5.0, 6.0))  # nothing is clipped
    control = moved_control(made, dataset(), seed=0)
    giver = control.field("moved_from")
    assert (giver != control.field("index")).all()
    assert giver.unique().numel() == len(control)
    assert torch.equal(control.labels, made.labels[giver])
    assert torch.equal(control.labels, made.labels[control.field("index")])
    perturbation = (made.images - bases(method, made))[giver]
    torch.testing.assert_close(control.images - bases(method, control), perturbation)


def test_the_only_sample_of_a_label_is_left_out():
    made = build("D_det")
    made.fields["labels"][:] = 0
    made.fields["labels"][5] = 1
    control = moved_control(made, dataset(), seed=0)
    assert len(control) == SAMPLES - 1
    assert 5 not in control.field("index")
    made.fields["labels"][:] = np.arange(SAMPLES)
    with pytest.raises(ValueError, match="no label has two samples"):
        moved_control(made, dataset(), seed=0)


@pytest.mark.parametrize("control", [noise_control, moved_control])
def test_a_control_has_a_seed_and_says_what_it_is(control):
    made = build("D_rand")
    one, again, other = (control(made, dataset(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, other.images)
    assert one.manifest["method"].startswith("D_rand, ")
    assert one.labels.max() < CLASSES


@pytest.mark.parametrize("control", [noise_control, moved_control])
def test_a_set_from_noise_has_no_controls(control):
    made = build("D_R", start="noise")
    with pytest.raises(ValueError, match="start='images'"):
        control(made, dataset(), seed=0)


def test_norms_that_differ_by_rounding_have_a_histogram():
    low = np.float32(0.5)
    fields = {
        "images": np.eye(2, 4, dtype=np.float32),
        "labels": np.array([0, 1]),
        "size": np.array([low, np.nextafter(low, np.float32(1))]),
    }
    found = inspect(af.ConstructedDataset(fields, {"method": "any"}))
    assert sum(found.size_counts) == 2
    assert str(found).endswith("\nsize of the perturbation: 0.5")
