"""ONNX Runtime on the CPU.

An engine is the *optimized* graph: build lets ONNX Runtime fuse and lay out the model for this CPU and saves the result; open
loads it with optimizations off. It gives the same outputs bit for bit at the same speed, and leaves a file in which one can read
what runs (QLinearConv or Conv). It is bound to the CPU's instruction set, which the engine's fingerprint records.
"""

from __future__ import annotations

import json
import re
import tempfile
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

FILE = "model.onnx"
_LEVELS = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}
_KERNEL = "_kernel_time"
_PROFILED = 5
"""Inferences; a kernel's time is their median."""
_DTYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class OnnxRuntimeOptions:
    """Options of the onnxruntime backend."""

    precisions: ClassVar[tuple[str, ...]] = ("float32", "int8")
    encoding: ClassVar[str] = "u8"

    name: Literal["onnxruntime"] = "onnxruntime"
    threads: int = 1
    """Threads that share one inference, 1 to 1024."""
    provider: Literal["cpu"] = "cpu"
    """Execution provider."""
    optimization: Literal["all", "extended", "basic", "none"] = "all"
    """How far the graph is rewritten while building; ``all`` includes layouts for this CPU."""

    def __post_init__(self) -> None:
        check_int("threads", self.threads, 1, 1024)
        check_choice("provider", self.provider, ("cpu",))
        check_choice("optimization", self.optimization, tuple(_LEVELS))

    def unsupported(self, precision: str) -> str | None:
        """Why a graph of this precision cannot be built, or None."""
        return precision_refusal("onnxruntime on the CPU", self.precisions, precision)


class OnnxRuntimeSession:
    """An optimized graph, loaded."""

    device_ns: int | None = None

    def __init__(self, runtime: Any, inner: Any) -> None:
        self._errors = _errors(runtime)
        self._inner = inner
        self.inputs = tuple(_spec(item) for item in inner.get_inputs())
        self.outputs = tuple(_spec(item) for item in inner.get_outputs())
        self._names = [spec.name for spec in self.outputs]

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see ``Session.infer``."""
        check_feeds(self.inputs, feeds)
        try:
            return dict(zip(self._names, self._inner.run(self._names, feeds), strict=True))
        except self._errors as error:
            raise BuildError(f"onnxruntime failed while running: {_line(error)}") from error

    def __enter__(self) -> OnnxRuntimeSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._inner = None


class OnnxRuntime:
    """The onnxruntime backend."""

    name = "onnxruntime"

    def available(self) -> Availability:
        """Whether onnxruntime can be imported."""
        try:
            runtime = require("onnxruntime")
        except MissingDependency as error:
            return Availability(False, reason=error.message, hint=error.hint)
        return Availability(True, version=runtime.__version__, debug="build type=Debug" in runtime.get_build_info())

    def fingerprint(self, _options: OnnxRuntimeOptions) -> dict[str, Any]:
        """Library version, CPU architecture and flags."""
        cpu = hardware.cpu()
        version = require("onnxruntime").__version__
        return {"library": "onnxruntime", "version": version, "arch": cpu["arch"], "cpu_flags": cpu["flags"], "cpu": cpu["model"]}

    def build(self, model: Path, options: OnnxRuntimeOptions, out: Path) -> list[str]:
        """Optimize the graph for this CPU and save it."""
        runtime = require("onnxruntime")
        settings = _settings(runtime, options, options.optimization)
        settings.optimized_model_filepath = str(out / FILE)
        settings.log_severity_level = 2
        # A product and its bias fused to a Gemm would run in float; apart, the product runs on integers.
        keep = ["MatMulAddFusion"] if json.loads(model.with_name("io.json").read_text()).get("precision") == "int8" else []
        with native_log(out / "build.log"):
            _session(runtime, model, settings, keep)
        return [FILE]

    def executed(self, folder: Path, options: OnnxRuntimeOptions) -> list[Executed]:
        """The kernels of one profiled inference of zeros: their names are the nodes', with a suffix where nodes were fused."""
        runtime = require("onnxruntime")
        settings = _settings(runtime, options, "none")
        settings.enable_profiling = True
        with tempfile.TemporaryDirectory() as scratch:
            settings.profile_file_prefix = str(Path(scratch) / "profile")
            session = _session(runtime, folder / FILE, settings)
            specs = [_spec(item) for item in session.get_inputs()]
            feeds = {spec.name: np.zeros([max(1, size) for size in spec.shape], spec.dtype) for spec in specs}
            try:
                for _ in range(_PROFILED):
                    session.run(None, feeds)
                events = json.loads(Path(session.end_profiling()).read_text())
            except _errors(runtime) as error:
                raise BuildError(f"onnxruntime cannot profile {folder / FILE}: {_line(error)}") from error
        times: dict[tuple[str, str], list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
                times.setdefault((event["name"].removesuffix(_KERNEL), event["args"]["op_name"]), []).append(event["dur"])
        return [
            Executed((re.sub(r"(_token_\d+|_nchwc|/.*)$", "", name),), kind, _precision(kind), float(np.median(durations)))
            for (name, kind), durations in times.items()
        ]

    def open(self, folder: Path, options: OnnxRuntimeOptions) -> OnnxRuntimeSession:
        """Load the optimized graph as it is."""
        runtime = require("onnxruntime")
        return OnnxRuntimeSession(runtime, _session(runtime, folder / FILE, _settings(runtime, options, "none")))


def _precision(kind: str) -> str:
    """Its operators on integers are named for it; all others here compute in float32."""
    return "int8" if kind.startswith(("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize")) else "float32"


def _settings(runtime: Any, options: OnnxRuntimeOptions, optimization: str) -> Any:
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    settings.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, _LEVELS[optimization])
    settings.log_severity_level = 3
    # Worker threads may spin inside a run, but not after it: they would take the cores of the engine that is measured next.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    return settings


def _session(runtime: Any, model: Path, settings: Any, disabled: list[str] | None = None) -> Any:
    try:
        return runtime.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    except _errors(runtime) as error:
        raise BuildError(
            f"onnxruntime cannot load {model}: {_line(error)}", hint="check that the file is a whole ONNX model; export it again"
        ) from error


def _errors(runtime: Any) -> tuple[type[Exception], ...]:
    state = runtime.capi.onnxruntime_pybind11_state
    names = ("Fail", "EPFail", "EngineError", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile")
    return (*(getattr(state, name) for name in (*names, "NotImplemented", "RuntimeException")), RuntimeError)


def _spec(item: Any) -> TensorSpec:
    dtype = item.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else DYNAMIC for size in item.shape)
    return TensorSpec(item.name, _DTYPES.get(dtype, dtype), shape)


def _line(error: Exception) -> str:
    """The library's message without its status number, on one line."""
    return " ".join(str(error).removeprefix("[ONNXRuntimeError] : ").split())
