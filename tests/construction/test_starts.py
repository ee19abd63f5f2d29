"""Several starts for each sample of the data."""

import numpy as np
import pytest
import torch
from builds import CLASSES, INVERTED, SAMPLES, build, dataset, network
from torch.utils.data import DataLoader, Subset

import advfeat as af
from advfeat.attacks import invert
from advfeat.datasets import StartSampler, moved_control, noise_control


@pytest.mark.parametrize("start", ["images", "noise"])
@pytest.mark.parametrize("method", INVERTED)
def test_the_first_start_is_the_dataset_of_one_start(method, start):
    one, three = build(method, start=start), build(method, start=start, starts=3)
    assert len(three) == 3 * SAMPLES
    assert three.manifest["settings"]["starts"] == 3
    assert torch.equal(three.field("index"), torch.arange(SAMPLES).repeat(3))
    assert torch.equal(three.field("start_number"), torch.arange(3).repeat_interleave(SAMPLES))
    first = three.subset(three.field("start_number") == 0)
    for name in one.fields:
        torch.testing.assert_close(first.field(name), one.field(name), atol=1e-6, rtol=1e-5)
    assert torch.equal(three.labels, dataset().tensors[1].repeat(3))


def test_starts_of_a_sample_are_different_images_and_never_its_own():
    made = build("D_R", data=dataset(6), starts=5, steps=1)
    starts = made.field("start_index").view(5, 6)
    for sample in range(6):
        assert sorted(starts[:, sample].tolist()) == [i for i in range(6) if i != sample]


def test_each_start_is_drawn_uniformly_over_the_other_images():
    made = build("D_R", data=dataset(400), starts=3, steps=1, batch_size=400)
    steps_on = (made.field("start_index") - made.field("index") - 1) % 400
    for number in range(3):
        counts = torch.histc(steps_on.view(3, 400)[number].float(), 4, 0, 399)
        assert counts.min() > 70
        assert counts.max() < 130


def test_noise_of_each_start_is_its_own():
    made = build("D_NR", start="noise", starts=4, steps=1)
    images = made.images.view(4, SAMPLES, -1)
    assert all(not torch.equal(images[0], images[k]) for k in range(1, 4))


def test_given_starts_go_to_their_sample_and_number():
    given = torch.rand(2, SAMPLES, 1, 3, 3)
    made = build("D_R", start=given, starts=2, steps=1, step_size=1e-9)
    torch.testing.assert_close(made.images.view_as(given), given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"starts": 0}, "starts=0"),
        ({"starts": SAMPLES}, f"starts={SAMPLES}: there are {SAMPLES - 1} other images"),
        ({"starts": 2, "start": torch.rand(SAMPLES, 1, 3, 3)}, r"start\.shape"),
    ],
)
def test_starts_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("D_R", **options)


def test_a_sample_does_not_depend_on_batches_patience_or_the_folder(tmp_path):
    whole = build("D_R", starts=2)
    for options in ({"batch_size": 7}, {"out": tmp_path / "set"}, {"patience": 1000}):
        made = build("D_R", starts=2, **options)
        torch.testing.assert_close(made.images, whole.images, atol=1e-6, rtol=1e-5)
        assert torch.equal(made.field("index"), whole.field("index"))


def test_a_folder_with_other_starts_is_refused(tmp_path):
    build("D_R", tmp_path / "set", starts=2)
    with pytest.raises(ValueError, match="starts=2 there, None here"):
        build("D_R", tmp_path / "set")


def test_a_part_of_the_data_keeps_its_indices():
    data = DataLoader(dataset(), batch_size=5, sampler=[3, 8, 4, 20])
    made = build("D_R", data=data, starts=2)
    assert made.field("index").tolist() == [3, 4, 8, 20] * 2


def test_pairs_give_the_source_of_every_start():
    made = build("D_R", starts=3)
    pairs = made.pairs(dataset())
    assert len(pairs) == 3 * SAMPLES
    for position in (0, SAMPLES, 2 * SAMPLES + 5):
        source, image = pairs[position]
        assert torch.equal(source, dataset()[position % SAMPLES][0])
        assert torch.equal(image, made[position][0])


def test_controls_know_starts():
    made, data = build("D_R", starts=3), dataset()
    noise, moved = noise_control(made, data, seed=0), moved_control(made, data, seed=0)
    torch.testing.assert_close(noise.field("size"), made.field("size"), atol=1e-4, rtol=1e-4)
    assert torch.equal(noise.field("start_number"), made.field("start_number"))
    giver = moved.field("moved_from")
    assert (made.field("index")[giver] != moved.field("index")).all()
    assert (made.labels[giver] == moved.labels).all()


def test_the_sampler_draws_every_image_once_and_every_start_in_time():
    made = build("D_R", starts=3)
    sampler = StartSampler(made, torch.Generator().manual_seed(0))
    seen = set()
    for _ in range(30):
        positions = list(sampler)
        assert len(positions) == len(sampler) == SAMPLES
        assert sorted(made.field("index")[positions].tolist()) == list(range(SAMPLES))
        seen |= set(positions)
    assert seen == set(range(3 * SAMPLES))
    loader = DataLoader(made, batch_size=6, sampler=StartSampler(made))
    assert sum(len(labels) for _, labels in loader) == SAMPLES


def test_the_sampler_of_a_part_and_of_one_start_shuffles():
    part = build("D_R", starts=2).subset(np.arange(SAMPLES + 3))
    assert sorted(part.field("index")[list(StartSampler(part))].tolist()) == list(range(SAMPLES))
    one = build("D_R")
    assert sorted(StartSampler(one)) == list(range(SAMPLES))
    nothing = af.ConstructedDataset({"images": np.zeros((2, 3), "f4"), "labels": np.arange(2)})
    with pytest.raises(ValueError, match="does not record the index"):
        StartSampler(nothing)


def test_invert_takes_several_starts():
    model, inputs = network(), torch.rand(4, 1, 3, 3)
    start = torch.rand(3, 4, 1, 3, 3)
    found = invert(model, inputs, start, steps=3)
    assert found.shape == start.shape
    for number in range(3):
        assert torch.equal(found[number], invert(model, inputs, start[number], steps=3))
    with pytest.raises(ValueError, match=r"start\.shape"):
        invert(model, inputs, torch.rand(3, 5, 1, 3, 3), steps=3)


def test_training_on_several_starts():
    made = build("D_R", starts=2)
    model = network()
    af.fit(model, DataLoader(made, batch_size=8, sampler=StartSampler(made)), epochs=1, seed=0)
    image, _ = Subset(made, [SAMPLES])[0]
    assert model.eval()(image[None]).shape == (1, CLASSES)
