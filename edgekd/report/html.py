"""report.html: one file that needs nothing else. It draws with the plotly.js that it carries and asks no network for anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgekd.report import bits, charts, facts, units, views, widths

TEMPLATE = "report.html.j2"


def render(report: dict[str, Any]) -> str:
    """The whole page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = lambda value: Markup(script_json(value))
    return environment.get_template(TEMPLATE).render(
        report=report,
        views=views,
        bits=bits,
        widths=widths,
        facts_of=facts,
        cards=cards(report),
        colors=charts.COLORS,
        charts={
            "widths": charts.widths_curve(report),
            "accuracy": charts.accuracy_against_latency(report),
            "latency": charts.latencies(report),
            "comparisons": charts.comparisons(report),
            "validation": charts.validation(report),
            "terms": charts.terms(report),
            "layers": charts.layers(report),
        },
        plotlyjs=Markup(get_plotlyjs()),
    )


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character sequence in it ends the element or opens a comment."""
    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def cards(report: dict[str, Any]) -> list[dict[str, str]]:
    """The answer as cards: name, big value, and what it was before."""
    rows = {row[0]: row for row in views.answer(report).rows}
    answer = report["answer"]
    metric, latency = answer["metric"], answer["latency_ms"]
    name = metric["name"] or "metric"
    title = name.capitalize() if name.islower() else name  # mIoU and mAP50 as they are
    found = [
        _card(title, rows[name], f"{rows[name][3]}" if metric["difference"] is not None else ""),
        _card("Latency", rows["latency, p50"], f"{units.ratio(latency['ratio'])} as fast" if latency["ratio"] else ""),
        _card("Size", rows["engine size"], rows["engine size"][3]),
        _card("Peak memory", rows["peak memory"], rows["peak memory"][3]),
        _card("Energy", rows["energy per inference"], rows["energy per inference"][3]),
    ]
    if latency["interval"] is not None:
        found[1]["change"] += f" {units.interval(latency['interval'])}"
    return found


def _card(title: str, row: tuple[str, ...], change: str) -> dict[str, str]:
    _, before, after, _ = row
    was = f"was {before}" if before != units.NONE else ""
    return {"title": title, "value": after, "change": "" if change == units.NONE else change, "note": was}
