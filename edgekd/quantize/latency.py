"""Which layers may stay in float within a latency: a search whose cost is the real engine, built and measured.

Engines execute 2 to 8 bits alike, as int8, so bits decide nothing here; what costs and saves time is whether a layer runs on
integers at all. Layers are ranked by what their bits do to their weights (the k-means distortion times the number of weights) for
what float costs the engine in time, layer by layer, as the backend's own profile of two engines has it: everything in float, and
everything on integers. Those that are no slower in float come first. How many of them stay in float is then found by bisection,
and every step is an engine, built and timed as a whole, since conversions between float and integers cost time too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekd.artifacts import write_json
from edgekd.errors import TrainingError
from edgekd.train.checkpoint import Loaded
from edgekd.train.stage import EngineTime

FILE = "latency.json"
NAME = "quantizer.budget.latency_ms"


def search(
    limit_ms: float,
    errors: Mapping[str, float],
    source: Loaded,
    make: Callable[[list[str]], Loaded],
    engine_time: Callable[[Loaded], EngineTime],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Find the layers that stay in float.

    Args:
        limit_ms: Largest median latency.
        errors: Module path -> what quantization does to the layer, of all layers that may be quantized; larger is worse.
        source: The float model.
        make: Gives the calibrated quantized model with these layers in float.
        engine_time: Builds and times the engine of a float or a quantized model.
        say: Told of every engine.

    Returns:
        limit_ms, float_ms, kept, layers (path, error, float_us, int8_us) in their order, and steps (kept, latency_ms).

    Raises:
        TrainingError: Everything on integers takes longer, or everything in float does not.
    """
    steps: list[dict[str, Any]] = []

    def timed(kept: list[str]) -> EngineTime:
        found = engine_time(make(kept))
        say(f"  {len(kept)} layers in float: the engine takes {found.latency_ms:.3g} ms")
        steps.append({"kept": kept, "latency_ms": found.latency_ms})
        return found

    in_float, integer = engine_time(source), timed([])
    if integer.latency_ms > limit_ms:
        raise TrainingError(
            f"{NAME}: {limit_ms:g} ms cannot be met: the engine with every layer on integers takes {integer.latency_ms:.3g} ms, "
            f"and in float {in_float.latency_ms:.3g} ms",
            hint="give a larger budget, or a smaller model",
        )
    if in_float.latency_ms <= limit_ms:
        raise TrainingError(
            f"{NAME}: the float engine takes {in_float.latency_ms:.3g} ms, which is within {limit_ms:g} ms already",
            hint="give a smaller budget, or size_mb or bops_g in place of it, or remove the quantize stage",
        )
    order = ranked(errors, in_float.layers_us, integer.layers_us)
    few, many = 0, len(order)  # all in float are too slow
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if timed(order[:middle]).latency_ms <= limit_ms else (few, middle)
    times = {"float_us": in_float.layers_us, "int8_us": integer.layers_us}
    layers = [{"path": path, "error": errors[path]} | {name: us.get(path) for name, us in times.items()} for path in order]
    return {"limit_ms": limit_ms, "float_ms": in_float.latency_ms, "kept": order[:few], "layers": layers, "steps": steps}


def ranked(errors: Mapping[str, float], float_us: Mapping[str, float], int8_us: Mapping[str, float]) -> list[str]:
    """Layers in the order in which float pays: error avoided for the time that it costs; equal ones by name.

    Args:
        errors: Module path -> error.
        float_us: Time of the layer in the float engine; a layer that the profile lacks goes last.
        int8_us: In the integer one.
    """

    def key(path: str) -> tuple[int, float, str]:
        if path not in float_us or path not in int8_us:
            return 2, -errors[path], path
        extra = float_us[path] - int8_us[path]
        return (0, -errors[path], path) if extra <= 0 else (1, -errors[path] / extra, path)

    return sorted(errors, key=key)


def remembered(work: Path, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a search found, kept in a folder: measured again, an interrupted training might go on with other layers."""
    path = work / FILE
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    found = find()
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found
