"""Run the notebooks: from notebooks/NAME.txt make notebooks/NAME.ipynb and the page NAME.md.

    pip install -e ".[examples]" nbformat nbclient ipykernel && python docs/notebook.py [NAME ...]

A source is text and code, divided by lines "%% text" and "%% code"; the line "@prelude" stands for
notebooks/prelude.txt. Pictures of the page are in figures/notebooks.
"""

import base64
import re
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parent
FOLDER, FIGURES = DOCS / "notebooks", DOCS / "figures/notebooks"
NAMES = ("attack", "evaluation", "robust_training", "datasets", "transfer", "tabular")
# Progress goes to stderr, which is left out.
HIDDEN = """\
%matplotlib inline
import sys
import torch
from advfeat import progress
progress._stream = lambda: sys.stderr
torch.set_num_threads(1)"""
USED = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"


def parts(name: str) -> list[tuple[str, str]]:
    """Kind and text of every cell."""
    source = (FOLDER / f"{name}.txt").read_text()
    prelude = (FOLDER / "prelude.txt").read_text()
    cells = [("text", source.split("%% ", 1)[0])]
    for kind, text in re.findall(r"^%% (\w+)\n(.*?)(?=^%% |\Z)", source, re.S | re.M):
        cells.append((kind, text.replace("@prelude\n", prelude)))
    return [(kind, text.strip()) for kind, text in cells]


def executed(name: str) -> Any:
    """The notebook with its outputs, and its run time in the first cell."""
    make = {"text": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    cells = [make[kind](text) for kind, text in parts(name)]
    ends = [nbformat.v4.new_code_cell(HIDDEN), *cells, nbformat.v4.new_code_cell(USED)]
    notebook = nbformat.v4.new_notebook(cells=ends)
    NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    seconds = float(notebook.cells.pop().outputs[0].text)
    notebook.cells.pop(0)
    date = time.strftime("%Y-%m-%d")
    cells[0].source += f"\n\nRun time: {seconds:.0f} s on one CPU core ({date})."
    for place, cell in enumerate(cells):
        cell.id = f"cell-{place}"  # not random: the same notebook from the same source
        cell.metadata.clear()
        if cell.cell_type == "code":
            kept = [o for o in cell.outputs if o.get("name") != "stderr"]  # progress bars
            # Jupyter shows a figure as the value of the cell and once more by pyplot.
            shown = [o.get("data", {}).get("image/png") for o in kept]
            kept = [o for at, o in enumerate(kept) if not shown[at] or shown[at] not in shown[:at]]
            cell.outputs, cell.execution_count = kept, place
            for output in kept:
                if "text" in output:  # a progress bar writes over its line
                    output["text"] = re.sub(r"[^\n]*\r", "", output["text"])
                if "execution_count" in output:
                    output["execution_count"] = place
    return notebook


def page(name: str, notebook: Any) -> str:
    """The notebook as a page of the site."""
    written: list[str] = []
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            written.append(cell.source)
            continue
        code = cell.source.replace("    display(figure)", "    # display(figure), in Jupyter")
        written.append(f"```python\n{code}\n```")
        printed = ""
        for number, output in enumerate(cell.outputs):
            data = output.get("data", {})
            if "image/png" in data:
                file = FIGURES / f"{name}_{place}_{number}.png"
                file.write_bytes(base64.b64decode(data["image/png"]))
                written.append(f"![Figure of the block above](../figures/notebooks/{file.name})")
            else:
                printed += output.get("text") or data.get("text/plain", "")
        if printed:
            written.append(f"```text\n{printed.strip()}\n```")
    written.append(f"[Download this notebook]({name}.ipynb)")
    return "\n\n".join(written) + "\n"


if __name__ == "__main__":
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or NAMES:
        notebook = executed(name)
        file = FOLDER / f"{name}.ipynb"
        nbformat.write(notebook, file)
        (FOLDER / f"{name}.md").write_text(page(name, notebook))
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB", flush=True)
