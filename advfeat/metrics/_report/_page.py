"""The sections of a report as HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape

from advfeat import pages
from advfeat.metrics._diagnose import Finding
from advfeat.metrics._outcome import accuracy_row
from advfeat.metrics._report import _drawing
from advfeat.metrics._report._examples import Example
from advfeat.metrics._report._fields import ReportFields
from advfeat.metrics._report._verdict import Verdict, finding_text

SYMBOLS = {"green": "\N{HEAVY CHECK MARK}", "yellow": "!", "red": "\N{HEAVY BALLOT X}"}
_CLASSES = {"green": "good", "yellow": "warn", "red": "bad"}
STYLE = """
.lights { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.light { flex: 1 1 15rem; border: 2px solid; border-radius: .5rem; padding: .7rem 1rem; }
.light b { display: block; font-size: 1.3rem; } .light span { color: var(--grey); }
.good { color: var(--good); border-color: var(--good); }
.warn { color: var(--warn); border-color: var(--warn); }
.bad { color: var(--bad); border-color: var(--bad); }
.reasons { list-style: none; padding: 0; } .reasons li { padding: .25rem 0 .25rem 1.8rem; }
.reasons li > b:first-child { display: inline-block; width: 1.8rem; margin-left: -1.8rem; }
.bar { height: .9rem; background: var(--curve); min-width: 1px; }
.fates td { padding-top: .15rem; padding-bottom: .15rem; border: 0; }
.fates td.measure { width: 45%; min-width: 7rem; padding-right: 0; }
.samples { display: flex; flex-wrap: wrap; gap: 1.2rem 1.4rem; margin: .8rem 0; }
.samples figure { margin: 0; } .samples figcaption { font-size: .85rem; max-width: 312px; }
.samples img { width: 100px; image-rendering: pixelated; background: none; margin-right: 4px; }
@media (max-width: 32rem) { th, td { padding: .3rem .2rem; font-size: .82rem; }
  th { white-space: normal; } th:first-child, td:first-child { min-width: 5rem; } }
"""


def sections(report: ReportFields) -> Iterator[str]:
    """All sections, in order."""
    yield from _verdict(report.verdict)
    yield pages.heading("Accuracy")
    rows = [accuracy_row("without an attack", report.clean)]
    rows.append(accuracy_row("under attack", report.robust))
    yield pages.rows(["", "%", "samples", "95% interval"], [list(map(str, row)) for row in rows])
    yield pages.heading("What broke the samples")
    yield _fates(report.robust.broken_counts, report.robust.total)
    if report.curve is not None:
        yield pages.heading("Robust accuracy at every radius")
        yield _drawing.curve_svg(report.curve, report.radius, chance=report.chance)
        yield pages.note(
            f"Percent of {len(report.curve.distance)} samples whose nearest adversarial example is "
            f"farther away; median distance {report.curve.median:.4g}."
        )
    if report.diagnosis is not None:
        yield pages.heading("Signs of masked gradients")
        yield _findings(list(report.diagnosis.findings.values()))
    yield from _classes(report)
    yield from _samples(report)
    if report.transfer is not None:
        yield pages.heading("Transfer")
        yield report.transfer._repr_html_()
        yield pages.note(
            "Percent of the samples that both models classify correctly, and that the second one "
            "gets wrong when they are attacked on the first."
        )
    yield from _paper(report)


def _verdict(verdict: Verdict) -> Iterator[str]:
    boxes = "".join(
        f'<div class="light {_CLASSES[light]}"><span>{title}</span>'
        f"<b>{SYMBOLS[light]} {escape(verdict.word(which))}</b>"
        f"<span>{light} light</span></div>"
        for which, title, light in (
            ("robustness", "Robustness", verdict.robustness),
            ("reliability", "Reliability of the number", verdict.reliability),
        )
    )
    yield f'<div class="lights">{boxes}</div>'
    yield pages.paragraph(verdict.summary)
    items = "".join(
        f'<li><b class="{_CLASSES[light]}" title="{light}">{SYMBOLS[light]}</b>{escape(text)}</li>'
        for light, text in verdict.reasons
    )
    yield f'<ul class="reasons">{items}</ul>'


def _fates(counts: Mapping[str, int], total: int) -> str:
    lines = "".join(
        f'<tr><td>{escape(name)}</td><td>{count}</td><td class="measure">'
        f'<div class="bar" style="width:{100 * count / max(1, total):.1f}%"></div></td></tr>'
        for name, count in counts.items()
    )
    return f'<div class="wide"><table class="fates" style="width:100%">{lines}</table></div>'


def _findings(found: list[Finding]) -> str:
    items = []
    for each in found:
        light = "yellow" if each.suspicious else "green"
        items.append(
            f'<li><b class="{_CLASSES[light]}">{SYMBOLS[light]}</b>{each.mark}: '
            f"<b>{escape(each.name)}</b>: {escape(finding_text(each))}</li>"
        )
    return f'<ul class="reasons">{"".join(items)}</ul>'


def _classes(report: ReportFields) -> Iterator[str]:
    if len(report.classes) < 2:
        return
    shown = report.shown_classes()
    yield pages.heading("Accuracy of each class")
    head = ["class", "samples", "clean (%)", "attacked (%)", "95% interval"]
    yield pages.rows(head, [each.row() for each in shown])
    if len(shown) < len(report.classes):
        yield pages.note(
            f"The {len(shown)} of {len(report.classes)} classes with the lowest and the highest "
            "robust accuracy."
        )


def _samples(report: ReportFields) -> Iterator[str]:
    for kind, title in (("fragile", "Most fragile samples"), ("robust", "Most robust samples")):
        chosen = [each for each in report.examples if each.kind == kind]
        if not chosen:
            continue
        yield pages.heading(title)
        if all(each.clean is not None and pages.is_image(each.clean) for each in chosen):
            figures = "".join(_figure(report, each) for each in chosen)
            yield f'<div class="samples">{figures}</div>'
            yield pages.note(
                "The sample, the attacked sample, and the perturbation magnified as its caption "
                "says; grey is no change."
            )
        else:
            head = ["sample", "label", "predicted", "distance", "broken by"]
            yield pages.rows(head, [_line(report, each) for each in chosen])


def _figure(report: ReportFields, example: Example) -> str:
    assert example.clean is not None
    assert example.adversarial is not None
    delta, factor = _drawing.difference_uri(example.clean, example.adversarial, report.bounds)
    images = (
        (pages.image_uri(example.clean, report.bounds), "sample"),
        (pages.image_uri(example.adversarial, report.bounds), "attacked sample"),
        (delta, f"perturbation, magnified {_factor(factor)} times"),
    )
    shown = "".join(f'<img alt="{text}" src="{source}">' for source, text in images)
    number, label, predicted, distance, broken = _line(report, example)
    text = f"#{number}: {label}, attacked: {predicted}"
    text += f"; distance {distance}" if distance else ""
    text += f"; {broken}" if broken else ""
    text += f"; perturbation x\N{NO-BREAK SPACE}{_factor(factor)}"
    return f"<figure>{shown}<figcaption>{escape(text)}</figcaption></figure>"


def _factor(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _line(report: ReportFields, example: Example) -> list[str]:
    distance = "" if example.distance is None else f"{example.distance:.4g}"
    label, predicted = report.class_name(example.label), report.class_name(example.predicted)
    return [str(example.index), label, predicted, distance, example.broken_by or ""]


def _paper(report: ReportFields) -> Iterator[str]:
    yield pages.heading("For a paper")
    yield pages.paragraph(report.paper)
    yield pages.paragraph(
        "For a number that compares with other papers, run the published ensemble: "
        "attack=AutoAttack(eps=..., norm=..., version='standard')."
    )
    yield "<p>Cite:</p>"
    yield f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in report.citations)}</ul>"
    yield pages.heading("Time and settings")
    if report.left_out:
        yield "<p>Left out, for want of time or of samples:</p>"
        yield f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in report.left_out)}</ul>"
    else:
        yield pages.paragraph("Nothing was left out.")
    times = [[name, f"{seconds:.1f}"] for name, seconds in report.seconds.items()]
    yield pages.rows(["stage", "seconds"], times)
    lines = [f"{name}: {value}" for name, value in report.provenance.items() if name != "attacks"]
    attacks = [f"  {text}" for text in report.provenance["attacks"]]
    body = pages.preformatted("\n".join([*lines, "attacks:", *attacks]))
    yield pages.folded("All settings", body)
