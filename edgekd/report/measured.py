"""Engines and comparisons as a report has them: cells of run.json, and the records that they name."""

from __future__ import annotations

from typing import Any

from edgekd.artifacts import Artifact
from edgekd.report import units
from edgekd.report.files import Files

ECDF_POINTS = 200
"""How many of an engine's samples report.json keeps, evenly spaced in rank; the bench record has them all."""
_LATENCIES = ("p50", "p90", "p99", "mean", "min", "max", "std")


def engines(cells: list[dict[str, Any]], files: Files) -> list[dict[str, Any]]:
    """One engine per cell, in the same order."""
    return [_engine(cell, files) | title for cell, title in zip(cells, _titles(cells), strict=True)]


def comparisons(entries: list[dict[str, Any]], files: Files, engines: int) -> list[dict[str, Any]]:
    """The comparisons whose records can be used; ``engines`` is how many engines there are to refer to."""
    return [found for entry in entries if (found := _comparison(entry, files, engines)) is not None]


def _engine(cell: dict[str, Any], files: Files) -> dict[str, Any]:
    """One cell of the deploy matrix, whatever became of it."""
    engine, bench = files.artifact(cell.get("engine")), files.artifact(cell.get("bench"))
    info = files.json(engine, "engine.json") or {}
    record = files.json(bench, "record.json") or {}
    status, reason = cell.get("status", "failed"), cell.get("reason") or None
    if status == "measured" and not record.get("latency_ms"):
        status = "built" if engine is not None else "failed"
        reason = f"it was measured, but the measurement is lost: {files.why(cell.get('bench'))}"
    elif status != "measured":
        record, reason = {}, reason or "no reason was recorded"
    options = info.get("backend") or cell.get("backend") or {}
    latency = record.get("latency_ms")
    return {
        "backend": cell.get("backend_name", ""),
        "precision": cell.get("precision", ""),
        "target": cell.get("target", ""),
        "status": status,
        "reason": reason if reason is None else units.plain(reason),
        "batch": cell.get("batch", 1),
        "latency_ms": {key: latency[key] for key in _LATENCIES if key in latency} if latency else None,
        "first_ms": record.get("first_ms"),
        "load_ms": record.get("load_ms"),
        "peak_memory_mib": record.get("peak_memory_mib"),
        "engine_memory_mib": record.get("engine_memory_mib"),
        "size_bytes": _size_bytes(engine, info, record),
        "metric": record.get("metric"),
        "role": cell.get("role", ""),
        "stage": cell.get("stage", ""),
        "threads": record.get("threads", options.get("threads")),
        "options": options,
        "compute_capabilities": options.get("compute_capabilities"),
        "valid": record.get("valid"),
        "warnings": [units.plain(warning) for warning in record.get("warnings") or []],
        "energy": record.get("energy"),
        "energy_reason": record.get("energy_reason") or None,
        "warmup": record.get("warmup"),
        "samples": len(record["samples_ns"]) if "samples_ns" in record else None,
        "ecdf": ecdf(record["samples_ns"]) if record.get("samples_ns") else None,
        "sensors": _sensors(record.get("sensors")),
        "audit": info.get("audit"),
        "reported": info.get("reported"),
        "build_s": info.get("seconds"),
        "fingerprint": info.get("fingerprint"),
        "files": info.get("files"),
        "folders": {key: cell.get(key) for key in ("onnx", "engine", "bench")},
    }


def _size_bytes(engine: Artifact | None, info: dict[str, Any], record: dict[str, Any]) -> int:
    built = engine.metrics.get("size_bytes") if engine is not None else None
    return int(record.get("size_bytes") or info.get("size_bytes") or built or 0)


def ecdf(samples_ns: list[int], points: int = ECDF_POINTS) -> dict[str, list[float]]:
    """Points of the empirical distribution: real samples, evenly spaced in rank, the smallest and the largest among them.

    Returns:
        {"ms": ascending latencies, "share": which share of all samples is no larger, 0..1}.
    """
    ordered, last = sorted(samples_ns), len(samples_ns) - 1
    ranks = sorted({round(index * last / max(points - 1, 1)) for index in range(points)})
    return {"ms": [ordered[rank] / 1e6 for rank in ranks], "share": [(rank + 1) / len(ordered) for rank in ranks]}


def _sensors(sensors: dict[str, Any] | None) -> dict[str, Any] | None:
    """The fastest core's clock and the hottest zone before and after, and the reasons where they cannot be read."""
    if not sensors:
        return None
    before, after = sensors.get("before") or {}, sensors.get("after") or {}

    def top(reading: dict[str, Any], key: str) -> float | None:
        values = reading.get(key)
        return max(values.values() if isinstance(values, dict) else values) if values else None

    found: dict[str, Any] = {
        key: {"before": top(before, key), "after": top(after, key)} for key in ("clock_mhz", "temperature_c")
    }
    found["load_1m"] = {"before": before.get("load_1m"), "after": after.get("load_1m")}
    return found | {key: after.get(key) or None for key in ("clock_reason", "temperature_reason")}


def _titles(cells: list[dict[str, Any]]) -> list[dict[str, str]]:
    """``group`` (backend, and what distinguishes its entries of the recipe) and ``title`` (group, model, precision) per cell."""
    settings = [
        {**(cell.get("backend") or {}), "batch": cell.get("batch", 1), "target": cell.get("target", "")} for cell in cells
    ]
    titles = []
    for cell, own in zip(cells, settings, strict=True):
        name = units.plain(cell.get("backend_name", ""))
        alike = [
            other for other, near in zip(settings, cells, strict=True) if near.get("backend_name") == cell.get("backend_name")
        ]
        varying = [key for key in own if any(other.get(key) != own[key] for other in alike)]
        group = name + (f" ({', '.join(f'{key} {units.plain(units.listed(own[key]))}' for key in varying)})" if varying else "")
        model = f"{units.role(str(cell.get('role', '')))} {cell.get('precision', '')}"
        titles.append({"group": group, "title": units.plain(f"{group}: {model}")})
    return titles


def _comparison(entry: dict[str, Any], files: Files, engines: int) -> dict[str, Any] | None:
    """One interleaved comparison, its engines named by their index in the report; None where its record cannot be used."""
    artifact = files.artifact(entry.get("folder"))
    record = files.json(artifact, "record.json")
    if artifact is None or not record:
        return None
    cells = entry.get("cells") or []
    if len(cells) != len(record.get("engines", [])) or not all(isinstance(cell, int) and 0 <= cell < engines for cell in cells):
        files.damage[artifact.folder.name] = "run.json and its record name different engines"
        return None
    return {
        "backend": entry.get("backend_name", ""),
        "target": entry.get("target", ""),
        "batch": record.get("batch", 1),
        "threads": record.get("threads"),
        "valid": record.get("valid"),
        "warnings": [units.plain(warning) for warning in record.get("warnings") or []],
        "noise_floor": record.get("noise_floor"),
        "rounds": min((len(engine.get("samples_ns") or []) for engine in record["engines"]), default=0),
        "reference": cells[0],
        "engines": [
            {"engine": cell, "p50_ms": engine["latency_ms"]["p50"]}
            for cell, engine in zip(cells, record["engines"], strict=True)
            if engine.get("latency_ms")
        ],
        "ratios": [
            {
                "engine": cells[ratio["engine"]],
                "reference": cells[ratio["reference"]],
                **{key: ratio[key] for key in ("speedup", "interval", "verdict")},
            }
            for ratio in record.get("ratios", [])
        ],
        "folder": artifact.folder.name,
    }
