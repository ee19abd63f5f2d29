"""Small constructed datasets, whole or half built, for the tests of several packages."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import advfeat as af

CLASSES, SAMPLES, BATCH = 4, 22, 5
INVERTED = {"D_R": af.construct_robust_dataset, "D_NR": af.construct_nonrobust_dataset}
TARGETED = {"D_det": af.construct_det_dataset, "D_rand": af.construct_rand_dataset}
METHODS = [*INVERTED, *TARGETED]
ONE_OF_EACH = ["D_R", "D_rand"]

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def dataset(count=SAMPLES):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 1, 3, 3, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (count,), generator=generator))


def network(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(9, 12),
        nn.BatchNorm1d(12),
        activation(),
        nn.Linear(12, 7),
        nn.ReLU(),
        nn.Linear(7, CLASSES),
    )


def build(method, out=None, data=None, model=None, **options):
    data = dataset() if data is None else data
    model = network() if model is None else model
    options = {"steps": 4, "out": out} | options
    if not isinstance(data, DataLoader):
        options.setdefault("batch_size", BATCH)
    if method != "D_det":
        options.setdefault("seed", 3)
    if method in INVERTED:
        return INVERTED[method](model, data, **options)
    return TARGETED[method](model, data, **({"eps": 0.4} | options))


def contents(folder):
    """What counts: a lock file that a killed process left behind does not."""
    paths = Path(folder).iterdir()
    return {path.name: path.read_bytes() for path in paths if path.name != ".lock"}


def finished(folder):
    # The manifest is written last: before it, the arrays are still being laid out.
    begun = (Path(folder) / "manifest.json").exists()
    return int(np.load(Path(folder) / "done.npy").sum()) if begun else 0


class Stopped(Exception):  # noqa: N818
    pass


class Failing(Dataset):
    """A dataset that is as good as any, until a row is read that stops everything."""

    def __init__(self, row, act):
        self.data, self.row, self.act = dataset(), row, act

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        if row == self.row:
            self.act()
        return self.data[row]


def stop():
    raise Stopped


def half_built(folder, method="D_rand", **options):
    """A folder of which some rows are finished and some are not."""
    build(method, folder, **options)
    done = np.load(folder / "done.npy")
    done[BATCH:] = 0
    np.save(folder / "done.npy", done)
    for path in folder.glob("*.npy"):
        if path.name != "done.npy":
            array = np.load(path)
            array[BATCH:] = 0
            np.save(path, array)
    return folder
