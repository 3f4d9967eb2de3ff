"""The answer of a run: the compressed engine against what it replaces, on one backend."""

from __future__ import annotations

from typing import Any

Engines = list[dict[str, Any]]


def build(
    models: list[dict[str, Any]], engines: Engines, comparisons: list[dict[str, Any]], budget: dict[str, Any] | None
) -> dict[str, Any]:
    """The teacher's engine against the best engine of the student.

    Where no engine of the teacher was measured, the student trained alone or the float32 student takes its place; where no engine
    was measured at all, the models' own metrics are what is left.

    Returns:
        compressed and reference (indices of engines, or None), reason (why one of them is missing, or None), and for each of
        metric, latency_ms, size_bytes, peak_memory_mib and energy_j the two values and how they relate.
    """
    compressed = _compressed(engines, budget)
    reference = _reference(engines, compressed) if compressed is not None else None
    after = engines[compressed] if compressed is not None else None
    before = engines[reference] if reference is not None else None
    teacher = next((model for model in models if model["role"] == "teacher"), None)
    product = after["role"] if after is not None else "student"
    student = next((model for model in reversed(models) if model["role"] == product), None)
    reason = None
    if after is None:
        reason = "no engine of the student was measured"
        if any(engine["backend"] == "null" and engine["latency_ms"] for engine in engines):
            reason += " on a backend that computes anything"
    elif before is None:
        reason = f"no other engine was measured on {after['group']}"
    return {
        "compressed": compressed,
        "reference": reference,
        "reason": reason,
        "metric": _metric(before or teacher, after or student),
        "latency_ms": _latency(before, after, compressed, reference, comparisons),
        "size_bytes": _ratio(_of(before, "size_bytes") or None, _of(after, "size_bytes") or None),
        "peak_memory_mib": _ratio(_of(before, "peak_memory_mib"), _of(after, "peak_memory_mib")),
        "energy_j": _ratio(_joules(before), _joules(after)) | {"reason": after["energy_reason"] if after else reason},
        "params": _ratio(_of(teacher, "params"), _of(student, "params")),
        "macs": _ratio(_of(teacher, "macs"), _of(student, "macs")),
    }


def speedup(comparisons: list[dict[str, Any]], reference: int, engine: int) -> dict[str, Any] | None:
    """How many times as fast as ``reference`` an engine is, from a comparison that measured both interleaved.

    A comparison relates every engine to one of its own. Between two others the ratio is the quotient of theirs, and the interval
    the widest quotient of the two 95 % intervals' ends, which holds with at least 90 %.

    Returns:
        {"ratio", "interval", "confidence", "valid", "folder"}, or None where no comparison has both.
    """
    for comparison in comparisons:
        own = {comparison["reference"]: (1.0, (1.0, 1.0))}
        own |= {ratio["engine"]: (ratio["speedup"], tuple(ratio["interval"])) for ratio in comparison["ratios"]}
        if reference in own and engine in own:
            (below, (below_low, below_high)), (above, (above_low, above_high)) = own[reference], own[engine]
            direct = comparison["reference"] in (reference, engine)
            return {
                "ratio": above / below,
                "interval": [above_low / below_high, above_high / below_low],
                "confidence": 0.95 if direct else 0.90,
                "valid": comparison["valid"],
                "folder": comparison["folder"],
            }
    return None


def _compressed(engines: Engines, budget: dict[str, Any] | None) -> int | None:
    """The student's engine that the budget was held against; else the fastest on a backend that ran the teacher too, int8 or not.

    Of a student with several widths the budget may choose any; else it is the full one.
    Invalid measurements come last, and the null backend, which computes nothing, is no answer.
    """
    at_any_width = [
        index
        for index, engine in enumerate(engines)
        if engine["role"].partition("@")[0] == "student" and engine["status"] == "measured" and engine["backend"] != "null"
    ]
    held = next((check.get("cell") for check in (budget or {}).get("checks", [])), None)
    if held in at_any_width:
        return int(held)
    # without a budget nothing says that a narrower one is good enough
    measured = [index for index in at_any_width if engines[index]["role"] == "student"] or at_any_width

    def rank(index: int) -> tuple[bool, bool, float]:
        reference = _reference(engines, index)
        beside_teacher = reference is not None and engines[reference]["role"] == "teacher"
        return engines[index]["valid"] is False, not beside_teacher, engines[index]["latency_ms"]["p50"]

    return min(measured, key=rank, default=None)


def _reference(engines: Engines, compressed: int) -> int | None:
    """The engine that the compressed one replaces: same backend and settings, the bigger model first."""
    order = {"teacher": 0, "student_alone": 1, "student": 2}
    candidates = [
        index
        for index, engine in enumerate(engines)
        if index != compressed
        and engine["status"] == "measured"
        and engine["group"] == engines[compressed]["group"]
        and "@" not in engine["role"]  # another width of the same student is no predecessor
        and (engine["role"] != "student" or engine["precision"] == "float32")
    ]
    return min(
        candidates,
        key=lambda index: (order.get(engines[index]["role"], 3), engines[index]["precision"] != "float32"),
        default=None,
    )


def _of(entry: dict[str, Any] | None, key: str) -> Any:
    """A value of an engine or model that may not be there."""
    return entry[key] if entry is not None else None


def _metric(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any]:
    first, second = _of(before, "metric") or {}, _of(after, "metric") or {}
    old, new = first.get("value"), second.get("value")
    difference = new - old if old is not None and new is not None else None
    return {"name": second.get("name", first.get("name")), "reference": old, "compressed": new, "difference": difference}


def _latency(
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    compressed: int | None,
    reference: int | None,
    comparisons: list[dict[str, Any]],
) -> dict[str, Any]:
    """p50 of both engines, each measured alone; the ratio is the interleaved comparison's where there is one."""
    plain = _ratio(*((_of(engine, "latency_ms") or {}).get("p50") for engine in (before, after)))
    found = speedup(comparisons, reference, compressed) if reference is not None and compressed is not None else None
    if found is None:
        return plain | {"interval": None, "confidence": None, "interleaved": False, "valid": None, "comparison": None}
    return plain | {
        "ratio": found["ratio"],
        "interval": found["interval"],
        "confidence": found["confidence"],
        "interleaved": True,
        "valid": found["valid"],
        "comparison": found["folder"],
    }


def _ratio(before: float | None, after: float | None) -> dict[str, Any]:
    """Both values and how many times the first is the second."""
    return {"reference": before, "compressed": after, "ratio": before / after if before and after else None}


def _joules(engine: dict[str, Any] | None) -> float | None:
    energy = engine["energy"] if engine is not None else None
    return energy["joules_per_inference"] if energy else None
