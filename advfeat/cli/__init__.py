"""The command line: ``advfeat evaluate``, ``advfeat construct`` and ``advfeat study``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from advfeat._version import __version__
from advfeat.cli import _commands

__all__ = ["main"]

# What a wrong argument, file or model raises; anything else is a defect, and has a traceback.
_ERRORS = (ValueError, TypeError, ImportError, AttributeError, OSError, RuntimeError, KeyError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments
        By default those of the process.

    Returns
    -------
    int
        Exit code: 0, or 2 after an error, which stderr says in one line.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("advfeat: interrupted; the same command resumes what has a folder", file=sys.stderr)
        return 130
    except _ERRORS as error:
        if options.traceback:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"advfeat: error: {text}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="advfeat",
        description="Robust and non-robust features: evaluate a model, construct datasets, or "
        "run the whole study.",
    )
    parser.add_argument("--version", action="version", version=f"advfeat {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_commands.add_evaluate, _commands.add_construct, _commands.add_study):
        add(commands)
    return parser
