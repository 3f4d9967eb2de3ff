"""What is known of one engine, of the machine and of the run, as tables of two columns."""

from __future__ import annotations

from typing import Any

from edgekd.report import units, views
from edgekd.report.views import Report, Table, table


def subtitle(report: Report) -> str:
    """When, where and by what."""
    state, version = report["state"], report["reproduce"]["edgekd"]
    cpu = (report["environment"].get("cpu") or {}).get("model")
    parts = (units.moment(state["finished"] or state["started"]), cpu, version and f"edgekd {version}")
    return " · ".join(units.plain(part) for part in parts if part)


def of_engine(engine: dict[str, Any]) -> Table:
    """Everything that is known of one engine."""
    latency, sensors, energy = engine["latency_ms"] or {}, engine["sensors"] or {}, engine["energy"]
    rows: list[tuple[str, object]] = [("status", views.status(engine)), ("reason", engine["reason"])]
    rows += [(metric_label(engine), units.metric(engine["metric"]) + _images(engine)) if engine["metric"] else ("metric", None)]
    if latency:
        spread = ", ".join(f"{key} {units.number(latency[key])}" for key in latency)
        rows.append(("latency, ms", f"{spread}; {engine['samples']} samples"))
    rows += [
        ("first inference", units.ms(engine["first_ms"])),
        ("load", units.ms(engine["load_ms"])),
        ("peak memory of the process", units.mib(engine["peak_memory_mib"])),
        ("memory of the engine", units.mib(engine["engine_memory_mib"])),
        ("size", units.size(engine["size_bytes"])),
        ("files", ", ".join(f"{name} ({units.size(size)})" for name, size in (engine["files"] or {}).items())),
        (
            "energy per inference",
            f"{units.joules(energy['joules_per_inference'])}, {energy['source']}"
            if energy
            else _not_read(engine["energy_reason"]),
        ),
        ("batch, threads", f"{engine['batch']}, {engine['threads'] or units.NONE}"),
        (f"multiply-accumulates in {engine['precision']}", views.precision_share(engine)),
        ("time outside the layers of the audit", units.percent((engine["audit"] or {}).get("other_time"))),
        ("precision audit", units.plain((engine["audit"] or {}).get("reason", ""))),
        ("options", _pairs(engine["options"])),
        ("the library's own settings", _pairs(engine.get("reported"))),
        ("built in", units.seconds(engine["build_s"])),
        ("built with", _pairs(engine["fingerprint"])),
        ("clock, MHz", _before_after(sensors.get("clock_mhz")) or _not_read(sensors.get("clock_reason"))),
        ("temperature, °C", _before_after(sensors.get("temperature_c")) or _not_read(sensors.get("temperature_reason"))),
        ("load average", _before_after(sensors.get("load_1m"))),
        ("warnings", "; ".join(engine["warnings"])),
        ("target", engine["target"]),
        ("folders", ", ".join(str(folder) for folder in engine["folders"].values() if folder)),
    ]
    return table("fact|value", [(name, value) for name, value in rows if value not in (None, "", units.NONE)])


def metric_label(engine: dict[str, Any]) -> str:
    """The metric's name, said to be the engine's own."""
    return f"{engine['metric']['name']} of this engine"


def _images(engine: dict[str, Any]) -> str:
    images = engine["metric"].get("images")
    return f" on {images} images" if images else ""


def _not_read(reason: str | None) -> str | None:
    return f"not read: {reason}" if reason else None


def _pairs(values: dict[str, Any] | None) -> str:
    return ", ".join(f"{key} {units.listed(value)}" for key, value in (values or {}).items())


def _before_after(reading: dict[str, Any] | None) -> str | None:
    if not reading or reading.get("before") is None or reading.get("after") is None:
        return None
    return f"{units.number(reading['before'], 4)} before, {units.number(reading['after'], 4)} after"


def environment(report: Report) -> Table:
    """The machine."""
    found = report["environment"]
    cpu, gpus = found.get("cpu") or {}, found.get("gpus") or []
    memory = found.get("memory_mib")
    rows: list[tuple[str, object]] = [
        ("CPU", cpu.get("model")),
        ("cores", f"{cpu.get('cores_usable')} usable of {cpu.get('cores_logical')}" if cpu else None),
        ("instruction sets", " ".join(cpu.get("flags") or [])),
        ("memory", f"{memory / 1024:.1f} GiB" if memory else None),
        ("system", ", ".join(str(part) for part in (found.get("distribution"), found.get("os"), cpu.get("arch")) if part)),
        ("Python", found.get("python")),
        ("GPU", ", ".join(_gpu(gpu) for gpu in gpus) or f"none: {found.get('gpu_reason') or 'no reason was recorded'}"),
    ]
    for name, backend in (found.get("backends") or {}).items():
        rows.append((name, backend.get("version") if backend.get("available") else f"not available: {backend.get('reason')}"))
    return table("fact|value", [(name, value) for name, value in rows if value])


def _gpu(gpu: dict[str, Any]) -> str:
    return f"{gpu.get('name')} ({gpu.get('capability')}, driver {gpu.get('driver')})"


def data(report: Report) -> Table:
    """The data set."""
    found = report["data"]
    counts = ", ".join(f"{name} {count}" for name, count in (found.get("counts") or {}).items())
    rows = [
        ("kind", found.get("kind")),
        ("classes", found.get("classes")),
        ("images", counts),
        ("fingerprint", found.get("fingerprint")),
    ]
    return table("fact|value", [(name, value) for name, value in rows if value])


def reproduce(report: Report) -> Table:
    """Seed and versions."""
    found, state = report["reproduce"], report["state"]
    rows = [
        ("seed", found["seed"]),
        ("edgekd", found["edgekd"]),
        ("libraries", _pairs(found["versions"])),
        ("started", units.moment(state["started"])),
        ("finished", units.moment(state["finished"])),
        ("took", units.seconds(state["seconds"])),
    ]
    return table("fact|value", [(name, value) for name, value in rows if value not in (None, "", units.NONE)])
