"""The stages of a study, in their order, each done once."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from advfeat import checks, distributed, nonrobust, robustify, seeding
from advfeat.analysis import leakage
from advfeat.attacks import PGD
from advfeat.construction import data_fingerprint, model_fingerprint
from advfeat.datasets import ConstructedDataset
from advfeat.loading import Data, Source
from advfeat.metrics import RobustAccuracy, accuracy, robust_accuracy, transfer_matrix
from advfeat.model import Precision
from advfeat.study._data import Moved, dataset_of, digits, first, plain, resident
from advfeat.study._recipe import SOURCES, TARGETED, Recipe
from advfeat.study._result import Study
from advfeat.study._stages import Stages
from advfeat.threat import Bounds, Norm
from advfeat.training import History, adversarial_fit, fit

_CONSTRUCT: dict[str, Callable[..., ConstructedDataset]] = {
    "D_R": robustify.construct_robust_dataset,
    "D_NR": nonrobust.construct_nonrobust_dataset,
    "D_rand": nonrobust.construct_rand_dataset,
    "D_det": nonrobust.construct_det_dataset,
}


def run(
    make_model: Callable[[], nn.Module],
    train: Data,
    test: Data,
    *,
    eps: float,
    norm: Norm,
    at: Sequence[float] | None = None,
    bounds: Bounds = (0.0, 1.0),
    recipe: Recipe | Literal["paper", "short"] = "short",
    out: str | os.PathLike[str] | None = None,
    stages: Iterable[str] | None = None,
    seed: int | torch.Generator | None = None,
    precision: Precision = "float32",
    device: torch.device | str | None = None,
    on_stage: Callable[[str, float], object] | None = None,
    progress: bool | None = None,
) -> Study:
    """Do the paper on a model and data: train, construct, train on what was made, measure.

    A standard and a robust model; the sets D_R, D_NR, D_rand, D_det and the control from the robust
    model; a fresh model on each of them; accuracy and robust accuracy of them all on true test
    data; transfer; leakage. Every stage is done once: with ``out`` the same call goes on where it
    was, killed at any moment.

    Parameters
    ----------
    make_model
        Makes an untrained model; called with torch's generators seeded, once for each model.
    train, test
        Map-style datasets (or loaders of one) without random augmentation, which is the recipe's.
        Nothing is chosen on ``test``.
    eps, norm
        Ball of adversarial training and of the targeted perturbations, in the units of the inputs.
    at
        Radii at which robust accuracy is measured, in ``norm``; default ``eps / 2`` and ``eps``, as
        in the paper.
    bounds
        The box ``(low, high)`` of valid inputs.
    recipe
        Settings of all stages, or ``"paper"`` (CIFAR-10; days on a CPU), or ``"short"``.
    out
        A folder for weights, sets, results and ``report.html``. What is in it was made by the
        same settings, or the stage is refused.
    stages
        Names of stages to do, with what they need; default all, in order: ``"train standard"``,
        ``"train robust"``, and for each set ``"make D_R"``, then ``"train on D_R"``, then for
        each model ``"measure standard"``, and ``"transfer"`` and ``"leakage"``.
    seed
        Of everything random; None draws one number from torch's default generator (with ``out``
        the one that the folder was begun with).
    precision
        ``"bfloat16"`` for training and for gradients; verdicts are float32 always.
    device
        Where models are moved to; by default they stay where ``make_model`` puts them.
    on_stage
        Called with the name and the seconds of each stage that was done.
    progress
        Draw bars; by default where stderr is a terminal and tqdm is installed.

    Returns
    -------
    Study
        What was measured, as a table, pictures and a report.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and the usual cause; also where ``out`` holds a stage done
        with other settings.

    Notes
    -----
    Under ``torchrun`` every rank makes the same call: trainings and constructions are shared out
    (see `advfeat.fit`), the first rank measures. ``out`` is then needed, on a disk that all share.

    Examples
    --------
    >>> import torch
    >>> from advfeat import study
    >>> y = torch.arange(60) % 3
    >>> data = torch.utils.data.TensorDataset(0.4 * torch.rand(60, 6) + 0.2 * y[:, None], y)
    >>> recipe = study.Recipe(standard={"epochs": 5}, sets={"D_det": {"steps": 5}})
    >>> found = study.run(
    ...     lambda: torch.nn.Linear(6, 3), data, data, eps=0.1, norm="l2", recipe=recipe, seed=0
    ... )
    >>> list(found.measured), found.measured["D_det"].standard.total
    (['standard', 'robust', 'D_det'], 60)
    """
    work = Work(
        make_model=make_model,
        train=dataset_of("train", train),
        test=dataset_of("test", test),
        eps=eps,
        norm=norm,
        at=(eps / 2, eps) if at is None else tuple(at),
        bounds=bounds,
        recipe=_recipe(recipe, eps),
        precision=precision,
        device=device,
        progress=progress,
        stages=Stages(out, distributed.current_process()),
        seed=seed,
    )
    todo = work.order()
    for name in work.needed(todo if stages is None else stages):
        began = time.perf_counter()
        todo[name].work()
        if on_stage is not None and work.stages.is_first:
            on_stage(name, time.perf_counter() - began)
    study = Study(work)
    if work.stages.folder is not None:
        for name in study.made:  # opened by all ranks, for the first one's report
            work.dataset(name)
        if work.stages.is_first:
            study.save_report(work.stages.folder / "report.html")
    return study


class Stage(NamedTuple):
    """A piece of the study, and the stages that it starts from."""

    work: Callable[[], object]
    after: list[str]


@dataclass(kw_only=True)
class Work:
    """A study at work: what was asked, and what is done."""

    make_model: Callable[[], nn.Module]
    train: Dataset[Any]
    test: Dataset[Any]
    eps: float
    norm: Norm
    at: tuple[float, ...]
    bounds: Bounds
    recipe: Recipe
    precision: Precision
    device: torch.device | str | None
    progress: bool | None
    stages: Stages
    seed: Any

    def __post_init__(self) -> None:
        """Refuse bad settings, and a folder that holds another study."""
        if not callable(self.make_model) or isinstance(self.make_model, nn.Module):
            raise TypeError(
                f"make_model: {type(self.make_model).__name__}; expected a function that makes a "
                "new model each time: make_model=lambda: Net()"
            )
        checks.bounds(self.bounds)
        checks.norm(self.norm)
        for argument, radius in (("eps", self.eps), *(("at", radius) for radius in self.at)):
            checks.number(argument, radius, low=0.0, strict=True)
            checks.linf_in_bounds(radius, self.norm, self.bounds)
        checks.one_of("precision", self.precision, checks.PRECISIONS)
        checks.seed(self.seed)
        self.seed = self.stages.seed(self.seed)
        self._models: dict[str, nn.Module] = {}
        self._sets: dict[str, ConstructedDataset] = {}
        self.identity = self._identity()
        self.stages.begin(self.identity)

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return ["standard", "robust", *self.recipe.sets]

    @property
    def leaking(self) -> list[str]:
        """The sets that robust features may leak into (Goh)."""
        return [name for name in self.recipe.sets if name in TARGETED]

    def order(self) -> dict[str, Stage]:
        """The paper, stage by stage."""
        sets = self.recipe.sets
        return {
            "train standard": Stage(partial(self.trained, "standard"), []),
            "train robust": Stage(partial(self.trained, "robust"), []),
            **{f"make {n}": Stage(partial(self.made, n), [training(SOURCES[n])]) for n in sets},
            **{f"train on {n}": Stage(partial(self.trained, n), [f"make {n}"]) for n in sets},
            **{f"measure {n}": Stage(partial(self.measured, n), [training(n)]) for n in self.names},
            "transfer": Stage(self.transferred, [training(n) for n in self.names]),
            "leakage": Stage(self.leaked, [f"make {n}" for n in self.leaking]),
        }

    def needed(self, stages: Iterable[str]) -> list[str]:
        """These stages and what they need, in order."""
        order, found = self.order(), set[str]()

        def add(stage: str) -> None:
            checks.one_of("stages", stage, tuple(order))
            for before in order[stage].after:
                add(before)
            found.add(stage)

        for stage in stages:
            add(stage)
        return [stage for stage in order if stage in found]

    # --- Stages: each is done once, and gives what it found as plain values ---

    def trained(self, name: str) -> list[dict[str, float]]:
        """Train a model; the rows of its history."""
        rows: list[dict[str, float]] = self._once(
            training(name), self._behind_model(name), lambda: self._train(name).rows
        )
        return rows

    def made(self, name: str) -> dict[str, float]:
        """Make a set; means over its rows."""

        def make() -> dict[str, float]:
            fields = self.dataset(name).fields
            told = ("success", "distance_before", "distance", "size")
            return {each: float(np.asarray(fields[each]).mean()) for each in told if each in fields}

        found: dict[str, float] = self._once(f"make {name}", self._behind_set(name), make)
        return found

    def measured(self, name: str) -> dict[str, str]:
        """Accuracies of a model: the outcome of each test row, ``"1"`` where it is right."""

        def measure() -> dict[str, str]:
            model = self.model(name)
            robust = [self._robust(model, radius) for radius in self.at]
            # Every robust accuracy has looked at the clean rows already.
            clean = robust[0].standard if robust else accuracy(model, self.test)
            moved = accuracy(model, Moved(self.test, model), progress=self.progress)
            named = {f"{radius:g}": found for radius, found in zip(self.at, robust, strict=True)}
            shares = {"accuracy": clean, **named, "moved": moved}
            return {key: digits(share) for key, share in shares.items()}

        settings = {**self.recipe.measured, "at": self.at, "model": self._behind_model(name)}
        found: dict[str, str] = self._once(
            f"measure {name}", settings, measure, lambda: self.model(name)
        )
        return found

    def transferred(self) -> dict[str, Any]:
        """Whether examples made on the first two models fool the others."""
        settings = dict(self.recipe.transfer)
        rows = settings.pop("rows", None)

        def measure() -> dict[str, Any]:
            models = {name: self.model(name) for name in self.names}
            sources = {name: models[name] for name in ("standard", "robust")}
            attack = PGD(**{"eps": self.eps, "norm": self.norm, "bounds": self.bounds, **settings})
            data = self.test if rows is None else first(self.test, rows)
            matrix = transfer_matrix(sources, models, data, attack, progress=self.progress)
            tensors = ("fooled", "both_right", "of_fooled", "of_all", "clean_error")
            return {name: getattr(matrix, name).tolist() for name in tensors}

        models = [self._behind_model(name) for name in self.names]
        found: dict[str, Any] = self._once(
            "transfer",
            {**settings, "rows": rows, "models": models},
            measure,
            lambda: [self.model(name) for name in self.names],
        )
        return found

    def leaked(self) -> dict[str, Any]:
        """How much of the targeted sets provably robust linear features explain."""
        settings = {"sets": [self._behind_set(name) for name in self.leaking]}
        found: dict[str, Any] = self._once(
            "leakage",
            settings,
            lambda: {n: self._leak(n) for n in self.leaking},
            lambda: [self.dataset(n) for n in self.leaking],
        )
        return found

    # --- What they leave behind ---

    def model(self, name: str) -> nn.Module:
        """A trained model; read from the folder where it is there."""
        if name not in self._models:
            self._train(name)
        return self._models[name]

    def dataset(self, name: str) -> ConstructedDataset:
        """A constructed set; opened in the folder where it is there."""
        if name not in self._sets:
            kind = name.split()[0]
            given = {"precision": self.precision, **self.recipe.sets[name]}
            if kind in TARGETED:
                given = {"eps": self.eps, "norm": self.norm, **given}
            if kind != "D_det":
                given["seed"] = self._seed(kind)
            self._sets[name] = _CONSTRUCT[kind](
                self.model(SOURCES[name]),
                self.rows,
                bounds=self.bounds,
                progress=self.progress,
                out=self.stages.place("sets", name),
                **given,
            )
        return self._sets[name]

    @property
    def rows(self) -> Dataset[Any]:
        """What sets are made of."""
        return self.train if self.recipe.rows is None else first(self.train, self.recipe.rows)

    def _train(self, name: str) -> History:
        model = self._fresh(name)
        settings: dict[str, Any] = {
            "precision": self.precision,
            "checkpoint": self.stages.place("models", name),
            "seed": self._seed(training(name)),
            "progress": self.progress,
        }
        data = resident(self.dataset(name), model) if name in SOURCES else self.train
        if name == "robust":
            if "attack" not in self.recipe.training(name):
                settings |= {"eps": self.eps, "norm": self.norm}
            settings["bounds"] = self.bounds
            history = adversarial_fit(model, data, **settings | self.recipe.training(name))
        else:
            history = fit(model, data, **settings | self.recipe.training(name))
        self._models[name] = model
        return history

    def _fresh(self, name: str) -> nn.Module:
        """An untrained model with weights of its own."""
        device = torch.device("cpu" if self.device is None else self.device)
        with seeding.default_generators(self._seed(training(name)), 0, device):
            model = self.make_model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"make_model: made {type(model).__name__}; expected a torch.nn.Module")
        return model if self.device is None else model.to(self.device)

    def _robust(self, model: nn.Module, radius: float) -> RobustAccuracy:
        settings = {
            "eps": radius,
            "norm": self.norm,
            "bounds": self.bounds,
            "seed": self.seed,
            "precision": self.precision,
            "progress": self.progress,
        }
        return robust_accuracy(model, self.test, **{**settings, **self.recipe.measured})

    def _leak(self, name: str) -> dict[str, Any]:
        ball = {"eps": self.eps, "norm": self.norm, **self.recipe.sets[name]}
        try:
            found = leakage(
                self.dataset(name), self.train, self.test,
                eps=ball["eps"], norm=ball["norm"], seed=self.seed,
            )  # fmt: skip
        except ValueError as error:  # no linear feature is robust at this radius
            return {"why": str(error)}
        shares = {"learned": found.learned, "reference": found.reference}
        return {**{k: digits(s) for k, s in shares.items()}, "features": found.features}

    # --- What was asked, for the folder to recognise ---

    def _identity(self) -> dict[str, Any]:
        """What all stages share."""
        untrained = self._fresh("standard").cpu()
        found: dict[str, Any] = plain(
            {
                "eps": self.eps,
                "norm": self.norm,
                "bounds": self.bounds,
                "precision": self.precision,
                "seed": self.seed,
                "rows": self.recipe.rows,
                "model": {
                    "class": type(untrained).__name__,
                    "sha256": model_fingerprint(untrained),
                },
                "train": {"sha256": data_fingerprint(Source(self.train))},
                "test": {"sha256": data_fingerprint(Source(self.test))},
            }
        )
        return found

    def _behind_model(self, name: str) -> dict[str, Any]:
        own = {"name": name, **self.recipe.training(name)}
        return {**own, "set": self._behind_set(name)} if name in SOURCES else own

    def _behind_set(self, name: str) -> dict[str, Any]:
        source = self._behind_model(SOURCES[name])
        return {"name": name, **self.recipe.sets[name], "source": source}

    def _once(
        self,
        stage: str,
        settings: Any,
        work: Callable[[], Any],
        alone_after: Callable[[], object] | None = None,
    ) -> Any:
        # Models and sets are everybody's, also where they are only read: a rank that asked for
        # one alone would wait for the others for ever.
        return self.stages.once(stage, plain(settings), work, alone_after=alone_after)

    def _seed(self, part: str) -> int:
        return seeding.derive(self.seed, zlib.crc32(part.encode()))


def training(name: str) -> str:
    """Name of the stage that trains a model."""
    return f"train on {name}" if name in SOURCES else f"train {name}"


def _recipe(recipe: Recipe | str, eps: float) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    checks.one_of("recipe", recipe, ("paper", "short"))
    return Recipe.paper() if recipe == "paper" else Recipe.short(eps)
