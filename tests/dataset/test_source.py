"""Data are compared with what a dataset records of those it was made from."""

import numpy as np
import pytest
import torch
from builds import build, dataset
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import advfeat as af
from advfeat.datasets import inspect, moved_control, noise_control

TAKERS = {
    "pairs": lambda made, data: made.pairs(data),
    "noise_control": lambda made, data: noise_control(made, data, seed=0),
    "moved_control": lambda made, data: moved_control(made, data, seed=0),
    "inspect": lambda made, data: inspect(made, data=data),
}


class Augmented(Dataset):
    def __init__(self, data, *, at_random=True):
        self.data, self.at_random = data, at_random

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        noise = torch.rand(()) if self.at_random else 0.5
        return image * noise, label


def others():
    data = dataset()
    x, y = data.tensors
    rolled = torch.arange(len(data)).roll(1)
    relabelled = y.clone()
    relabelled[7] = (y[7] + 1) % 4
    return {
        "shorter": (Subset(data, range(20)), "20 samples.*made from 22"),
        "longer": (TensorDataset(torch.cat([x, x]), torch.cat([y, y])), "44 samples"),
        "reordered": (TensorDataset(x[rolled], y[rolled]), "another order"),
        "augmented": (Augmented(data), "augmented at random"),
        "transformed": (Augmented(data, at_random=False), "another transform"),
        "relabelled": (TensorDataset(x, relabelled), "label . at sample 7"),
        "larger images": (TensorDataset(x.repeat(1, 1, 2, 2), y), r"float32 \(1, 6, 6\)"),
        "other dtype": (TensorDataset(x.double(), y), "float64"),
    }


@pytest.mark.parametrize("kind", list(others()))
@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.slow
def test_other_data_are_refused_by_the_difference(taker, kind):
    data, message = others()[kind]
    made = build("D_det")
    with pytest.raises(ValueError, match=message) as raised:
        TAKERS[taker](made, data)
    assert "constructed from" in str(raised.value)


@pytest.mark.parametrize("method", ["D_R", "D_det"])
def test_the_same_data_pass_in_any_form(method, tmp_path):
    data = dataset()
    made = build(method, tmp_path / "set")
    opened = af.ConstructedDataset.open(tmp_path / "set")
    forms = [data, DataLoader(data, batch_size=3, shuffle=True), Subset(data, range(len(data)))]
    for form in forms:
        assert torch.equal(opened.pairs(form)[5][0], data[5][0])
        assert torch.equal(made.subset([3, 5]).pairs(form)[1][0], data[5][0])


def test_data_of_a_part_are_the_whole_dataset_or_the_loader_of_the_part():
    data = dataset()
    loader = DataLoader(data, batch_size=5, sampler=[3, 8, 4, 20])
    made = build("D_det", data=loader)
    for form in (loader, data):
        assert torch.equal(made.pairs(form)[2][0], data[8][0])
    with pytest.raises(ValueError, match="no sample 20"):
        made.pairs(DataLoader(data, sampler=[3, 8, 4]))


def test_a_dataset_that_records_nothing_is_compared_by_its_labels_alone():
    made = build("D_det")
    imported = af.ConstructedDataset(made.fields, {"method": "from elsewhere"})
    assert len(imported.pairs(dataset())) == 22
    labels = dataset().tensors[1].roll(1)
    pairs = imported.pairs(TensorDataset(dataset().tensors[0], labels))
    with pytest.raises(ValueError, match="it was"):
        [pairs[i] for i in range(22)]


def test_many_samples_are_compared_by_some_of_them():
    """A single other sample among those compared is seen; the record stays small."""
    x, y = torch.rand(3000, 2), torch.arange(3000) % 3
    made = af.construct_det_dataset(torch.nn.Linear(2, 3), TensorDataset(x, y), eps=0.1, steps=1)
    record = made.manifest["data"]
    compared = [int(index) for index in record["compared"].split()]
    assert len(compared) == len(record["digests"].split()) == 250
    assert np.diff(compared).tolist() == [12] * 249
    changed = x.clone()
    changed[compared[100], 1] += 1e-3
    with pytest.raises(ValueError, match=f"1 of 250 samples compared .sample {compared[100]}"):
        made.pairs(TensorDataset(changed, y))
