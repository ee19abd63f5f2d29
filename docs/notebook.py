"""Make notebooks/quickstart.ipynb from examples/quickstart.py, and run it.

    pip install nbformat nbclient ipykernel && python docs/notebook.py

The docstring and the numbered comments become text, what is between them cells.
"""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs/notebooks/quickstart.ipynb"
# A cell has no command line, and shows its figure.
CHANGES = [
    ("parser.parse_args()", "parser.parse_args([])"),
    ('import matplotlib as mpl\n\nmpl.use("Agg")\n', ""),
    ('\nprint(f"figure: {options.out}")', ""),
    ("figure.savefig(options.out, dpi=110)", "plt.show()"),
    ('"""', "", 2),
]
STEP = re.compile(r"^# (\d\. .*(?:\n# .*)*)\n", re.M)


def notebook() -> nbformat.NotebookNode:
    source = (ROOT / "examples/quickstart.py").read_text()
    docstring = source.split('"""')[1]
    for old, new, *count in CHANGES:
        assert old in source, old
        source = source.replace(old, new, *count)
    title, _, rest = docstring.partition("\n\n")
    parts = STEP.split(source.replace(docstring, "", 1))
    text = [f"# {title}\n\n{rest.split(']')[-1].strip()}"]
    text += [_step(part.replace("\n# ", " ")) for part in parts[1::2]]
    cells = []
    for said, done in zip(text, parts[::2], strict=True):
        cells.append(nbformat.v4.new_markdown_cell(said))
        cells.append(nbformat.v4.new_code_cell(done.strip()))
    for place, cell in enumerate(cells):
        cell.id = f"cell-{place}"  # not random: the same notebook from the same example
    return nbformat.v4.new_notebook(cells=cells)


def _step(comment: str) -> str:
    """Its first sentence as a heading, the rest below."""
    heading, _, rest = comment.partition(". ")[2].partition(". ")
    return f"## {heading.rstrip('.')}\n\n{rest}".strip()


if __name__ == "__main__":
    made = notebook()
    NotebookClient(made, timeout=3600).execute()
    for cell in made.cells:
        cell.metadata.clear()  # the times of the run
    OUT.parent.mkdir(exist_ok=True)
    nbformat.write(made, OUT)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")
