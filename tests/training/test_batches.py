"""Epochs of batches to train on: which samples, in which order, on which rank."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from advfeat.distributed import SINGLE, Process
from advfeat.training._batch_checks import BatchChecks
from advfeat.training._batches import BatchReader

CPU = torch.device("cpu")
SAMPLES = 11


def inputs_of(rows):
    """Inputs that tell their own index."""
    return torch.stack([rows.float(), rows.float() ** 2], 1)


def tensors(count=SAMPLES):
    rows = torch.arange(count)
    return TensorDataset(inputs_of(rows), 10 * rows)


X, Y = tensors().tensors


class Pairs(Dataset):
    """Sample by sample, labels as plain integers."""

    def __init__(self, count=SAMPLES):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return inputs_of(torch.tensor([row]))[0], 10 * row


class Stream(IterableDataset):
    def __iter__(self):
        return (Pairs()[row] for row in reversed(range(SAMPLES)))


def ids(batches):
    return torch.cat([batch.ids for batch in batches]).tolist()


def assert_paired(batches):
    """Inputs and labels are those of the sample that the index says."""
    for batch in batches:
        assert torch.equal(batch.inputs, inputs_of(batch.ids))
        assert torch.equal(batch.labels, 10 * batch.ids)


def several(dataset, **options):
    return DataLoader(dataset, batch_size=4, **options)


def trained_on(data, batch_size=None, seed=0, epoch=1, process=SINGLE):
    wide = BatchChecks((-float("inf"), float("inf")))
    reader = BatchReader(
        data,
        batch_size=batch_size,
        seed=seed,
        device=CPU,
        process=process,
        checked=wide,
        weight_field=None,
    )
    return list(reader.epoch(epoch))


def test_an_epoch_of_a_dataset_is_each_sample_once_shuffled():
    batches = trained_on(tensors(), 4)
    assert [len(batch.ids) for batch in batches] == [4, 4, 3]
    assert sorted(ids(batches)) == list(range(SAMPLES))
    assert ids(batches) != list(range(SAMPLES))
    assert_paired(batches)


def test_the_order_follows_from_seed_and_epoch_alone():
    before = torch.get_rng_state()
    first = ids(trained_on(tensors(100), 8, seed=3, epoch=2))
    torch.rand(5)
    assert ids(trained_on(Pairs(100), 25, seed=3, epoch=2)) == first
    assert ids(trained_on(tensors(100), 8, seed=3, epoch=1)) != first
    assert ids(trained_on(tensors(100), 8, seed=4, epoch=2)) != first
    torch.set_rng_state(before)


def test_shuffling_a_dataset_leaves_the_global_random_state():
    before = torch.get_rng_state()
    trained_on(tensors())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_last_batch_of_one_sample_is_left_out():
    # BatchNorm cannot train on it.
    batches = trained_on(tensors(9), 4)
    assert [len(batch.ids) for batch in batches] == [4, 4]


def test_a_dataset_of_one_sample_is_trained_on_all_the_same():
    assert ids(trained_on(tensors(1))) == [0]


def test_batches_of_one_sample_are_given_where_asked_for():
    assert sorted(ids(trained_on(tensors(), 1))) == list(range(SAMPLES))


def test_a_loader_is_trained_on_as_it_is():
    loader = several(tensors(), shuffle=True, drop_last=True)
    torch.manual_seed(0)
    expected = torch.cat([labels for _, labels in loader])
    torch.manual_seed(0)
    found = torch.cat([batch.labels for batch in trained_on(loader)])
    assert len(found) == 8
    assert torch.equal(found, expected)


def test_a_sharded_loader_is_told_the_epoch():
    sampler = DistributedSampler(tensors(), num_replicas=1, rank=0, shuffle=True)
    loader = several(tensors(), sampler=sampler)

    def order(epoch):
        return torch.cat([batch.labels for batch in trained_on(loader, epoch=epoch)]).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "no batches"),
        (tensors(0), ValueError, "no samples"),
        (several(Stream()), TypeError, "may never end"),
        ((X, Y), TypeError, "pair of tensors"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        trained_on(data)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("count", [8, 9, 10, 11])
def test_ranks_drop_nothing_but_a_single_sample(ranks, count):
    whole = ids(trained_on(tensors(count), 8))
    parts = [trained_on(tensors(count), 8, process=Process(rank, ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1  # as many steps on every rank
    found = [i for part in parts for batch in part if not batch.idle for i in batch.ids.tolist()]
    assert sorted(found) == sorted(whole)
    assert all(len(batch.ids) >= 2 for part in parts for batch in part)
    assert [batch.total for batch in parts[0]] == [
        len(b.ids) for b in trained_on(tensors(count), 8)
    ]
