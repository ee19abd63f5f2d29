"""Every Python block of the README and of docs/ runs, in the order of the page.

The pages of the guide run in one session, as a reader would paste them, and notebooks each in
their own: on fewer digits, with fewer epochs and steps. `tests/benchmarks/newcomer.py` runs the
guide as it is. Any other page has a session of its own.
"""

import ast
import importlib
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from torch.utils.data import TensorDataset

import advfeat
from advfeat import study
from advfeat.training._schedule import make_scheduler

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SITE = (ROOT / ".mkdocs.yml").read_text()
GUIDE = [
    ROOT / "docs" / name
    for name in re.findall(
        r": (\w+\.md)$", re.search(r"- Guide:\n(.*?)^  - ", SITE, re.S | re.M)[1], re.M
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
    (r"samples=\d+", "samples=64, queries=5"),
    (r"budget=\d+", "budget=3"),
    # PGD for the ensemble.
    (r"(robust_accuracy\((?:(?!steps|attack=)[^()])*?seed=0)(?=[,)])", r"\1, steps=2"),
    ("1437", "96"),
    (r"range\(200\)", "range(20)"),
    (r"eps in \(.*\)", "eps in (0.5,)"),
    (r"\[:1200\]", "[:96]"),  # of the notebooks
    (r"1200:1500", "1200:1232"),
    (r"range\(100\)", "range(10)"),
]


def blocks(page):
    return PYTHON.findall(page.read_text())


def yours():
    """What the pages call the reader's own: a small image model, and data for it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    data = TensorDataset(torch.rand(12, 3, 8, 8), torch.arange(12) % 10)
    return {"model": model, "data": data, "test": data}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p) and p not in GUIDE], ids=lambda p: p.name
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("short_ensembles")
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace = yours()
    for block in blocks(page):
        exec(compile(shortened(block, page), page.name, "exec"), namespace)


def shortened(block, page):
    """Fewer samples, epochs and steps, in the guide and the notebooks."""
    if page in GUIDE or page.parent.name == "notebooks":
        for longer, shorter in FEWER:
            block = re.sub(longer, shorter, block)
    return block


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("short_ensembles", "short_boundary_search")
def test_the_blocks_of_the_guide_run_one_after_another(tmp_path, monkeypatch):
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    digits.images, digits.target = digits.images[:160], digits.target[:160]
    monkeypatch.setattr(datasets, "load_digits", lambda: digits)
    monkeypatch.setattr("advfeat.metrics._curve._ROUNDS", 1)  # a search as short as the attacks
    monkeypatch.chdir(tmp_path)
    assert [page.stem for page in GUIDE][:2] == ["install", "attack"]
    namespace = {}
    for page in GUIDE:
        for block in blocks(page):
            exec(compile(shortened(block, page), page.name, "exec"), namespace)


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


COMMAND = re.compile(r"((?:examples|tests/benchmarks|docs)/\w+\.py)((?:[^\n]*\\\n)*[^\n]*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_options_of_a_command_exist(page):
    for block in CONSOLE.findall(page.read_text()):
        for script, arguments in COMMAND.findall(block):
            known = (ROOT / script).read_text()
            for name in re.findall(r"^(?:from|import) (\w+)", known, re.M):
                beside = (ROOT / script).with_name(f"{name}.py")  # its parser, for one script
                known += beside.read_text() if beside.exists() else ""
            for option in re.findall(r"--[a-z][\w-]*", arguments.split("#")[0]):
                assert f'"{option}"' in known, f"{page.name}: {script} has no {option}"


def test_no_output_was_left_out():
    assert not [page.name for page in PAGES if "OUTPUT:" in page.read_text()]


PUBLIC = {"advfeat", *re.findall(r"^      - (advfeat\.\w+): api/", SITE, re.M)}


def own_names(title):
    """Public names of a module, without those that the top level has too."""
    names = importlib.import_module(title).__all__
    return [name for name in names if title == "advfeat" or name not in advfeat.__all__]


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_the_reference_has_every_public_name_once(module):
    pages = "".join(page.read_text() for page in sorted((ROOT / "docs/api").glob("*.md")))
    shown = re.findall(rf"^::: {module}\.(\w+)$", pages, re.M)
    assert sorted(shown) == sorted(own_names(module))
    for name in shown:
        assert getattr(importlib.import_module(module), name).__doc__, name


def test_every_package_is_on_the_map():
    tree = ast.parse((ROOT / "tests/test_architecture.py").read_text())
    levels = next(n.value for n in tree.body if ast.unparse(n).startswith("LEVELS ="))
    packages = set().union(*ast.literal_eval(levels)) - {"__init__"}
    drawn = (ROOT / "docs/figures/architecture.svg").read_text()
    missing = {name for name in packages if f">{name}</text>" not in drawn}
    assert not missing, "add them to docs/map.py, and run it"


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_every_public_name_has_its_reason(module):
    listed = (ROOT / "docs/architecture.md").read_text().split("## Public names\n")[1]
    begin = "At the top level" if module == "advfeat" else f"In `{module}`"
    table = listed.split(f"\n{begin}", 1)[1].split("|---|---|\n")[1].split("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()]
    assert all(reason for _, reason in rows)
    named = [name for names, _ in rows for name in re.findall(r"`(\w+)`", names)]
    assert sorted(named) == sorted(own_names(module))


@pytest.mark.parametrize(
    "page",
    [*(p for p in PAGES if blocks(p)), *sorted((ROOT / "examples").glob("*.py"))],
    ids=lambda p: p.name,
)
def test_a_reader_needs_public_names_alone(page):
    sources = blocks(page) if page.suffix == ".md" else [page.read_text()]
    tree = ast.parse("\n".join(sources))
    modules = {}  # by the names they have on the page
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name: a.name for a in node.names if "advfeat" in a.name}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "advfeat":
            for alias in node.names:
                if f"{node.module}.{alias.name}" in PUBLIC:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                else:
                    assert alias.name in importlib.import_module(node.module).__all__
                    assert node.module in PUBLIC
    assert set(modules.values()) <= PUBLIC
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and node.attr != "__version__":
                assert node.attr in importlib.import_module(module).__all__, node.attr


BADGE = re.compile(r"!\[([^\]]*)\]\(https://img\.shields\.io/badge/([^)?]+)[^)]*\)")


def test_the_badges_are_true():
    project = (ROOT / "pyproject.toml").read_text()
    shown = {
        text: [unquote(part.replace("--", "-")) for part in re.split(r"(?<!-)-(?!-)", badge)]
        for text, badge in BADGE.findall((ROOT / "README.md").read_text())
    }
    python = re.search(r'^requires-python = ">=(.*)"$', project, re.M)[1]
    torch_needed = re.search(r'^dependencies = .*"torch>=([\d.]+)"', project, re.M)[1]
    assert shown.pop(f"Python {python} or later")[:2] == ["python", f">={python}"]
    assert shown.pop(f"PyTorch {torch_needed} or later")[:2] == ["torch", f">={torch_needed}"]
    assert shown.pop("licence: MIT")[:2] == ["licence", "MIT"]
    assert "OSI Approved :: MIT License" in project
    assert "MIT License" in (ROOT / "LICENSE").read_text()
    assert shown.pop("types: mypy strict")[:2] == ["types", "mypy strict"]
    assert re.search(r"^\[tool\.mypy\]\nstrict = true$", project, re.M)
    assert "Typing :: Typed" in project
    assert (ROOT / "advfeat/py.typed").exists()
    assert shown.pop("lint: ruff")[:2] == ["lint", "ruff"]
    assert "[tool.ruff.lint]\nselect" in project
    assert all(f"\n{tool}" in (ROOT / ".ci/run").read_text() for tool in ("mypy\n", "ruff check"))
    assert not shown, "a badge that nothing checks"


def test_the_readme_is_short():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") < 150
    assert "## How fast" in readme


def test_the_table_of_digits_has_mean_and_range_of_the_seeds_and_shifted_labels():
    readme, results = ((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))
    section = readme.split("## Results on digits", 1)[1].split("\n## ")[0]
    head, _, *body = (line for line in section.splitlines() if line.startswith("|"))
    assert head.strip("| ").split(" | ")[-1] == "shifted labels"
    assert f"{head}\n|---|---|---|---|\n" + "\n".join(body) in results
    assert len(body) == 8
    for line in body:
        cells = re.findall(r"\| (\S+) \((\S+) to (\S+)\) (?=\|)", line)
        assert len(cells) == 3
        assert all(float(low) <= float(mean) <= float(high) for mean, low, high in cells)


def test_what_the_paper_recipe_adds_is_called_so():
    page = (ROOT / "docs/not_in_the_paper.md").read_text()
    epochs = study.Recipe.paper().training("standard")["epochs"]
    weights = torch.zeros(1, requires_grad=True)
    schedule = make_scheduler(torch.optim.SGD([weights], lr=0.1), None, epochs, lambda: 1)
    first, second = sorted(schedule.milestones)
    assert (
        f"| number of epochs | not given | {epochs} in `Recipe.paper()`, learning rate divided by "
        f"{1 / schedule.gamma:g} after {first} and {second} |"
    ) in page
    own = study.Recipe.paper().training("standard")["augment"].__name__
    assert re.search(rf"\| not given; .*jitter 0.25 and rotation by 2 degrees \|.*`{own}`", page)


def test_every_address_has_the_same_owner():
    owner = re.compile(r"(?:github\.com/|https://)([\w-]+)(?:/|\.github\.io/)advfeat\b")
    files = [
        ROOT / name for name in ("pyproject.toml", ".mkdocs.yml", "docs/CITATION.cff", "README.md")
    ]
    found = {name for file in files for name in owner.findall(file.read_text())}
    assert len(found) == 1, f"set it with docs/owner.py: {found}"


def test_every_notebook_was_run():
    sources = sorted((ROOT / "docs/notebooks").glob("*.txt"))
    names = [source.stem for source in sources if source.stem != "prelude"]
    assert len(names) >= 6
    for name in names:
        page = (ROOT / f"docs/notebooks/{name}.md").read_text()
        assert re.search(r"^Run time: \d+ s", page, re.M), name
        assert (ROOT / f"docs/notebooks/{name}.ipynb").exists()
        assert f"notebooks/{name}.md" in SITE
