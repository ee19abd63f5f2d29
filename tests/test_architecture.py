"""Levels of packages, what each may import, what is public, what must be installed."""

import ast
import functools
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import advfeat

ROOT = Path(advfeat.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]

# Lowest level first; a package or module imports only from levels below its own.
LEVELS = [
    {"_version"},
    {"threat"},
    {"losses"},
    {"checks", "suggestions"},
    {"seeding", "tables", "durable", "distributed"},
    {"plots", "progress", "results", "pages"},
    {"statistics"},
    {"model", "class_correlation"},
    {"labels", "unpacking"},
    {"loading"},
    {"attacks"},
    {"datasets"},
    {"construction"},
    {"robustify", "nonrobust"},
    {"metrics"},
    {"training"},
    {"analysis"},
    {"study"},
    {"cli"},
    {"__main__"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

PUBLIC = [
    "FGSM",
    "PGD",
    "Normalize",
    "ConstructedDataset",
    "accuracy",
    "adversarial_fit",
    "construct_det_dataset",
    "construct_nonrobust_dataset",
    "construct_rand_dataset",
    "construct_robust_dataset",
    "fgsm",
    "fit",
    "pgd",
    "report",
    "robust_accuracy",
]

REQUIRED = {"torch", "numpy", "typing_extensions"}
EXTRAS = {"tqdm", "matplotlib", "sklearn", "PIL", "datasets"}


@functools.cache
def nodes_of(path):
    """Every node of a file, parsed once."""
    return list(ast.walk(ast.parse(path.read_text())))


def package_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def imports(path):
    """Every module that a file imports, dotted, and whether importing the file leaves it alone."""

    def visit(node, inside):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", inside
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        inside = inside or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return list(visit(nodes_of(path)[0], False))


def imported_packages(path):
    """The other packages and modules of the library that a file imports from."""
    own = [name.split(".") for name, _ in imports(path) if name.split(".")[0] == "advfeat"]
    # `from advfeat import pgd` and `import advfeat` know the top level.
    packages = {parts[1] if len(parts) > 1 and parts[1] in LEVEL else "__init__" for parts in own}
    return packages - {package_of(path)}


def test_imports_only_point_downward():
    for path in FILES:
        package = package_of(path)
        assert package in LEVEL, (
            "a new package needs its place in LEVELS and in docs/architecture.md"
        )
        too_high = {other for other in imported_packages(path) if LEVEL[other] >= LEVEL[package]}
        assert not too_high, path


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("threat", set()),
        ("losses", {"threat"}),
        ("seeding", set()),
        # A loop over data never sees a model.
        ("loading", {"checks", "seeding", "unpacking"}),
        # An attack never sees a loader, a file or a progress bar.
        ("attacks", {"threat", "losses", "checks", "suggestions", "seeding", "model"}),
        # Drawing knows numbers and images, and no result: so every package above can plot.
        ("plots", {"threat", "checks"}),
        # A constructed dataset knows no model; its inspection asks models for features.
        (
            "datasets",
            {
                "checks",
                "threat",
                "loading",
                "seeding",
                "durable",
                "model",
                "class_correlation",
                "plots",
                "results",
                "tables",
            },
        ),
    ],
)
def test_what_a_package_may_import(package, allowed):
    known = {
        other for path in FILES if package_of(path) == package for other in imported_packages(path)
    }
    assert known <= allowed


def test_only_what_must_be_installed_is_imported_at_run_time():
    allowed = REQUIRED | {"advfeat"} | set(sys.stdlib_module_names)
    for path in FILES:
        for name, inside in imports(path):
            package = name.split(".")[0]
            assert package in (allowed | EXTRAS if inside else allowed), f"{path}: {name}"


@pytest.mark.slow
def test_the_package_imports_where_no_extra_is_installed():
    # None in sys.modules is how Python writes down that a module cannot be imported.
    code = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); import advfeat.study"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


@pytest.mark.parametrize(
    "name", ["requires_grad_", "autocast", "channels_last", "register_forward_hook", "eval"]
)
def test_only_the_model_package_touches_the_users_module(name):
    touching = set()
    for path in FILES:
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and node.attr == name:
                touching.add(package_of(path))
    assert touching <= {"model"}


def test_nothing_seeds_the_global_random_state():
    for path in FILES:
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and node.attr in {"manual_seed", "manual_seed_all"}:
                # A generator's own method is another thing: torch.Generator().manual_seed(...).
                assert isinstance(node.value, ast.Call), path


def test_the_public_names_are_these():
    assert sorted(advfeat.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_with_examples(name):
    text = inspect.getdoc(getattr(advfeat, name))
    assert "\nExamples\n--------\n>>> " in text


# --- Sizes and cycles ---

# A module may be longer where docs/architecture.md says why.
LONGEST_MODULE, LONGEST_BODY, MOST_PARAMETERS = 400, 60, 12
ARCHITECTURE = (ROOT.parent / "docs/architecture.md").read_text()


def test_a_module_is_short_or_says_why_not():
    for path in FILES:
        name = path.relative_to(ROOT.parent).as_posix()
        if len(path.read_text().splitlines()) > LONGEST_MODULE:
            listed = ARCHITECTURE.split("## Modules above 400 lines\n", 1)[1].split("\n## ")[0]
            assert f"`{name}`" in listed, "split it, or give the reason in docs/architecture.md"


def body_lines(function):
    """Lines of a function without its signature and docstring."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def functions_of(path):
    for node in nodes_of(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def is_public(path, name):
    """Whether a user types this name: it is in the __all__ of its package."""
    package = importlib.import_module(f"advfeat.{package_of(path)}")
    return name in getattr(package, "__all__", ())


def test_functions_are_short_and_take_few_arguments():
    for path in FILES:
        for function in functions_of(path):
            assert body_lines(function) <= LONGEST_BODY, f"{path}: {function.name}"
            args = function.args
            count = len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs)
            if count > MOST_PARAMETERS:
                assert is_public(path, function.name), f"{function.name} takes {count} arguments"


def test_no_two_modules_import_each_other_even_for_types():
    modules = {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in FILES
    }
    graph = {}
    for name, path in modules.items():
        found = set()
        for imported, _ in imports(path):
            # `from a.b import c`: the module a.b.c, or the name c of the module a.b.
            for target in (imported, imported.rpartition(".")[0]):
                if target in modules:
                    found.add(target)
                    break
        graph[name] = found - {name}
    order, done, path_now = [], set(), []

    def visit(name):
        assert name not in path_now, f"cycle: {[*path_now[path_now.index(name) :], name]}"
        if name in done:
            return
        path_now.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path_now.pop()
        done.add(name)
        order.append(name)

    for name in sorted(graph):
        visit(name)
    assert len(order) == len(modules)


def test_private_modules_are_imported_by_their_own_package_alone():
    for path in FILES:
        for name, _ in imports(path):
            parts = name.split(".")
            if (
                parts[0] == "advfeat"
                and parts[1] != "_version"
                and any(part.startswith("_") for part in parts[2:3])
            ):
                assert parts[1] == package_of(path), f"{path}: {name}"


def test_the_top_level_holds_what_the_design_card_allows():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT.parent, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no clone")
    found = {name.split("/")[0] for name in listed.stdout.splitlines()}
    allowed = {"README.md", "pyproject.toml", "advfeat", "tests", "docs", "examples", "LICENSE"}
    assert {name for name in found if not name.startswith(".")} <= allowed
