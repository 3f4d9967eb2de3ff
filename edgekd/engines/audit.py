"""The precision audit: what each layer was asked to run in, and what the built engine runs it in.

A library may fall back to float without a word, and the engine then is no faster than its float twin. So after every build the
layers of the model (layers.json, beside it) are looked up in what the library itself reports of the engine. Layers asked in
float32 are not held to it: what they run in is the choice of the backend's options.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgekd.engines.base import Backend, Executed, WrongMachineError
from edgekd.errors import BuildError

LAYERS = "layers.json"
SUBSTANTIAL = 0.5
"""The share, of the MACs and of the time, that must run as asked; below it the engine is not what was asked."""


def audit(layers: Path, backend: Backend, engine: Path, options: Any) -> dict[str, Any]:
    """Compare what was asked with what was got.

    Args:
        layers: layers.json of the model.
        backend: What built the engine.
        engine: Its folder.
        options: Its options.

    Returns:
        layers (path, op, macs, asked, got, kind, time_us, and elsewhere where it runs elsewhere than asked), other_time (share
        of the time spent outside these layers, or None) and reason; where the engine cannot be inspected, reason alone.

    Raises:
        BuildError: layers.json or the engine cannot be read.
    """
    try:
        rows = json.loads(layers.read_text())
        asked = {row["node"]: row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{layers} cannot be read: {error!r}", hint="export the model again") from error
    try:
        executed = backend.executed(engine, options)
    except WrongMachineError as error:
        return {"layers": [], "reason": error.message}
    return compare(asked, executed)


def compare(asked: dict[str, dict[str, Any]], executed: list[Executed]) -> dict[str, Any]:
    """The audit from both tables; see :func:`audit`."""
    names = {name: node for node, row in asked.items() for name in (*row["outputs"], node)}
    found: dict[str, Executed] = {}
    for operation in executed:
        for name in operation.nodes:
            node = names.get(name)
            # a node can leave several operations, for instance a conversion of its input: the longest one is the layer itself
            if node is not None and (node not in found or (operation.time_us or 0) > (found[node].time_us or 0)):
                found[node] = operation
    rows: list[dict[str, Any]] = []
    for node, row in asked.items():
        got = found.get(node, Executed((), "", "unknown"))
        what = {key: row[key] for key in ("path", "op", "macs", "asked")}
        where = {"elsewhere": got.elsewhere} if got.elsewhere else {}
        rows.append({**what, "got": got.precision, "kind": got.kind or None, "time_us": got.time_us, **where})
    times = [operation.time_us for operation in executed if operation.time_us is not None]
    inside = sum(row["time_us"] or 0 for row in rows)
    return {
        "layers": rows,
        "other_time": max(0.0, 1 - inside / sum(times)) if times and sum(times) > 0 else None,
        "reason": "",
    }


def refusal(result: dict[str, Any]) -> str | None:
    """Why an engine is not what was asked, naming the layers; None where it is, or where nobody can tell."""
    lowered = [row for row in result["layers"] if row["asked"] != "float32"]
    missed = [row for row in lowered if not _as_asked(row)]
    away = [row for row in result["layers"] if row.get("elsewhere")]
    names = " and ".join(sorted({row["asked"] for row in missed}))
    places = " and ".join(sorted({row["elsewhere"] for row in away}))
    for column, what in (("macs", "multiply-accumulates"), ("time_us", "time")):
        if (share := _share(missed, lowered, column)) > SUBSTANTIAL:
            others = _list(missed, column)
            return f"asked for {names}, but only {1 - share:.0%} of the {what} of the layers asked so is in it; others: {others}"
        if (share := _share(away, result["layers"], column)) > SUBSTANTIAL:
            return f"{share:.0%} of the {what} is not where it was asked, but on the {places}: {_list(away, column)}"
    return None


def summary(result: dict[str, Any]) -> str | None:
    """How much runs as asked, in one line; None where nobody can tell, or where only float32 was asked."""
    lines = []
    for precision in sorted({row["asked"] for row in result["layers"]} - {"float32"}):
        asked = [row for row in result["layers"] if row["asked"] == precision]
        missed = [row for row in asked if not _as_asked(row)]
        lines.append(f"{precision}: {1 - _share(missed, asked, 'macs'):.0%} of the multiply-accumulates asked in it run in it")
    return "; ".join(lines) or None


def _as_asked(row: dict[str, Any]) -> bool:
    return bool(row["got"] == row["asked"]) and not row.get("elsewhere")


def _share(part: list[dict[str, Any]], rows: list[dict[str, Any]], column: str) -> float:
    total = sum(row[column] or 0 for row in rows)
    return sum(row[column] or 0 for row in part) / total if total else 0.0


def _list(rows: list[dict[str, Any]], column: str) -> str:
    """The layers that weigh most, and what they run in."""
    heaviest = sorted(rows, key=lambda row: -(row[column] or 0))[:5]
    shown = [f"{row['path']} ({row['got']}{' on the ' + row['elsewhere'] if row.get('elsewhere') else ''})" for row in heaviest]
    return ", ".join(shown) + (", ..." if len(rows) > 5 else "")
