"""One engine, alone in this process: load, first inference, warm-up, steady state, memory, energy."""

from __future__ import annotations

import gc
import json
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.bench import host, sensors, stats
from edgekd.engines import EngineInfo, backend, open_engine, read_engine, read_io
from edgekd.engines.base import DYNAMIC, Array, Io, Session
from edgekd.engines.preprocess import check, normalize
from edgekd.errors import DataError
from edgekd.jobs import BenchJob

Inputs = Array | dict[str, Array]
"""Images, uint8 [N, H, W, C]; or, by the name of each input of a model, what it takes, [N, ...]."""
POOL_MIB = 32
"""Inputs kept ready: enough that they do not all stay in the caches next to the model, few enough for a small device."""


def bench(job: BenchJob) -> dict[str, Any]:
    """Measure one engine.

    Returns:
        The record that ``BenchRecord`` keeps; times in milliseconds, raw samples in nanoseconds.

    Raises:
        BuildError: The engine cannot be opened or does not take these inputs.
        DataError: The inputs cannot be read.
        WrongMachineError: This machine cannot run the engine.
    """
    folder = Path(job.engine)
    info, io = read_engine(folder), read_io(folder / "io.json")
    threads = info.threads or 1
    pool = input_pool(load_inputs(Path(job.inputs)), io, job.batch)
    library = backend(info.options.name).available()  # imports it, so that loading it is not counted as loading the engine
    meter = sensors.EnergyMeter()
    idle_w = meter.idle_watts() if meter else 0.0

    base_mib, start = host.rss_mib(), time.perf_counter_ns()
    with open_engine(folder) as session:
        load_ms = (time.perf_counter_ns() - start) / 1e6
        first_ms = timed(session, pool[0]) / 1e6
        warmup_runs, warmup_s = warm_up(session, pool, job.warmup_s)
        gc.collect()
        gc.disable()  # a collection in the middle of a sample is Python's time, not the engine's
        try:
            before, cpu_before, energy_before = sensors.read(), sensors.cpu_time(), meter.counters_uj()
            samples_ns, device_ns, steady_s = _steady(session, pool, job)
            energy_after, cpu_after, after = meter.counters_uj(), sensors.cpu_time(), sensors.read()
        finally:
            gc.enable()
        now_mib = host.rss_mib()

    machine = host.describe([info.options.name])
    others = sensors.neighbours(cpu_before, cpu_after)
    warnings, valid = sensors.judge(before, after, others, threads=threads, cores=machine["cpu"]["cores_usable"])
    warnings = [*warnings, *info.notes]
    if library.debug:
        warnings, valid = [*warnings, f"{info.options.name} is a debug build: its times mean nothing"], False
    energy, energy_reason = None, meter.reason
    if meter:
        joules = meter.joules(energy_before, energy_after) - idle_w * steady_s
        energy = {"joules_per_inference": joules / len(samples_ns), "source": meter.source}
    return {
        "backend": info.options.name,
        "precision": info.precision,
        "batch": job.batch,
        "threads": threads,
        "load_ms": load_ms,
        "first_ms": first_ms,
        "warmup": {"runs": warmup_runs, "seconds": warmup_s},
        "samples_ns": samples_ns,
        "latency_ms": stats.summarize(samples_ns),
        "device_samples_ns": device_ns,
        "device_ms": stats.summarize(device_ns) if device_ns else None,
        "peak_memory_mib": host.rss_mib("VmHWM"),
        "engine_memory_mib": None if base_mib is None or now_mib is None else now_mib - base_mib,
        "size_bytes": info.size_bytes,
        "sensors": {"before": before, "after": after},
        "energy": energy,
        "energy_reason": energy_reason,
        "warnings": warnings,
        "valid": valid,
        "host": machine,
    }


def predict(engine: Path, inputs: Path, out: Path, batch: int) -> dict[str, Any]:
    """Run an engine on all inputs and write all outputs to an .npz file, one array per output, in the order of the inputs."""
    info, io = read_engine(engine), read_io(engine / "io.json")
    given = load_inputs(inputs)
    total = _count(given)
    fixed = io.inputs[0].shape[0] != DYNAMIC  # then the last batch is filled up, and its surplus cut off
    parts: dict[str, list[Array]] = {}
    start = time.perf_counter()
    with open_engine(engine) as session:
        for first in range(0, total, batch):
            count = min(batch, total - first)
            rows = np.minimum(np.arange(first, first + (batch if fixed else count)), total - 1)
            for name, array in session.infer(_feeds(given, rows, io)).items():
                parts.setdefault(name, []).append(array[:count])
    outputs = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    with out.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **outputs)
    return {
        "backend": info.options.name,
        "precision": info.precision,
        "images": total,
        "out": str(out),
        "outputs": {name: list(array.shape) for name, array in outputs.items()},
        "seconds": time.perf_counter() - start,
    }


def load_inputs(path: Path) -> Inputs:
    """What a model is to be given: images from an .npy file, or the model's own inputs from an .npz file.

    Raises:
        DataError: The file cannot be read, is empty, or its arrays have different lengths.
    """
    if path.suffix != ".npz":
        return load_images(path)
    hint = "save every input under its name with numpy.savez, [N, ...] each"
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = dict(found)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"the inputs {path} cannot be read: {error}", hint=hint) from error
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or 0 in lengths:
        received = ", ".join(f"{name}: {list(array.shape)}" for name, array in arrays.items()) or "no array"
        raise DataError(f"{path}: expected arrays of one length above 0; received {received}", hint=hint)
    return arrays


def load_images(path: Path) -> Array:
    """An .npy file of uint8 [N, H, W, C], memory-mapped.

    Raises:
        DataError: It is missing, is no .npy file, holds something else, or is empty.
    """
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"the images {path} cannot be read: {error}", hint="save uint8 [N, H, W, C] with numpy.save") from error
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        received = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else "several arrays"
        raise DataError(f"{path}: expected uint8 [N, H, W, C] with N > 0; received {received}")
    return images


def make_feeds(images_NHWC: Array, io: Io) -> dict[str, Array]:
    """The model's input for these images."""
    spec = io.inputs[0]
    if len(io.inputs) != 1:
        raise DataError(
            f"the model has {len(io.inputs)} inputs; images can only be given to one",
            hint="give an .npz file with an array for every input",
        )
    return {spec.name: normalize(images_NHWC, io.preprocessing).astype(spec.dtype, copy=False)}


def input_pool(inputs: Inputs, io: Io, batch: int) -> list[dict[str, Array]]:
    """Ready batches, at least one and at most ``POOL_MIB``; a short file is repeated."""
    total = _count(inputs)
    if isinstance(inputs, dict):
        size = sum(array[0].nbytes for array in inputs.values()) * batch
    else:
        check(inputs, io.preprocessing)  # all of them, so that a refusal tells the shape of the user's file and not of a batch
        size = inputs[0].size * 4 * batch  # bytes as float32
    count = max(1, min(total // batch, POOL_MIB * 2**20 // max(size, 1), 64))
    return [_feeds(inputs, np.arange(index * batch, (index + 1) * batch) % total, io) for index in range(count)]


def _count(inputs: Inputs) -> int:
    return len(next(iter(inputs.values()))) if isinstance(inputs, dict) else len(inputs)


def _feeds(inputs: Inputs, rows: NDArray[np.int64], io: Io) -> dict[str, Array]:
    """The model's inputs for these rows of a file; whether they are the model's is for the session to say."""
    if isinstance(inputs, dict):
        return {name: np.ascontiguousarray(array[rows]) for name, array in inputs.items()}
    return make_feeds(inputs[rows], io)


def timed(session: Session, feeds: Mapping[str, Array]) -> int:
    """One inference, nanoseconds."""
    start = time.perf_counter_ns()
    session.infer(feeds)
    return time.perf_counter_ns() - start


def warm_up(session: Session, pool: list[dict[str, Array]], seconds: float) -> tuple[int, float]:
    """Infer for a while; returns how often and how long (seconds)."""
    runs, start = 0, time.perf_counter()
    while runs < 2 or time.perf_counter() - start < seconds:
        session.infer(pool[runs % len(pool)])
        runs += 1
    return runs, time.perf_counter() - start


def _steady(session: Session, pool: list[dict[str, Array]], job: BenchJob) -> tuple[list[int], list[int], float]:
    """Nanoseconds per inference, those of the device alone (empty where the library does not tell), and seconds in all."""
    samples_ns: list[int] = []
    device_ns: list[int] = []
    start = time.perf_counter()
    while len(samples_ns) < job.max_samples and (
        len(samples_ns) < job.min_samples or time.perf_counter() - start < job.duration_s
    ):
        samples_ns.append(timed(session, pool[len(samples_ns) % len(pool)]))
        if session.device_ns is not None:
            device_ns.append(session.device_ns)
    return samples_ns, device_ns, time.perf_counter() - start


def pool_key(io: Io) -> str:
    """Engines with the same key take the same inputs."""
    return json.dumps([[[spec.name, spec.dtype] for spec in io.inputs], dict(io.preprocessing)], sort_keys=True)


def engine_threads(infos: list[EngineInfo]) -> list[int]:
    """Each engine's CPU threads."""
    return [info.threads or 1 for info in infos]
