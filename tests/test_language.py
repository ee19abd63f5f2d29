"""README and docs use the terms of the field: a list of other words stays at zero."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The word to avoid, and what to write.
TERMS = {
    r"\brows?\b": "sample, example, line of a table",
    r"\b(?:is|are|was|were) refused\b|\brefusals?\b": "raises an error",
    r"\b(?:goes|gone|going|go|went) on\b": "resumes, continues",
    r"\bdone over\b": "is recomputed",
    r"\bleft standing\b|\bresists?\b|\bresisted\b": "still robust, remaining",
    r"\b(?:is|are|was|were) taken for\b": "is classified as",
    r"\blabel \+ 1\b|\bmoved labels\b|\blabels moved\b": "shifted labels",
    r"\b(?:to be|can be) believed\b|\bto believe\b": "trustworthy",
    r"\bwhat the words mean\b": "arguments",
    r"\bbeside it\b": "baseline",
    r"\ba look\b|\blooks at\b": "evaluates, checks",
    r"\bstrangers?\b|\bhouse\b|\broom\b": "module, package, interface",
    r"\bshares?\b(?= of )": "fraction, percentage",
    r"\btrue data\b": "original data",
    r"\bof one's own\b": "your own",
    r"\bsays? so\b": "what it says",
    r"\b([a-z]+)[ \n]\1\b": "the word once",
}
CODE = re.compile(r"^```.*?^```|`[^`\n]*`|\]\([^)]*\)", re.S | re.M)


def prose(page: Path) -> str:
    """Text of a page without code, links and output, on as many lines."""
    return CODE.sub(lambda found: "\n" * found[0].count("\n"), page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_uses_the_terms_of_the_field(page):
    text = prose(page)
    found = [
        f"line {text[: hit.start()].count(chr(10)) + 1}: {hit[0]!r}: write {instead}"
        for term, instead in TERMS.items()
        for hit in re.finditer(term, text, re.I)
    ]
    assert not found, "\n".join(found)


def test_the_terms_are_found_where_they_are_used():
    text = "Two rows goes on; label + 1 is taken for a share of it, as it was to be believed."
    hits = [term for term in TERMS if re.search(term, text, re.I)]
    assert len(hits) == 6
    assert prose(ROOT / "README.md").count("\n") == (ROOT / "README.md").read_text().count("\n")
