"""A student that runs at several widths: what each costs, what it gives, and the curve of accuracy against latency over them."""

from __future__ import annotations

from typing import Any

from edgekd.report import answer, units
from edgekd.report.views import Table, metric_name, table

Report = dict[str, Any]


def of_role(role: str) -> float | None:
    """The width of a student's model, 1 for the full one; None for other models."""
    who, _, width = role.partition("@")
    return (float(width) if width else 1.0) if who == "student" else None


def build(models: list[dict[str, Any]], engines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What report.json holds of widths, the widest first; nothing where the student has one.

    Args:
        models: As the report has them.
        engines: The same; ``engines`` of a width are their indices.
    """
    last = {model["role"]: model for model in models if of_role(model["role"]) is not None}
    if not any("@" in role for role in last):
        return []
    found = [
        {
            "width": of_role(role),
            "role": role,
            **{key: model[key] for key in ("params", "macs", "metric", "folder")},
            "engines": [index for index, engine in enumerate(engines) if engine["role"] == role],
        }
        for role, model in last.items()
    ]
    return sorted(found, key=lambda entry: -entry["width"])


def curves(report: Report) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """Backend and precision -> the measured engines of the widths, narrowest first, where there are two at least."""
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for entry in reversed(report["widths"]):
        for index in entry["engines"]:
            engine = report["engines"][index]
            if engine["latency_ms"] and engine["metric"] and engine["backend"] != "null":
                found.setdefault(f"{engine['group']} {engine['precision']}", []).append((entry["width"], engine))
    return {name: points for name, points in found.items() if len(points) > 1}


def view(report: Report) -> Table:
    """One row per engine of a width, and one for a width that has none."""
    rows: list[tuple[str, ...]] = []
    for entry in report["widths"]:
        about = (f"{entry['width']:g}", units.count(entry["params"]), units.count(entry["macs"]))
        for index in entry["engines"]:
            engine = report["engines"][index]
            rows.append(
                (
                    *about,
                    f"{engine['group']} {engine['precision']}",
                    units.metric(engine["metric"] or entry["metric"]),
                    units.ms((engine["latency_ms"] or {}).get("p50")),
                    _speedup(report, index),
                    units.size(engine["size_bytes"]),
                )
            )
        if not entry["engines"]:
            rows.append((*about, "PyTorch", units.metric(entry["metric"]), *[units.NONE] * 3))
    return table(f"width|params >|MACs >|engine|{metric_name(report)} >|p50 >|times as fast as the widest >|size >", rows)


def _speedup(report: Report, index: int) -> str:
    """Against the widest engine of the same backend and precision, where both were measured interleaved."""
    engine = report["engines"][index]
    alike = [
        other
        for entry in report["widths"]
        for other in entry["engines"]
        if all(report["engines"][other][key] == engine[key] for key in ("group", "precision"))
    ]
    found = answer.speedup(report["comparisons"], alike[0], index) if alike[0] != index else None
    return units.NONE if found is None else f"{units.ratio(found['ratio'])} {units.interval(found['interval'])}"
