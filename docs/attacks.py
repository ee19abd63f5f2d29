"""Write the table of attacks into docs/attack.md: python docs/attacks.py, from the root.

Everything but the names in other libraries comes from the classes. The column of samples that are
still robust is measured here, on digits; `--keep` leaves the one that is there.
"""

import argparse
import dataclasses
import inspect
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import advfeat as af
from advfeat import attacks
from advfeat.attacks.minimum_norm import MinimumNorm
from advfeat.threat import NORMS

PAGE = Path(__file__).parent / "attack.md"
BEGIN, END = "<!-- attacks: written by docs/attacks.py -->\n", "<!-- end of attacks -->\n"
FIRST = 3  # columns before the measured one
LIBRARIES = ("torchattacks", "foolbox", "ART", "adv-lib", "cleverhans")
# Paper, and names in the libraries, in their order.
KNOWN = {
    "AutoAttack": (
        "[Croce and Hein 2020](https://arxiv.org/abs/2003.01690)",
        ("AutoAttack", "", "AutoAttack", "", ""),
    ),
    "APGD": (
        "[Croce and Hein 2020](https://arxiv.org/abs/2003.01690)",
        ("APGD, APGDT", "", "AutoProjectedGradientDescent", "apgd", ""),
    ),
    "PGD": (
        "[Madry et al. 2018](https://arxiv.org/abs/1706.06083)",
        ("PGD, PGDL2", "LinfPGD, L2PGD, L1PGD", "ProjectedGradientDescent", "pgd_linf", "pgd"),
    ),
    "FGSM": (
        "[Goodfellow et al. 2015](https://arxiv.org/abs/1412.6572)",
        ("FGSM", "FGSM", "FastGradientMethod", "", "fast_gradient_method"),
    ),
    "MIFGSM": (
        "[Dong et al. 2018](https://arxiv.org/abs/1710.06081)",
        ("MIFGSM", "", "MomentumIterativeMethod", "", "momentum_iterative_method"),
    ),
    "DIFGSM": (
        "[Xie et al. 2019](https://arxiv.org/abs/1803.06978)",
        ("DIFGSM", "", "", "", ""),
    ),
    "SmoothedPGD": ("advfeat", ("", "", "", "", "")),
    "Square": (
        "[Andriushchenko et al. 2020](https://arxiv.org/abs/1912.00049)",
        ("Square", "", "SquareAttack", "", ""),
    ),
    "FMN": (
        "[Pintor et al. 2021](https://arxiv.org/abs/2102.12827)",
        ("", "L2FMNAttack, ...", "", "fmn", ""),
    ),
    "FAB": (
        "[Croce and Hein 2020](https://arxiv.org/abs/1907.02044)",
        ("FAB", "", "", "fab", ""),
    ),
    "MinimumPGD": ("advfeat", ("", "", "", "", "")),
}


def classes() -> dict[str, type]:
    """All attacks that are public, by name, in the order of `KNOWN`."""
    public = {name: getattr(attacks, name) for name in attacks.__all__}
    found = {n: c for n, c in public.items() if dataclasses.is_dataclass(c)}
    missing = found.keys() ^ KNOWN.keys()
    assert not missing, f"add to KNOWN of docs/attacks.py, or take away: {missing}"
    return {name: found[name] for name in KNOWN}


def defaults(kind: type, norm: str, eps: float = 0.1, **settings: object):
    """The attack with its default settings."""
    return kind(eps=eps, norm=norm, **settings)


def properties(name: str, kind: type) -> dict[str, str]:
    """The columns that the class itself tells."""
    own = {field.name for field in dataclasses.fields(kind)}
    one = defaults(kind, "l2")
    parts = getattr(one, "attacks", (one,))
    black_box = issubclass(kind, attacks.Square)
    cost = " + ".join(
        f"{part.max_evaluations:,}{' queries' if isinstance(part, attacks.Square) else ''}"
        for part in parts
    )
    asked = inspect.signature(kind.__call__).parameters
    return {
        "attack": f"`{name}`",
        "norms": ", ".join(norm for norm in NORMS if defaults(kind, norm).norm == norm),
        "steps": cost,
        "targeted": "yes" if "targeted" in own else "",
        "black box": "yes" if black_box else "",
        "minimum norm": "yes" if issubclass(kind, MinimumNorm) else "",
        "mask, eps by feature": "yes" if "mask" in own else "",
        "expectation": "yes" if "expectation" in asked else "",
        "own loss": "yes" if "loss" in own else "",
    }


def measured() -> dict[str, str]:
    """Percent of digits on which a robust network is right under each attack, in linf and l2."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[:1500], labels[:1500])
    test = TensorDataset(images[1500:1700], labels[1500:1700])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    af.adversarial_fit(model, train, eps=0.1, norm="linf", steps=5, epochs=15, lr=0.05, seed=0)
    balls = {"linf": 0.15, "l2": 0.8}
    found = {}
    for name, kind in classes().items():
        runs = [defaults(kind, norm, eps) for norm, eps in balls.items()]
        robust = (af.robust_accuracy(model, test, attack=run, seed=0) for run in runs)
        found[name] = " / ".join(f"{100 * float(share):.1f}" for share in robust)
        print(name, found[name], flush=True)
    return found


def kept() -> dict[str, str]:
    """The measured column as it is in the page."""
    lines = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    if not rows:
        return {}
    place = next(n for n, title in enumerate(rows[0]) if title.startswith("still robust"))
    return {row[0].strip("`"): row[place] for row in rows[2:]}


def write(robust: dict[str, str]) -> str:
    """The table in Markdown."""
    rows = []
    for name, kind in classes().items():
        paper, names = KNOWN[name]
        own = properties(name, kind)
        others = [f"`{other}`" if other else "" for other in names]
        first, rest = list(own.values())[:FIRST], list(own.values())[FIRST:]
        rows.append((*first, robust.get(name, ""), *rest, paper, *others))
    titles = (*own, "paper", *LIBRARIES)
    titles = (*titles[:FIRST], "still robust, %, linf / l2", *titles[FIRST:])
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(robust: dict[str, str]) -> str:
    """The page with the table in it."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + "\n" + write(robust) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep the measured column")
    PAGE.write_text(page(kept() if parser.parse_args().keep else measured()))
