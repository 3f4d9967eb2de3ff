"""Backends: ways to turn an ONNX model into an engine and to run it. The union and the table below are the whole list.

An engine's folder holds the backend's own files, io.json, engine.json (options, precision, fingerprint, sizes) and build.log.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.engines import audit, hardware, model_check
from edgekd.engines.base import REPORTED, Availability, Backend, Io, Session, TensorSpec, WrongMachineError, read_io
from edgekd.engines.null import Null, NullOptions
from edgekd.engines.onnxruntime import OnnxRuntime, OnnxRuntimeOptions
from edgekd.engines.openvino import OpenVino, OpenVinoOptions
from edgekd.engines.tensorrt import TensorRt, TensorRtOptions
from edgekd.engines.tensorrt_rtx import TensorRtRtx, TensorRtRtxOptions
from edgekd.errors import BuildError, nearest

__all__ = [
    "Availability",
    "Backend",
    "BackendOptions",
    "EngineInfo",
    "Io",
    "WrongMachineError",
    "Session",
    "TensorSpec",
    "BACKENDS",
    "OPTIONS",
    "backend",
    "encoding_for",
    "options_from",
    "options_dict",
    "build_engine",
    "read_engine",
    "open_engine",
    "read_io",
]

BackendOptions = OnnxRuntimeOptions | OpenVinoOptions | TensorRtOptions | TensorRtRtxOptions | NullOptions

BACKENDS: dict[str, Backend] = {
    "onnxruntime": OnnxRuntime(),
    "openvino": OpenVino(),
    "tensorrt": TensorRt(),
    "tensorrt_rtx": TensorRtRtx(),
    "null": Null(),
}
OPTIONS: dict[str, type[BackendOptions]] = {
    "onnxruntime": OnnxRuntimeOptions,
    "openvino": OpenVinoOptions,
    "tensorrt": TensorRtOptions,
    "tensorrt_rtx": TensorRtRtxOptions,
    "null": NullOptions,
}

SCHEMA = 1
RECORD = "engine.json"


@dataclass(frozen=True)
class EngineInfo:
    """engine.json, read."""

    options: BackendOptions
    precision: str
    fingerprint: Mapping[str, Any]
    files: Mapping[str, int]
    """The backend's own files and their sizes in bytes."""
    notes: tuple[str, ...] = ()
    """What the library made otherwise than asked."""

    @property
    def size_bytes(self) -> int:
        """What has to be shipped to run it."""
        return sum(self.files.values())

    @property
    def threads(self) -> int | None:
        """CPU threads per inference, where the backend has such an option."""
        return getattr(self.options, "threads", None)


def backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        BuildError: There is none.
    """
    if name not in BACKENDS:
        raise BuildError(
            f"unknown backend {name!r}{nearest(name, list(BACKENDS))}; there are {', '.join(BACKENDS)}",
            hint="edgekd backends lists what is installed here",
        )
    return BACKENDS[name]


def encoding_for(options: BackendOptions, cpu: Mapping[str, Any]) -> str:
    """How an int8 graph must be written to run on integers, and right, with these options on this CPU (edgekd.export.qdq).

    Args:
        options: The backend's.
        cpu: arch and flags of the target's CPU, from :func:`edgekd.engines.hardware.cpu`.
    """
    return "u7" if _on_cpu(options) and hardware.adds_in_16_bits(cpu) else options.encoding


def _on_cpu(options: BackendOptions) -> bool:
    """Whether the CPU's integer kernels run what is built with these options."""
    return options.encoding == "u8" and options.name != "null"


def options_from(data: Mapping[str, Any]) -> BackendOptions:
    """The options that a job or an engine.json describes: ``name`` and any of that backend's fields.

    Raises:
        BuildError: The name is missing or unknown, or a field is unknown or out of bounds.
    """
    name = str(data.get("name", ""))
    backend(name)
    allowed = [field.name for field in dataclasses.fields(OPTIONS[name])]
    for key in data:
        if key not in allowed:
            raise BuildError(f"{name} has no option {key!r}{nearest(key, allowed)}; it has {', '.join(allowed)}")
    try:
        return OPTIONS[name](**data)
    except (TypeError, ValueError) as error:
        raise BuildError(f"options of {name}: {error}") from error


def options_dict(options: BackendOptions) -> dict[str, Any]:
    """The options as JSON holds them, ``name`` first and every default spelled out."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(options).items()}


def build_engine(model: Path, options: BackendOptions, precision: str, out: Path) -> dict[str, Any]:
    """Build one engine.

    Args:
        model: The .onnx file; its io.json lies beside it.
        options: Which backend, and how.
        precision: What the graph asks for: float32, float16 or int8.
        out: An existing folder, which gets the engine's files.

    Returns:
        What engine.json holds: backend, precision, fingerprint, files, size_bytes, seconds, model_check (ok, or why the file was
        not checked); reported (the library's own settings), where the backend tells; notes, where it tells them or where sums
        overflow on this CPU; and audit, where layers.json lies beside the model.

    Raises:
        BuildError: The file is damaged, or the backend refuses it or lacks the precision.
        MissingDependency: The backend's library is not installed.
        WrongMachineError: It can be built, but not here.
    """
    if refusal := options.unsupported(precision):
        raise BuildError(refusal, hint="choose another precision or backend for this entry of deploy")
    if not model.is_file():
        raise BuildError(f"the model {model} does not exist", hint="export it first")
    if not out.is_dir():
        raise BuildError(f"the folder for the engine, {out}, does not exist")
    io = read_io(model.with_name("io.json"))  # refuse a damaged one before any work
    maker, start = backend(options.name), time.monotonic()
    (out / "build.log").touch()
    fingerprint = maker.fingerprint(options)  # fails where the library is missing
    checked = model_check.check(model, io) if options.name != "null" else "not checked: the null backend reads no model"
    names = maker.build(model, options, out)
    files = {name: (out / name).stat().st_size for name in names}
    shutil.copyfile(model.with_name("io.json"), out / "io.json")
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "backend": options_dict(options),
        "precision": precision,
        "fingerprint": fingerprint,
        "files": files,
        "size_bytes": sum(files.values()),
        "seconds": round(time.monotonic() - start, 3),
        "model_check": checked,
    }
    if (out / REPORTED).is_file():
        record |= json.loads((out / REPORTED).read_text())
        (out / REPORTED).unlink()
    if precision == "int8" and _on_cpu(options) and hardware.adds_in_16_bits(hardware.cpu()):
        record["notes"] = [*record.get("notes", []), *model_check.overflows(model)]
    if model.with_name(audit.LAYERS).is_file():
        record["audit"] = audit.audit(model.with_name(audit.LAYERS), maker, out, options)
    (out / RECORD).write_text(json.dumps(record, indent=1))
    return record


def read_engine(folder: Path) -> EngineInfo:
    """Read an engine's record.

    Raises:
        BuildError: There is none, or it cannot be read.
    """
    path = folder / RECORD
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise BuildError(
                f"{path} has schema {data['schema']!r}; this edgekd reads schema {SCHEMA}", hint="build the engine again"
            )
        return EngineInfo(
            options_from(data["backend"]), data["precision"], data["fingerprint"], data["files"], tuple(data.get("notes", ()))
        )
    except FileNotFoundError as error:
        raise BuildError(f"{folder} holds no engine: there is no {RECORD}", hint="give the folder of a built engine") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{path} cannot be read: {error!r}", hint="build the engine again") from error


def open_engine(folder: Path) -> Session:
    """Open an engine in this process, if this is the kind of machine that it was built for.

    Raises:
        BuildError: It is damaged.
        MissingDependency: The library is not installed.
        WrongMachineError: This machine cannot run it: another version of the library, another instruction set, no GPU.
    """
    info = read_engine(folder)
    maker = backend(info.options.name)
    here = maker.fingerprint(info.options)
    for key, built in info.fingerprint.items():
        if key != "cpu" and here.get(key) != built:  # two CPU models with the same instruction set are alike
            raise WrongMachineError(
                f"engine {folder} was built {_difference(key, built, here.get(key))}",
                hint="build the engine again on this machine",
            )
    return maker.open(folder, info.options)


def _difference(key: str, built: object, here: object) -> str:
    if not isinstance(built, list) or not isinstance(here, list):
        return f"with {key} {built}; here it is {here}"
    lacking, surplus = (" ".join(str(each) for each in one if each not in other) for one, other in ((built, here), (here, built)))
    with_ = f"with {key} {lacking}, which this machine lacks" if lacking else ""
    return ", and ".join(filter(None, [with_, f"without {key} {surplus}, which this machine has" if surplus else ""]))
