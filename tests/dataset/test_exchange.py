"""Formats of others: the paper's release and folders of PNGs, there and back; no code is run."""

import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import advfeat as af
from advfeat.datasets import export_images, export_released, import_images, import_released

PAGE = Path(__file__).parents[2] / "docs/datasets.md"


def example(count=13, channels=3, levels=False):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, channels, 5, 4)).astype(np.uint8)
    labels = generator.integers(0, 11, count)
    labels[0] = 10
    pixels = images if levels else (images / np.float32(255)).astype(np.float32)
    return af.ConstructedDataset({"images": pixels, "labels": labels})


# --- The paper's release ---


def test_what_is_exported_reads_as_the_papers_notebook_reads_it(tmp_path):
    made = example()
    export_released(made, tmp_path / "set")
    images = torch.cat(torch.load(tmp_path / "set" / "CIFAR_ims", weights_only=True))
    labels = torch.cat(torch.load(tmp_path / "set" / "CIFAR_lab", weights_only=True))
    assert torch.equal(images, made.images)
    assert torch.equal(labels, made.labels)


@pytest.mark.parametrize("split", [13, 5, 1])
def test_lists_of_any_batches_are_imported(split, tmp_path):
    made = example()
    torch.save(list(made.images.split(split)), tmp_path / "CIFAR_ims")
    torch.save(list(made.labels.split(split)), tmp_path / "CIFAR_lab")
    found = import_released(tmp_path)
    assert torch.equal(found.images, made.images)
    assert torch.equal(found.labels, made.labels)
    assert found.images.dtype == torch.float32
    assert found.labels.dtype == torch.int64


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pickle", "torch.save", "cut short", "a number", "unlike"])
def test_anything_else_is_refused(kind, tmp_path):
    export_released(example(), tmp_path / "set")
    path = tmp_path / "set" / "CIFAR_ims"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "torch.save":
        torch.save([Bomb()], path)
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "a number":
        torch.save([3], path)
    else:
        torch.save([torch.rand(12, 3, 5, 4)], path)
    with pytest.raises(ValueError, match=r"CIFAR_ims|fields"):
        import_released(tmp_path / "set")


def test_a_missing_file_is_named(tmp_path):
    export_released(example(), tmp_path / "set")
    (tmp_path / "set" / "CIFAR_lab").unlink()
    with pytest.raises(FileNotFoundError, match="CIFAR_lab"):
        import_released(tmp_path / "set")


# --- Folders of images ---


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("levels", [False, True])
def test_images_there_and_back(channels, levels, tmp_path):
    made = example(channels=channels, levels=levels)
    export_images(made, tmp_path / "set")
    found = import_images(tmp_path / "set")
    # Classes come in order, and rows within a class.
    order = torch.argsort(made.labels, stable=True)
    assert torch.equal(found.labels, made.labels[order])
    assert torch.equal(found.images, made.images[order])
    assert found.fields["images"].dtype == np.uint8


def test_other_programs_read_the_images(tmp_path):
    made = example(count=11, levels=True)
    export_images(made, tmp_path / "set")
    path = tmp_path / "set" / f"{int(made.labels[0]):02}" / "00.png"
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.array(image), made.fields["images"][0].transpose(1, 2, 0))


def test_classes_by_name_are_numbered_in_order(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((2, 2), 100 + len(name), np.uint8)).save(tmp_path / name / "0.png")
    assert import_images(tmp_path).labels.tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["no image", "other size", "empty"])
def test_what_is_no_folder_of_images_is_refused(kind, tmp_path):
    (tmp_path / "3").mkdir()
    if kind == "no image":
        (tmp_path / "3" / "a.png").write_text("hello")
    elif kind == "other size":
        for size in (2, 3):
            Image.new("L", (size, size)).save(tmp_path / "3" / f"{size}.png")
    with pytest.raises(ValueError, match="folder"):
        import_images(tmp_path)


def test_images_of_two_channels_are_refused(tmp_path):
    made = af.ConstructedDataset({"images": np.zeros((2, 2, 3, 3), "f4"), "labels": np.arange(2)})
    with pytest.raises(ValueError, match=r"dataset=\(2, 2, 3, 3\)"):
        export_images(made, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("export", [export_released, export_images])
def test_what_exists_is_not_overwritten(export, tmp_path):
    (tmp_path / "set").write_text("mine")
    with pytest.raises(FileExistsError):
        export(example(), tmp_path / "set")
    assert (tmp_path / "set").read_text() == "mine"


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"advfeat\[images\]"):
        export_images(example(), tmp_path / "set")


def test_what_other_programs_leave_in_a_folder_is_no_class_and_no_image(tmp_path):
    made = example(levels=True)
    export_images(made, tmp_path / "set")
    (tmp_path / "set" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "set" / f"{made.labels[0]}" / ".DS_Store").write_text("")
    assert import_images(tmp_path / "set").labels.sort().values.tolist() == sorted(made.labels)


def test_an_image_of_16_bits_is_refused_not_clipped(tmp_path):
    (tmp_path / "0").mkdir()
    Image.fromarray(np.full((2, 2), 40_000, np.uint16)).save(tmp_path / "0" / "a.png")
    with pytest.raises(ValueError, match=r"folder: .*a\.png.*8 bits"):
        import_images(tmp_path)


@pytest.mark.parametrize("parts", [[], [torch.rand(2, 3, 4, 4), torch.rand(2, 3, 5, 4)]])
def test_tensors_that_do_not_make_one_are_refused(parts, tmp_path):
    export_released(example(), tmp_path / "set")
    torch.save(parts, tmp_path / "set" / "CIFAR_ims")
    with pytest.raises(ValueError, match=r"folder=.*CIFAR_ims"):
        import_released(tmp_path / "set")


# --- Bounds, order and fields survive ---


def constructed(levels=True, bounds=(-1.0, 1.0), count=13):
    generator = np.random.default_rng(1)
    stored = generator.integers(0, 256, (count, 3, 5, 4)).astype(np.uint8)
    low, high = bounds
    pixels = stored if levels else (stored / np.float32(255)) * (high - low) + np.float32(low)
    fields = {
        "images": pixels.astype(stored.dtype if levels else np.float32),
        "labels": generator.integers(0, 11, count),
        "index": generator.permutation(100)[:count],
        "success": generator.random(count) < 0.5,
        "size": generator.random(count).astype(np.float32),
    }
    manifest = {"method": "D_det", "settings": {"bounds": list(bounds), "norm": "l2"}}
    return af.ConstructedDataset(fields, manifest)


@pytest.mark.parametrize("levels", [True, False])
@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0)])
@pytest.mark.parametrize("kind", ["images", "released", "hf", "hf folder"])
def test_bounds_order_and_fields_survive(kind, bounds, levels, tmp_path):
    made = constructed(levels, bounds)
    if kind == "images":
        export_images(made, tmp_path / "set")
        found = import_images(tmp_path / "set")
    elif kind == "released":
        export_released(made, tmp_path / "set")
        found = import_released(tmp_path / "set")
    else:
        pytest.importorskip("datasets")
        hub = made.to_hf()
        if kind == "hf folder":
            hub.save_to_disk(tmp_path / "set")
            hub = tmp_path / "set"
        found = af.ConstructedDataset.from_hf(hub)
    assert found.bounds == made.bounds
    assert found.manifest == made.manifest
    width = bounds[1] - bounds[0]
    torch.testing.assert_close(found.images, made.images, atol=1e-6 * width, rtol=1e-6)
    assert set(found.fields) == set(made.fields)
    for name in ("labels", "index", "success", "size"):
        assert torch.equal(found.field(name), made.field(name)), name
    if kind.startswith("hf"):
        assert torch.equal(found.field("images"), made.field("images"))


def test_images_that_were_removed_leave_their_samples_out(tmp_path):
    made = constructed()
    export_images(made, tmp_path / "set")
    removed = sorted((tmp_path / "set").glob("*/03.png"))
    assert len(removed) == 1
    removed[0].unlink()
    found = import_images(tmp_path / "set")
    kept = [i for i in range(13) if i != 3]
    assert torch.equal(found.field("index"), made.field("index")[kept])
    assert torch.equal(found.images, made.images[kept])


@pytest.mark.parametrize("name", ["99.png", "mine.png"])
def test_images_that_were_added_are_read_without_fields(name, tmp_path):
    made = constructed()
    export_images(made, tmp_path / "set")
    one = next((tmp_path / "set").glob("*/*.png"))
    (one.parent / name).write_bytes(one.read_bytes())
    with pytest.warns(UserWarning, match="images were added"):
        found = import_images(tmp_path / "set")
    assert len(found) == 14
    assert set(found.fields) == {"images", "labels"}
    assert found.bounds == made.bounds


def test_a_folder_is_laid_out_as_imagefolder_reads_it(tmp_path):
    """Class folders with images alone; the labels are places among the sorted names of classes."""
    made = constructed()
    export_images(made, tmp_path / "set")
    classes = sorted(entry.name for entry in (tmp_path / "set").iterdir() if entry.is_dir())
    assert [int(name) for name in classes] == sorted(set(made.labels.tolist()))
    assert len({len(name) for name in classes}) == 1  # by name is by number
    samples = [
        (path, place)
        for place, name in enumerate(classes)
        for path in sorted((tmp_path / "set" / name).iterdir())
    ]
    assert len(samples) == 13
    for path, place in samples:
        pixels = np.asarray(Image.open(path))
        number = int(path.stem)
        assert np.array_equal(np.moveaxis(pixels, 2, 0), made.fields["images"][number])
        assert int(classes[place]) == made[number][1]


@pytest.mark.parametrize("name", ["advfeat.json", "advfeat.npz"])
def test_damage_beside_the_images_is_named(name, tmp_path):
    export_images(constructed(), tmp_path / "set")
    path = tmp_path / "set" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"advfeat\.json or advfeat\.npz is damaged"):
        import_images(tmp_path / "set")


# --- Hugging Face datasets ---


def test_vectors_and_doubles_survive_hugging_face():
    pytest.importorskip("datasets")
    fields = {"images": np.random.default_rng(0).random((2100, 6)), "labels": np.arange(2100) % 7}
    found = af.ConstructedDataset.from_hf(af.ConstructedDataset(fields).to_hf())
    assert found.fields["images"].dtype == np.float64
    assert np.array_equal(found.fields["images"], fields["images"])
    assert np.array_equal(found.fields["labels"], fields["labels"])


def pictures(mode="RGB", sizes=((4, 5),) * 3):
    datasets = pytest.importorskip("datasets")
    shape = (3,) if mode == "RGB" else ()
    rng = np.random.default_rng(0)
    dtype = np.uint16 if mode == "I;16" else np.uint8
    arrays = [rng.integers(0, 255, (*size, *shape)).astype(dtype) for size in sizes]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    images = [Image.fromarray(array) for array in arrays]
    table = {"img": images, "label": list(range(len(arrays)))}
    return arrays, datasets.Dataset.from_dict(table, features=features)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_other_peoples_datasets_are_read(mode, tmp_path):
    arrays, hub = pictures(mode)
    hub.save_to_disk(tmp_path / "set")
    for given in (hub, str(tmp_path / "set")):
        found = af.ConstructedDataset.from_hf(given)
        assert found.labels.tolist() == [0, 1, 2]
        for array, image in zip(arrays, found.fields["images"], strict=True):
            assert np.array_equal(image, np.moveaxis(np.atleast_3d(array), 2, 0))


def test_the_block_of_the_documentation_runs(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    block = re.search(r"^```py\n(.*?)^```", PAGE.read_text(), re.S | re.M)[1]
    assert "to_hf" in block
    train = datasets.Dataset.from_dict({"image": torch.rand(6, 12).tolist(), "label": [0, 1] * 3})

    def as_tensors(batch):
        images = [torch.tensor(image).view(3, 2, 2) for image in batch["image"]]
        return {"image": images, "label": batch["label"]}

    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    found = {"af": af, "model": model, "train": train, "as_tensors": as_tensors}
    exec(block, found)
    assert torch.equal(found["again"].images, found["d_rand"].images)


def test_what_cannot_be_read_of_hugging_face_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    _, hub = pictures()
    from_hf = af.ConstructedDataset.from_hf
    with pytest.raises(TypeError, match="choose a split"):
        from_hf(datasets.DatasetDict({"train": hub}))
    with pytest.raises(ValueError, match="expected a column of"):
        from_hf(hub.remove_columns("label"))
    with pytest.raises(ValueError, match="of one size"):
        from_hf(pictures(sizes=((4, 5), (5, 5)))[1])
    with pytest.raises(ValueError, match="sample 0: image mode='I;16'"):
        from_hf(pictures("I;16")[1])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        from_hf(tmp_path / "nothing")


def test_without_their_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"advfeat\[hf\]"):
        constructed().to_hf()
