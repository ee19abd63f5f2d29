"""Resume equals uninterrupted, byte for byte: processes that are killed, over many combinations.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_resume.py [--random 300] [--seed 0]

Each combination of data and sampler, method, optimiser, schedule and options is trained once
without interruption; then in processes that end themselves at a random step, by SIGTERM (which
saves the step) and by SIGKILL (which does not), in an order drawn at random; then to its end.
Weights, all buffers, the history and the best epoch must be equal to the byte. First every pair of
data and method, then combinations at random.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # here, or every child would import it

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
import combinations as c

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--random", type=int, default=300)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--compile", type=int, default=4, help="runs of torch.compile, slow ones")
parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
options = parser.parse_args()


def in_a_process(work) -> tuple[int, object]:
    """Status of a child, and what it returned."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            with os.fdopen(write, "wb") as file:
                pickle.dump(work(), file)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    return status, pickle.loads(text) if text else None


def is_equal(combination: tuple[str, ...], draw: random.Random) -> tuple[bool, list[str]]:
    """Whether a run that is killed twice ends like one that is not."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def run(checkpoint: Path | None, **further: object) -> object:
            return c.outcome(*c.train(checkpoint, folder, *combination, **further))

        status, whole = in_a_process(lambda: run(None))
        if status or whole is None:
            return False, ["failed"]
        kills = []
        last = 2 * c.SAMPLES // c.BATCH if combination[4] == "patience" else c.STEPS
        for step in sorted(draw.sample(range(1, last), 2)):
            number = draw.choice([signal.SIGTERM, signal.SIGKILL])

            def on_step(row, step=step, number=number):
                if row["step"] == step:
                    os.kill(os.getpid(), number)

            status, _ = in_a_process(lambda on_step=on_step: run(folder / "run", on_step=on_step))
            kills.append(f"{number.name} at {step}")
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != number:
                return False, [*kills, f"status {status}"]
        _, found = in_a_process(lambda: run(folder / "run"))
        return found == whole, kills


def combinations(draw: random.Random):
    for data, method in itertools.product(c.DATA, c.METHODS):
        yield (data, method, "sgd", "default", "none")
    tables = (c.DATA, c.METHODS, c.OPTIMIZERS, c.SCHEDULES, c.OPTIONS)
    seen = set()
    while len(seen) < options.random:
        combination = tuple(draw.choice(list(table)) for table in tables)
        if combination not in seen and c.is_possible(*combination):
            seen.add(combination)
            yield combination
    c.OPTIONS |= {"compiled": {"compile": True}, "compiled average": {"compile": True, "ema": 0.9}}
    compiled = itertools.product(
        ("tensors", "shuffled"), ("standard", "pgd"), ("compiled", "compiled average")
    )
    for data, method, option in itertools.islice(compiled, options.compile):
        yield (data, method, "sgd", "default", option)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:  # what is imported late, once
        c.train(None, Path(scratch), "tensors", "pgd", "adam", "default", "none")
    draw, began, count, wrong = random.Random(options.seed), time.monotonic(), 0, 0
    for combination in combinations(draw):
        if time.monotonic() - began > options.seconds:
            break
        equal, kills = is_equal(combination, draw)
        count, wrong = count + 1, wrong + (not equal)
        if not equal:
            print("DIFFERS", combination, kills, flush=True)
        if count % 25 == 0:
            print(
                f"{count} combinations, {wrong} differ, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    print(f"{count} combinations, each killed twice: {count - wrong} equal, {wrong} differ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
