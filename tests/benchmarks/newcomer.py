"""The guide as a newcomer reads it: every block of its pages, as it stands, pasted in order.

    python tests/benchmarks/newcomer.py [--install] [--out FOLDER]

--install begins with what install.md says, in a fresh environment. Prints what the blocks print,
page by page, and the waiting; pictures go to FOLDER.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
GUIDE = re.compile(r"- Guide:\n(.*?)^  - ", re.S | re.M)


def pages() -> list[Path]:
    listed = GUIDE.search((ROOT / ".mkdocs.yml").read_text())
    assert listed
    return [ROOT / "docs" / name for name in re.findall(r": (\w+\.md)$", listed[1], re.M)]


def session() -> str:
    """One script of all blocks, which says where it is and how long each block took."""
    parts = ["import time as _time\n_total, _began = 0.0, 0.0\n"]
    for page in pages():
        for place, block in enumerate(PYTHON.findall(page.read_text())):
            parts += [
                f'print("\\n== {page.name} {place}", flush=True)\n_began = _time.perf_counter()\n',
                block,
                "_took = _time.perf_counter() - _began\n_total += _took\n"
                'print(f"-- {_took:.1f} s", flush=True)\n',
            ]
    parts.append('print(f"\\nall blocks: {_total:.0f} s, {_time.process_time():.0f} s of CPU")\n')
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        python, folder = sys.executable, options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if options.install:
            began = time.perf_counter()
            venv.create(f"{scratch}/venv", with_pip=True)
            python = f"{scratch}/venv/bin/python"
            line = re.search(r"^pip (install .*)$", (ROOT / "docs/install.md").read_text(), re.M)
            assert line
            command = f"{python} -m pip --quiet {line[1]}"
            subprocess.run(command, shell=True, check=True, cwd=ROOT)
            print(f"install: {time.perf_counter() - began:.0f} s")
        script = Path(scratch) / "session.py"
        script.write_text(session())
        subprocess.run([python, script.resolve()], check=True, cwd=folder)


if __name__ == "__main__":
    main()
