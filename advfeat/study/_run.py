"""The whole paper in one call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from advfeat import checks, distributed
from advfeat.durable import as_path
from advfeat.loading import Data
from advfeat.model import Precision
from advfeat.progress import Meter
from advfeat.study._calibrate import calibrate
from advfeat.study._calibration import Calibration, of_another_version
from advfeat.study._data import dataset_of, plain
from advfeat.study._findings import Run
from advfeat.study._recipe import Recipe
from advfeat.study._result import Study
from advfeat.study._stages import Stages
from advfeat.study._work import Work, check_ball, check_model_maker
from advfeat.threat import Bounds, Norm


def run(
    make_model: Callable[[], nn.Module],
    train: Data,
    test: Data,
    *,
    eps: float,
    norm: Norm,
    at: Sequence[float] | None = None,
    bounds: Bounds = (0.0, 1.0),
    recipe: Recipe | Literal["auto", "paper", "short"] = "auto",
    out: str | os.PathLike[str] | None = None,
    stages: Iterable[str] | None = None,
    seed: int | torch.Generator | None = None,
    seeds: int | Sequence[int] | None = None,
    precision: Precision = "float32",
    device: torch.device | str | None = None,
    on_stage: Callable[[str, float], object] | None = None,
    progress: bool | None = None,
) -> Study:
    """Run all experiments of the paper on a model and data.

    The study trains a standard and a robust model, constructs D_R, D_NR, D_rand, D_det and their
    controls, and trains a new model on each dataset. It evaluates all models on original test data
    (accuracy, robust accuracy, transfer, leakage), and judges each claim of the paper by paired
    differences to matched controls. With ``out`` the same call resumes after an interruption.

    Parameters
    ----------
    make_model
        Function that returns an untrained model. It is called once for each model, with torch's
        generators seeded.
    train, test
        Map-style datasets (or loaders of one) without random augmentation; the recipe has the
        augmentation. No setting is chosen on ``test``.
    eps, norm
        Ball of adversarial training and of the targeted perturbations, in the units of the inputs.
    at
        Radii at which robust accuracy is measured, in ``norm``; default ``eps / 2`` and ``eps``, as
        in the paper, or those that `calibrate` chooses.
    bounds
        Lowest and highest valid input, ``(low, high)``.
    recipe
        Settings of all stages. ``"auto"`` chooses them on held-out training samples (see
        `calibrate`; the radii ``at`` as well, if none are given), ``"short"`` has fixed ones for a
        short run, ``"paper"`` the paper's for CIFAR-10 (days on a CPU).
    out
        A folder for weights, datasets, results and ``report.html``. If it has a stage of other
        settings, an error is raised.
    stages
        Stages to run, with those that they need; default all, in order: ``"train standard"``,
        ``"train robust"``, and for each dataset ``"make D_R"``, then ``"train on D_R"``, then for
        each model ``"measure standard"``, and ``"transfer"`` and ``"leakage"``.
    seed
        Seed of all random numbers. None draws one number from torch's default generator (with
        ``out`` the first call's).
    seeds
        Repeat the study: the number of seeds, counted up from ``seed``, or a list of them. Each
        has a folder ``seed-N`` in ``out``. The table then has mean, lowest and highest, and
        intervals include the variation between trainings.
    precision
        ``"bfloat16"`` for training and gradients; the success of attacks is checked in float32.
    device
        Device of the models; by default that of ``make_model``.
    on_stage
        Function that is called with the name and the seconds of each finished stage.
    progress
        As in `advfeat.robust_accuracy`.

    Returns
    -------
    Study
        What was measured, as a table, claims with verdicts, pictures and a report.

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
    if not isinstance(recipe, Recipe):
        checks.one_of("recipe", recipe, ("auto", "paper", "short"))
    check_model_maker(make_model)
    check_ball(eps, norm, bounds, () if at is None else at)
    folders = _folders(out, seed, seeds)
    train_data, test_data = dataset_of("train", train), dataset_of("test", test)
    found = None
    if recipe == "auto":
        whole, first_seed = Stages(out, distributed.current_process()), folders[0][1]
        pilot = {
            "eps": eps, "norm": norm, "bounds": bounds, "seed": whole.seed(first_seed),
            "precision": precision, "device": device, "progress": progress,
        }  # fmt: skip
        began = time.perf_counter()
        found = _calibrated(whole, make_model, train_data, pilot)
        if on_stage is not None and whole.is_first:
            on_stage("calibrate", time.perf_counter() - began)
        folders = [(place, pilot["seed"] if one is None else one) for place, one in folders]
    settings: dict[str, Any] = {
        "make_model": make_model,
        "train": train_data,
        "test": test_data,
        "eps": eps,
        "norm": norm,
        "at": _radii(at, eps, found),
        "bounds": bounds,
        "recipe": _recipe(recipe, eps, found),
        "precision": precision,
        "device": device,
        "progress": progress,
    }
    runs = [
        _run_one(Work(stages=place, seed=one, **settings), stages, on_stage)
        for place, one in folders
    ]
    study = Study(runs, found)
    first = runs[0].work.stages
    if out is not None and first.is_first:
        study.save_report(as_path(out) / "report.html")
    return study


def _run_one(
    work: Work, stages: Iterable[str] | None, on_stage: Callable[[str, float], object] | None
) -> Run:
    todo = work.order()
    needed = work.needed(todo if stages is None else stages)
    progress = work.progress if work.stages.is_first else False
    with Meter(progress, "study", len(needed)) as meter:
        for name in needed:
            began = time.perf_counter()
            with Meter(progress, name):
                todo[name].work()
            meter.update()
            if on_stage is not None and work.stages.is_first:
                on_stage(name, time.perf_counter() - began)
    run = Run(work)
    if work.stages.folder is not None:
        for name in run.made:  # opened by all ranks, for the first one's report
            work.dataset(name)
    return run


def _folders(
    out: str | os.PathLike[str] | None, seed: Any, seeds: int | Sequence[int] | None
) -> list[tuple[Stages, Any]]:
    """Where each seed's stages are kept, and the seed: one, or as many as asked for."""
    process = distributed.current_process()
    whole = Stages(out, process)
    if seeds is None:
        return [(whole, seed)]
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        checks.count("seeds", seeds, low=1)
        checks.seed(seed)
        begin = whole.seed(seed)
        whole.begin({"seed": begin})
        listed = list(range(begin, begin + seeds))
    else:
        listed = _listed(seeds, seed)
    places = {one: None if out is None else as_path(out) / f"seed-{one}" for one in listed}
    return [(Stages(place, process), one) for one, place in places.items()]


def _listed(seeds: object, seed: object) -> list[int]:
    if seed is not None:
        checks.fail("seed", seed, "seeds names them all; pass one or the other")
    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or not seeds:
        raise TypeError(f"seeds={seeds!r}: expected how many, or a list of them: seeds=3")
    for one in seeds:
        checks.count("seeds", one, low=0)
    if len(set(seeds)) < len(seeds):
        checks.fail("seeds", seeds, "one occurs twice; the runs would be the same")
    return list(seeds)


def _calibrated(
    stages: Stages, make_model: Callable[[], nn.Module], train: Any, settings: dict[str, Any]
) -> Calibration:
    """Settings chosen once, and kept in the folder."""
    if stages.has_results and stages.record("calibrate") is None:
        cause = f"the study in out={str(stages.folder)!r} was begun with a recipe; pass the same"
        checks.fail("recipe", "auto", cause)
    kept = stages.once(
        "calibrate",
        plain({name: settings[name] for name in ("eps", "norm", "bounds", "seed", "precision")}),
        lambda: calibrate(make_model, train, **settings).to_dict(),
    )
    found = Calibration.from_dict(kept)
    if made := of_another_version(found.choices):
        cause = f"the calibration in it was {made}. Use another folder, or that version"
        checks.fail("out", str(stages.folder), cause)
    return found


def _radii(
    at: Sequence[float] | None, eps: float, calibration: Calibration | None
) -> tuple[float, ...]:
    if at is not None:
        return tuple(at)
    return (eps / 2, eps) if calibration is None else calibration.at


def _recipe(recipe: Recipe | str, eps: float, calibration: Calibration | None) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if calibration is not None:
        return calibration.recipe()
    return Recipe.paper() if recipe == "paper" else Recipe.short(eps)
