"""OpenVINO on the CPU.

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
    check_choice,
    check_feeds,
    check_int,
    native_log,
    precision_refusal,
)
from edgekd.errors import BuildError, MissingDependency

FILE = "model.blob"
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
    inference_precision: Literal["f32", "bf16"] = "f32"
    """What runs that is not quantized; OpenVINO would choose bf16 by itself on CPUs that have it."""
    device: Literal["CPU"] = "CPU"
    """OpenVINO's device name."""

    def __post_init__(self) -> None:
        check_int("threads", self.threads, 1, 1024)
        check_choice("inference_precision", self.inference_precision, ("f32", "bf16"))
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

    def available(self) -> Availability:
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
                (out / FILE).write_bytes(compiled.export_model().getvalue())
        except RuntimeError as error:
            raise BuildError(
                f"openvino cannot build {model}: {_line(error)}",
                hint="check that the file is a whole ONNX model; export it again",
            ) from error
        return [FILE]

    def executed(self, folder: Path, options: OpenVinoOptions) -> list[Executed]:
        """The operations of the compiled model, timed over an inference of zeros."""
        library = require("openvino")
        try:
            settings = {**_settings(options), "PERF_COUNT": True}
            compiled = library.Core().import_model((folder / FILE).read_bytes(), options.device, settings)
            request = compiled.create_infer_request()
            specs = [_spec(port) for port in compiled.inputs]
            for _ in range(2):  # the first prepares
                request.infer({spec.name: np.zeros([max(1, size) for size in spec.shape], spec.dtype) for spec in specs})
            times = {info.node_name: info.real_time.total_seconds() * 1e6 for info in request.profiling_info}
        except (OSError, RuntimeError) as error:
            raise BuildError(f"openvino cannot inspect {folder / FILE}: {_line(error)}", hint="build the engine again") from error
        found = []
        for node in compiled.get_runtime_model().get_ordered_ops():
            facts = {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
            names = tuple(name.split("/")[0] for name in facts.get("originalLayersNames", "").split(","))
            precision = _PRECISIONS.get(facts.get("runtimePrecision", ""), facts.get("runtimePrecision", "unknown"))
            found.append(Executed(names, facts.get("layerType", "unknown"), precision, times.get(node.get_friendly_name())))
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
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": options.threads,
        "INFERENCE_PRECISION_HINT": options.inference_precision,
        # Not pinned: where the threads run is the system's choice for every engine alike.
        "ENABLE_CPU_PINNING": False,
    }


def _spec(port: Any) -> TensorSpec:
    shape = tuple(DYNAMIC if size.is_dynamic else size.get_length() for size in port.get_partial_shape())
    return TensorSpec(port.get_any_name(), np.dtype(port.get_element_type().to_dtype()).name, shape)


def _line(error: Exception) -> str:
    """The library's message on one line, without the lines that only say where in its source it arose."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("Exception from src/")) or str(error)
