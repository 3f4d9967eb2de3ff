"""report.md: the report as Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from edgekd.report import bits, facts, units, views, widths
from edgekd.report.views import Table


def render(report: dict[str, Any]) -> str:
    """The whole report."""
    return "\n".join(_blocks(report)) + "\n"


def _blocks(report: dict[str, Any]) -> Iterator[str]:
    yield f"# {escape(report['name'] or 'run')}\n"
    if state := views.state_line(report):
        yield f"**{escape(state)}**\n"
    yield f"{escape(views.headline(report))}\n"
    yield table(views.answer(report))
    if note := views.latency_note(report):
        yield f"{escape(note)}\n"
    if line := views.budget_line(report):
        yield f"**{escape(line)}**\n"
        yield table(views.budget(report))
    yield from _list("Warnings", report["warnings"])
    yield from _section("Widths of the student", widths.view(report))
    yield from _section("Models", views.models(report))
    yield from _section("Engines", views.engines(report))
    yield from (f"- {escape(note)}" for note in views.notes(report))
    yield from _section("Metrics in detail", views.details(report))
    for engine in report["engines"]:
        if engine["precision"] == "int8":
            yield from _section(f"Precision audit of {escape(engine['title'])}", views.audit(engine))
    yield from _section("Speed-ups, measured interleaved", views.comparisons(report))
    yield from _section("Skipped, failed and not read", views.skipped(report))
    yield from _section("Training", views.training(report))
    yield from _section("What the methods say after the last epoch", views.statistics(report))
    for ladder in report["ladders"]:
        yield from _section("Precision ladder", views.ladder(ladder))
        yield f"{escape(views.ladder_line(ladder))}\n"
        if ranking := views.ladder_ranking(ladder):
            yield table(ranking)
    if report["bits"]:
        yield from _section("Hybrid bits", bits.costs(report["bits"]))
        yield f"{escape(bits.STATEMENT)}\n"
        if (steps := bits.latency_steps(report["bits"])) is not None:
            yield f"What stays in float within {report['bits']['latency']['limit_ms']:g} ms:\n"
            yield table(steps)
        yield table(bits.layers(report["bits"]))
    yield from _section("Layers of the compressed student", views.layers(report))
    yield from _section("Parity", views.parity(report))
    yield from _section("Machine", facts.environment(report))
    yield from _section("Data", facts.data(report))
    yield from _section("How to reproduce", facts.reproduce(report))
    if report["reproduce"]["command"]:
        yield fenced(units.plain(report["reproduce"]["command"]), "sh")
    if report["recipe"]["text"]:
        yield "\n## Recipe\n"
        yield fenced(report["recipe"]["text"], "yaml")


def _section(title: str, content: Table) -> Iterator[str]:
    if content:
        yield f"\n## {title}\n"
        yield table(content)


def _list(title: str, entries: list[str]) -> Iterator[str]:
    if entries:
        yield f"\n## {title}\n"
        yield from (f"- {escape(entry)}" for entry in entries)


def table(content: Table) -> str:
    """A Markdown table."""
    marks = ["--:" if index in content.numeric else "---" for index in range(len(content.columns))]
    rows = [[escape(cell) for cell in row] for row in (content.columns, *content.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], marks, *rows[1:])) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no tags, no links, no emphasis, no new cells."""
    escaped = units.plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", escaped)


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
