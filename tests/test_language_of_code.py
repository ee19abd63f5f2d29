"""Docstrings, messages, comments and names in advfeat/ use the terms of the field.

A list of other words stays at zero. A word is right in its own sense: the row of a matrix or of a
table, a set of classes, a black box. Those places are listed below, with the number of uses.
"""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "advfeat"
FILES = sorted(PACKAGE.rglob("*.py"))
# The word to avoid, and what to write.
TERMS = {
    r"\brows?\b": "sample, example",
    r"\brefus(?:e[sd]?|ing|als?)\b": "raise an error, check that",
    r"\b(?:goes|go|going|gone|went) on\b|\bdone over\b": "resumes, continues, is recomputed",
    r"\bleft standing\b|\bresist(?:s|ed)?\b": "still robust, remaining",
    r"\b(?:is|are|was|were) taken for\b|\btakes? (?:it |them )?for\b": "is classified as",
    r"\blabel \+ 1\b|\bmoved labels?\b|\bnext class\b": "class y + 1, shifted labels",
    r"\bbelieved?\b": "trustworthy",
    r"\b(?:the|what the) words\b": "arguments",
    r"\bbeside it\b": "baseline",
    r"\b(?:a|last) look\b|\blook(?:s|ed)? at\b|\blooks on\b": "evaluate, check",
    r"\bstrangers?\b|\bhouses?\b|\brooms?\b": "module, package, space",
    r"\b(?<!black-)box(?:es)?\b": "bounds, valid range",
    r"\bshares?(?= (?:of|whose|that)\b)|\b(?:a|its|the|which) share\b": "fraction, part",
    r"\btrue (?:data|images)\b": "original data",
    r"\bconstructed sets?\b|\b(?:a|the|each|another|whole) set\b(?! of)": "dataset",
    r"\bof one's own\b": "your own",
    r"\bsays so\b": "what it says",
}
# Parts of names that say nothing of what a thing is, or call it by another word.
# Not "box": a sample's own bounds, where the attack's are `bounds`.
NAMES = {"refuse", "refused", "share", "shares", "room", "told", "begun", "taken", "look"}
NAMES |= {"looked", "stranger", "strangers", "row", "rows"}
# Rows of a printed table, of a matrix, of images in a figure; epochs in `History.rows`.
TABLES = {
    *("analysis/_alignment.py", "analysis/_gaussian_study.py", "analysis/_leakage.py"),
    *("analysis/_matrix.py", "analysis/_poison.py", "analysis/_robustified.py"),
    *(
        "analysis/_strong.py",
        "analysis/_mislabelled.py",
        "analysis/_planted.py",
        "analysis/_fourier.py",
        "analysis/_spectrum.py",
    ),
    *("analysis/_tradeoff.py", "analysis/_transfer.py", "analysis/_usefulness.py"),
    *("attacks/_square.py", "attacks/_transferable.py", "checks.py"),
    *(
        "metrics/_certified.py",
        "metrics/_corruption_accuracy.py",
        "metrics/_diagnose.py",
        "metrics/_outcome.py",
    ),
    *(
        "metrics/_transfer.py",
        "metrics/_report/_fields.py",
        "metrics/_report/_page.py",
        "metrics/_report/_result.py",
        "pages.py",
        "plots/axes.py",
        "plots/figures.py",
        "tables.py",
        "training/_adversarial_fit.py",
    ),
    *("training/_augment.py", "training/_fit.py", "training/_history.py", "training/_loop.py"),
    *("training/_resume.py", "training/_schedule.py", "training/_settings.py"),
    *("study/_calibrate.py", "study/_claims.py", "study/_report.py", "study/_sections.py"),
}


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


@functools.cache
def nodes(source):
    return list(ast.walk(ast.parse(source)))


def texts(source):
    """Docstrings, messages and comments of a file, each with its line."""
    for node in nodes(source):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for number, line in enumerate(node.value.split("\n")):
                if not re.match(r"\s*(>>>|\.\.\. |\w+$)", line):  # code, or a parameter's name
                    yield node.lineno + number, line
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def hits(source, terms=TERMS):
    """Words to avoid in the texts of a file."""
    for line, text in texts(source):
        for term, instead in terms.items():
            for found in re.finditer(term, text, re.I):
                yield f"line {line}: {found[0]!r}: write {instead}"


def identifiers(source):
    """Names that a file gives: of functions, classes, arguments and variables."""
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def parts(name):
    return re.findall(r"[a-z]+", re.sub(r"([A-Z])", r"_\1", name).lower())


def test_texts_use_the_terms_of_the_field():
    rows = r"\brows?\b"
    found = []
    for path in FILES:
        legitimate = name_of(path) in TABLES
        terms = {term: other for term, other in TERMS.items() if term != rows or not legitimate}
        found += [f"{name_of(path)}, {hit}" for hit in hits(path.read_text(), terms)]
    assert not found, "\n".join(found)


def test_names_use_the_terms_of_the_field():
    found = []
    for path in FILES:
        avoid = NAMES - {"row", "rows"} if name_of(path) in TABLES else NAMES
        names = identifiers(path.read_text())
        found += [(name_of(path), name) for name in names if avoid & set(parts(name))]
    assert not found


def test_words_are_found_where_they_are_used():
    source = '''
def refuse_rows(box):
    """A row is refused; the true data go on in a box.

    >>> row = "not in an example"
    """
    share = 1  # the share of samples
    raise ValueError("a constructed set has no room")
'''
    found = {hit.split("'")[1] for hit in hits(source)}
    assert found == {"row", "refused", "true data", "go on", "box", "the share", "constructed set",
                     "room"}  # fmt: skip
    named = [name for name in identifiers(source) if NAMES & set(parts(name))]
    assert sorted(named) == ["refuse_rows", "share"]
