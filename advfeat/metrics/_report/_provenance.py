"""What to write in a paper: settings, versions, device, and whom to cite."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advfeat._version import __version__
from advfeat.attacks import Attack
from advfeat.metrics._outcome import attack_name
from advfeat.model import Normalize, device_of
from advfeat.threat import Bounds, FeatureBounds, hull

PAPERS = {
    "PGD": "Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks",
    "FGSM": "Goodfellow et al. 2015, Explaining and Harnessing Adversarial Examples",
    "APGD": "Croce and Hein 2020, Reliable Evaluation of Adversarial Robustness with an Ensemble "
    "of Diverse Parameter-free Attacks",
    "FAB": "Croce and Hein 2020, Minimally Distorted Adversarial Examples with a Fast Adaptive "
    "Boundary Attack",
    "Square": "Andriushchenko et al. 2020, Square Attack: a Query-efficient Black-box Adversarial "
    "Attack via Random Search",
    "SmoothedPGD": "Athalye et al. 2018, Obfuscated Gradients Give a False Sense of Security",
    "FMN": "Pintor et al. 2021, Fast Minimum-norm Adversarial Attacks through Adaptive Norm "
    "Constraints",
    "MinimumPGD": "Rony et al. 2019, Decoupling Direction and Norm for Efficient Gradient-based "
    "L2 Adversarial Attacks and Defenses",
}
_CHECKS = (
    "Carlini et al. 2019, On Evaluating Adversarial Robustness",
    "Athalye et al. 2018, Obfuscated Gradients Give a False Sense of Security",
)


def radius_of(eps: float | Tensor) -> float:
    """The radius in the units of a curve: 1 where there is one for each feature."""
    return 1.0 if isinstance(eps, Tensor) else float(eps)


def size_text(eps: float | Tensor, bounds: FeatureBounds, mask: Tensor | None = None) -> str:
    """A radius as papers write it, 8/255 where it is one; and whether some features are fixed."""
    masked = "" if mask is None else " on some features (mask)"
    return _radius_text(eps, hull(bounds)) + masked


def _radius_text(eps: float | Tensor, bounds: Bounds) -> str:
    if isinstance(eps, Tensor):
        return f"{float(eps.min()):.4g} to {float(eps.max()):.4g} by feature"
    levels = 255 * eps
    if bounds == (0.0, 1.0) and 0.99 < levels < 64 and abs(levels - round(levels)) < 1e-6:
        return f"{round(levels)}/255"
    return f"{eps:.4g}"


def provenance(
    model: nn.Module, attacks: Sequence[Attack], seed: int, norm: str, eps: str, bounds: Bounds
) -> dict[str, Any]:
    """Settings and versions by name, plain values."""
    device = device_of(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = torch.get_num_threads()
    return {
        "model": _name(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threat model": f"{norm}, eps {eps}, inputs in [{bounds[0]:g}, {bounds[1]:g}]",
        "attacks": [_settings(attack) for attack in attacks],
        "seed": seed,
        "device": f"{device.type} ({name}), {threads} thread{'s' * (threads != 1)}",
        "advfeat": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": f"{platform.python_version()} on {platform.system()}",
    }


def paper_text(about: dict[str, Any], sentence: str, names: Iterable[str]) -> str:
    """A paragraph for the section on experiments."""
    listed = ", ".join(dict.fromkeys(names))
    return (
        f"{sentence} Robust accuracy was measured with advfeat {about['advfeat']} "
        f"(threat model: {about['threat model']}; attacks in this order, each on the samples that "
        f"the ones before left: {listed}; seed {about['seed']}) in float32 with PyTorch "
        f"{about['torch']} on {about['device']}. A sample counts as robust if the model is right "
        "on it and on every adversarial candidate."
    )


def citations(attacks: Sequence[Attack], others: Sequence[str], checked: bool) -> tuple[str, ...]:
    """Papers of what was run: the evaluation's attacks, and by name those of other stages."""
    names = [kind.__name__ for attack in attacks for kind in type(attack).__mro__]
    found = [PAPERS[name] for name in (*names, *others) if name in PAPERS]
    found += _CHECKS if checked else ()
    own = "Ilyas et al. 2019, Adversarial Examples Are Not Bugs, They Are Features (for advfeat)"
    return tuple(dict.fromkeys([*found, own]))


def _name(model: nn.Module) -> str:
    """Class of the model; of a normalised one, that of the model inside."""
    while isinstance(model, Normalize):
        model = model.model
    return type(model).__name__


def _settings(attack: Attack) -> str:
    shown = ("steps", "queries", "restarts", "targets")
    found = [f"{name} {getattr(attack, name)}" for name in shown if getattr(attack, name, None)]
    return ", ".join([attack_name(attack), *found])
