"""Change the library on purpose, one small change at a time, and see whether a test notices.

    python tests/benchmarks/mutants.py --named                # the changes to APGD by name
    python tests/benchmarks/mutants.py --sample 200 --seed 0  # of all modules below
    python tests/benchmarks/mutants.py --files losses.py threat.py --sample 40

A mutant is one changed constant, comparison, operator or call, or a statement left out. It runs
in a copy of the checkout, against the tests of its module alone, the slow ones last, until the
first failure. What survives is printed at the end: a test is missing there, or the change makes
no difference.
"""

from __future__ import annotations

import argparse
import ast
import copy
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import torch

ROOT = Path(__file__).parents[2]
# Tests of each module, by file name, fastest first.
TESTS = {
    "attacks/_apgd.py": ["test_apgd_published.py", "test_apgd.py"],
    "attacks/_apgd_schedule.py": ["test_apgd_published.py"],
    "attacks/_pgd.py": ["test_pgd.py", "test_peers.py"],
    "attacks/_fab.py": ["test_fab.py", "test_peers_minimum_norm.py"],
    "attacks/_fmn.py": ["test_fmn.py", "test_peers_minimum_norm.py"],
    "attacks/minimum_norm.py": ["test_fab.py", "test_fmn.py"],
    "attacks/_square.py": ["test_square.py", "test_peers_square.py"],
    "attacks/inversion.py": ["test_inversion.py"],
    "losses.py": ["test_losses.py", "test_objectives.py"],
    "threat.py": ["test_threat.py"],
    "metrics/_outcome.py": ["test_metrics.py"],
    "metrics/_accuracy.py": ["test_metrics.py", "test_robust_accuracy.py"],
    "metrics/_choice.py": ["test_robust_accuracy.py", "test_metrics.py"],
    "metrics/_sharing.py": ["test_accuracy_ranks.py"],
    "metrics/_curve.py": ["test_curve.py"],
    "metrics/_transfer.py": ["test_transfer_matrix.py"],
    "metrics/_diagnose.py": ["test_diagnose.py"],
    "metrics/_masking.py": ["test_masks.py"],
    "metrics/_certified.py": ["test_certified.py"],
    "metrics/_corruption_accuracy.py": ["test_corruptions.py"],
    "metrics/_corruptions.py": ["test_corruptions.py"],
    **{
        f"metrics/_report/_{part}.py": ["test_report.py"]
        for part in ("budget", "contents", "examples", "fields", "result", "samples", "verdict")
    },
    "analysis/_alignment.py": ["test_analysis_alignment.py"],
    "analysis/_features.py": ["test_analysis_alignment.py", "test_analysis_usefulness.py"],
    "analysis/_gaussian.py": ["test_analysis_gaussian.py"],
    "analysis/_gaussian_study.py": ["test_analysis_gaussian.py"],
    "analysis/_leakage.py": ["test_analysis_leakage.py"],
    "analysis/_planted.py": ["test_analysis_planted.py"],
    "analysis/_spectrum.py": ["test_analysis_spectrum.py"],
    "analysis/_fourier.py": ["test_analysis_spectrum.py"],
    "analysis/_tradeoff.py": ["test_analysis_tradeoff.py"],
    "analysis/_mislabelled.py": ["test_analysis_tradeoff.py"],
    "analysis/_transfer.py": ["test_analysis_transfer.py"],
    "analysis/_usefulness.py": ["test_analysis_usefulness.py"],
    **{
        f"analysis/_{part}.py": ["test_analysis_after.py"]
        for part in (
            *("matrix", "noise", "poison", "probe", "robustified", "saliency", "strong"),
            *("superposition", "targeted_transfer"),
        )
    },
}
# Changes that make another algorithm of APGD: name, text, replacement.
APGD = [
    ("rise share 0.75 -> 0.5", "_RISES = 0.75", "_RISES = 0.5"),
    ("momentum 0.75 -> 1.0", "_MOMENTUM = 0.75", "_MOMENTUM = 1.0"),
    ("first checkpoint 0.22 -> 0.5", "int(0.22 * steps)", "int(0.5 * steps)"),
    ("l1 density 0.2 -> 0.5", "_L1_SMALLEST = 0.2, 1.5, 0.1", "_L1_SMALLEST = 0.5, 1.5, 0.1"),
    ("l1 shrink 1.5 -> 2", "_L1_SMALLEST = 0.2, 1.5, 0.1", "_L1_SMALLEST = 0.2, 2.0, 0.1"),
    ("l1 smallest 0.1 -> 0.5", "_L1_SMALLEST = 0.2, 1.5, 0.1", "_L1_SMALLEST = 0.2, 1.5, 0.5"),
    ("no step is ever halved", "state.step_size / 2", "state.step_size / 1"),
    (
        "momentum line removed",
        "moved.addcmul_(current - state.previous, torch.rsub(alpha, 1.0))",
        "pass",
    ),
    ("l1 phases at one radius", "((3.0, 0.3), (2.0, 0.3)", "((1.0, 0.3), (1.0, 0.3)"),
    ("first step 2 eps -> 0.2 eps", "else 2 * radius", "else 0.2 * radius"),
]
COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
OPPOSITES = [("minimum", "maximum"), ("amax", "amin"), ("clamp_min", "clamp_max"), ("sum", "mean")]
CALLS = dict(OPPOSITES) | {second: first for first, second in OPPOSITES}


class Mutant(NamedTuple):
    """One change of one file."""

    file: str
    place: str  # the line, and what was there
    source: str


def mutants_of(file: str) -> list[Mutant]:
    """All changes of a file."""
    source = (ROOT / "advfeat" / file).read_text()
    found = []
    for node, changed in changes(ast.parse(source)):
        start, end = offsets(source, node)
        old = source[start:end]
        statement = isinstance(node, ast.stmt)
        new = "pass" if changed is None else ast.unparse(changed)
        new = new if statement or isinstance(node, ast.Constant) else f"({new})"
        place = f"{node.lineno}: {' '.join(old.split())} -> {new}"
        found.append(Mutant(file, place, source[:start] + new + source[end:]))
    return found


def changes(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, ast.AST | None]]:
    """Nodes with what each is replaced by; None leaves the statement out."""
    for node in wanted(tree):
        if isinstance(node, ast.AugAssign):
            yield node, None
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            yield node, with_(node, ops=[COMPARISONS[type(node.ops[0])](), *node.ops[1:]])
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            yield node, with_(node, op=OPERATORS[type(node.op)]())
        elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
            yield node, node.operand
        elif isinstance(node, ast.BoolOp):
            yield node, with_(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
        elif isinstance(node, ast.IfExp):
            yield node, with_(node, body=node.orelse, orelse=node.body)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield node, ast.Constant(node.value + 1)
        elif isinstance(node, ast.Constant) and type(node.value) is float:
            yield node, ast.Constant(node.value / 2 or 1.0)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) in CALLS:
            name = CALLS[node.func.attr]
            yield node, with_(node, func=with_(node.func, attr=name))


def wanted(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Nodes that say what is computed: no annotations, no messages, no declared shapes."""
    if isinstance(node, ast.Raise | ast.JoinedStr):
        return
    if isinstance(node, ast.Call) and "checks" in ast.unparse(node.func):
        return  # test_bad_input.py holds what is refused
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "type_params", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from wanted(child)


def with_(node: ast.AST, **fields: object) -> ast.AST:
    """A copy of a node with other fields."""
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def offsets(source: str, node: ast.expr | ast.stmt) -> tuple[int, int]:
    """Where a node's text begins and ends."""
    lines = source.splitlines(keepends=True)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None

    def offset(line: int, column: int) -> int:
        before = sum(map(len, lines[: line - 1]))
        return before + len(lines[line - 1].encode()[:column].decode())

    return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)


def named_mutants() -> list[Mutant]:
    """The changes to APGD that make another algorithm of it."""
    files = ["attacks/_apgd.py", "attacks/_apgd_schedule.py"]
    found = []
    for name, old, new in APGD:
        sources = {file: (ROOT / "advfeat" / file).read_text() for file in files}
        places = [file for file, source in sources.items() for _ in range(source.count(old))]
        if len(places) != 1:
            raise SystemExit(f"{name}: {old!r} is in {places}")
        found.append(Mutant(places[0], name, sources[places[0]].replace(old, new)))
    return found


class Copy:
    """A copy of the checkout that mutants are tried in."""

    def __init__(self, folder: str, extra_path: str, fast: bool = False) -> None:
        self.root, self._fast = Path(folder), fast
        self.path = os.pathsep.join(p for p in (extra_path, folder) if p)
        skip = shutil.ignore_patterns("__pycache__", "*.pyc", "benchmarks")
        for part in ("advfeat", "tests"):
            shutil.copytree(ROOT / part, self.root / part, ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self._limits: dict[str, float] = {}

    def notices(self, mutant: Mutant) -> str | None:
        """How the tests notice a mutant: "failed", "too slow" or None."""
        file = self.root / "advfeat" / mutant.file
        own = file.read_text()
        for marker in ("not slow",) if self._fast else ("not slow", "slow"):
            key = f"{TESTS[mutant.file]} {marker}"
            if key not in self._limits:
                began = time.monotonic()
                if self._run(mutant.file, marker, 900) is not None:
                    raise SystemExit(f"the tests of {mutant.file} fail without any change")
                self._limits[key] = 30 + 5 * (time.monotonic() - began)
            try:
                file.write_text(mutant.source)
                found = self._run(mutant.file, marker, self._limits[key])
            finally:
                file.write_text(own)
            if found is not None:
                return found
        return None

    def _run(self, file: str, marker: str, limit: float) -> str | None:
        tests = [str(p) for name in TESTS[file] for p in (self.root / "tests").rglob(name)]
        if not tests:
            raise SystemExit(f"no tests of {file}: {TESTS[file]}")
        child = os.fork()  # torch and pytest are imported already
        if not child:
            self._test([*tests, "-m", marker], limit)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):  # the alarm, or a crash
            return "too slow" if os.WTERMSIG(status) == signal.SIGALRM else "failed"
        code = os.WEXITSTATUS(status)
        if code not in (0, 1, 2, 5):  # neither passed nor failed: not our change's doing
            raise SystemExit((self.root / "output").read_text())
        return "failed" if code in (1, 2) else None

    def _test(self, arguments: list[str], limit: float) -> NoReturn:
        """In a child: run tests of the copy, and end with pytest's code."""
        signal.alarm(math.ceil(limit))
        output = os.open(self.root / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(self.root)
        sys.path[:0] = self.path.split(os.pathsep)
        os.environ["PYTHONPATH"] = self.path
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--named", action="store_true", help="the changes to APGD by name")
    parser.add_argument("--files", nargs="*", default=[""], help="modules or packages to change")
    parser.add_argument("--sample", type=int, default=200, help="how many mutants of all of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="without the tests marked slow")
    parser.add_argument("--path", default="", help="further folders for PYTHONPATH")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # a mutant has the time and size of its file
    if options.named:
        chosen = every = named_mutants()
    else:
        files = [file for file in TESTS if file.startswith(tuple(options.files))]
        every = [mutant for file in files for mutant in mutants_of(file)]
        chosen = random.Random(options.seed).sample(every, min(options.sample, len(every)))
        chosen.sort(key=lambda mutant: files.index(mutant.file))
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        checkout = Copy(folder, options.path, options.fast)
        for number, mutant in enumerate(chosen, 1):
            how = checkout.notices(mutant)
            print(
                f"{number}/{len(chosen)} {how or 'SURVIVES'}: {mutant.file}:{mutant.place}",
                flush=True,
            )
            if how is None:
                survivors.append(mutant)
    print(f"\n{len(chosen)} of {len(every)} mutants tried, {len(survivors)} survive")
    for mutant in survivors:
        print(f"  {mutant.file}:{mutant.place}")


if __name__ == "__main__":
    main()
