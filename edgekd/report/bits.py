"""Hybrid bits: for each layer the bits that were trained, that are stored, and that engines execute; and what each saves."""

from __future__ import annotations

from typing import Any

from edgekd.report import units
from edgekd.report.files import Files
from edgekd.report.views import Table, table

FLOAT_BITS = 32
STATEMENT = (
    "Bits 2 to 7 reduce the stored size (if packed) and the bit operations. On ONNX Runtime, OpenVINO, TensorRT and TensorRT-RTX "
    "convolutions execute as int8 at best: convolutions below 8 bits give no extra speed on these runtimes."
)


def build(models: list[dict[str, Any]], engines: list[dict[str, Any]], files: Files) -> dict[str, Any] | None:
    """What report.json holds of hybrid bits; None where the run has none.

    Args:
        models: The run's, as run.json names them.
        engines: As the report has them.
        files: Of the run.
    """
    found = [files.artifact(model.get("folder")) for model in models if model.get("role") == "student"]
    artifact = next((one for one in reversed(found) if one is not None and one.metrics.get("hybrid")), None)
    if artifact is None:
        return None
    integer = [engine for engine in engines if engine["role"] == "student" and engine["precision"] == "int8" and engine["audit"]]
    executed = {engine["title"]: {row["path"]: row["got"] for row in engine["audit"].get("layers") or []} for engine in integer}
    return {
        "account": artifact.metrics["hybrid"],
        "layers": [
            {
                "path": row["path"],
                "trained": row["weight_bits"],
                "reads": row["activation_bits"],
                "stored": 8 if row["weight_bits"] < FLOAT_BITS else FLOAT_BITS,
                "executed": {title: rows.get(row["path"]) for title, rows in executed.items()},
            }
            for row in artifact.metrics.get("layers") or []
        ],
        "engines": [
            {"title": engine["title"], "size_bytes": engine["size_bytes"], "latency_ms": (engine["latency_ms"] or {}).get("p50")}
            for engine in integer
        ],
        "latency": artifact.metrics.get("latency"),
        "folder": artifact.folder.name,
    }


def layers(found: dict[str, Any]) -> Table:
    """One row per layer: bits of the weights as trained, of what it reads, as stored in an int8 file, and what engines run."""
    titles = list(found["layers"][0]["executed"]) if found["layers"] else []
    rows = [
        (
            row["path"],
            row["trained"],
            row["reads"],
            row["stored"],
            *(row["executed"].get(title) or units.NONE for title in titles),
        )
        for row in found["layers"]
    ]
    heads = "|".join(f"executed: {title}".replace("|", "/") for title in titles)
    columns = "layer|weight bits trained >|activation bits read >|weight bits stored >"
    return table(columns + (f"|{heads}" if heads else ""), rows)


def latency_steps(found: dict[str, Any]) -> Table | None:
    """The engines that a latency budget was searched with; None where there was none."""
    search = found["latency"]
    if search is None:
        return None
    rows: list[tuple[str, str, str]] = [("all", units.ms(search["float_ms"]), units.NONE)]
    for step in sorted(search["steps"], key=lambda step: -len(step["kept"])):
        chosen = "chosen" if step["kept"] == search["kept"] else units.NONE
        rows.append((", ".join(step["kept"]) or "none", units.ms(step["latency_ms"]), chosen))
    return table("layers that stay in float|engine, measured before training >|", rows)


def costs(found: dict[str, Any]) -> Table:
    """Theoretical size and bit operations beside what files and engines really are."""
    account = found["account"]
    rows: list[tuple[str, str, str]] = [
        ("mean bits of quantized layers", units.number(account["mean_bits"]), f"{FLOAT_BITS}"),
        ("size of the weights at the bits trained, MB", units.number(account["size_mb"]), units.number(account["size_float_mb"])),
        ("bit operations by data flow, 10⁹", units.number(account["bops_g"]), units.number(account["bops_float_g"])),
        ("bit operations as the published script counts, 10⁹", units.number(account["bops_paper_g"]), units.NONE),
    ]
    for engine in found["engines"]:
        rows.append((f"size of the engine file: {engine['title']}", units.size(engine["size_bytes"]), units.NONE))
        rows.append((f"latency, measured: {engine['title']}", units.ms(engine["latency_ms"]), units.NONE))
    return table("what|hybrid >|float32 >", rows)
