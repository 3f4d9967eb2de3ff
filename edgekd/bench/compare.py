"""Several engines measured interleaved, so that a drift of the machine hits all alike and their ratio stays.

Absolute times on a shared machine drift by tens of percent within minutes; the ratio of two engines measured in turns does not. A
second session of the reference runs along: where an engine differs from the reference by no more than the reference differs from
itself, the answer is "no difference".
"""

from __future__ import annotations

import contextlib
import gc
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.bench import host, sensors, stats
from edgekd.bench.measure import engine_threads, input_pool, load_inputs, pool_key, timed, warm_up
from edgekd.engines import backend, open_engine, read_engine, read_io
from edgekd.engines.base import Array, Session
from edgekd.errors import DataError
from edgekd.jobs import CompareJob

SEED = 0
SETTLE_S = 0.02
"""Of every turn, before what is timed: a dozen inferences of an engine that takes 1.5 ms."""


def compare(job: CompareJob) -> dict[str, Any]:
    """Measure engines in rounds of random order, each engine once per round, the reference twice.

    Returns:
        The record: latencies and raw samples per engine, the noise floor, and per engine its speed-up over the first one.

    Raises:
        BuildError: An engine cannot be opened or does not take these inputs.
        DataError: There is no engine, or the inputs cannot be read.
        WrongMachineError: This machine cannot run one of them.
    """
    folders = [Path(name) for name in job.engines]
    if not folders:
        raise DataError("compare needs at least one engine; received none")
    infos, ios = [read_engine(folder) for folder in folders], [read_io(folder / "io.json") for folder in folders]
    inputs = load_inputs(Path(job.inputs))
    pools = {pool_key(io): input_pool(inputs, io, job.batch) for io in ios}
    libraries = {info.options.name: backend(info.options.name).available() for info in infos}
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(open_engine(folder)) for folder in (*folders, folders[0])]  # the last is the A/A arm
        arms = [(session, pools[pool_key(io)]) for session, io in zip(sessions, (*ios, ios[0]), strict=True)]
        for session, pool in arms:
            warm_up(session, pool, job.warmup_s)
        gc.collect()
        gc.disable()
        try:
            before, cpu_before = sensors.read(), sensors.cpu_time()
            samples_ns = _rounds(arms, job)
            cpu_after, after = sensors.cpu_time(), sensors.read()
        finally:
            gc.enable()

    *samples_ns, again_ns = samples_ns
    machine, threads = host.describe(libraries), engine_threads(infos)
    others = sensors.neighbours(cpu_before, cpu_after)
    warnings, valid = sensors.judge(before, after, others, threads=max(threads), cores=machine["cpu"]["cores_usable"])
    if len(set(threads)) > 1:
        warnings.append(f"the engines have different numbers of threads: {', '.join(map(str, threads))}")
    if debug := [name for name, library in libraries.items() if library.debug]:
        warnings, valid = [*warnings, f"debug builds, whose times mean nothing: {', '.join(debug)}"], False
    noise_ratio, noise_interval = stats.ratio_of_medians(samples_ns[0], again_ns)
    ratios = []
    for index in range(1, len(folders)):
        speedup, interval = stats.ratio_of_medians(samples_ns[0], samples_ns[index])
        result = stats.verdict(interval, noise_interval)
        ratios.append({"engine": index, "reference": 0, "speedup": speedup, "interval": list(interval), "verdict": result})
    return {
        "batch": job.batch,
        "threads": threads[0],
        "engines": [
            {
                "engine": str(folder),
                "backend": info.options.name,
                "precision": info.precision,
                "latency_ms": stats.summarize(samples),
                "samples_ns": samples,
            }
            for folder, info, samples in zip(folders, infos, samples_ns, strict=True)
        ],
        "noise_floor": {"ratio": noise_ratio, "interval": list(noise_interval)},
        "ratios": ratios,
        "warnings": warnings,
        "valid": valid,
        "sensors": {"before": before, "after": after},
        "host": machine,
    }


def _rounds(arms: list[tuple[Session, list[dict[str, Array]]]], job: CompareJob) -> list[list[int]]:
    """Nanoseconds per arm and round. The order within a round is random, so that no arm always follows the same other.

    A turn begins with inferences that are not timed, for ``SETTLE_S``. The other arms' weights lie in the caches; an engine alone
    finds its own there, and a small one would lose more by the change than a large one, which no cache holds anyway.
    """
    rng = np.random.default_rng(SEED)
    samples_ns: list[list[int]] = [[] for _ in arms]
    done, start = 0, time.perf_counter()
    while done < job.max_rounds and (done < job.min_rounds or time.perf_counter() - start < job.duration_s):
        for arm in rng.permutation(len(arms)):
            session, pool = arms[arm]
            _settle(session, pool)
            samples_ns[arm].append(timed(session, pool[done % len(pool)]))
        done += 1
    return samples_ns


def _settle(session: Session, pool: list[dict[str, Array]]) -> None:
    """Run for ``SETTLE_S``, once at least."""
    index, start = 0, time.perf_counter()
    while not index or time.perf_counter() - start < SETTLE_S:
        timed(session, pool[index % len(pool)])
        index += 1
