"""Each command: its options with their defaults, and the call that a user of Python would write."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch

from advfeat import study
from advfeat.attacks import AutoAttack
from advfeat.cli import _load
from advfeat.durable import as_path, write_whole
from advfeat.metrics import report
from advfeat.nonrobust import (
    construct_det_dataset,
    construct_nonrobust_dataset,
    construct_rand_dataset,
)
from advfeat.robustify import construct_robust_dataset

_KINDS: dict[str, Callable[..., Any]] = {
    "d_r": construct_robust_dataset,
    "d_nr": construct_nonrobust_dataset,
    "d_det": construct_det_dataset,
    "d_rand": construct_rand_dataset,
}
_INVERTED = ("d_r", "d_nr")


def size(text: str) -> float:
    """A radius: ``8/255`` or ``0.03``."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, or 8/255") from error


def add_evaluate(commands: Any) -> None:
    """Options of ``evaluate``."""
    parser = _command(commands, "evaluate", "Evaluate how robust a trained model is.")
    _model_options(parser)
    _data_option(parser)
    _ball_options(parser)
    parser.add_argument(
        "--attack",
        choices=("fast", "standard", "strong"), default="fast",
        help="ensemble of attacks; standard is the published AutoAttack",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=1000, help="maximum number of samples")
    parser.add_argument("--budget", type=float, default=45.0, help="time in seconds; 0: no limit")
    parser.add_argument("--html", metavar="FILE", help="write the report as an HTML page")
    parser.add_argument("--json", metavar="FILE", help="write all numbers as JSON")
    parser.set_defaults(run=evaluate)


def add_construct(commands: Any) -> None:
    """Options of ``construct``."""
    parser = _command(
        commands, "construct",
        "Construct a dataset in a folder. Run the same command again to resume.",
    )  # fmt: skip
    parser.add_argument("kind", choices=tuple(_KINDS), help="the dataset to construct")
    _model_options(parser)
    _data_option(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the dataset")
    parser.add_argument("--eps", type=size, help="radius for d_det, d_rand (default: 0.5)")
    parser.add_argument("--norm", help="norm for d_det and d_rand (default: l2)")
    parser.add_argument("--steps", type=int, help="default: 1000 for d_r, d_nr; else 100")
    parser.add_argument("--step-size", type=float, help="length of a step (default: the paper's)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "uint8"),
        default="float32",
        help="type of the stored images",
    )
    _shared_options(parser)
    parser.set_defaults(run=construct)


def add_study(commands: Any) -> None:
    """Options of ``study``."""
    parser = _command(
        commands, "study",
        "Run all experiments of the paper: train, construct datasets, train on them, evaluate. "
        "Run the same command again to resume.",
    )  # fmt: skip
    _model_options(parser, weights=False)
    _data_option(parser, "--train", "training data")
    _data_option(parser, "--test", "test data")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for all results")
    parser.add_argument(
        "--recipe",
        choices=("auto", "paper", "short"),
        default="auto",
        help="settings; auto: calibrate",
    )
    parser.add_argument("--seeds", type=int, help="number of runs; seeds count up from --seed")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="stages to run (default: all)")
    _ball_options(parser)
    parser.set_defaults(run=run_study)


def evaluate(options: Any) -> None:
    """Print a report, and write it where asked."""
    model, data = _load.model(options), _load.data(options.data)
    ball: dict[str, Any] = {
        "eps": options.eps, "norm": options.norm, "bounds": tuple(options.bounds),
    }  # fmt: skip
    attack = None if options.attack == "fast" else AutoAttack(**ball, version=options.attack)
    found = report(
        model, data, **ball, attack=attack,
        budget=options.budget or None, samples=options.samples, seed=options.seed,
        batch_size=options.batch_size, progress=options.progress,
    )  # fmt: skip
    print(found)
    if options.json:
        write_whole(as_path(options.json), json.dumps(found.to_dict(), indent=1) + "\n")
    if options.html:
        found.save(options.html)
        print(f"page: {options.html}")


def construct(options: Any) -> None:
    """Make a dataset in its folder."""
    given: dict[str, Any] = {"steps": options.steps, "step_size": options.step_size}
    if options.kind in _INVERTED:
        if options.eps is not None or options.norm is not None:
            raise ValueError(f"--eps, --norm: {options.kind} has no ball; leave them out")
    else:
        given |= {"eps": options.eps, "norm": options.norm}
    if options.kind != "d_det":  # it draws no random numbers
        given["seed"] = options.seed
    given = {name: value for name, value in given.items() if value is not None}
    found = _KINDS[options.kind](
        _load.model(options), _load.data(options.data), **given,
        bounds=tuple(options.bounds), batch_size=options.batch_size, dtype=options.dtype,
        progress=options.progress, out=os.path.expanduser(options.out),
    )  # fmt: skip
    print(f"{found!r}\nfolder: {options.out}")


def run_study(options: Any) -> None:
    """Run a study in its folder."""
    found = study.run(
        _load.model_maker(options), _load.data(options.train, "--train"),
        _load.data(options.test, "--test"), eps=options.eps, norm=options.norm,
        bounds=tuple(options.bounds), recipe=options.recipe, out=options.out,
        stages=options.stages, seed=options.seed, seeds=options.seeds, device=options.device,
        progress=options.progress,
        on_stage=lambda name, seconds: print(f"{name}: {seconds:.1f} s", flush=True),
    )  # fmt: skip
    print(found)
    print(f"page: {os.path.join(options.out, 'report.html')}")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind the help, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, formatter_class=_Help
    )
    parser.add_argument("--traceback", action="store_true", help="print where an error was raised")
    return parser


def _model_options(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    parser.add_argument(
        "model", metavar="MODULE:NAME",
        help="a function that returns the model, or the model itself; also FILE.py:NAME",
    )  # fmt: skip
    parser.add_argument(
        "--model-args", metavar="JSON", default="{}", help="keyword arguments for the function"
    )
    if weights:
        parser.add_argument(
            "--weights", metavar="FILE", help="state dict; a file that holds code raises an error"
        )
    for name, text in (("--mean", "mean"), ("--std", "deviation")):
        parser.add_argument(
            name, type=float, nargs="+", help=f"{text} of each channel, to normalize inputs"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="device of the model")


def _data_option(
    parser: argparse.ArgumentParser, name: str = "--data", text: str = "labelled samples"
) -> None:
    parser.add_argument(
        name, required=True, metavar="DATA",
        help=f"{text}: an .npz with inputs and labels, a folder CLASS/IMAGE.png, a constructed "
        "dataset, or MODULE:NAME of a function that returns a dataset",
    )  # fmt: skip


def _ball_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eps", type=size, required=True, help="radius, such as 8/255 or 0.5")
    parser.add_argument("--norm", required=True, help="linf, l2 or l1")
    _shared_options(parser)


def _shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bounds", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="range of valid inputs",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, help="samples in a batch (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--progress", action="store_true", default=None, help="show progress from the beginning"
    )
    group.add_argument(
        "--quiet", dest="progress", action="store_false", default=None, help="show no progress"
    )
