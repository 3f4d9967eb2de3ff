"""The JSON contract between whoever wants an engine built or measured and the worker that does it.

A job is one file, ``job.json``; the worker answers with ``result.json`` beside it. Paths inside a job are absolute on the machine
that runs it. ``cpp_runtime`` reads the same files. Standard library only.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

SCHEMA = 1


@dataclass(frozen=True)
class BuildJob:
    """Build one engine from an ONNX model."""

    kind: ClassVar[str] = "build"
    model: str
    """The .onnx file; its io.json lies beside it."""
    backend: dict[str, Any]
    """The backend's options, ``name`` first among them (see edgekd.engines)."""
    precision: str
    """What the graph asks for: float32, float16 or int8."""
    out: str
    """An existing, empty folder for the engine's files."""


@dataclass(frozen=True)
class BenchJob:
    """Measure one engine alone in the worker's process: load, first inference, warm-up, steady state, memory."""

    kind: ClassVar[str] = "bench"
    engine: str
    """The engine's folder."""
    inputs: str
    """An .npy file of real images, uint8 [N, H, W, C], or an .npz file with an array [N, ...] for every input of the model, as it
    takes it; batches are cycled so that caches do not see one buffer only."""
    batch: int = 1
    warmup_s: float = 0.3
    duration_s: float = 2.0
    """Steady state is measured for at least this long..."""
    min_samples: int = 50
    """... and for at least this many inferences, ..."""
    max_samples: int = 20_000
    """... but never for more than this many."""


@dataclass(frozen=True)
class CompareJob:
    """Measure several engines interleaved (A B C A B C ...) in one process, so that drift of the machine hits all alike."""

    kind: ClassVar[str] = "compare"
    engines: list[str]
    """The engines' folders; the first is the reference of the ratios."""
    inputs: str
    batch: int = 1
    warmup_s: float = 0.3
    duration_s: float = 4.0
    """For all engines together."""
    min_rounds: int = 30
    max_rounds: int = 5_000


@dataclass(frozen=True)
class PredictJob:
    """Run an engine on every image of a file and keep all outputs."""

    kind: ClassVar[str] = "predict"
    engine: str
    inputs: str
    out: str
    """The .npz file to write: one array per output name, in the order of the images."""
    batch: int = 1


Job = BuildJob | BenchJob | CompareJob | PredictJob
_KINDS = {job.kind: job for job in (BuildJob, BenchJob, CompareJob, PredictJob)}


@dataclass(frozen=True)
class JobResult:
    """What the worker answers.

    ``status`` is ``ok``, ``skipped`` (this machine cannot do it) or ``failed``. ``reason`` says why it is not ok, ``hint`` what
    to do; a failure also has ``error`` (``BuildError: ...``, the type before the reason) and ``log_tail``.
    """

    status: str
    payload: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    error: str = ""
    hint: str = ""
    log_tail: str = ""


def write_job(job: Job, path: Path) -> None:
    """Write a job as JSON."""
    data = {"schema": SCHEMA, "kind": job.kind, **dataclasses.asdict(job)}
    path.write_text(json.dumps(data, indent=1))


def read_job(path: Path) -> Job:
    """Read a job.

    Raises:
        ValueError: Not a JSON object, unknown kind, unknown or missing field, or another schema.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a job is a JSON object; received {type(data).__name__}")
    schema, kind = data.pop("schema", None), data.pop("kind", None)
    if schema != SCHEMA:
        raise ValueError(f"{path}: job schema {schema!r}; this worker reads schema {SCHEMA}")
    if kind not in _KINDS:
        raise ValueError(f"{path}: job kind {kind!r}; allowed: {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](**data)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def write_result(result: JobResult, path: Path) -> None:
    """Write a result as JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"schema": SCHEMA, **dataclasses.asdict(result)}, indent=1))
    partial.replace(path)


def read_result(path: Path) -> JobResult:
    """Read a result."""
    data = json.loads(path.read_text())
    data.pop("schema", None)
    return JobResult(**data)
