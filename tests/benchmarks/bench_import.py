"""Time of `import advfeat` over that of `import torch`: fresh processes that take turns.

python tests/benchmarks/bench_import.py [--rounds 9] [--python PYTHON]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

MEASURE = "import resource\n{}\nuse = resource.getrusage(resource.RUSAGE_SELF)\nprint({})"
CLOCK = "use.ru_utime + use.ru_stime"  # of the process itself: other work does not count


def seconds(python: str, line: str) -> float:
    """CPU time of a process that does this and nothing else."""
    run = [python, "-c", MEASURE.format(line, CLOCK)]
    return float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    seconds(options.python, "import advfeat")  # bytecode and disk cache
    pairs = [
        (seconds(options.python, "import torch"), seconds(options.python, "import advfeat"))
        for _ in range(options.rounds)
    ]
    ratios = sorted(ours / torchs for torchs, ours in pairs)
    print(
        f"import advfeat / import torch, CPU time: median {statistics.median(ratios):.2f}, "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}, {options.rounds} rounds"
    )


if __name__ == "__main__":
    main()
