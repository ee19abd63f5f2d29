"""Draw figures/architecture.svg, the map of the packages: python docs/map.py, from the root.

The levels are those that tests/test_architecture.py holds the code to.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAYS = {
    "__init__": "the names used most",
    "__main__": "python -m advfeat",
    "cli": "evaluate, construct, study",
    "study": "the whole paper in one call",
    "analysis": "one file a question of the paper",
    "training": "standard and adversarial fitting",
    "metrics": "accuracy, robust accuracy, curves, diagnosis",
    "robustify": "D_R",
    "nonrobust": "D_NR, D_det, D_rand",
    "construction": "what all constructed datasets share",
    "datasets": "constructed datasets, in memory or on disk",
    "attacks": "one file an attack",
    "labels": "labels that a dataset keeps apart",
    "unpacking": "inputs and labels of a batch",
    "loading": "any dataset or loader as indexed samples",
    "model": "access to the user's module",
    "plots": "figures",
    "progress": "progress",
    "seeding": "random numbers",
    "distributed": "ranks",
    "durable": "whole files",
    "tables": "tables",
    "results": "repr, HTML, JSON",
    "pages": "HTML pages",
    "statistics": "intervals, tests",
    "class_correlation": "rho and gamma of features",
    "checks": "errors for bad input",
    "suggestions": "did you mean",
    "losses": "per-sample objectives",
    "threat": "norms, balls and bounds as tensor functions",
    "_version": "the version",
}
WIDTH, ROW, GAP, LEFT = 600, 50, 6, 10


def levels() -> list[list[str]]:
    """LEVELS of the test, highest first."""
    tree = ast.parse((ROOT / "tests/test_architecture.py").read_text())
    found = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LEVELS"
    )
    return [sorted(names, key=list(SAYS).index) for names in reversed(ast.literal_eval(found))]


def drawing() -> str:
    rows = levels()
    height = len(rows) * (ROW + GAP) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" fill="#111">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for level, names in enumerate(rows):
        width = (WIDTH - 2 * LEFT - GAP * (len(names) - 1)) / len(names)
        shade = "#dfe7f2" if level % 2 else "#f4f6fa"
        for place, package in enumerate(names):
            x, y = LEFT + place * (width + GAP), 5 + level * (ROW + GAP)
            name = "advfeat" if package == "__init__" else package
            middle = x + width / 2
            parts += [
                f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{ROW}" rx="4" fill="{shade}" '
                'stroke="#333"/>',
                f'<text x="{middle:g}" y="{y + 21}" text-anchor="middle" font-size="16" '
                f'font-weight="bold">{name}</text>',
                f'<text x="{middle:g}" y="{y + 40}" text-anchor="middle" font-size="14">'
                f"{SAYS[package]}</text>",
            ]
    parts.append(
        f'<text x="{WIDTH / 2:g}" y="{height - 8}" text-anchor="middle" font-size="14" '
        'font-style="italic">a package imports only from levels below its own</text></svg>'
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/figures/architecture.svg").write_text(drawing())
