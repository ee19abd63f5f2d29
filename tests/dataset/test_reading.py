"""Every way of reading a constructed dataset: positions, workers, subclasses, wrappers, pickles."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

import advfeat as af
from advfeat.datasets import export_images, export_released, import_images, import_released
from advfeat.loading import Source

COUNT = 12


def example(levels=False, count=COUNT):
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 4, 4)).astype(np.uint8)
    pixels = images if levels else images.astype(np.float32) / 255
    fields = {"images": pixels, "labels": np.arange(count) % 5, "index": np.arange(count)[::-1]}
    return af.ConstructedDataset(fields)


@pytest.fixture(params=["in memory", "on disk"])
def made(request, tmp_path):
    dataset = example()
    if request.param == "in memory":
        return dataset
    dataset.save(tmp_path / "set")
    return af.ConstructedDataset.open(tmp_path / "set")


# --- Positions ---


def test_single_positions(made):
    for position in (3, np.int64(3), torch.tensor(3), 3 - COUNT):
        image, label = made[position]
        assert torch.equal(image, made.images[3])
        assert label == 3
        assert type(label) is int
    for position in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError, match=f"the dataset has {COUNT} samples"):
            made[position]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, -4), [11, 7, 3]),
        ([4, -1], [4, 11]),
        (torch.tensor([1, 0]), [1, 0]),
        (np.array([], np.int64), []),
        ([], []),
        ([True] + [False] * (COUNT - 1), [0]),
    ],
)
def test_several_positions_give_a_batch_and_a_part(made, positions, expected):
    images, labels = made[positions]
    part = made.subset(positions)
    assert torch.equal(images, made.images[expected])
    assert torch.equal(labels, made.labels[expected])
    assert labels.dtype == torch.int64
    assert torch.equal(part.images, images)
    assert torch.equal(part.field("index"), made.field("index")[expected])
    assert len(part) == len(expected)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (3, TypeError, r"dataset\[i\]"),
        ("3", TypeError, "expected"),
        ([0.5], TypeError, "integers or a mask"),
        ([[0, 1]], TypeError, "of one axis"),
        ([0, COUNT], IndexError, f"{COUNT} is outside"),
        ([True, False], ValueError, "a mask needs one entry"),
        (None, TypeError, "expected"),
    ],
)
def test_what_is_no_position_is_refused(made, positions, error, message):
    with pytest.raises(error, match=message):
        made.subset(positions)


@pytest.mark.parametrize("name", ["done", "Done", "class-name", "../up", "", 3])
def test_a_name_that_is_no_file_is_refused(name, tmp_path):
    fields = dict(example().fields)
    with pytest.raises(ValueError, match="fields="):
        af.ConstructedDataset({**fields, name: np.arange(COUNT)})
    added = example()
    added.fields[name] = np.arange(COUNT)
    with pytest.raises(ValueError, match="fields="):
        added.save(tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "labels", [np.zeros(COUNT), np.zeros((COUNT, 3), int), np.zeros(COUNT, "U")]
)
def test_labels_are_integers(labels):
    with pytest.raises(TypeError, match=r"fields\['labels'\]"):
        af.ConstructedDataset({"images": np.zeros((COUNT, 2), "f4"), "labels": labels})


def test_tensors_are_fields_too():
    made = af.ConstructedDataset({"images": torch.ones(2, 3), "labels": torch.arange(2)})
    assert made.labels.tolist() == [0, 1]


# --- A subclass has a say, whoever reads ---


class Brighter(af.ConstructedDataset):
    """A transform, as users write it."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + 10, label


class Wrapped(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return image + 10, label


def ways(made):
    yield "loader", DataLoader(made, batch_size=5)
    yield "workers", DataLoader(made, batch_size=5, num_workers=2)
    yield "subset", DataLoader(Subset(made, range(COUNT)), batch_size=5)
    yield "nested subsets", DataLoader(Subset(Subset(made, range(COUNT)), range(COUNT)))
    yield "concatenation", DataLoader(ConcatDataset([made, Subset(made, [])]), batch_size=5)
    yield "sampler", DataLoader(made, sampler=SequentialSampler(made), batch_size=4)
    batches = BatchSampler(SequentialSampler(made), 5, drop_last=False)
    yield "batch sampler", DataLoader(made, batch_sampler=batches)
    yield "whole batches", DataLoader(made, batch_size=None, sampler=batches)
    yield "items", [(image[None], torch.tensor([label])) for image, label in made]
    indices = [range(0, 7), range(7, COUNT)]
    yield "getitems", [torch.utils.data.default_collate(made.__getitems__(i)) for i in indices]
    yield "source", [b[1:3] for b in Source(made, 5).batches(torch.device("cpu"))]
    yield "part", DataLoader(made.subset(slice(None)), batch_size=5)


@pytest.mark.parametrize("kind", [Brighter, "opened", "plain"])
def test_every_way_of_reading_goes_through_the_users_code(kind, tmp_path):
    plain = example()
    plain.save(tmp_path / "set")
    made = {
        Brighter: lambda: Brighter(plain.fields),
        "opened": lambda: Brighter.open(tmp_path / "set"),
        "plain": lambda: plain,
    }[kind]()
    added = 0 if kind == "plain" else 10
    for name, batches in ways(made):
        images, labels = (torch.cat(list(part)) for part in zip(*batches, strict=True))
        torch.testing.assert_close(images, plain.images + added, msg=name)
        assert torch.equal(labels, plain.labels), name


def test_a_wrapper_is_read_as_itself():
    plain = example()
    images = torch.cat([images for images, _ in DataLoader(Wrapped(plain), batch_size=5)])
    torch.testing.assert_close(images, plain.images + 10)
    weighted = WeightedRandomSampler([0.0] * (COUNT - 1) + [1.0], 3)
    for images, labels in DataLoader(Wrapped(plain), sampler=weighted, batch_size=3):
        assert torch.equal(images, plain.images[[-1] * 3] + 10)
        assert labels.tolist() == [(COUNT - 1) % 5] * 3


def test_a_part_of_a_subclass_keeps_class_and_attributes():
    made = Brighter(example().fields)
    made.note = "mine"
    part = made.subset([1, 2])
    assert type(part) is Brighter
    assert part.note == "mine"
    assert len(made) == COUNT
    part.manifest["note"] = 1
    assert "note" not in made.manifest


# --- Pickles ---


def parts(opened):
    yield opened, range(COUNT)
    yield opened.subset(slice(3, 9)), range(3, 9)
    yield opened.subset(slice(None, None, -2)), range(COUNT - 1, -1, -2)
    yield opened.subset(slice(4, 11)).subset(slice(1, 6, 3)), [5, 8]
    yield opened.subset(slice(5, 5)), []


def big(folder):
    """A dataset of 3 MB on disk."""
    fields = {"images": np.random.rand(COUNT, 256, 256).astype("f4"), "labels": np.arange(COUNT)}  # noqa: NPY002
    af.ConstructedDataset(fields).save(folder)
    return af.ConstructedDataset.open(folder)


def test_what_is_on_disk_is_pickled_by_its_files(tmp_path):
    opened = big(tmp_path / "set")
    for part, indices in parts(opened):
        data = pickle.dumps(part)
        assert len(data) < 5000
        again = pickle.loads(data)
        assert torch.equal(again.images, opened.images[list(indices)])
        assert torch.equal(again.labels, opened.labels[list(indices)])
        assert len(pickle.dumps(again)) < 5000
        assert torch.equal(pickle.loads(pickle.dumps(again)).images, again.images)
    assert len(pickle.dumps(Subset(opened, [3, 4]))) < 5000
    assert len(pickle.dumps(ConcatDataset([opened]))) < 5000
    assert torch.equal(copy.deepcopy(opened).images, opened.images)
    # In memory there is no file to name.
    assert len(pickle.dumps(opened.subset([0]))) > 256 * 256 * 4


def test_shards_of_ranks_are_pickled_by_their_files(tmp_path):
    whole = example(count=COUNT)
    for rank in range(2):
        part = whole.subset(slice(rank, None, 2))
        part.fields = {**part.fields, "index": np.arange(rank, COUNT, 2)}
        part.manifest = {"shard": {"rank": rank, "of": 2}, "versions": {}}
        part.save(tmp_path / f"rank-{rank}")
    opened = af.ConstructedDataset.open(tmp_path)
    assert torch.equal(opened.images, whole.images)
    again = pickle.loads(pickle.dumps(opened))
    assert torch.equal(again.images, whole.images)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver", "fork"])
def test_workers_of_every_kind_read_it(start, tmp_path):
    example().save(tmp_path / "set")
    opened = af.ConstructedDataset.open(tmp_path / "set")
    # A spawned worker imports torch: one is enough for what is pickled.
    whole = (opened,) if start == "spawn" else (opened, Subset(opened, range(COUNT)))
    for data in whole:
        workers = 1 if start == "spawn" else 2
        loader = DataLoader(data, batch_size=5, num_workers=workers, multiprocessing_context=start)
        images, labels = (torch.cat(list(part)) for part in zip(*loader, strict=True))
        assert torch.equal(images, opened.images)
        assert torch.equal(labels, opened.labels)


# --- The home folder ---


def test_a_tilde_is_the_home_folder_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    plain = example(levels=True)
    plain.save("~/a/saved")
    export_images(plain, "~/a/images")
    export_released(plain, Path("~/a/released"))
    assert torch.equal(af.ConstructedDataset.open("~/a/saved").images, plain.images)
    assert torch.equal(import_images("~/a/images").labels.sort()[0], plain.labels.sort()[0])
    assert torch.equal(import_released("~/a/released").labels, plain.labels)
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    data = torch.utils.data.TensorDataset(torch.rand(4, 6), torch.arange(4) % 3)
    built = af.construct_det_dataset(model, data, eps=0.1, steps=1, out="~/a/built")
    assert torch.equal(af.ConstructedDataset.open(tmp_path / "a" / "built").images, built.images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
