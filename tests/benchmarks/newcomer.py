"""The guide as a newcomer reads it: every block of its pages, as it stands, pasted in order.

    python tests/benchmarks/newcomer.py [--install] [--out FOLDER]

--install begins with what install.md says, in a fresh environment. The session runs in a terminal
of its own, as a newcomer's does. Prints what the blocks print, page by page, the waiting, and the
longest times without a sign of life; pictures go to FOLDER.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
MARK = re.compile(r"^== (.*?)\r?$", re.M)
GUIDE = re.compile(r"- Guide:\n(.*?)^  - ", re.S | re.M)


def pages() -> list[Path]:
    listed = GUIDE.search((ROOT / ".mkdocs.yml").read_text())
    assert listed
    return [ROOT / "docs" / name for name in re.findall(r": (\w+\.md)$", listed[1], re.M)]


def session() -> str:
    """One script of all blocks, which says where it is and how long each block took."""
    parts = ["import time as _time\n_total, _began, _cpu = 0.0, 0.0, 0.0\n"]
    for page in pages():
        for place, block in enumerate(PYTHON.findall(page.read_text())):
            parts += [
                f'print("\\n== {page.name} {place}", flush=True)\n'
                "_began, _cpu = _time.perf_counter(), _time.process_time()\n",
                block,
                "_took, _cpu = _time.perf_counter() - _began, _time.process_time() - _cpu\n"
                '_total += _took\nprint(f"-- {_took:.1f} s, {_cpu:.1f} s of CPU", flush=True)\n',
            ]
    parts.append('print(f"\\nall blocks: {_total:.0f} s, {_time.process_time():.0f} s of CPU")\n')
    return "\n".join(parts)


def followed(command: list[str], folder: Path) -> list[tuple[float, str]]:
    """Run a command in a terminal, show what it prints, and return its longest silences."""
    silences: list[tuple[float, str]] = []
    block, before = "start", time.perf_counter()
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=folder) as run:
        os.close(theirs)
        while shown := output(ours):
            now = time.perf_counter()
            silences.append((now - before, block))
            before = now
            block = [block, *MARK.findall(shown.decode(errors="replace"))][-1]
            sys.stdout.buffer.write(shown)
            sys.stdout.buffer.flush()
    os.close(ours)
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command)
    return sorted(silences, reverse=True)[:5]


def output(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux has this where the other end is closed
        return b""


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
        for silence, block in followed([str(python), str(script.resolve())], folder):
            print(f"without output: {silence:.1f} s in {block}")


if __name__ == "__main__":
    main()
