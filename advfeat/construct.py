"""The one loop behind all four sets: numbered rows, an attack, a store."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import platform
import shlex
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from advfeat import checks, ranks, seeding, store, threat
from advfeat._version import __version__
from advfeat.attacks import Attack, Batch
from advfeat.attacks._attack import joined, taken
from advfeat.attacks._inversion import Inversion
from advfeat.loading import Data, Rows, Source, prefetched, with_progress
from advfeat.model import Layer, Network, Precision, attackable, device_of, unwrapped
from advfeat.store import Array, ConstructedDataset, Dtype, Folder
from advfeat.threat import Bounds

Start: TypeAlias = Literal["images", "noise"] | Tensor

# Rows that the fingerprint of the source data is taken of, evenly spread: reading all of ImageNet
# would take hours.
_LOOKED_AT = 256
# In the name of a folder it stands for the rank.
_RANK = "{rank}"


# Where rows may stop early, the pool is refilled when a quarter of it is free, and looked at every
# few steps: to look is to wait for the device.
_PORTIONS, _LOOK = 4, 8


@dataclass(frozen=True)
class Making:
    """How a set is made, whatever the set is."""

    batch_size: int | None
    precision: Precision
    progress: bool | None
    out: Folder | None
    dtype: Dtype
    compile: bool = False

    def __post_init__(self) -> None:
        """Refuse bad settings."""
        checks.one_of("dtype", self.dtype, store.DTYPES)
        if not (self.out is None or isinstance(self.out, (str, os.PathLike))):
            raise TypeError(f"out={self.out!r}: expected the name of a folder")

    @property
    def has_own_folder(self) -> bool:
        """Whether each rank has a folder of its own."""
        return self.out is not None and _RANK in os.fspath(self.out)

    @property
    def folder(self) -> Path | None:
        """Where this rank's rows go."""
        if self.out is None:
            return None
        rank = ranks.team().rank if self.has_own_folder else 0
        return Path(os.fspath(self.out).replace(_RANK, str(rank)))

    def seed(self, seed: int | torch.Generator | None) -> int:
        """The seed to use: of a set that was begun in ``out`` its own, unless another is given."""
        drawn = seeding.resolve(seed)
        if seed is not None or self.folder is None:
            return drawn
        begun = store.read_manifest(self.folder)
        if begun is not None:
            drawn = begun.get("settings", {}).get("seed", drawn)
        return ranks.team().agreed(drawn)


class Recipe(ABC):
    """What is particular to a set."""

    method: str
    attack: Attack
    layer: Layer = None

    @property
    def may_stop_early(self) -> bool:
        """Whether rows may leave before the attack's steps are spent."""
        return getattr(self.attack, "patience", None) is not None

    @abstractmethod
    def settings(self, model: nn.Module) -> dict[str, Any]:
        """What goes into the manifest beside the attack's own settings."""

    def companions(self, ids: list[int]) -> list[int]:
        """The other rows, one for each row or none at all, that are to be read beside these."""
        return []

    def given_starts(self, ids: list[int]) -> Tensor | None:
        """Starts that come from the user, one for each row."""
        return None

    @abstractmethod
    def begin(self, net: Network, batch: Batch) -> Batch:
        """Give the batch to attack: targets for labels, or another start.

        The start that comes in is the user's, or the companions' inputs, where there are any.
        """

    @abstractmethod
    def describe(
        self, net: Network, batch: Batch, attacked: Batch, images: Tensor
    ) -> dict[str, Tensor]:
        """Fields to keep beside the images, ``labels`` among them, measured in float32.

        Of the model, the rows as they came, the batch as it was attacked, and the very images that
        are kept.
        """


def construct(
    model: nn.Module, source: Source, recipe: Recipe, making: Making
) -> ConstructedDataset:
    """Run the recipe's attack over all rows, and keep what it returns."""
    out = making.folder
    team = ranks.ALONE if out is None else ranks.team()
    chunks = _chunks(source, recipe)[team.rank :: team.size]
    kept = np.arange(len(source))
    manifest = _manifest(model, source, recipe, making)
    if making.has_own_folder:
        if not chunks:
            checks.fail("out", str(out), f"there are more ranks ({team.size}) than batches")
        kept = np.concatenate(chunks)
        manifest |= {"rows": len(kept), "share": {"rank": team.rank, "of": team.size}}
        team = ranks.ALONE  # each for itself from here on
    if out is not None:
        store.refuse_other(out, manifest)
        if store.is_finished(out):
            return ConstructedDataset.open(out)
    precision, layer, compiled = making.precision, recipe.layer, making.compile
    with attackable(model, precision=precision, layer=layer, compile=compiled) as net:
        maker = _Maker(net, source, recipe, making.dtype, device_of(model))
        with _begun(maker, manifest, out, team) as growing, _stoppable(growing):
            left = [c for c in chunks if not growing.done[np.searchsorted(kept, c)].all()]
            batches = with_progress(
                prefetched(maker.read(left)),
                total=len(left),
                label=recipe.method,
                progress=making.progress if team.rank == 0 else False,
            )
            for places, found in maker.made(batches):
                growing.put(np.searchsorted(kept, places), found)
            growing.flush()
            team.wait()
        return growing.dataset()


def _chunks(source: Source, recipe: Recipe) -> list[Array]:
    """Places of the rows that enter together.

    Always the same, whatever is finished and whoever asks: a row's last digits can depend on its
    batch.
    """
    size = source.batch_size
    if recipe.may_stop_early:
        size = max(1, size // _PORTIONS)
    return np.split(np.arange(len(source)), np.arange(size, len(source), size))


class _Maker:
    """Makes rows of a set, a batch at a time."""

    def __init__(
        self, net: Network, source: Source, recipe: Recipe, dtype: Dtype, device: torch.device
    ) -> None:
        self._net, self._source, self._recipe = net, source, recipe
        self._dtype, self._device = dtype, device
        self._places = {row: place for place, row in enumerate(source.indices)}

    def read(self, chunks: list[Array]) -> Iterator[Rows]:
        """The chunks' rows, and their companions behind them, on the host."""
        ids = [[self._source.indices[place] for place in chunk] for chunk in chunks]
        wanted = [own + self._recipe.companions(own) for own in ids]
        for own, rows in zip(ids, self._source.batches(torch.device("cpu"), wanted), strict=True):
            yield rows._replace(ids=torch.tensor(own))

    def example(self) -> dict[str, Array]:
        """All fields of the first row, before any step."""
        (rows,) = self.read([np.zeros(1, np.int64)])
        batch = self._checked(rows)
        attacked = self._recipe.begin(self._net, batch)
        attack = self._recipe.attack
        return self._described(batch, attacked, attack.result(attack.init(self._net, attacked)))

    def made(self, batches: Iterable[Rows]) -> Iterator[tuple[Array, dict[str, Array]]]:
        """All fields of the rows, and the places they go to."""
        drive = self._pooled if self._recipe.may_stop_early else self._in_turn
        for batch, attacked, images in drive(batches):
            found = self._described(batch, attacked, images)
            yield np.array([self._places[row] for row in found["index"].tolist()]), found

    def _in_turn(self, batches: Iterable[Rows]) -> Iterator[tuple[Batch, Batch, Tensor]]:
        """One batch after the other."""
        net, attack = self._net, self._recipe.attack
        for rows in batches:
            batch = self._checked(rows)
            attacked = self._recipe.begin(net, batch)
            yield batch, attacked, attack.result(attack.run(net, attack.init(net, attacked)))

    def _pooled(self, batches: Iterable[Rows]) -> Iterator[tuple[Batch, Batch, Tensor]]:
        """Rows as they finish; the next ones take their places in portions of a batch."""
        net, attack, size = self._net, self._recipe.attack, self._source.batch_size
        waiting, more = iter(batches), True
        pool: list[Any] = []  # rows as they came, as attacked, and their state
        while True:
            while more and (not pool or len(pool[0].ids) * _PORTIONS <= size * (_PORTIONS - 1)):
                rows = next(waiting, None)
                if rows is None:
                    more = False
                    break
                batch = self._checked(rows)
                attacked = self._recipe.begin(net, batch)
                fresh = [batch, attacked, attack.init(net, attacked)]
                pool = [joined(*pair) for pair in zip(pool, fresh, strict=True)] if pool else fresh
            if not pool:
                return
            for _ in range(_LOOK):
                pool[2] = attack.step(net, pool[2])
            finished = attack.finished(pool[2])
            leaving, staying = finished.nonzero().squeeze(1), (~finished).nonzero().squeeze(1)
            if len(leaving) * _PORTIONS >= size or (len(leaving) and not more):
                batch, attacked, state = (taken(part, leaving) for part in pool)
                yield batch, attacked, attack.result(state)
                pool = [taken(part, staying) for part in pool] if len(staying) else []

    def _described(self, batch: Batch, attacked: Batch, images: Tensor) -> dict[str, Array]:
        net, recipe, bounds = self._net, self._recipe, self._recipe.attack.bounds
        found = {"images": images, "index": batch.ids}
        if self._dtype == "float32":
            found |= recipe.describe(net, batch, attacked, images)
        else:
            levels = store.quantised(images, bounds)
            rounded = store.dequantised(levels, bounds)
            before = recipe.describe(net, batch, attacked, images)
            found |= {"images": levels, **recipe.describe(net, batch, attacked, rounded)}
            found |= {
                f"{name}_unrounded": before[name]
                for name in ("success", "distance")
                if name in before
            }
            found["rounding"] = threat.size(rounded - images, "l2")
        host = _on_host(found)
        if companions := recipe.companions(host["index"].tolist()):
            host["start_index"] = np.array(companions)
        return host

    def _checked(self, rows: Rows) -> Batch:
        """Check on the host, where looking waits for nobody, and move to the device."""
        net, bounds, count = self._net, self._recipe.attack.bounds, len(rows.ids)
        checks.inputs(rows.inputs, bounds)
        checks.labels(rows.labels, rows.inputs)
        net.expect(rows.labels)
        inputs = self._moved(rows.inputs)
        start = inputs[count:] if len(inputs) > count else None
        given = self._recipe.given_starts(rows.ids.tolist())
        return Batch(
            inputs[:count],
            rows.labels[:count].to(self._device, torch.int64, non_blocking=True),
            rows.ids.to(self._device, non_blocking=True),
            start if given is None else self._moved(given),
        )

    def _moved(self, inputs: Tensor) -> Tensor:
        if self._net.dtype not in (None, torch.float64):
            # NumPy's float64, which the model would read in float32, doubles a set for nothing.
            inputs = inputs.float()
        moved = self._net.prepare(inputs.to(self._device, non_blocking=True))
        return moved.clamp_(*self._recipe.attack.bounds)


def _on_host(found: dict[str, Tensor]) -> dict[str, Array]:
    """Move all fields, waiting for the device once."""
    waits = any(value.is_cuda for value in found.values())
    host = {name: value.to("cpu", non_blocking=value.is_cuda) for name, value in found.items()}
    if waits:
        torch.cuda.current_stream().synchronize()
    return {name: value.numpy() for name, value in host.items()}


@contextmanager
def _begun(
    maker: _Maker, manifest: dict[str, Any], out: Folder | None, team: ranks.Team
) -> Iterator[store.InMemory | store.OnDisk]:
    """Open the place where rows go: in memory, a new folder, or one that was begun before."""
    if out is None:
        with store.InMemory(maker.example(), manifest["rows"], manifest) as growing:
            yield growing
        return
    with store.claim(out) if team.rank == 0 else nullcontext():
        if team.rank == 0 and store.read_manifest(out) is None:
            store.create(out, maker.example(), manifest["rows"], manifest)
        team.wait()
        store.refuse_other(out, manifest)
        with store.OnDisk(out) as growing:
            yield growing


@contextmanager
def _stoppable(growing: store.InMemory | store.OnDisk) -> Iterator[None]:
    """On Ctrl-C and SIGTERM, finish what is being written and say how to go on."""
    if isinstance(growing, store.InMemory):
        yield
        return
    main = threading.current_thread() is threading.main_thread()
    # A handler of the user's own stays in charge.
    ours = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        growing.flush()
        print(
            f"advfeat: stopped; {int(growing.done.sum())} of {len(growing.done)} rows are safe in "
            f"{str(growing.folder)!r}. The same call goes on:\n    {_command()}",
            file=sys.stderr,
        )
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _command() -> str:
    """The command line of this process, or of the torchrun that started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']} {shlex.join(sys.argv)}"
    return shlex.join(sys.orig_argv)


def numbered(data: Data, making: Making) -> Source:
    """Rows that can be fetched by number, which every construction needs."""
    source = Source(data, making.batch_size)
    if source.is_stream:
        checks.fail(
            "data",
            type(data).__name__,
            "construction fetches rows by number; pass a map-style dataset or a loader of one",
        )
    sharded = isinstance(data, DataLoader) and isinstance(data.sampler, DistributedSampler)
    if sharded and making.out is not None and ranks.team().size > 1:
        checks.fail(
            "data",
            "DistributedSampler",
            "the ranks share the rows themselves; pass the dataset, or a loader without a sampler",
        )
    return source


# --- D_R and D_NR ---


class Inversions(Recipe):
    """Images with the activations of others: D_R or D_NR, as the model is robust or standard."""

    def __init__(
        self, method: str, attack: Inversion, layer: Layer, start: Start, seed: int, source: Source
    ) -> None:
        self.method, self.attack, self.layer = method, attack, layer
        self._start, self._seed, self._rows = start, seed, source.indices
        self._places = {row: place for place, row in enumerate(source.indices)}

    def settings(self, model: nn.Module) -> dict[str, Any]:
        """Seed, start and layer."""
        start = self._start
        if isinstance(start, Tensor):
            start = "given, sha256 " + _digest([start])  # type: ignore[assignment]
        return {"seed": self._seed, "start": start, "layer": _layer_name(model, self.layer)}

    def companions(self, ids: list[int]) -> list[int]:
        """Another row for each row, uniform over all the others: where it starts."""
        if isinstance(self._start, Tensor) or self._start != "images":
            return []
        count = len(self._rows)
        steps_on = seeding.integers(seeding.keys(self._seed, torch.tensor(ids)), 0, count - 1)
        return [
            self._rows[(self._places[row] + 1 + on) % count]
            for row, on in zip(ids, steps_on.tolist(), strict=True)
        ]

    def given_starts(self, ids: list[int]) -> Tensor | None:
        """The user's, by place."""
        if isinstance(self._start, Tensor):
            return self._start[[self._places[row] for row in ids]]
        return None

    def begin(self, net: Network, batch: Batch) -> Batch:
        """Start elsewhere."""
        if batch.start is None:
            return batch._replace(start=_noise(batch, self._seed, self.attack.bounds))
        if batch.start.shape != batch.inputs.shape:
            checks.fail("start.shape", tuple(batch.start.shape), "must be that of the images")
        return batch

    def describe(
        self, net: Network, batch: Batch, attacked: Batch, images: Tensor
    ) -> dict[str, Tensor]:
        """How near the activations have come, and how far the image has moved."""
        assert attacked.start is not None
        goal = net.features(batch.inputs)
        return {
            "labels": batch.labels,
            "distance": threat.size(net.features(images) - goal, "l2"),
            "distance_before": threat.size(net.features(attacked.start) - goal, "l2"),
            "size": threat.size(images - attacked.start, "l2"),
        }


def invert_all(
    model: nn.Module,
    data: Data,
    *,
    method: str,
    layer: Layer,
    start: Start,
    steps: int,
    step_size: float,
    momentum: float,
    bounds: Bounds,
    seed: int | torch.Generator | None,
    patience: int | None,
    making: Making,
) -> ConstructedDataset:
    """Invert the activations of every row."""
    checks.model(model)
    attack = Inversion(
        steps=steps, step_size=step_size, momentum=momentum, bounds=bounds, patience=patience
    )
    checks.seed(seed)
    source = numbered(data, making)
    _check_start(start, len(source), bounds)
    recipe = Inversions(method, attack, layer, start, making.seed(seed), source)
    return construct(model, source, recipe, making)


def _check_start(start: Start, rows: int, bounds: Bounds) -> None:
    if not isinstance(start, str):
        checks.inputs(start, bounds, "start")
        if len(start) != rows:
            checks.fail("start.shape", tuple(start.shape), f"expected {rows} images, one a row")
        return
    checks.one_of("start", start, ("images", "noise"))
    if start == "images" and rows < 2:
        checks.fail("start", start, "there is no other image to start from; use start='noise'")


def _noise(batch: Batch, seed: int, bounds: Bounds) -> Tensor:
    """The released notebook's start, N(0, 1) / 20 + 0.5 of the box's width."""
    keys = seeding.keys(seed, batch.ids)
    normal: Tensor = torch.special.ndtri(seeding.uniform(keys, 0, batch.inputs[0].numel()))
    low, high = bounds
    noise = low + (high - low) * (normal.view(batch.inputs.shape) / 20 + 0.5)
    noise = noise.to(batch.inputs.dtype, memory_format=torch.preserve_format)
    return noise.clamp_(low, high)


def _layer_name(model: nn.Module, layer: Layer) -> str:
    if layer is None or isinstance(layer, str):
        return layer or "input of the last Linear"
    if isinstance(layer, nn.Module):
        names: dict[nn.Module, str] = {
            module: name for name, module in unwrapped(model).named_modules()
        }
        return names.get(layer, "")  # a module of another model is refused by `attackable`
    return f"function {getattr(layer, '__qualname__', type(layer).__qualname__)}"


# --- Provenance ---


def _manifest(model: nn.Module, source: Source, recipe: Recipe, making: Making) -> dict[str, Any]:
    attack = recipe.attack
    own = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}  # type: ignore[arg-type]
    own = {name: value for name, value in own.items() if name != "seed"}
    chosen = {"precision": making.precision, "dtype": making.dtype}
    return {
        "method": recipe.method,
        "attack": type(attack).__name__,
        "settings": _plain({**own, **chosen, **recipe.settings(model)}),
        "rows": len(source),
        "model": {"class": type(unwrapped(model)).__name__, "sha256": model_fingerprint(model)},
        "data": {"sha256": data_fingerprint(source)},
        "versions": {
            "advfeat": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def model_fingerprint(model: nn.Module) -> str:
    """Digest of the modules' kinds and settings and of all parameters and buffers."""
    module = unwrapped(model)
    kinds = [
        f"{name} {type(part).__qualname__} {part.extra_repr()}"
        for name, part in module.named_modules()
    ]
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return _digest([*kinds, *tensors, *tensors.values()])


def data_fingerprint(source: Source) -> str:
    """Digest of the row numbers and of rows spread evenly over all of them."""
    rows = source.indices
    spread = rows[:: -(-len(rows) // _LOOKED_AT)]
    looked_at = (
        item
        for start in range(0, len(spread), 32)
        for item in source.rows(spread[start : start + 32], torch.device("cpu"))
    )
    return _digest(itertools.chain([torch.tensor(rows)], looked_at))


def _digest(items: Iterable[str | Tensor]) -> str:
    found = hashlib.sha256()
    for item in items:
        if isinstance(item, Tensor):
            found.update(f"{item.dtype} {tuple(item.shape)}".encode())
            plain = item.detach().cpu().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).numpy().data)
        else:
            found.update(item.encode() + b"\0")
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON can hold: NumPy's numbers become Python's, anything strange its description."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
