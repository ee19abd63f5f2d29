"""Any dataset or loader as indexed samples: each once, with its own label, in any order."""

import itertools
import multiprocessing
import warnings

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from advfeat.checks import ResultWarning
from advfeat.loading import Source, prefetched
from advfeat.unpacking import unpack

CPU = torch.device("cpu")
SAMPLES = 11


def inputs_of(rows):
    """Inputs that tell their own row."""
    return torch.stack([rows.float(), rows.float() ** 2], 1)


def tensors(count=SAMPLES):
    rows = torch.arange(count)
    return TensorDataset(inputs_of(rows), 10 * rows)


class Pairs(Dataset):
    """Row by row, labels as plain integers."""

    def __init__(self, count=SAMPLES):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return inputs_of(torch.tensor([row]))[0], 10 * row


class Dictionaries(Pairs):
    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return {"pixel_values": image, "label": label, "name": str(row)}


class Stream(IterableDataset):
    def __iter__(self):
        return (Pairs()[row] for row in reversed(range(SAMPLES)))


class SizedStream(Stream):
    def __len__(self):
        return SAMPLES


class Endless(Sampler):
    def __init__(self):
        pass

    def __iter__(self):
        return itertools.cycle(range(SAMPLES))


class Given(Sampler):
    """A user's own sampler, of any numbers."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __iter__(self):
        return iter(self.numbers)

    def __len__(self):
        return len(self.numbers)


class Shuffling(Given):
    """A user's own sampler that draws from the global generator."""

    def __iter__(self):
        return iter([self.numbers[i] for i in torch.randperm(len(self.numbers))])


def read(data, **options):
    return list(Source(data, **options).batches(CPU))


def ids(batches):
    return torch.cat([rows.ids for rows in batches]).tolist()


def assert_paired(batches):
    """Inputs and labels are those of the row that the number says."""
    for rows in batches:
        assert rows.ids.dtype == torch.int64
        assert torch.equal(rows.inputs, inputs_of(rows.ids))
        assert torch.equal(rows.labels, 10 * rows.ids)


def several(dataset, **options):
    return DataLoader(dataset, batch_size=4, **options)


MAP_STYLE = {
    "tensors": tensors,
    "pairs": Pairs,
    "dictionaries": Dictionaries,
    "subset": lambda: torch.utils.data.Subset(Pairs(20), range(SAMPLES)),
    "sequence": lambda: several(tensors()),
    "shuffled": lambda: several(Pairs(), shuffle=True),
    "drop_last": lambda: several(tensors(), shuffle=True, drop_last=True),
    "generator": lambda: several(tensors(), shuffle=True, generator=torch.Generator()),
    "own sampler": lambda: several(Pairs(), sampler=Shuffling(range(SAMPLES))),
    "without replacement": lambda: several(
        Pairs(), sampler=WeightedRandomSampler(torch.ones(SAMPLES), SAMPLES, replacement=False)
    ),
    "batch sampler": lambda: DataLoader(
        tensors(), batch_sampler=BatchSampler(RandomSampler(range(SAMPLES)), 3, drop_last=True)
    ),
    "list of batches": lambda: DataLoader(tensors(), batch_sampler=torch.arange(11).split(4)),
}


# --- Map-style data ---


@pytest.mark.parametrize("make", MAP_STYLE.values(), ids=MAP_STYLE.keys())
def test_map_style_data_are_read_by_sample_number_each_sample_once(make):
    batches = read(make())
    assert ids(batches) == list(range(SAMPLES))
    assert_paired(batches)


@pytest.mark.parametrize("make", MAP_STYLE.values(), ids=MAP_STYLE.keys())
def test_reading_leaves_the_global_random_state(make):
    data = make()
    before = torch.get_rng_state()
    source = Source(data)
    list(source.batches(CPU))
    source.samples([3, 1], CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", MAP_STYLE.values(), ids=MAP_STYLE.keys())
def test_single_samples_are_fetched_by_number_in_the_order_asked_for(make):
    rows = Source(make()).samples([7, 0, 3], CPU)
    assert rows.ids.tolist() == [7, 0, 3]
    assert_paired([rows])


@pytest.mark.parametrize(
    ("data", "options", "sizes"),
    [
        (several(tensors(), drop_last=True), {}, [4, 4, 3]),
        (several(tensors()), {"batch_size": 6}, [6, 5]),
        (tensors(), {"batch_size": 10}, [10, 1]),
        (tensors(300), {}, [128, 128, 44]),
    ],
)
def test_batches_have_the_loaders_size_or_the_one_asked_for(data, options, sizes):
    source = Source(data, **options)
    assert [len(rows.ids) for rows in source.batches(CPU)] == sizes
    assert source.batch_count == len(sizes)
    assert len(source) == sum(sizes)
    assert source.batch_size == sizes[0]


def test_a_source_can_be_read_twice():
    source = Source(several(Pairs(), shuffle=True))
    assert ids(source.batches(CPU)) == ids(source.batches(CPU))


def test_a_method_of_a_dataset_that_happens_to_be_called_batch_is_not_used():
    class Hub(Dictionaries):  # datasets.Dataset.batch(batch_size) of Hugging Face
        def batch(self, batch_size):
            raise AssertionError

    assert_paired(read(Hub()))


def test_a_dataset_that_gives_many_samples_at_once_is_asked_so():
    class Fast(Pairs):
        def __getitems__(self, rows):
            return [Pairs.__getitem__(self, row) for row in rows]

        def __getitem__(self, row):
            raise AssertionError

    assert_paired(read(Fast()))


def as_dictionary(pairs):
    """A collation of the user's own, which labels by 10 more."""
    images, labels = zip(*pairs, strict=True)
    return {"image": torch.stack(images), "label": 10 + torch.tensor([int(y) for y in labels])}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("make", [tensors, Pairs])
def test_a_collation_of_the_users_own_is_used(make, num_workers):
    loader = several(make(), shuffle=True, collate_fn=as_dictionary, num_workers=num_workers)
    for rows in read(loader):
        assert torch.equal(rows.inputs, inputs_of(rows.ids))
        assert torch.equal(rows.labels, 10 * rows.ids + 10)


# --- A part of the rows ---


PARTS = {
    "subset sampler": lambda: several(Pairs(), sampler=SubsetRandomSampler([5, 1, 8])),
    "own sampler": lambda: several(Pairs(), sampler=Given([5, 1, 8])),
    "own batches": lambda: DataLoader(Pairs(), batch_sampler=[[5, 1], [8]]),
    "batches of a sampler": lambda: DataLoader(
        Pairs(), batch_sampler=BatchSampler(SubsetRandomSampler([5, 1, 8]), 2, drop_last=True)
    ),
}


@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS.keys())
def test_a_sampler_of_some_samples_gives_these_in_order(make):
    source = Source(make())
    assert source.indices == [1, 5, 8]
    assert len(source) == 3
    assert_paired(source.batches(CPU))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("wrap", [False, True])
def test_the_shards_of_all_ranks_are_each_sample_once(shuffle, drop_last, wrap):
    # 11 rows and 3 ranks: the sampler itself repeats a row, or drops two.
    found = []
    for rank in range(3):
        sampler = DistributedSampler(
            tensors(), num_replicas=3, rank=rank, shuffle=shuffle, drop_last=drop_last
        )
        if wrap:
            loader = DataLoader(tensors(), batch_sampler=BatchSampler(sampler, 2, drop_last=False))
        else:
            loader = several(tensors(), sampler=sampler)
        batches = read(loader)
        assert_paired(batches)
        found += ids(batches)
    assert sorted(found) == list(range(SAMPLES))


REPEATING = {
    "with replacement": lambda: several(tensors(), sampler=RandomSampler(tensors(), True)),
    "a random part": lambda: several(tensors(), sampler=RandomSampler(tensors(), num_samples=5)),
    "weighted": lambda: several(tensors(), sampler=WeightedRandomSampler(torch.ones(SAMPLES), 50)),
    "subset": lambda: several(tensors(), sampler=SubsetRandomSampler([3, 1, 3])),
    "own": lambda: several(tensors(), sampler=Given([3, 1, 3])),
    "own batches": lambda: DataLoader(tensors(), batch_sampler=[[3, 1], [3]]),
    "endless": lambda: several(tensors(), sampler=Endless()),
    "endless batches": lambda: DataLoader(
        tensors(), batch_sampler=BatchSampler(Endless(), 4, drop_last=False)
    ),
}


@pytest.mark.parametrize("make", REPEATING.values(), ids=REPEATING.keys())
def test_a_sampler_that_repeats_samples_or_never_ends_is_refused(make):
    loader = make()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"data=.*pass the dataset"):
        Source(loader)
    assert torch.equal(torch.get_rng_state(), before)


# --- Workers ---


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("pin_memory", [False, True])
def test_workers_read_the_same_samples_and_leave_the_global_random_state(pin_memory):
    loader = several(Pairs(), shuffle=True, num_workers=1, pin_memory=pin_memory)
    before = torch.get_rng_state()
    batches = read(loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert ids(batches) == list(range(SAMPLES))
    assert_paired(batches)


def label_by_hundreds(worker):
    torch.utils.data.get_worker_info().dataset.tensors[1].mul_(10)


def test_workers_are_set_up_as_the_loader_says():
    loader = several(tensors(), num_workers=1, worker_init_fn=label_by_hundreds)
    labels = torch.cat([rows.labels for rows in read(loader)])
    assert torch.equal(labels, 100 * torch.arange(SAMPLES))


# --- Streams ---


STREAMS = {
    "iterable": lambda: several(SizedStream()),
    "list": lambda: list(several(SizedStream())),
    "tuple": lambda: tuple(several(SizedStream())),
    "no collation": lambda: DataLoader(
        torch.utils.data.Subset(list(several(SizedStream())), range(3)), batch_size=None
    ),
}


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS.keys())
def test_samples_of_a_stream_are_numbered_as_they_come(make):
    data = make()
    before = torch.get_rng_state()
    source = Source(data)
    batches = list(source.batches(CPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert source.is_stream
    assert source.batch_count == len(batches) == 3
    assert ids(batches) == list(range(SAMPLES))
    labels = torch.cat([rows.labels for rows in batches])
    assert labels.tolist() == [10 * row for row in reversed(range(SAMPLES))]
    for rows in batches:
        assert torch.equal(rows.inputs, inputs_of(rows.labels // 10))


class Repeating(SizedStream):
    """As in each of several workers that do not divide the samples."""

    def __iter__(self):
        yield from super().__iter__()
        yield from super().__iter__()


class Ending(SizedStream):
    def __iter__(self):
        yield from itertools.islice(super().__iter__(), 5)


@pytest.mark.parametrize(
    ("stream", "message"),
    [(Repeating(), f"more samples than its length of {SAMPLES}"), (Ending(), "gave 5 samples")],
)
def test_a_stream_of_another_length_is_warned_of_once(stream, message):
    with pytest.warns(ResultWarning, match=message) as found:
        list(Source(several(stream)).batches(CPU))
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(Source(several(SizedStream())).batches(CPU))
        list(Source(several(Ending(), drop_last=True)).batches(CPU))


@pytest.mark.parametrize("kind", ["reversed", "big endian"])
def test_arrays_that_torch_does_not_take_as_they_are(kind):
    inputs, labels = (tensor.numpy() for tensor in tensors().tensors)
    given = inputs.astype(">f4"), labels.astype(">i8")
    if kind == "reversed":
        given = inputs[::-1].copy()[::-1], labels[::-1].copy()[::-1]
    for tensor, array in zip(unpack(given), (inputs, labels), strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))


def test_a_stream_without_length_is_refused():
    with pytest.raises(TypeError, match="no length and may never end"):
        Source(several(Stream()))


def test_a_stream_of_single_samples_is_refused():
    with pytest.raises(TypeError, match="wrap it in a DataLoader"):
        Source(SizedStream())


def test_a_stream_that_promised_samples_and_gives_none_is_refused():
    class Liar(SizedStream):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="gave no samples"):
        read(several(Liar()))


# --- Refusals ---


@pytest.mark.parametrize("empty", [[], (), tensors(0), DataLoader(Pairs(0)), Pairs(0)])
def test_empty_data_are_refused(empty):
    with pytest.raises(ValueError, match=r"data=.*it has no (samples|batches)"):
        Source(empty)


def test_a_pair_of_tensors_is_a_dataset():
    x, y = torch.rand(4, 2), torch.arange(4)
    (rows,) = Source((x, y)).batches(torch.device("cpu"))
    assert torch.equal(rows.inputs, x)
    assert torch.equal(rows.labels, y)


@pytest.mark.parametrize("data", [3, None, "path", torch.rand(3), iter([])])
def test_what_is_no_data_is_refused(data):
    with pytest.raises(TypeError, match="data: "):
        read(data)


def test_a_dataset_without_length_is_refused():
    class NoLength(Dataset):
        def __getitem__(self, row):
            return Pairs()[row]

    with pytest.raises(TypeError, match="NoLength has no length"):
        Source(NoLength())


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}"):
        Source(tensors(), batch_size)


@pytest.mark.parametrize("batch_size", [2.0, True, "8"])
def test_a_batch_size_that_is_no_integer_is_refused(batch_size):
    with pytest.raises(TypeError, match="batch_size="):
        Source(tensors(), batch_size)


def test_a_collation_that_loses_samples_is_refused():
    loader = several(Pairs(), collate_fn=lambda pairs: (torch.rand(1, 2), torch.tensor([0])))
    with pytest.raises(ValueError, match=r"a batch of 4 came back so"):
        read(loader)


# --- Batches ---


X, Y = torch.rand(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, "extra", None),
        {"inputs": X, "labels": Y},
        {"pixel_values": X, "label": Y, "id": 3},
        {"image": X, "fine_label": Y, "coarse_label": None},
        {"x": X, "y": Y},
    ],
)
def test_inputs_and_labels_are_found_in_a_batch(batch):
    inputs, labels = unpack(batch)
    assert inputs is X
    assert labels is Y


def test_unknown_keys_are_refused_by_name():
    with pytest.raises(ValueError, match=r"batch keys=\['pictures', 'y'\]"):
        unpack({"pictures": X, "y": Y})


@pytest.mark.parametrize("batch", [X, (X,), "text", 3])
def test_what_is_no_batch_is_refused(batch):
    with pytest.raises(TypeError, match=r"expected \(inputs, labels, \.\.\.\)"):
        unpack(batch)


@pytest.mark.parametrize("batch", [(["a.png"], Y), {"image": [object()], "label": Y}])
def test_images_that_are_no_tensors_are_refused_with_the_transform_to_add(batch):
    with pytest.raises(TypeError, match=r"inputs of a batch are list.*add a transform"):
        unpack(batch)


def test_labels_that_are_no_tensors_are_refused():
    with pytest.raises(TypeError, match="labels of a batch are list"):
        unpack((X, [0, 1]))


def test_copies_towards_the_cpu_wait(monkeypatch):
    # From a GPU, torch would copy into pinned memory that is read before it is filled.
    waits, move = [], torch.Tensor.to

    def watched(tensor, *args, non_blocking=False, **options):
        waits.append(not non_blocking)
        return move(tensor, *args, non_blocking=non_blocking, **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    list(Source(tensors()).batches(torch.device("cpu")))
    assert waits
    assert all(waits)


def test_workers_start_before_a_thread_reads_ahead():
    """A worker that was forked from a thread ended with code 1, now and then."""
    data = TensorDataset(torch.rand(6, 3), torch.arange(6) % 3)
    batches = Source(DataLoader(data, batch_size=2, num_workers=1)).batches(CPU)
    assert multiprocessing.active_children()
    assert sum(len(batch.labels) for batch in prefetched(batches)) == 6


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 32, 32), 1024), ((1, 8, 8), 1024), ((3, 64, 64), 256), ((3, 224, 224), 128)],
)
def test_batches_are_larger_where_they_go_to_a_gpu(shape, expected):
    data = TensorDataset(torch.zeros(2, *shape), torch.tensor([0, 1]))
    assert Source(data, device=torch.device("cuda")).batch_size == expected
    assert Source(data, device=torch.device("cpu")).batch_size == 128
    assert Source(data, 7, torch.device("cuda")).batch_size == 7
    assert Source(DataLoader(data, 5), device=torch.device("cuda")).batch_size == 5
