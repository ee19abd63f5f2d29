"""Draw figures/house.svg, the map of the rooms: python docs/house.py, from the root.

The floors are those that tests/test_architecture.py holds the code to.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAYS = {
    "__init__": "the names used most",
    "study": "the whole paper in one call",
    "analysis": "one file a question of the paper",
    "training": "standard and adversarial fitting",
    "metrics": "accuracy, robust accuracy, curves, diagnosis",
    "robustify": "D_R",
    "nonrobust": "D_NR, D_det, D_rand",
    "construct": "the loop behind all sets",
    "exchange": "others' formats",
    "inspection": "checks, controls",
    "store": "a constructed set, in memory or on disk",
    "engine": "drives an attack over data, survivors only",
    "attacks": "one file an attack",
    "loading": "any dataset or loader as numbered rows",
    "model": "the one border to the user's module",
    "folding": "BatchNorm, folded in",
    "class_correlation": "rho and gamma of features",
    "plots": "pictures of numbers and images",
    "statistics": "intervals and tests",
    "seeding": "random numbers",
    "ranks": "processes of a run",
    "checks": "refusals of bad input",
    "losses": "per-sample objectives",
    "threat": "norms, balls and boxes as tensor functions",
    "_version": "the version",
}
WIDTH, ROW, GAP, LEFT = 600, 50, 6, 10


def floors() -> list[list[str]]:
    """FLOORS of the test, top floor first."""
    tree = ast.parse((ROOT / "tests/test_architecture.py").read_text())
    found = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    return [sorted(rooms, key=list(SAYS).index) for rooms in reversed(ast.literal_eval(found))]


def drawing() -> str:
    rows = floors()
    height = len(rows) * (ROW + GAP) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" fill="#111">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for floor, rooms in enumerate(rows):
        width = (WIDTH - 2 * LEFT - GAP * (len(rooms) - 1)) / len(rooms)
        shade = "#dfe7f2" if floor % 2 else "#f4f6fa"
        for place, room in enumerate(rooms):
            x, y = LEFT + place * (width + GAP), 5 + floor * (ROW + GAP)
            name = "advfeat" if room == "__init__" else room
            middle = x + width / 2
            parts += [
                f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{ROW}" rx="4" fill="{shade}" '
                'stroke="#333"/>',
                f'<text x="{middle:g}" y="{y + 21}" text-anchor="middle" font-size="16" '
                f'font-weight="bold">{name}</text>',
                f'<text x="{middle:g}" y="{y + 40}" text-anchor="middle" font-size="14">'
                f"{SAYS[room]}</text>",
            ]
    parts.append(
        f'<text x="{WIDTH / 2:g}" y="{height - 8}" text-anchor="middle" font-size="14" '
        'font-style="italic">a room imports only from floors below its own</text></svg>'
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/figures/house.svg").write_text(drawing())
