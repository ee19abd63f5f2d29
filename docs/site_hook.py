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


def on_page_content(content: str, **_: Any) -> str:
    """Replace every formula of a page."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return str(convert(html.unescape(found[2]), display=display))

    return FORMULA.sub(mathml, content)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put a table of its names at the beginning of a page of the reference."""
    names = NAME.findall(markdown)
    if not page.file.src_uri.startswith("api/") or not names:
        return markdown
    listed = (Path(__file__).parent / "architecture.md").read_text().split("## Public names\n")[1]
    module = names[0][0]
    begin = "At the top level" if module == "advfeat" else f"In `{module}`"
    lines = listed.split(f"\n{begin}", 1)[1].split("|---|---|\n")[1].split("\n\n")[0].splitlines()
    table = ["| name | use |", "|---|---|"]
    for line in lines:
        shown, reason = line.strip("| ").split(" | ", 1)
        links = re.sub(r"`(\w+)`", rf"[`\1`](#{module}.\1)", shown)
        table.append(f"| {links} | {reason.replace('](', '](../').replace('](../#', '](#')} |")
    first = min(markdown.index("::: "), len(markdown))
    heading = markdown.rfind("\n## ", 0, first)
    at = first if heading < 0 else heading + 1
    return markdown[:at] + "\n".join(table) + "\n\n" + markdown[at:]
