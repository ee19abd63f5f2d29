"""The stages of a study, in their order, each done once."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

from advfeat import checks, nonrobust, robustify, seeding
from advfeat.analysis import leakage
from advfeat.attacks import PGD
from advfeat.construction import data_fingerprint, model_fingerprint
from advfeat.datasets import ConstructedDataset, moved_control, noise_control
from advfeat.loading import Source
from advfeat.metrics import RobustAccuracy, accuracy, robust_accuracy, transfer_matrix
from advfeat.model import Precision
from advfeat.study._data import ModelMaker, Shifted, as_text, first, plain, resident
from advfeat.study._plan import PLANS, base_of, training_stage
from advfeat.study._recipe import Recipe
from advfeat.study._stages import Stages
from advfeat.threat import Bounds, Norm
from advfeat.training import History, adversarial_fit, fit

_CONSTRUCT: dict[str, Callable[..., ConstructedDataset]] = {
    "D_R": robustify.construct_robust_dataset,
    "D_NR": nonrobust.construct_nonrobust_dataset,
    "D_rand": nonrobust.construct_rand_dataset,
    "D_det": nonrobust.construct_det_dataset,
}
_CONTROL = {"noise": noise_control, "moved": moved_control}
TRANSFER = ("fooled", "both_right", "of_fooled", "of_all", "clean_error")


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
        """Check the settings, and that the folder holds no other study."""
        check_model_maker(self.make_model)
        check_ball(self.eps, self.norm, self.bounds, self.at)
        checks.one_of("precision", self.precision, checks.PRECISIONS)
        checks.seed(self.seed)
        self.seed = self.stages.seed(self.seed)
        self._new_model = ModelMaker(self.make_model)
        self._models: dict[str, nn.Module] = {}
        self._datasets: dict[str, ConstructedDataset] = {}
        self.identity = self._identity()
        self.stages.begin(self.identity)

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return ["standard", "robust", *self.recipe.sets]

    @property
    def made_names(self) -> list[str]:
        """Of the datasets that are made: those that are not the original images."""
        return [name for name in self.recipe.sets if PLANS[name].method != "original"]

    @property
    def leaking(self) -> list[str]:
        """The datasets that robust features may leak into (Goh)."""
        return [name for name in self.recipe.sets if name in ("D_rand", "D_det")]

    def order(self) -> dict[str, Stage]:
        """The paper, stage by stage."""
        sets = self.recipe.sets
        # Noise and moved controls are made of another dataset.
        made = sorted(self.made_names, key=lambda name: not PLANS[name].is_constructed)
        return {
            "train standard": Stage(partial(self.trained, "standard"), []),
            "train robust": Stage(partial(self.trained, "robust"), []),
            **{f"make {n}": Stage(partial(self.made, n), [self._made_from(n)]) for n in made},
            **{
                training_stage(n): Stage(
                    partial(self.trained, n), [f"make {n}"] if n in made else []
                )
                for n in sets
            },
            **{
                f"measure {n}": Stage(partial(self.measured, n), [training_stage(n)])
                for n in self.names
            },
            "transfer": Stage(self.transferred, [training_stage(n) for n in self.names]),
            "leakage": Stage(self.leaked, [f"make {n}" for n in self.leaking]),
        }

    def needed(self, stages: Iterable[str]) -> list[str]:
        """These stages and what they need, in order."""
        if isinstance(stages, str):
            raise TypeError(f"stages={stages!r}: expected a list of names, [{stages!r}]")
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
        """Train a model; the epochs of its history."""
        epochs: list[dict[str, float]] = self._once(
            training_stage(name), self._behind_model(name), lambda: self._train(name).rows
        )
        return epochs

    def made(self, name: str) -> dict[str, float]:
        """Make a dataset; means over its samples."""

        def make() -> dict[str, float]:
            fields = self.dataset(name).fields
            reported = ("success", "distance_before", "distance", "size")
            return {
                each: float(np.asarray(fields[each]).mean()) for each in reported if each in fields
            }

        found: dict[str, float] = self._once(f"make {name}", self._behind_dataset(name), make)
        return found

    def measured(self, name: str) -> dict[str, str]:
        """Accuracies of a model: the outcome of each test sample, ``"1"`` where it is right."""

        def measure() -> dict[str, str]:
            model = self.model(name)
            robust = [self._robust(model, radius) for radius in self.at]
            # Every robust accuracy has evaluated the clean samples already.
            clean = robust[0].standard if robust else accuracy(model, self.test)
            shifted = accuracy(model, Shifted(self.test, model), progress=self.progress)
            named = {f"{radius:g}": found for radius, found in zip(self.at, robust, strict=True)}
            found = {"accuracy": clean, **named, "shifted": shifted}
            return {key: as_text(each) for key, each in found.items()}

        settings = {**self.recipe.measured, "at": self.at, "model": self._behind_model(name)}
        found: dict[str, str] = self._once(
            f"measure {name}", settings, measure, lambda: self.model(name)
        )
        return found

    def transferred(self) -> dict[str, Any]:
        """Whether examples made on the first two models fool the others."""
        settings = dict(self.recipe.transfer)
        samples = settings.pop("samples", None)

        def measure() -> dict[str, Any]:
            models = {name: self.model(name) for name in self.names}
            sources = {name: models[name] for name in ("standard", "robust")}
            attack = PGD(**{"eps": self.eps, "norm": self.norm, "bounds": self.bounds, **settings})
            data = self.test if samples is None else first(self.test, samples)
            matrix = transfer_matrix(sources, models, data, attack, progress=self.progress)
            return {name: getattr(matrix, name).tolist() for name in TRANSFER}

        models = [self._behind_model(name) for name in self.names]
        found: dict[str, Any] = self._once(
            "transfer",
            {**settings, "samples": samples, "models": models},
            measure,
            lambda: [self.model(name) for name in self.names],
        )
        return found

    def leaked(self) -> dict[str, Any]:
        """How much of the targeted datasets provably robust linear features explain."""
        settings = {"sets": [self._behind_dataset(name) for name in self.leaking]}
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
        """A dataset that is made; opened in the folder where it is there."""
        if name not in self._datasets:
            plan = PLANS[name]
            if plan.is_constructed:
                self._datasets[name] = self._construct(name)
            else:
                assert plan.source is not None
                self._datasets[name] = _CONTROL[plan.method](
                    self.dataset(plan.source), self.samples, seed=self._seed(name)
                )
        return self._datasets[name]

    @property
    def samples(self) -> Dataset[Any]:
        """What datasets are made of."""
        return self.train if self.recipe.samples is None else first(self.train, self.recipe.samples)

    def _construct(self, name: str) -> ConstructedDataset:
        plan = PLANS[name]
        given = {"precision": self.precision, **self.recipe.construction(name)}
        if plan.is_targeted:
            given = {"eps": self.eps, "norm": self.norm, **given}
        if plan.method != "D_det":
            given["seed"] = self._seed(plan.method)
        assert plan.source is not None
        return _CONSTRUCT[plan.method](
            self.model(plan.source),
            self.samples,
            bounds=self.bounds,
            progress=self.progress,
            out=self.stages.place("sets", name),
            **given,
        )

    def _made_from(self, name: str) -> str:
        """The stage that a dataset starts from."""
        plan = PLANS[name]
        return training_stage(plan.source or "") if plan.is_constructed else f"make {plan.source}"

    def _train(self, name: str) -> History:
        model = self._fresh(name)
        settings: dict[str, Any] = {
            "precision": self.precision,
            "checkpoint": self.stages.place("models", name),
            "seed": self._training_seed(name),
            "progress": self.progress,
        }
        settings |= self.recipe.training(name)
        data: Dataset[Any] = self.train
        if name in PLANS:
            starts = self.recipe.starts(name)
            settings["epochs"] = max(1, round(settings["epochs"] / starts))
            if name in self.made_names:
                data = resident(self.dataset(name), model)
            else:
                data = self.samples if starts == 1 else ConcatDataset([self.samples] * starts)
        if name == "robust":
            ball = {} if "attack" in settings else {"eps": self.eps, "norm": self.norm}
            history = adversarial_fit(model, data, **{**ball, "bounds": self.bounds, **settings})
        else:
            history = fit(model, data, **settings)
        self._models[name] = model
        return history

    def _fresh(self, name: str) -> nn.Module:
        """An untrained model; a control begins with the weights of its dataset's model."""
        device = torch.device("cpu" if self.device is None else self.device)
        with seeding.default_generators(self._training_seed(name), 0, device):
            model = self._new_model()
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
        ball = {"eps": self.eps, "norm": self.norm, **self.recipe.construction(name)}
        try:
            found = leakage(
                self.dataset(name), self.train, self.test,
                eps=ball["eps"], norm=ball["norm"], seed=self.seed,
            )  # fmt: skip
        except ValueError as error:  # no linear feature is robust at this radius
            return {"why": str(error)}
        if not found.features:
            return {"why": "no linear feature is robust for certain at this radius"}
        fractions = {"learned": found.learned, "reference": found.reference}
        return {**{k: as_text(s) for k, s in fractions.items()}, "features": found.features}

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
                "samples": self.recipe.samples,
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
        return {**own, "set": self._behind_dataset(name)} if name in PLANS else own

    def _behind_dataset(self, name: str) -> dict[str, Any]:
        plan = PLANS[name]
        if plan.source is None:
            return {"name": name, "starts": self.recipe.starts(name)}
        if plan.is_constructed:
            settings = self.recipe.construction(name)
            return {"name": name, **settings, "source": self._behind_model(plan.source)}
        return {"name": name, "of": self._behind_dataset(plan.source)}

    def _once(
        self,
        stage: str,
        settings: Any,
        work: Callable[[], Any],
        alone_after: Callable[[], object] | None = None,
    ) -> Any:
        # Models and datasets belong to all ranks, also where they are only read: a rank that
        # asked for one alone would wait for the others for ever.
        return self.stages.once(stage, plain(settings), work, alone_after=alone_after)

    def _training_seed(self, name: str) -> int:
        return self._seed(training_stage(base_of(name)))

    def _seed(self, part: str) -> int:
        return seeding.derive(self.seed, zlib.crc32(part.encode()))


def check_model_maker(make_model: object) -> None:
    """Check that this is a function that makes a model, not a model."""
    if not callable(make_model) or isinstance(make_model, nn.Module):
        raise TypeError(
            f"make_model: {type(make_model).__name__}; expected a function that makes a "
            "new model each time: make_model=lambda: Net()"
        )


def check_ball(eps: float, norm: Norm, bounds: Bounds, at: Iterable[float]) -> None:
    """Check that radii are numbers in the units of the inputs."""
    checks.bounds(bounds)
    norm = checks.norm(norm)
    for argument, radius in (("eps", eps), *(("at", radius) for radius in at)):
        checks.number(argument, radius, low=0.0, strict=True)
        checks.linf_in_bounds(radius, norm, bounds)
    named = [f"{radius:g}" for radius in at]
    if len(set(named)) < len(named):
        checks.fail("at", named, "a radius occurs twice, or two differ by less than six digits")
