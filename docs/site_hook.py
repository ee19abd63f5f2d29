"""Changes of the pages while the site is built; mkdocs calls the functions.

Formulas become MathML, so that the browser needs no script and no request. A page of the reference
begins with a table of its names, with the reasons that architecture.md gives.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
NAME = re.compile(r"^::: (advfeat[\w.]*)\.(\w+)$", re.M)
DOCS = Path(__file__).parent
# The page of the reference that each name is documented on.
PLACES = {
    f"{module}.{name}": page.name
    for page in sorted((DOCS / "api").glob("*.md"))
    for module, name in NAME.findall(page.read_text())
}


# "a, b: text" of a docstring comes as two items of the same text.
ITEM = '<li class="doc-section-item field-body">'
WITHIN, DASH = r"(?:(?!</li>).)*?", "\N{EN DASH}"
TWINS = re.compile(
    rf"({ITEM}{WITHIN})\s*{DASH}\s*(<div class=\"doc-md-description\">{WITHIN}</div>)\s*</li>\s*"
    rf"{ITEM}({WITHIN})\s*{DASH}\s*\2\s*</li>",
    re.S,
)
CELL = re.compile(r"<td[^>]*>.*?</td>", re.S)
CODE = re.compile(r"(<code[^>]*>)(.*?)(</code>)", re.S)
OUTPUT = re.compile(r'<div class="language-text highlight">(.*?)</div>', re.S)


def on_page_content(content: str, **_: Any) -> str:
    """Replace formulas, join parameters of one description, and say where code may break."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return str(convert(html.unescape(found[2]), display=display))

    def breakable(cell: re.Match[str]) -> str:
        """Long names in a table break after a sign, not within a word."""

        def broken(code: re.Match[str]) -> str:
            return code[1] + re.sub(r"(?<=[\w(])([_.(/=,])(?=\w)", r"\1<wbr>", code[2]) + code[3]

        return CODE.sub(broken, cell[0])

    def columns(output: re.Match[str]) -> str:
        """A printed table scrolls on a phone; other output wraps (style.css)."""
        lines = re.sub(r"<[^>]*>", "", output[1]).strip("\n").split("\n")
        table = len(lines) > 3 and len({len(html.unescape(line)) for line in lines}) == 1
        return output[0].replace("language-text", "language-text columns") if table else output[0]

    content = OUTPUT.sub(columns, CELL.sub(breakable, FORMULA.sub(mathml, content)))
    joined = 1
    while joined:
        content, joined = TWINS.subn(rf"\1, \3 {DASH} \2</li>", content)
    return content


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put a table of its names at the beginning of a page of the reference."""
    here = Path(page.file.src_uri).name
    if not page.file.src_uri.startswith("api/") or not NAME.search(markdown):
        return markdown
    own = markdown.split("\n", 1)[0].removeprefix("# ")
    table = ["| name | use |", "|---|---|"]
    for module in dict.fromkeys(("advfeat", NAME.findall(markdown)[-1][0])):
        for shown, reason in reasons(module):
            places = {name: PLACES[f"{module}.{name}"] for name in re.findall(r"`(\w+)`", shown)}
            if own == module or here in places.values():
                links = (f"[`{n}`]({at}#{module}.{n})" for n, at in places.items())
                table.append(f"| {', '.join(links)} | {reason} |")
    first = markdown.index("::: ")
    heading = markdown.rfind("\n## ", 0, first)
    at = first if heading < 0 else heading + 1
    return markdown[:at] + "\n".join(table) + "\n\n" + markdown[at:]


def reasons(module: str) -> list[list[str]]:
    """Names of a module as architecture.md lists them, and what each is for."""
    listed = (DOCS / "architecture.md").read_text().split("## Public names\n")[1]
    begin = "At the top level" if module == "advfeat" else f"In `{module}`"
    lines = listed.split(f"\n{begin}", 1)[1].split("|---|---|\n")[1].split("\n\n")[0].splitlines()
    moved = (line.replace("](", "](../").replace("](../#", "](#") for line in lines)
    return [line.strip("| ").split(" | ", 1) for line in moved]
