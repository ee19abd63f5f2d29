"""Pictures without a plotting library: images as PNG, the curve as SVG."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advfeat import pages
from advfeat.metrics._curve import RobustnessCurve
from advfeat.threat import Bounds

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 520, 270, 46, 46
_WIDEST = 680  # pixels; on a narrow screen the letters are still legible


def difference_uri(clean: Tensor, adversarial: Tensor, bounds: Bounds) -> tuple[str, float]:
    """The perturbation magnified to the whole range, grey where it is zero, and the factor."""
    low, high = bounds
    delta = (adversarial - clean).detach().float().cpu()
    peak = float(delta.abs().max())
    factor = max(1.0, (high - low) / (2 * peak)) if peak else 1.0
    return pages.image_uri((low + high) / 2 + factor * delta, bounds), factor


def curve_svg(curve: RobustnessCurve, radius: float, *, chance: float) -> str:
    """Robust accuracy over the radius, with the radius of the report as a line."""
    ordered = curve.distance.double().nan_to_num(nan=-1.0).sort().values
    finite = ordered[ordered.isfinite()]
    largest = float(finite[-1]) if len(finite) else 0.0
    # Far beyond the radius nothing is of interest.
    end = min(max(1.05 * largest, 1.2 * radius), 4 * radius)
    edges = torch.linspace(0, end, 241, dtype=torch.float64)
    above = len(ordered) - torch.searchsorted(ordered, edges, right=True)
    percentages = (100 * above.double() / max(1, len(ordered))).tolist()

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 12) * value / end

    def y(percent: float) -> float:
        return 12 + (_HEIGHT - _BOTTOM - 12) * (1 - percent / 100)

    points = " ".join(
        f"{x(e):.1f},{y(s):.1f}" for e, s in zip(edges.tolist(), percentages, strict=True)
    )
    parts = [_text(_LEFT - 8, y(p) + 5, f"{p:d}%", "end") for p in (0, 25, 50, 75, 100)]
    parts += [_line(_LEFT, y(p), _WIDTH - 12, y(p), "var(--line)") for p in (0, 25, 50, 75, 100)]
    for value in _ticks(end):
        anchor = "end" if value > 0.97 * end else "middle"  # no letter is outside the picture
        parts.append(_text(x(value), _HEIGHT - _BOTTOM + 20, f"{value:.3g}", anchor))
    unit = "" if curve.scale is None else ", in multiples of eps"
    title = f"{curve.norm} size of the perturbation{unit}"
    parts.append(_text(_WIDTH / 2, _HEIGHT - 6, title, "middle"))
    parts.append(_line(_LEFT, y(100 * chance), _WIDTH - 12, y(100 * chance), "var(--grey)", "2 4"))
    # Where the curve is not: below its high end, or above its low one.
    is_high = percentages[len(percentages) // 3] > 100 * chance + 15
    place, anchor = (_LEFT + 4, "start") if is_high else (_WIDTH - 14, "end")
    parts.append(_text(place, y(100 * chance) - 5, "commonest class", anchor))
    parts.append(_line(x(radius), y(0), x(radius), y(100), "var(--bad)", "6 4"))
    parts.append(_text(x(radius) + 5, y(94), "eps", "start"))
    parts.append(
        f'<polyline points="{points}" fill="none" stroke="var(--curve)" stroke-width="2.5"/>'
    )
    return (
        f'<div class="wide"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" style="width:100%;'
        f'max-width:{_WIDEST}px" aria-label="percent of samples that are still '
        f'robust, over the size of the perturbation"><title>Robust accuracy (%)</title>'
        f"{''.join(parts)}</svg></div>"
    )


def _ticks(end: float) -> list[float]:
    """Round numbers from 0 to ``end``, four to six of them or so."""
    power = 10.0 ** math.floor(math.log10(end / 3))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= end / 3)
    return [place * step for place in range(int(end / step * (1 + 1e-9)) + 1)]


def _line(x0: float, y0: float, x1: float, y1: float, color: str, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{color}"{dashes}/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="14" '
        f'fill="currentColor">{text}</text>'
    )
