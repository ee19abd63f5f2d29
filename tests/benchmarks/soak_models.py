"""Random models against an independent reference: python tests/benchmarks/soak_models.py 100."""

import collections
import sys
import traceback
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from random_models import check

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    causes, failed = collections.Counter(), []
    for seed in range(first, first + count):
        try:
            described, warned = check(seed)
        except Exception as error:
            failed.append(seed)
            print(f"FAILED {seed}: {type(error).__name__}: {error}".split("\n")[0][:300])
            if "-v" in sys.argv:
                traceback.print_exc()
            continue
        causes.update(warned or ["no warning"])
    print(f"{count - len(failed)} of {count} agree or warn; failed: {failed}")
    for cause, number in causes.most_common():
        print(f"{number:4d} {cause}")
