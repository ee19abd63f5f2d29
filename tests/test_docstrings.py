"""Every public function documents what it takes, returns and raises, with an example."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module may be on several pages: "# advfeat.analysis: geometry".
TITLES = sorted(
    {
        page.read_text().split("\n", 1)[0].removeprefix("# ").split(":")[0]
        for page in (ROOT / "docs/api").glob("*.md")
    }
)
SECTIONS = ("Returns", "Raises", "Examples")


def functions():
    for title in TITLES:
        module = importlib.import_module(title)
        for name in module.__all__:
            function = inspect.unwrap(getattr(module, name))
            if inspect.isfunction(function):
                yield pytest.param(function, id=f"{title}.{name}")


@pytest.mark.parametrize("function", list(functions()))
def test_a_public_function_says_what_it_returns_and_raises(function):
    text = inspect.getdoc(function) or ""
    wanted = SECTIONS if not inspect.signature(function).parameters else ("Parameters", *SECTIONS)
    missing = [part for part in wanted if not re.search(rf"^{part}\n-+$", text, re.M)]
    assert not missing
