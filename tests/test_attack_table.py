"""The table of attacks in docs/attack.md is what docs/attacks.py writes from the code."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("attacks_table", ROOT / "docs/attacks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_up_to_date(script):
    written = script.page(script.kept())
    assert written == script.PAGE.read_text(), "run python docs/attacks.py"


def test_every_attack_is_in_the_table(script):
    assert script.kept().keys() == script.classes().keys()


@pytest.mark.parametrize(
    ("library", "path"), [("torchattacks", ""), ("foolbox", ".attacks"), ("ART", "")]
)
def test_names_in_other_libraries_exist(script, library, path):
    modules = {"ART": "art.attacks.evasion"}
    module = pytest.importorskip(modules.get(library, library + path))
    column = script.LIBRARIES.index(library)
    for _, names in script.KNOWN.values():
        for name in names[column].replace(", ...", "").split(", "):
            assert not name or hasattr(module, name)
