"""Make notebooks/quickstart.ipynb from examples/quickstart.py, and run it (minutes).

    pip install -e ".[examples]" nbformat nbclient ipykernel && python docs/notebook.py

The docstring and the comments between paragraphs become text, the code below each a cell.
"""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs/notebooks/quickstart.ipynb"
# A cell has no command line, and shows its pictures in place of writing files.
CHANGES = [
    ("parser.parse_args()", "parser.parse_args([])"),
    ("found.plot()\nplt.savefig(options.out, dpi=110)\n", "\n# The accuracies.\nfound.plot()\n"),
    ("found.save_report(options.report)\n", "\n# Samples of every set.\nfound.pictures()\n"),
    ('print(f"figure: {options.out}, report: {options.report}")\n', ""),
]
PARAGRAPH = re.compile(r"\n\n((?:# .*\n)+)")


def notebook() -> nbformat.NotebookNode:
    _, docstring, code = (ROOT / "examples/quickstart.py").read_text().split('"""', 2)
    for old, new in CHANGES:
        assert old in code, old
        code = code.replace(old, new)
    title, text = docstring.split("\n", 1)
    about = text[text.index("A scaled-down") :].strip()  # after the command line
    said = [f"# {title}\n\n{about}"]
    first, *rest = PARAGRAPH.split(code)
    said += [comment.replace("# ", "").strip() for comment in rest[::2]]
    cells = []
    for words, done in zip(said, [first + "\n%matplotlib inline", *rest[1::2]], strict=True):
        cells.append(nbformat.v4.new_markdown_cell(words))
        cells.append(nbformat.v4.new_code_cell(done.strip()))
    for place, cell in enumerate(cells):
        cell.id = f"cell-{place}"  # not random: the same notebook from the same example
    return nbformat.v4.new_notebook(cells=cells)


if __name__ == "__main__":
    made = notebook()
    NotebookClient(made, timeout=3600, kernel_name="python3").execute()
    for cell in made.cells:
        cell.metadata.clear()  # the times of the run
    OUT.parent.mkdir(exist_ok=True)
    nbformat.write(made, OUT)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")
