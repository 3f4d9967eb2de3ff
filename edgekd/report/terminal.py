"""What the terminal shows of a report: aligned text of at most ``WIDTH`` columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from edgekd.report import bits, units, views, widths
from edgekd.report.views import Table

WIDTH = 110
_LEAST = 8
"""A column is never cut below this many characters."""


def lines(report: dict[str, Any]) -> list[str]:
    """The report in short."""
    return list(_lines(report))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    if state := views.state_line(report):
        yield from _wrapped(state)
        yield ""
    yield from _wrapped(views.headline(report))
    yield ""
    yield from table(views.answer(report))
    yield from _section("models", views.models(report).without("bits (weights/activations)"))
    yield from _section("engines", views.engines(report).without("p90 ms", "mean ms", "first ms"))
    yield from _section("widths of the student", widths.view(report))
    yield from _section("speed-ups, measured interleaved", views.comparisons(report).without("noise floor", "rounds"))
    for ladder in report["ladders"]:
        yield from _section("precision ladder", views.ladder(ladder))
        yield from _wrapped(views.ladder_line(ladder), "  ", "  ")
    if report["bits"]:
        yield from _section("hybrid bits", bits.costs(report["bits"]))
        yield from _wrapped(bits.STATEMENT, "  ", "  ")
    if line := views.budget_line(report):
        yield ""
        yield line
        yield from table(views.budget(report))
    yield from _entries("warnings", report["warnings"])
    yield from _entries(
        "skipped, failed and not read", [f"{what} ({status}): {why}" for what, status, why in views.skipped(report).rows]
    )


def _section(title: str, content: Table) -> Iterator[str]:
    if content:
        yield ""
        yield title
        yield from table(content)


def _entries(title: str, entries: list[str]) -> Iterator[str]:
    if entries:
        yield ""
        yield title
        for entry in entries:
            yield from _wrapped(entry, "  - ", "    ")


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(units.plain(text), WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def table(content: Table) -> Iterator[str]:
    """A table in columns; where it is too wide, the widest columns of text are cut."""
    if not content:
        return
    rows = [content.columns, *content.rows]
    widths = [max(len(row[index]) for row in rows) for index in range(len(content.columns))]
    text = [index for index in range(len(widths)) if index not in content.numeric]
    while _total(widths) > WIDTH and text and max(widths[index] for index in text) > _LEAST:
        widest = max(text, key=lambda index: widths[index])
        widths[widest] -= 1
    for row in rows:
        cells = [
            _cut(cell, width).rjust(width) if index in content.numeric else _cut(cell, width).ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def _total(widths: list[int]) -> int:
    return sum(widths) + 2 * len(widths)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
