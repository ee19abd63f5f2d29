"""Every Python block of the README and of docs/ runs, in the order of the page.

The pages of the first hour run in one session, as a reader would paste them, but on fewer digits,
with fewer epochs and steps; `tests/benchmarks/newcomer.py` runs them as they are. Any other page
has a session of its own.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SITE = (ROOT / ".mkdocs.yml").read_text()
FIRST_HOUR = [
    ROOT / "docs" / name
    for name in re.findall(
        r": (\w+\.md)$", re.search(r"- The first hour:\n(.*?)^  - ", SITE, re.S | re.M)[1], re.M
    )
]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
CONSOLE = re.compile(r"^```(?:bash|console)\n(.*?)^```", re.S | re.M)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)[^)]*\)")
# Files of the repository that a page names, in a command or between backticks.
NAMED = re.compile(r"\b(?:examples|tests|advfeat|docs)/[\w/]+\.\w+|\.ci/run|\.mkdocs\.yml")
FEWER = [
    (r"epochs(\"?)(=|: )\d+", r"epochs\1\g<2>1"),
    (r"steps=\d+", "steps=2"),
    (r"samples=\d+", "samples=16, queries=5"),
    ("1437", "96"),
    (r"range\(200\)", "range(20)"),
    (r"eps in \(.*\)", "eps in (0.5,)"),
]


def blocks(page):
    return PYTHON.findall(page.read_text())


def yours():
    """What the pages call the reader's own: a small image model, and data for it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    data = TensorDataset(torch.rand(12, 3, 8, 8), torch.arange(12) % 10)
    return {"model": model, "data": data, "test": data}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p) and p not in FIRST_HOUR], ids=lambda p: p.name
)
@pytest.mark.filterwarnings("ignore")
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = yours()
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_of_the_first_hour_run_one_after_another(tmp_path, monkeypatch):
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    digits.images, digits.target = digits.images[:160], digits.target[:160]
    monkeypatch.setattr(datasets, "load_digits", lambda: digits)
    monkeypatch.chdir(tmp_path)
    assert [page.stem for page in FIRST_HOUR][:2] == ["install", "attack"]
    namespace = {}
    for page in FIRST_HOUR:
        for block in blocks(page):
            for longer, shorter in FEWER:
                block = re.sub(longer, shorter, block)
            exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_link_between_pages_is_broken(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_files_that_a_page_names_exist(page):
    for name in NAMED.findall(page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_extras_that_a_page_installs_exist(page):
    project = (ROOT / "pyproject.toml").read_text()
    for command in CONSOLE.findall(page.read_text()):
        for extra in re.findall(r"\.\[([\w,]+)\]", command):
            for name in extra.split(","):
                assert re.search(rf"^{name} = \[", project, re.M), f"{page.name}: [{name}]"


def test_no_output_was_left_out():
    assert not [page.name for page in PAGES if "OUTPUT:" in page.read_text()]


@pytest.mark.parametrize("page", sorted((ROOT / "docs/api").glob("*.md")), ids=lambda p: p.stem)
def test_the_reference_has_every_public_name(page):
    title = page.read_text().split("\n", 1)[0].removeprefix("# ")
    module = importlib.import_module(title)
    shown = re.findall(rf"^::: {title}\.(\w+)$", page.read_text(), re.M)
    own = getattr(module, "__all__", shown)
    if title != "advfeat":
        own = [name for name in own if name not in importlib.import_module("advfeat").__all__]
    assert sorted(shown) == sorted(own)
    for name in shown:
        assert getattr(module, name).__doc__, name


def test_every_room_is_on_the_map():
    tree = ast.parse((ROOT / "tests/test_architecture.py").read_text())
    floors = next(n.value for n in tree.body if ast.unparse(n).startswith("FLOORS ="))
    rooms = set().union(*ast.literal_eval(floors)) - {"__init__"}
    drawn = (ROOT / "docs/figures/house.svg").read_text()
    missing = {room for room in rooms if f">{room}</text>" not in drawn}
    assert not missing, "add them to docs/house.py, and run it"
