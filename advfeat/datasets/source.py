"""What a constructed dataset records of the data it was made from, and the check against it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advfeat import checks
from advfeat.loading import Source

# Samples that are read to recognise data, evenly spread: reading all of ImageNet takes hours.
_COMPARED = 256
_BATCH = 32


class _Sample(NamedTuple):
    """A sample of the data as it is recorded."""

    label: str
    digest: str
    kind: str  # dtype and shape


def describe_source(source: Source) -> dict[str, Any]:
    """Describe data for the manifest: size, a digest, and digests of single samples."""
    indices = _spread(source.indices)
    total, found = hashlib.sha256(), []
    _update(total, [torch.tensor(source.indices, device="cpu")])
    for batch in _batches(source, indices):
        _update(total, batch[:3])
        tensors = {n: v for n, v in batch.entries.items() if isinstance(v, Tensor)}
        for name in sorted(tensors):
            _update(total, [name, tensors[name]])
        found += _samples(batch.inputs, batch.labels)
    return {
        "sha256": total.hexdigest(),
        "size": source.dataset_size,
        "kind": found[0].kind,
        "compared": " ".join(map(str, indices)),
        "labels": " ".join(sample.label for sample in found),
        "digests": " ".join(sample.digest for sample in found),
    }


def check_source(manifest: Mapping[str, Any], source: Source) -> None:
    """Raise an error where data are not what a dataset records, and say what differs.

    A dataset that records nothing (an imported one) passes.
    """
    record = manifest.get("data", {})
    if "digests" not in record:
        return
    if source.is_stream:
        checks.fail("data", "a stream of batches", "pass the map-style dataset it was made from")
    if source.dataset_size != record["size"]:
        _fail(f"{source.dataset_size} samples", f"it was made from {record['size']}")
    indices = [int(index) for index in record["compared"].split()]
    before = {
        index: _Sample(label, digest, record["kind"])
        for index, label, digest in zip(
            indices, record["labels"].split(), record["digests"].split(), strict=True
        )
    }
    known = set(source.indices)
    indices = [index for index in indices if index in known]
    now: dict[int, _Sample] = {}
    for batch in _batches(source, indices):
        found = _samples(batch.inputs, batch.labels)
        now |= dict(zip(batch.ids.tolist(), found, strict=True))
    _compare(before, now, source)


def _compare(before: dict[int, _Sample], now: dict[int, _Sample], source: Source) -> None:
    changed = [index for index in now if now[index] != before[index]]
    if not changed:
        return
    first = changed[0]
    was, found = before[first], now[first]
    if found.kind != was.kind:
        _fail(f"{found.kind} at sample {first}", f"it was made from {was.kind}")
    count = f"{len(changed)} of {len(now)} samples compared"
    known = {sample.digest: index for index, sample in before.items()}
    if all(known.get(now[index].digest, index) != index for index in changed):
        _fail(f"{count} are others (sample {first} first)", "the same data in another order")
    wrong = [index for index in changed if now[index].label != before[index].label]
    if wrong:
        index = wrong[0]
        _fail(
            f"label {now[index].label} at sample {index}, and {len(wrong)} of {len(now)} compared",
            f"it was {before[index].label} when the dataset was made: other data, or another order",
        )
    again = source.samples([first], torch.device("cpu"))
    cause = "another transform, other data of the same labels, or another order"
    if _samples(again.inputs, again.labels)[0] != found:
        cause = "the data are augmented at random; leave the augmentation out"
    _fail(f"other inputs in {count} (sample {first} first)", cause)


def _fail(value: str, cause: str) -> None:
    checks.fail("data", value, f"{cause}. Pass the data that the dataset was constructed from")


def _spread(indices: list[int]) -> list[int]:
    return indices[:: -(-len(indices) // _COMPARED)]


def _batches(source: Source, indices: list[int]) -> Iterator[Any]:
    for start in range(0, len(indices), _BATCH):
        yield source.samples(indices[start : start + _BATCH], torch.device("cpu"))


def _samples(inputs: Tensor, labels: Tensor) -> list[_Sample]:
    kind = f"{str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape[1:])}"
    return [
        _Sample(
            str(label).replace(" ", ""),
            hashlib.blake2b(_bytes(one), digest_size=6).hexdigest(),
            kind,
        )
        for one, label in zip(inputs, labels.tolist(), strict=True)
    ]


def digest(items: Iterable[str | Tensor]) -> str:
    """A digest of texts and tensors."""
    found = hashlib.sha256()
    _update(found, items)
    return found.hexdigest()


def _update(found: Any, items: Iterable[str | Tensor]) -> None:
    for item in items:
        if isinstance(item, Tensor):
            found.update(f"{item.dtype} {tuple(item.shape)}".encode())
            found.update(_bytes(item))
        else:
            found.update(item.encode() + b"\0")


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    data: memoryview = plain.view(torch.uint8).numpy().data
    return data
