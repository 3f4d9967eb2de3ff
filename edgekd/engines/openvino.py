"""OpenVINO on the CPU.

What was asked is compared with what the compiled model reports of itself: OpenVINO takes fewer threads and streams where the
CPU has fewer cores, and another precision where the CPU lacks one, and says nothing.

An engine is the blob that OpenVINO exports: the transformed model for this plugin. Importing it takes a fifth of the time of
compiling the ONNX file, and gives the same outputs bit for bit. It is bound to the library's version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

import numpy as np

from edgekd._optional import require
from edgekd.engines import hardware
from edgekd.engines.base import (
    DYNAMIC,
    Array,
    Availability,
    Executed,
    TensorSpec,
    WrongMachineError,
    check_choice,
    check_feeds,
    check_int,
    native_log,
    precision_refusal,
    report,
    zeros,
)
from edgekd.errors import BuildError, MissingDependency

FILE = "model.blob"
_PROFILED = 5
"""Inferences; an operation's time is their median."""
_REPORTED = (
    *("NUM_STREAMS", "INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT", "EXECUTION_MODE_HINT"),
    *("ENABLE_CPU_PINNING", "ENABLE_HYPER_THREADING", "EXECUTION_DEVICES"),
)
_PRECISIONS = {"u8": "int8", "i8": "int8", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}
"""The runtime precision of an operation is that of what it reads."""


@dataclass(frozen=True)
class OpenVinoOptions:
    """Options of the openvino backend."""

    precisions: ClassVar[tuple[str, ...]] = ("float32", "int8")
    encoding: ClassVar[str] = "u8"

    name: Literal["openvino"] = "openvino"
    threads: int = 1
    """Threads that share one inference, 1 to 1024."""
    inference_precision: Literal["f32", "bf16", "f16"] = "f32"
    """What runs that is not quantized, where the CPU has it; OpenVINO would choose bf16 by itself on CPUs that have it."""
    hint: Literal["latency", "throughput"] = "latency"
    """OpenVINO's performance hint: throughput splits threads among several inferences at once, and measuring runs one."""
    streams: int = 1
    """Inferences that could run at once, 1 to ``threads``, each on its share of the threads; measuring runs one."""
    device: Literal["CPU"] = "CPU"
    """OpenVINO's device name."""

    def __post_init__(self) -> None:
        check_int("threads", self.threads, 1, 1024)
        check_choice("inference_precision", self.inference_precision, ("f32", "bf16", "f16"))
        check_choice("hint", self.hint, ("latency", "throughput"))
        check_int("streams", self.streams, 1, self.threads)
        check_choice("device", self.device, ("CPU",))

    def unsupported(self, precision: str) -> str | None:
        """Why a graph of this precision cannot be built, or None."""
        return precision_refusal("openvino on the CPU", self.precisions, precision)


class OpenVinoSession:
    """A compiled model with one request."""

    device_ns: int | None = None

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self.inputs = tuple(_spec(port) for port in compiled.inputs)
        self.outputs = tuple(_spec(port) for port in compiled.outputs)

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see ``Session.infer``."""
        check_feeds(self.inputs, feeds)
        try:
            # Inputs are read where they lie, as ONNX Runtime does; outputs are copied, because the request reuses its own.
            results = self._request.infer(dict(feeds), share_inputs=True)
        except RuntimeError as error:
            raise BuildError(f"openvino failed while running: {_line(error)}") from error
        return {spec.name: results[index] for index, spec in enumerate(self.outputs)}

    def __enter__(self) -> OpenVinoSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._request = self._compiled = None


class OpenVino:
    """The openvino backend."""

    name = "openvino"

    def available(self, _options: Any = None) -> Availability:
        """Whether openvino can be imported."""
        try:
            library = require("openvino")
        except MissingDependency as error:
            return Availability(False, reason=error.message, hint=error.hint)
        return Availability(True, version=library.__version__.split("-")[0])  # the rest names the build

    def fingerprint(self, _options: OpenVinoOptions) -> dict[str, Any]:
        """Library version, CPU architecture and flags."""
        cpu = hardware.cpu()
        version = require("openvino").__version__
        return {"library": "openvino", "version": version, "arch": cpu["arch"], "cpu_flags": cpu["flags"], "cpu": cpu["model"]}

    def build(self, model: Path, options: OpenVinoOptions, out: Path) -> list[str]:
        """Compile for this CPU and export the blob."""
        library = require("openvino")
        try:
            with native_log(out / "build.log"):
                core = library.Core()
                compiled = core.compile_model(core.read_model(str(model)), options.device, _settings(options))
                reported = {name: _plain(compiled.get_property(name)) for name in _REPORTED}
                (out / FILE).write_bytes(compiled.export_model().getvalue())
        except RuntimeError as error:
            raise BuildError(
                f"openvino cannot build {model}: {_line(error)}",
                hint="check that the file is a whole ONNX model; export it again",
            ) from error
        report(out, reported, _notes(options, reported))
        return [FILE]

    def executed(self, folder: Path, options: OpenVinoOptions) -> list[Executed]:
        """The operations of the compiled model, timed over an inference of zeros."""
        library = require("openvino")
        try:
            settings = {**_settings(options), "PERF_COUNT": True}
            compiled = library.Core().import_model((folder / FILE).read_bytes(), options.device, settings)
            request = compiled.create_infer_request()
            feeds = zeros(tuple(_spec(port) for port in compiled.inputs))
            request.infer(feeds)  # prepares
            samples: dict[str, list[float]] = {}
            for _ in range(_PROFILED):
                request.infer(feeds)
                for info in request.profiling_info:
                    samples.setdefault(info.node_name, []).append(info.real_time.total_seconds() * 1e6)
        except (OSError, RuntimeError) as error:
            raise BuildError(f"openvino cannot inspect {folder / FILE}: {_line(error)}", hint="build the engine again") from error
        found = []
        for node in compiled.get_runtime_model().get_ordered_ops():
            facts = {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
            names = tuple(name.split("/")[0] for name in facts.get("originalLayersNames", "").split(","))
            precision = _PRECISIONS.get(facts.get("runtimePrecision", ""), facts.get("runtimePrecision", "unknown"))
            measured = samples.get(node.get_friendly_name())
            time = float(np.median(measured)) if measured else None
            found.append(Executed(names, facts.get("layerType", "unknown"), precision, time))
        return found

    def open(self, folder: Path, options: OpenVinoOptions) -> OpenVinoSession:
        """Import the blob."""
        library = require("openvino")
        try:
            return OpenVinoSession(library.Core().import_model((folder / FILE).read_bytes(), options.device, _settings(options)))
        except (OSError, RuntimeError) as error:
            raise BuildError(f"openvino cannot open {folder / FILE}: {_line(error)}", hint="build the engine again") from error


def _settings(options: OpenVinoOptions) -> dict[str, Any]:
    return {
        "PERFORMANCE_HINT": options.hint.upper(),
        "NUM_STREAMS": options.streams,
        "INFERENCE_NUM_THREADS": options.threads,
        "INFERENCE_PRECISION_HINT": options.inference_precision,
        # Not pinned: where the threads run is the system's choice for every engine alike.
        "ENABLE_CPU_PINNING": False,
    }


def _notes(options: OpenVinoOptions, reported: Mapping[str, Any]) -> list[str]:
    """Where the library did less than it was asked to, by its own account.

    Raises:
        WrongMachineError: It computes in another precision.
    """
    got = reported["INFERENCE_PRECISION_HINT"]
    if got != options.inference_precision:
        raise WrongMachineError(
            f"inference_precision {options.inference_precision} was asked, and openvino computes in {got} on this CPU",
            hint="choose one that this CPU has; f32 always is",
        )
    pairs = (("threads", options.threads, "INFERENCE_NUM_THREADS"), ("streams", options.streams, "NUM_STREAMS"))
    return [f"asked for {count} {what}, openvino took {reported[key]}" for what, count, key in pairs if reported[key] != count]


def _plain(value: Any) -> Any:
    """A property as JSON holds it."""
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "type_name", None) or getattr(value, "name", None) or str(value)  # a type, an enum


def _spec(port: Any) -> TensorSpec:
    shape = tuple(DYNAMIC if size.is_dynamic else size.get_length() for size in port.get_partial_shape())
    return TensorSpec(port.get_any_name(), np.dtype(port.get_element_type().to_dtype()).name, shape)


def _line(error: Exception) -> str:
    """The library's message on one line, without the lines that only say where in its source it arose."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("Exception from src/")) or str(error)
