"""The report of a run: report.json, report.md and report.html, made from the run's files and nothing else.

tables.py makes the data, views.py arranges it as tables of text, and the printers (markdown.py, html.py, terminal.py) only print.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgekd.artifacts import write_json
from edgekd.errors import ArtifactError
from edgekd.report import html, markdown, tables, terminal

__all__ = ["write", "lines"]


def write(run: Path, out: Path | None = None) -> dict[str, Any]:
    """Write the report of a run, finished or not.

    Args:
        run: A run directory.
        out: Where report.json, report.md and report.html go; RUN/report where None.

    Returns:
        What report.json holds.

    Raises:
        ArtifactError: ``run`` is no run directory, or the report cannot be written.
    """
    report = tables.build(run)
    folder = run / "report" if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "report.json", report)
        _write(folder / "report.md", markdown.render(report))
        _write(folder / "report.html", html.render(report))
    except OSError as error:
        raise ArtifactError(
            f"the report cannot be written to {folder}: {error}", hint="give another folder with --out"
        ) from error
    return report


def lines(report: dict[str, Any]) -> list[str]:
    """What the terminal shows at the end of a run: the answer first."""
    return terminal.lines(report)


def _write(path: Path, text: str) -> None:
    """Write a text so that a reader sees the old one or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    # "replace": a reason that a library gave may hold a lone surrogate, which has no UTF-8
    with partial.open("w", encoding="utf-8", errors="replace") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
