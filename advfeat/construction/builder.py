"""The one loop behind all constructed datasets: indexed samples, an attack, a writer."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from advfeat import checks, distributed, threat
from advfeat.attacks import Batch
from advfeat.attacks.pool import Policy, Pool, drive
from advfeat.attacks.restricted import restricted
from advfeat.attacks.samples import check_samples
from advfeat.construction.checking import check_known_labels
from advfeat.construction.provenance import build_manifest
from advfeat.construction.recipe import (
    BuildOptions,
    DatasetRecipe,
    sample_id,
    source_index,
    start_number,
)
from advfeat.datasets import ConstructedDataset
from advfeat.datasets.arrays import dequantize, quantize
from advfeat.datasets.dataset import Dtype
from advfeat.datasets.folder import Array, check_same_manifest, is_finished, read_manifest
from advfeat.datasets.writer import FolderWriter, MemoryWriter, create_folder, lock_folder
from advfeat.durable import Folder, Termination
from advfeat.loading import Data, Samples, Source, prefetched
from advfeat.model import Network, attackable, device_of
from advfeat.progress import with_progress

# Where samples may stop early, the pool is refilled when a quarter of it is free, and checked every
# few steps: a check waits for the device.
_PORTIONS, _CHECK_EVERY = 4, 8


def build_dataset(
    model: nn.Module, source: Source, recipe: DatasetRecipe, options: BuildOptions
) -> ConstructedDataset:
    """Run the recipe's attack over all samples, and keep what it returns."""
    out = options.folder
    if options.dtype != "float32" and isinstance(recipe.attack.bounds[0], Tensor):
        cause = "rounding would leave bounds by feature; use dtype='float32'"
        checks.fail("dtype", options.dtype, cause)
    process = distributed.SINGLE if out is None else distributed.current_process()
    chunks = _chunks(source, recipe)[process.rank :: process.world_size]
    kept = np.arange(len(source) * recipe.starts)
    manifest = build_manifest(model, source, recipe, options)
    if options.has_own_folder:
        if not chunks:
            checks.fail(
                "out", str(out), f"there are more ranks ({process.world_size}) than batches"
            )
        kept = np.concatenate(chunks)
        manifest |= {
            "samples": len(kept),
            "shard": {"rank": process.rank, "of": process.world_size},
        }
        process = distributed.SINGLE  # each for itself from here on
    if out is not None:
        check_same_manifest(out, manifest)
        if is_finished(out):
            return ConstructedDataset.open(out)
    with attackable(
        model,
        precision=options.precision,
        layer=recipe.layer,
        compile=options.compile,
        expectation=options.expectation,
        straight_through=recipe.straight_through,
        purpose=recipe.purpose,
    ) as net:
        net.batches.usual = source.batch_size
        builder = _Builder(net, source, recipe, options.dtype, device_of(model))
        with _open_writer(builder, manifest, out, process) as growing, _stoppable(growing):
            left = [c for c in chunks if not growing.done[np.searchsorted(kept, c)].all()]
            batches = with_progress(
                prefetched(builder.read(left)),
                total=len(left),
                label=recipe.method,
                progress=options.progress if process.rank == 0 else False,
            )
            for places, found in builder.made(batches):
                growing.put(np.searchsorted(kept, places), found)
            growing.flush()
            process.barrier()
        return growing.dataset()


def _chunks(source: Source, recipe: DatasetRecipe) -> list[Array]:
    """Places of the samples that enter together.

    Always the same, whatever is finished and whoever asks: a sample's last digits can depend on its
    batch.
    """
    size = source.batch_size
    if not recipe.attack.is_fixed_length:
        size = max(1, size // _PORTIONS)
    count = len(source) * recipe.starts
    return np.split(np.arange(count), np.arange(size, count, size))


class _Kept(NamedTuple):
    """Samples under attack, as they came and as they are attacked."""

    batch: Batch
    attacked: Batch

    @property
    def extras(self) -> Mapping[str, Tensor] | None:
        """Further arguments of forward."""
        return self.batch.extras


class _Builder:
    """Makes samples of a dataset, a batch at a time."""

    def __init__(
        self,
        net: Network,
        source: Source,
        recipe: DatasetRecipe,
        dtype: Dtype,
        device: torch.device,
    ) -> None:
        self._net, self._source, self._recipe = net, source, recipe
        self._dtype, self._device = dtype, device
        # One start of every sample after the other: the first ones are the dataset of one start.
        self._ids = [
            sample_id(index, start) for start in range(recipe.starts) for index in source.indices
        ]
        self._places = {number: place for place, number in enumerate(self._ids)}
        self._shape: tuple[int, ...] | None = None  # of a sample

    def read(self, chunks: list[Array]) -> Iterator[Samples]:
        """The chunks' samples, and their companions behind them, on the host."""
        ids = [[self._ids[place] for place in chunk] for chunk in chunks]
        wanted = [
            source_index(torch.tensor(own, device="cpu")).tolist() + self._recipe.companions(own)
            for own in ids
        ]
        # Now, for workers of a loader start here and not in the thread that reads ahead.
        read = zip(ids, self._source.batches(torch.device("cpu"), wanted), strict=True)
        return (samples._replace(ids=torch.tensor(own, device="cpu")) for own, samples in read)

    def example(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """All fields of the first sample, before any step; and what is known of the model."""
        (samples,) = self.read([np.zeros(1, np.int64)])
        batch = self._checked(samples)
        with self._net.given(batch.extras):
            classes = self._net.class_count(batch.inputs)
            check_known_labels(self._source, self._recipe.attack.bounds, classes)
            attacked = self._recipe.begin(self._net, batch)
            attack = restricted(self._recipe.attack)
            images = attack.result(attack.init(self._net, attacked))
            known = self._recipe.provenance(self._net, batch)
            return self._described(batch, attacked, images), known

    def made(self, batches: Iterable[Samples]) -> Iterator[tuple[Array, dict[str, Array]]]:
        """All fields of the samples, and the places they go to."""
        net, recipe, attack = self._net, self._recipe, restricted(self._recipe.attack)

        def begin(batch: Batch) -> tuple[_Kept, Any]:
            with net.given(batch.extras):
                attacked = recipe.begin(net, batch)
                return _Kept(batch, attacked), attack.init(net, attacked)

        size = self._source.batch_size
        fraction = 1 / _PORTIONS
        policy = Policy(fraction, fraction, _CHECK_EVERY, portion=max(1, size // _PORTIONS))
        pool = Pool(attack, net, size, begin, policy)
        for (batch, attacked), state in drive(pool, map(self._checked, batches)):
            with net.given(batch.extras):
                found = self._described(batch, attacked, attack.result(state))
            yield np.array([self._places[number] for number in batch.ids.tolist()]), found

    def _described(self, batch: Batch, attacked: Batch, images: Tensor) -> dict[str, Array]:
        net, recipe, bounds = self._net, self._recipe, threat.hull(self._recipe.attack.bounds)
        found = {"images": images, "index": source_index(batch.ids)}
        if recipe.starts > 1:
            found["start_number"] = start_number(batch.ids)
        if self._dtype == "float32":
            found |= recipe.describe(net, batch, attacked, images)
        else:
            levels = quantize(images, bounds)
            rounded = dequantize(levels, bounds)
            before = recipe.describe(net, batch, attacked, images)
            found |= {"images": levels, **recipe.describe(net, batch, attacked, rounded)}
            found |= {
                f"{name}_unrounded": before[name]
                for name in ("success", "distance")
                if name in before
            }
            found["rounding"] = threat.size(rounded - images, "l2")
        host = _on_host(found)
        if companions := recipe.companions(batch.ids.tolist()):
            host["start_index"] = np.array(companions)
        return host

    def _checked(self, samples: Samples) -> Batch:
        """Check on the host, where it waits for nothing, and move to the device."""
        net, bounds, count = self._net, self._recipe.attack.bounds, len(samples.ids)
        indices = source_index(samples.ids).tolist() + self._recipe.companions(samples.ids.tolist())
        shape = tuple(samples.inputs.shape[1:])
        self._shape = self._shape or shape
        if shape != self._shape:
            cause = f"the first sample has {self._shape}, and a dataset has one shape: pad them all"
            checks.fail("inputs.shape", shape, cause)
        index = torch.tensor(indices, device="cpu")
        check_samples(samples.inputs, samples.labels, index, bounds, net.classes)
        net.expect(samples.labels)
        inputs = self._moved(samples.inputs)
        extras = net.choose_extras(samples.entries, inputs[:count])
        if count > 1 or len(self._source) == 1:  # not the example
            with net.given(extras):
                net.inspect(inputs[:count], bounds)
        start = inputs[count:] if len(inputs) > count else None
        given = self._recipe.given_starts(samples.ids.tolist())
        return Batch(
            inputs[:count],
            samples.labels[:count].to(self._device, torch.int64, non_blocking=True),
            samples.ids.to(self._device, non_blocking=True),
            start if given is None else self._moved(given),
            extras,
        )

    def _moved(self, inputs: Tensor) -> Tensor:
        if self._net.dtype not in (None, torch.float64):
            # NumPy's float64, which the model would read in float32, doubles a dataset for nothing.
            inputs = inputs.float()
        moved = self._net.prepare(inputs.to(self._device, non_blocking=True))
        return threat.clip(moved, self._recipe.attack.bounds, inplace=True)


def _on_host(found: dict[str, Tensor]) -> dict[str, Array]:
    """Move all fields, waiting for the device once."""
    waits = any(value.is_cuda for value in found.values())
    host = {name: value.to("cpu", non_blocking=value.is_cuda) for name, value in found.items()}
    if waits:
        torch.cuda.current_stream().synchronize()
    return {name: value.numpy() for name, value in host.items()}


@contextmanager
def _open_writer(
    builder: _Builder, manifest: dict[str, Any], out: Folder | None, process: distributed.Process
) -> Iterator[MemoryWriter | FolderWriter]:
    """Open the place where samples go: in memory, a new folder, or one that was begun before."""
    if out is None:
        example, known = builder.example()
        with MemoryWriter(example, manifest["samples"], manifest | known) as growing:
            yield growing
        return
    with lock_folder(out) if process.rank == 0 else nullcontext():
        if process.rank == 0 and read_manifest(out) is None:
            example, known = builder.example()
            create_folder(out, example, manifest["samples"], manifest | known)
        process.barrier()
        check_same_manifest(out, manifest)
        with FolderWriter(out) as growing:
            yield growing


@contextmanager
def _stoppable(growing: MemoryWriter | FolderWriter) -> Iterator[None]:
    """On Ctrl-C and SIGTERM, finish what is being written and say how to continue."""
    if isinstance(growing, MemoryWriter):
        yield
        return
    try:
        with Termination(at_once=True).watched():
            yield
    except (KeyboardInterrupt, SystemExit):
        growing.flush()
        print(
            f"advfeat: stopped; {int(growing.done.sum())} of {len(growing.done)} samples are safe "
            f"in {str(growing.folder)!r}. The same call resumes:\n    {_command()}",
            file=sys.stderr,
        )
        raise


def _command() -> str:
    """The command line of this process, or of the torchrun that started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} {shlex.join(sys.argv)}"
    return shlex.join(sys.orig_argv)


def indexed_source(model: nn.Module, data: Data, options: BuildOptions) -> Source:
    """Samples that can be fetched by number, which every construction needs."""
    source = Source(data, options.batch_size, device_of(model))
    if source.is_stream:
        checks.fail(
            "data",
            type(data).__name__,
            "construction fetches samples by number; pass a map-style dataset or a loader of one",
        )
    sharded = isinstance(data, DataLoader) and isinstance(data.sampler, DistributedSampler)
    if sharded and options.out is not None and distributed.current_process().world_size > 1:
        checks.fail(
            "data",
            "DistributedSampler",
            "ranks divide the samples themselves; pass the dataset, or a loader without a sampler",
        )
    return source
