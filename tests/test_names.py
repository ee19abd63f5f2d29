"""What a user finds at the top level: public names, packages without an import, help by task."""

import subprocess
import sys

import pytest

import advfeat


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()


def test_dir_shows_public_names_and_packages_alone():
    names = [name for name in dir(advfeat) if name != "__version__"]
    assert set(advfeat.__all__) <= set(names)
    assert not [name for name in names if name.startswith("_")]
    assert {"analysis", "attacks", "metrics", "plots", "study"} <= set(names)
    assert not {"checks", "durable", "pool", "robustify", "importlib", "ModuleType"} & set(names)
    for name in names:
        assert getattr(advfeat, name) is not None


@pytest.mark.slow
def test_packages_need_no_import_and_cost_none():
    code = (
        "import sys, advfeat; before = 'advfeat.study' in sys.modules or"
        " 'advfeat.analysis' in sys.modules or 'matplotlib' in sys.modules;"
        "print(before, advfeat.study.__name__, advfeat.plots.__name__)"
    )
    assert run(code) == ["False", "advfeat.study", "advfeat.plots"]


def test_help_lists_every_name():
    for name in [*advfeat.__all__, *advfeat._PACKAGES]:
        assert name in advfeat.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'attack'"):
        _ = advfeat.attack


@pytest.mark.parametrize(
    ("name", "place"), [("AutoAttack", "attacks"), ("robustness_curve", "metrics")]
)
def test_a_name_of_a_package_is_said_to_be_there(name, place):
    with pytest.raises(AttributeError, match=rf"it is advfeat\.{place}\.{name}$"):
        getattr(advfeat, name)
