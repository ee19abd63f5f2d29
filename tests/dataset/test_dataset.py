"""Constructed datasets on disk: whole or not there, memory-mapped, free of pickles."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import advfeat as af


def example(count=7):
    generator = np.random.default_rng(0)
    fields = {
        "images": generator.random((count, 2, 3, 3), dtype=np.float32),
        "labels": generator.integers(0, 5, count),
        "index": np.arange(count),
        "success": generator.random(count) < 0.5,
    }
    return af.ConstructedDataset(
        fields, {"method": "D_det", "settings": {"eps": 0.5, "seed": None}}
    )


def saved(tmp_path):
    folder = tmp_path / "set"
    example().save(folder)
    return folder


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- There and back ---


def test_what_was_saved_is_opened(tmp_path):
    found, expected = af.ConstructedDataset.open(saved(tmp_path)), example()
    assert list(found.fields) == list(expected.fields)
    for name, array in expected.fields.items():
        assert found.fields[name].dtype == array.dtype
        np.testing.assert_array_equal(found.fields[name], array)
    assert found.manifest.items() >= expected.manifest.items()
    assert len(found) == 7


def test_an_opened_set_stays_on_disk(tmp_path):
    found = af.ConstructedDataset.open(str(saved(tmp_path)))
    assert all(isinstance(array, np.memmap) for array in found.fields.values())


def test_a_folder_holds_plain_arrays_and_json_only(tmp_path):
    folder = saved(tmp_path / "new" / "parent")
    assert sorted(path.name for path in folder.iterdir()) == [
        "done.npy",
        "images.npy",
        "index.npy",
        "labels.npy",
        "manifest.json",
        "success.npy",
    ]
    assert json.loads((folder / "manifest.json").read_text())["method"] == "D_det"
    np.testing.assert_array_equal(np.load(folder / "images.npy"), example().fields["images"])
    assert [path.name for path in folder.parent.iterdir()] == ["set"]


def test_an_opened_set_can_be_saved_again(tmp_path):
    found = af.ConstructedDataset.open(saved(tmp_path))
    found.save(tmp_path / "copy")
    again = af.ConstructedDataset.open(tmp_path / "copy")
    assert torch.equal(again.images, found.images)
    assert again.manifest == found.manifest


def test_tensors_of_an_opened_set_are_the_users_own(tmp_path):
    folder = saved(tmp_path)
    found = af.ConstructedDataset.open(folder)
    found.images.zero_()
    found[0][0].zero_()
    next(iter(DataLoader(found, batch_size=7)))[0].zero_()
    np.testing.assert_array_equal(np.load(folder / "images.npy"), example().fields["images"])


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_reads_samples_in_batches(tmp_path, opened, workers):
    rows = af.ConstructedDataset.open(saved(tmp_path)) if opened else example()
    batches = list(DataLoader(rows, batch_size=3, num_workers=workers))
    expected = example()
    assert torch.equal(torch.cat([x for x, _ in batches]), expected.images)
    assert torch.equal(torch.cat([y for _, y in batches]), expected.labels)
    assert batches[0][1].dtype == torch.int64


@pytest.mark.parametrize("opened", [False, True])
def test_accuracy_and_fit_read_a_set(tmp_path, opened):
    rows = af.ConstructedDataset.open(saved(tmp_path)) if opened else example()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(18, 5))
    af.fit(model, rows, epochs=2, batch_size=3, seed=0)
    with torch.no_grad():
        expected = model(example().images).argmax(1) == example().labels
    assert torch.equal(af.accuracy(model, rows, batch_size=2).correct, expected)


# --- Whole or not there ---


def test_a_manifest_that_json_cannot_hold_leaves_nothing(tmp_path):
    rows = example()
    rows.manifest["model"] = object()
    with pytest.raises(TypeError, match="JSON"):
        rows.save(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_needs_a_pickle_leaves_nothing(tmp_path):
    rows = example()
    rows.fields["names"] = np.array([{"name": i} for i in range(7)], dtype=object)
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        rows.save(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_exists_is_not_overwritten(tmp_path, kind):
    target = tmp_path / "set"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="set"):
        example().save(target)
    mine = {"folder": target / "notes.txt", "file": target}.get(kind)
    assert mine is None or mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]


# --- What is not a saved set ---


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_a_manifest_is_refused(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="manifest"):
        af.ConstructedDataset.open(tmp_path / name)


def test_another_format_is_refused(tmp_path):
    folder = saved(tmp_path)
    edit_manifest(folder, format=99)
    with pytest.raises(ValueError, match="format 99"):
        af.ConstructedDataset.open(folder)


@pytest.mark.parametrize("text", ["", '{"format": 1,', "[1]"])
def test_a_broken_manifest_is_refused(tmp_path, text):
    folder = saved(tmp_path)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"folder=.*manifest"):
        af.ConstructedDataset.open(folder)


def test_a_manifest_without_fields_is_refused(tmp_path):
    folder = saved(tmp_path)
    edit_manifest(folder, fields={})
    with pytest.raises(ValueError, match="images and labels must be among them"):
        af.ConstructedDataset.open(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_an_array_cut_short_is_refused(tmp_path, keep):
    folder = saved(tmp_path)
    path = folder / "images.npy"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"images\.npy"):
        af.ConstructedDataset.open(folder)


def test_a_missing_array_is_refused(tmp_path):
    folder = saved(tmp_path)
    (folder / "labels.npy").unlink()
    with pytest.raises(ValueError, match=r"labels\.npy"):
        af.ConstructedDataset.open(folder)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("kind", ["pickle", "object array", "archive"])
def test_what_is_no_plain_array_is_refused_unread(tmp_path, kind):
    folder = saved(tmp_path)
    path = folder / "images.npy"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "object array":
        np.save(path, np.array([Bomb()] * 7, dtype=object), allow_pickle=True)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", b"")
    with pytest.raises(ValueError, match=r"images\.npy"):
        af.ConstructedDataset.open(folder)


def test_arrays_of_different_lengths_are_refused(tmp_path):
    folder = saved(tmp_path)
    np.save(folder / "labels.npy", np.zeros(6, np.int64))
    with pytest.raises(ValueError, match="one entry for each sample"):
        af.ConstructedDataset.open(folder)


# --- In memory ---


def test_images_and_labels_are_required():
    with pytest.raises(ValueError, match=r"fields.*labels"):
        af.ConstructedDataset({"images": np.zeros((2, 3), np.float32)})


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match=r"name='size'.*success"):
        example().field("size")


def test_a_set_ends():
    rows = example()
    assert len(list(rows)) == 7
    with pytest.raises(IndexError):
        rows[7]
    image, label = rows[-1]
    assert torch.equal(image, rows.images[6])
    assert label == rows.labels[6]


def test_a_set_describes_itself():
    assert (
        repr(example()) == "ConstructedDataset(D_det: 7 of 2x3x3; images, labels, index, success)"
    )
