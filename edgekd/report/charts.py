"""The report's charts as Plotly specifications: plain dicts that the page draws, in colours that it knows by name.

A colour is written ``@name``; the page puts in the value of its present theme, light or dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgekd.report import units, views, widths

Report = dict[str, Any]
COLORS = ("ink", "muted", "grid", "band", "teacher", "alone", "float", "int8", "hybrid", "term1", "term2", "term3", "term4")
"""The names that the page's style sheet defines as ``--chart-NAME``."""
SHOWN_SHARE = 0.995
"""The latency charts' axes reach this far into each distribution; the maximum is in the engine's facts."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
_TERMS = ("@term1", "@term2", "@term3", "@term4")
_STAGES = {"finetune": "@float", "distill": "@float", "prune": "@term3", "quantize": "@int8", "ptq": "@int8"}
_DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Chart:
    """One drawing."""

    title: str
    label: str
    """What a reader who cannot see it is told."""
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height_px: int = 320


def color(role: str, precision: str) -> str:
    """Every chart draws the same model in the same colour."""
    if role == "teacher":
        return "@teacher"
    if role == "student_alone":
        return "@alone"
    return {"int8": "@int8", "hybrid": "@hybrid"}.get(precision, "@float")


def text(value: object) -> str:
    """A name as Plotly shows it, which would otherwise read tags in it."""
    return html.escape(units.plain(value), quote=False)


def _measured(report: Report) -> list[dict[str, Any]]:
    """Engines with latencies, without the null backend: it computes nothing, and its times would squeeze all others."""
    return [engine for engine in report["engines"] if engine["latency_ms"] and engine["backend"] != "null"]


def _grouped(items: list[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    """Items by key, in the order of their first appearance."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _model(engine: dict[str, Any]) -> str:
    """The part of an engine's title after its group."""
    return text(engine["title"].partition(": ")[2])


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": text(title)}, "automargin": True, **more}


def _log(values: list[float], title: str) -> dict[str, Any]:
    """A logarithmic axis with room on both sides. Its ticks are chosen here: on a short one Plotly labels few."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max((high - low) * 0.08, 0.08)
    low, high = low - room, high + room
    steps = (1, 1.5, 2, 3, 4, 5, 7) if high - low < 0.8 else (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    shown = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return _axis(title, type="log", range=[low, high], tickvals=shown, ticktext=[f"{tick:.3g}" for tick in shown])


def accuracy_against_latency(report: Report) -> list[Chart]:
    """Every measured engine with a metric, and the line of those that no other beats in both."""
    engines = [engine for engine in _measured(report) if engine["metric"]]
    if not engines:
        return []
    name = views.metric_name(report)
    scale, unit = units.metric_scale(name)
    symbols = {group: _SYMBOLS[number % len(_SYMBOLS)] for number, group in enumerate(_grouped(engines, lambda e: e["group"]))}
    data = []
    if len(front := pareto(engines)) > 1:
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "not beaten in both",
                "x": [engine["latency_ms"]["p50"] for engine in front],
                "y": [scale * engine["metric"]["value"] for engine in front],
                "line": {"color": "@muted", "width": 1, "dash": "dot"},
                "hoverinfo": "skip",
            }
        )
    for engine in engines:
        shown = color(engine["role"], engine["precision"])
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": text(engine["title"]),
                "x": [engine["latency_ms"]["p50"]],
                "y": [scale * engine["metric"]["value"]],
                "marker": {
                    "color": shown,
                    "size": 12,
                    "symbol": symbols[engine["group"]] + ("-open" if engine["valid"] is False else ""),
                    "line": {"width": 2 if engine["valid"] is False else 0, "color": shown},
                },
                "hovertemplate": f"{text(engine['title'])}<br>%{{x:.3~g}} ms, %{{y:.2f}}{unit}<extra></extra>",
            }
        )
    xs = [engine["latency_ms"]["p50"] for engine in engines]
    layout = {"xaxis": _log(xs, "latency, p50 (ms)"), "yaxis": _axis(f"{name}{f' ({unit.strip()})' if unit else ''}")}
    return [Chart("", f"{name} against latency of {len(engines)} engines", data, layout, 400)]


def widths_curve(report: Report) -> list[Chart]:
    """Accuracy against latency over the widths of the student, a line for every backend and precision."""
    curves = widths.curves(report)
    if not curves:
        return []
    name = views.metric_name(report)
    scale, unit = units.metric_scale(name)
    data = []
    for number, (title, points) in enumerate(curves.items()):
        engines = [engine for _, engine in points]
        shown = color("student", engines[0]["precision"])
        symbol = _SYMBOLS[number % len(_SYMBOLS)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers+text",
                "name": text(title),
                "x": [engine["latency_ms"]["p50"] for engine in engines],
                "y": [scale * engine["metric"]["value"] for engine in engines],
                "text": [f"{width:g}" for width, _ in points],
                "textposition": "top left",
                "textfont": {"color": "@ink"},
                "line": {"color": shown, "width": 2, "dash": _DASHES[number % len(_DASHES)]},
                "marker": {
                    "color": shown,
                    "size": 10,
                    "symbol": [symbol + ("-open" if engine["valid"] is False else "") for engine in engines],
                },
                "hovertemplate": f"{text(title)}, width %{{text}}<br>%{{x:.3~g}} ms, %{{y:.2f}}{unit}<extra></extra>",
            }
        )
    xs = [x for line in data for x in line["x"]]
    layout = {
        "xaxis": _log(xs, "latency, p50 (ms)"),
        "yaxis": _axis(f"{name}{f' ({unit.strip()})' if unit else ''}"),
        "showlegend": True,
    }
    return [Chart("", f"{name} against latency over {len(report['widths'])} widths of the student", data, layout, 400)]


def pareto(engines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The engines that no other one beats in latency and metric, fastest first; invalid measurements do not take part."""
    front: list[dict[str, Any]] = []
    valid = [engine for engine in engines if engine["valid"] is not False]
    for engine in sorted(valid, key=lambda engine: (engine["latency_ms"]["p50"], -engine["metric"]["value"])):
        if not front or engine["metric"]["value"] > front[-1]["metric"]["value"]:
            front.append(engine)
    return front


def latencies(report: Report) -> list[Chart]:
    """Per backend the empirical distribution of each engine's samples."""
    charts = []
    for group, engines in _grouped([engine for engine in _measured(report) if engine["ecdf"]], lambda e: e["group"]).items():
        narrow = [role for role in dict.fromkeys(engine["role"] for engine in engines) if "@" in role]
        data = [
            {
                "type": "scatter",
                "mode": "lines",
                "name": _model(engine),
                "x": engine["ecdf"]["ms"],
                "y": [100 * share for share in engine["ecdf"]["share"]],
                "line": {
                    "shape": "hv",
                    "width": 2,
                    "color": color(engine["role"], engine["precision"]),
                    # of a student's widths each has a dash of its own, the full one none
                    "dash": "dash"
                    if engine["precision"] == "float16"
                    else _DASHES[(1 + narrow.index(engine["role"])) % len(_DASHES) if engine["role"] in narrow else 0],
                },
                "hovertemplate": f"{_model(engine)}<br>%{{y:.0f}} % within %{{x:.3~g}} ms<extra></extra>",
            }
            for engine in engines
        ]
        # one sample in thousands that waited for something else would take most of the axis
        shown = [ms for engine in engines for ms, share in zip(*engine["ecdf"].values(), strict=True) if share <= SHOWN_SHARE]
        shown += [engine["latency_ms"][key] for engine in engines for key in ("min", "p99")]
        layout = {
            "xaxis": _log(shown, "latency (ms)"),
            "yaxis": _axis("share of inferences", range=[0, 101], tickvals=[0, 25, 50, 75, 90, 99], ticksuffix=" %"),
        }
        charts.append(Chart(text(group), f"distribution of latencies on {group}", data, layout))
    return charts


def comparisons(report: Report) -> list[Chart]:
    """Per comparison the speed-ups with their intervals; the band is how far the reference is from itself."""
    charts = []
    for comparison in report["comparisons"]:
        ratios = comparison["ratios"]
        if not ratios:
            continue
        rows = [(_model(report["engines"][ratio["engine"]]), ratio) for ratio in reversed(ratios)]
        ends = [(ratio["speedup"] - ratio["interval"][0], ratio["interval"][1] - ratio["speedup"]) for _, ratio in rows]
        engines = [report["engines"][ratio["engine"]] for _, ratio in rows]
        data = [
            {
                "type": "scatter",
                "mode": "markers",
                "showlegend": False,
                "x": [ratio["speedup"] for _, ratio in rows],
                "y": [name for name, _ in rows],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [high for _, high in ends],
                    "arrayminus": [low for low, _ in ends],
                    "thickness": 1.5,
                    "width": 6,
                    "color": "@muted",
                },
                "marker": {"size": 8, "color": [color(engine["role"], engine["precision"]) for engine in engines]},
                "hovertemplate": "%{y}: %{x:.2f}× as fast<extra></extra>",
            }
        ]
        reference = report["engines"][comparison["reference"]]
        values = [end for _, ratio in rows for end in (*ratio["interval"], 1.0)]
        shapes: list[dict[str, Any]] = []
        if comparison["noise_floor"]:
            low, high = comparison["noise_floor"]["interval"]
            shapes.append(_stripe(low, high, fillcolor="@band", line={"width": 0}))
        shapes.append(_stripe(1, 1, line={"color": "@muted", "width": 1, "dash": "dot"}))
        title = f"times as fast as {_plain_model(reference)}"
        layout = {
            "xaxis": _log(values, title),
            "yaxis": _axis("", type="category", range=[-0.6, len(rows) - 0.4]),
            "shapes": shapes,
        }
        label = f"speed-ups over {reference['title']}"
        charts.append(Chart(text(reference["group"]), label, data, layout, 96 + 36 * len(rows)))
    return charts


def _plain_model(engine: dict[str, Any]) -> str:
    return str(engine["title"].partition(": ")[2])


def _stripe(low: float, high: float, **style: Any) -> dict[str, Any]:
    return {"type": "rect", "xref": "x", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1, "layer": "below", **style}


def _epochs(last: int) -> dict[str, Any]:
    room = max(0.02 * last, 0.1)
    return _axis("epoch", range=[1 - room, last + room], tickformat="d", **({"dtick": 1} if last < 8 else {}))


def validation(report: Report) -> list[Chart]:
    """The validation metric of every training; the student's stages stand one after the other, as they were run."""
    if not report["training"]:
        return []
    name = report["training"][0]["metric"]
    scale, unit = units.metric_scale(name)
    data: list[dict[str, Any]] = []
    done = 0
    for stage in report["training"]:
        first = done if stage["role"] == "student" else 0
        shown = [epoch for epoch in stage["epochs"] if epoch.get("val") is not None]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(shown) < 40 else "lines",
                "name": text(stage["title"]),
                "x": [first + epoch["epoch"] for epoch in shown],
                "y": [scale * epoch["val"] for epoch in shown],
                "line": {"width": 2, "color": _STAGES.get(stage["stage"], color(stage["role"], "float32"))},
                "marker": {"size": 5},
                "hovertemplate": f"{text(stage['title'])}, epoch %{{x}}: %{{y:.2f}}{unit}<extra></extra>",
            }
        )
        done += len(stage["epochs"]) if stage["role"] == "student" else 0
    layout = {
        "xaxis": _epochs(max((stop for line in data for stop in line["x"]), default=1)),
        "yaxis": _axis(f"validation {name}" + (f" ({unit.strip()})" if unit else "")),
        "showlegend": True,
    }
    return [Chart("", f"validation {name} per epoch of {len(data)} trainings", data, layout, 380)]


def terms(report: Report) -> list[Chart]:
    """Per training the terms of its loss, as they are summed."""
    charts = []
    for stage in report["training"]:
        names = list(dict.fromkeys(name for epoch in stage["epochs"] for name in epoch.get("terms") or {}))
        if not names:
            continue
        data = [
            {
                "type": "scatter",
                "mode": "lines" if len(stage["epochs"]) > 1 else "markers",
                "name": text(name),
                "x": [epoch["epoch"] for epoch in stage["epochs"]],
                "y": [(epoch.get("terms") or {}).get(name) for epoch in stage["epochs"]],
                "line": {
                    "width": 2,
                    "color": _TERMS[number % len(_TERMS)],
                    "dash": _DASHES[number // len(_TERMS) % len(_DASHES)],
                },
                "hovertemplate": f"{text(name)}, epoch %{{x}}: %{{y:.4~g}}<extra></extra>",
            }
            for number, name in enumerate(names)
        ]
        layout = {"xaxis": _epochs(len(stage["epochs"])), "yaxis": _axis("weighted loss", rangemode="tozero"), "showlegend": True}
        charts.append(Chart(text(stage["title"]), f"loss terms of {stage['title']}", data, layout, 260))
    return charts


def layers(report: Report) -> list[Chart]:
    """Channels before and after pruning; bits per layer where layers differ; sparsity where there is some."""
    rows = report["layers"]
    if not rows:
        return []
    paths = [text(row["path"]) for row in rows]
    charts = []
    if any(row["channels_before"] != row["channels"] for row in rows):
        data = [
            _bars(paths, [row["channels_before"] for row in rows], "before pruning", "@band"),
            _bars(paths, [row["channels"] for row in rows], "kept", "@float"),
        ]
        # the kept channels stand in front of those before
        charts.append(_layer_chart("Output channels", "output channels per layer before and after pruning", data, "channels"))
    if len({(row.get("weight_bits"), row.get("activation_bits")) for row in rows}) > 1:
        data = [
            _bars(paths, [row.get("weight_bits") for row in rows], "weights", "@int8"),
            _bars(paths, [row.get("activation_bits") for row in rows], "activations", "@band"),
        ]
        charts.append(_layer_chart("Bits", "bits of weights and activations per layer", data, "bits", barmode="group"))
    if any(row.get("sparsity") for row in rows):
        data = [_bars(paths, [100 * row.get("sparsity", 0) for row in rows], "zero weights", "@int8")]
        charts.append(_layer_chart("Zero weights", "share of zero weights per layer", data, "zero weights (%)", showlegend=False))
    return charts


def _bars(x: list[str], y: list[Any], name: str, shown: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "x": x,
        "y": y,
        "name": name,
        "marker": {"color": shown},
        "hovertemplate": f"%{{x}}: %{{y:.4~g}} {name}<extra></extra>",
    }


def _layer_chart(title: str, label: str, data: list[dict[str, Any]], axis: str, **layout: Any) -> Chart:
    axes = {"xaxis": _axis("", type="category", tickangle=-60), "yaxis": _axis(axis, rangemode="tozero")}
    return Chart(title, label, data, {"barmode": "overlay", "bargap": 0.25, **axes, **layout}, 340)
