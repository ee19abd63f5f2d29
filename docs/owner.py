"""Set the owner of the repository in every address: python docs/owner.py NAME.

The owner is read from `Repository` in pyproject.toml, where it is `OWNER` until the repository has
an address.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", ".mkdocs.yml", "docs/CITATION.cff")


def owner() -> str:
    """Owner in the address of the repository."""
    found = re.search(r"github\.com/([\w-]+)/advfeat", (ROOT / "pyproject.toml").read_text())
    assert found
    return found[1]


if __name__ == "__main__":
    old, new = owner(), sys.argv[1]
    for file in (ROOT / name for name in FILES):
        text = file.read_text()
        for rest in ("/advfeat", ".github.io/advfeat"):
            text = text.replace(f"/{old}{rest}", f"/{new}{rest}")
        file.write_text(text)
