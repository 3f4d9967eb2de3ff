"""The precision audit: what each layer was asked to run in, and what the built engine runs it in.

A library may fall back to float without a word, and the engine then is no faster than its float twin. So after every build the
layers of the model (layers.json, beside it) are looked up in what the library itself reports of the engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgekd.engines.base import Backend, Executed, WrongMachineError
from edgekd.errors import BuildError

LAYERS = "layers.json"
SUBSTANTIAL = 0.5
"""Where less than this share of the MACs that were asked in int8 runs in it, the engine is not what was asked."""


def audit(layers: Path, backend: Backend, engine: Path, options: Any) -> dict[str, Any]:
    """Compare what was asked with what was got.

    Args:
        layers: layers.json of the model.
        backend: What built the engine.
        engine: Its folder.
        options: Its options.

    Returns:
        layers (path, op, macs, asked, got, kind, time_us), asked_int8 and got_int8 (shares of all layers' MACs, 0..1), other_time
        (share of the time spent outside these layers, or None) and reason; where the engine cannot be inspected, reason alone.

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
        rows.append({**what, "got": got.precision, "kind": got.kind or None, "time_us": got.time_us})
    total = sum(row["macs"] for row in rows)
    times = [operation.time_us for operation in executed if operation.time_us is not None]
    inside = sum(row["time_us"] or 0 for row in rows)
    return {
        "layers": rows,
        "asked_int8": _share(rows, "asked", total),
        "got_int8": _share(rows, "got", total),
        "other_time": max(0.0, 1 - inside / sum(times)) if times and sum(times) > 0 else None,
        "reason": "",
    }


def refusal(result: dict[str, Any]) -> str | None:
    """Why an engine is not what was asked, naming the layers; None where it is, or where nobody can tell."""
    if not result["layers"] or not result["asked_int8"] or result["got_int8"] >= SUBSTANTIAL * result["asked_int8"]:
        return None
    missed = [row for row in result["layers"] if row["asked"] == "int8" and row["got"] != "int8"]
    missed.sort(key=lambda row: -row["macs"])
    names = ", ".join(f"{row['path']} ({row['got']})" for row in missed[:5]) + (", ..." if len(missed) > 5 else "")
    return (
        f"asked for int8, but only {result['got_int8']:.0%} of the multiply-accumulates run in it "
        f"({result['asked_int8']:.0%} were asked); in other precisions: {names}"
    )


def _share(rows: list[dict[str, Any]], column: str, total: int) -> float:
    return sum(row["macs"] for row in rows if row[column] == "int8") / total if total else 0.0
