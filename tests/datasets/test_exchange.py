"""Formats of others: the paper's release and folders of PNGs, there and back; no code is run."""

import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import advfeat as af
from advfeat.datasets import export_images, export_released, import_images, import_released


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
