"""TensorRT 10.3 to 11: engines for the NVIDIA GPU of the machine that builds them, run through pycuda.

Networks are strongly typed: every precision is in the graph. An engine is bound to the library's version and the GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

import numpy as np

from edgekd._optional import INSTALL, require
from edgekd.engines import _cuda, _trt, hardware
from edgekd.engines.base import (
    Array,
    Availability,
    Executed,
    TensorSpec,
    WrongMachineError,
    check_feeds,
    check_int,
    precision_refusal,
    zeros,
)
from edgekd.errors import BuildError, MissingDependency

TIMING_CACHE = "timing.cache"
_OLDEST = (10, 3)
_WORKSPACE_SHARE, _WORKSPACE_SHARE_INTEGRATED = 0.5, 0.25
"""Of the free device memory, where ``workspace_mib`` is not given; an integrated GPU (Jetson) shares it with the system."""
_DTYPES = {"FLOAT": "float32", "HALF": "float16"}
"""NumPy's names of the library's types, where they are not the same in small letters."""
_TYPE_WORDS = (
    *(("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16"), ("half", "float16"), ("fp8", "float8")),
    *(("fp4", "float4"), ("fp32", "float32"), ("float", "float32"), ("uint8", "uint8"), ("int8", "int8"), ("int4", "int4")),
    *(("int32", "int32"), ("int64", "int64"), ("bool", "bool")),
)
"""What the engine inspector writes in a tensor's format or type, and our names; the first that fits counts."""


@dataclass(frozen=True)
class TensorRtOptions:
    """Options of the tensorrt backend."""

    precisions: ClassVar[tuple[str, ...]] = ("float32", "float16", "int8")
    encoding: ClassVar[str] = "s8"

    name: Literal["tensorrt"] = "tensorrt"
    workspace_mib: int | None = None
    """Scratch memory that a layer may use, MiB, 1 to 65536; not given: half of the GPU's free memory, and a quarter where the
    GPU shares it with the system (Jetson)."""
    opt_batch: int = 1
    """The batch that kernels are chosen for, where the model's batch is free."""
    max_batch: int = 64
    """The largest batch that the engine takes, where the model's batch is free, 1 to 65536."""
    tf32: bool = False
    """Whether float32 products may round their inputs to 10 bits of fraction; TensorRT would do so by itself."""
    cuda_graph: bool = False
    """Whether an inference is launched as one recorded CUDA graph: less time between the kernels of a small net."""
    timing_cache: str | None = None
    """An absolute path on the target: measurements of kernels that builds share. Read before a build, written back after it, so
    that later builds are faster and choose the same kernels. What a build used always lies beside its engine, as timing.cache."""

    def __post_init__(self) -> None:
        if self.workspace_mib is not None:
            check_int("workspace_mib", self.workspace_mib, 1, 65536)
        check_int("max_batch", self.max_batch, 1, 65536)
        check_int("opt_batch", self.opt_batch, 1, self.max_batch)
        for field in ("tf32", "cuda_graph"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false; received {getattr(self, field)!r}")
        if self.timing_cache is not None and not os.path.isabs(self.timing_cache):
            raise ValueError(f"timing_cache must be an absolute path; received {self.timing_cache!r}")

    def unsupported(self, precision: str) -> str | None:
        """Why a graph of this precision cannot be built, or None."""
        return precision_refusal("tensorrt", self.precisions, precision)


class TensorRtSession:
    """An engine with its own stream, device memory and page-locked host memory.

    Buffers are made for the shapes of the first inference, and again where they change.
    """

    device_ns: int | None = None

    def __init__(self, trt: Any, path: Path, options: TensorRtOptions) -> None:
        self._cuda, self._path, self._options = _cuda.driver(), path, options
        self._log = _trt.Log(trt)
        self._graph: _cuda.CudaGraph | None = None
        self._buffers: dict[str, tuple[Array, Any]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        with contextlib.ExitStack() as stack, _cuda.translated(self._cuda, f"opening {path}"):
            stack.enter_context(_cuda.context(self._cuda))
            runtime = trt.Runtime(self._log.logger)
            self.engine = runtime.deserialize_cuda_engine(_read(path))
            if self.engine is None:
                raise BuildError(f"tensorrt cannot open {path}: {self._log.error()}", hint="build the engine again")
            self.execution = self.engine.create_execution_context()
            if self.execution is None:
                raise BuildError(f"tensorrt cannot run {path}: {self._log.error()}", hint="free memory of the GPU")
            self._runtime = runtime  # an engine must not outlive it
            self._stream, self._events = self._cuda.Stream(), (self._cuda.Event(), self._cuda.Event())
            self.inputs, self.outputs = (self._specs(mode) for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT))
            self._stack = stack.pop_all()

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see ``Session.infer``. ``device_ns`` is the time of the kernels, without the copies to and from the GPU."""
        check_feeds(self.inputs, feeds)
        with _cuda.translated(self._cuda, f"running {self._path}"):
            self._prepare({spec.name: feeds[spec.name].shape for spec in self.inputs})
            start, end = self._events
            for spec in self.inputs:
                host, device = self._buffers[spec.name]
                np.copyto(host, feeds[spec.name])
                self._cuda.memcpy_htod_async(device, host, self._stream)
            start.record(self._stream)
            if self._graph is not None:
                self._graph.launch()
            else:
                self._enqueue()
            end.record(self._stream)
            for spec in self.outputs:
                host, device = self._buffers[spec.name]
                self._cuda.memcpy_dtoh_async(host, device, self._stream)
            self._stream.synchronize()
            self.device_ns = round(start.time_till(end) * 1e6)  # from milliseconds
            return {spec.name: self._buffers[spec.name][0].copy() for spec in self.outputs}

    def _specs(self, mode: Any) -> tuple[TensorSpec, ...]:
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        return tuple(
            TensorSpec(name, self._dtype(name), self._shape(name)) for name in names if self.engine.get_tensor_mode(name) == mode
        )

    def _dtype(self, name: str) -> str:
        dtype = self.engine.get_tensor_dtype(name).name
        return _DTYPES.get(dtype, dtype.lower())

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.engine.get_tensor_shape(name))

    def _prepare(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Set the inputs' shapes, and give every tensor its memory."""
        if shapes == self._shapes:
            return
        self._release()
        for name, shape in shapes.items():
            if not self.execution.set_input_shape(name, shape):
                low, _usual, high = self.engine.get_tensor_profile_shape(name, 0)
                raise BuildError(
                    f"the engine takes {name} from {list(low)} to {list(high)}; received {list(shape)}",
                    hint="use a smaller batch, or build with a larger max_batch",
                )
        for spec in (*self.inputs, *self.outputs):
            host = self._cuda.pagelocked_empty(tuple(self.execution.get_tensor_shape(spec.name)), np.dtype(spec.dtype))
            device = self._cuda.mem_alloc(host.nbytes)
            self._buffers[spec.name] = (host, device)
            if not self.execution.set_tensor_address(spec.name, int(device)):
                raise self._failed()
        if self._options.cuda_graph:
            self._enqueue()  # what is set up at the first run after a change of shapes cannot be recorded
            self._stream.synchronize()
            self._graph = _cuda.CudaGraph(self._stream.handle, lambda: self.execution.execute_async_v3(self._stream.handle))
        self._shapes = shapes

    def _enqueue(self) -> None:
        if not self.execution.execute_async_v3(self._stream.handle):
            raise self._failed()

    def _failed(self) -> BuildError:
        return BuildError(f"tensorrt failed while running {self._path}: {self._log.error()}", hint="build the engine again")

    def _release(self) -> None:
        self._shapes = {}
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        for _host, device in self._buffers.values():
            device.free()
        self._buffers = {}

    def __enter__(self) -> TensorRtSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:  # leaves the context at the end: what is freed before needs it
            self._release()
            del self.execution, self.engine, self._runtime, self._stream, self._events


class TensorRt:
    """The tensorrt backend."""

    name = "tensorrt"

    def available(self, _options: Any = None) -> Availability:
        """Whether tensorrt and pycuda can be imported, and there is an NVIDIA driver."""
        try:
            trt = _library()
            if not hardware.has_nvidia_driver():
                return Availability(False, reason="no NVIDIA driver is loaded", hint="run this on the machine that has the GPU")
            require("pycuda.driver")
        except MissingDependency as error:
            return Availability(False, reason=error.message, hint=error.hint)
        return Availability(True, version=trt.__version__)

    def fingerprint(self, _options: TensorRtOptions) -> dict[str, Any]:
        """Library version, and the GPU with its compute capability."""
        version = _library().__version__
        try:
            device = _cuda.driver().Device(0)
        except WrongMachineError as error:
            raise WrongMachineError(f"tensorrt builds and runs engines on their own GPU: {error.message}", error.hint) from error
        major, minor = device.compute_capability()
        return {"library": "tensorrt", "version": version, "compute_capability": f"SM{major}{minor}", "gpu": device.name()}

    def build(self, model: Path, options: TensorRtOptions, out: Path) -> list[str]:
        """Parse the graph, and build the engine for this machine's GPU."""
        trt, cuda = _library(), _cuda.driver()
        facts = self.fingerprint(options)
        with (
            _cuda.translated(cuda, f"building {model}"),
            _cuda.context(cuda),
            _trt.Build(trt, self.name, model, out) as build,
        ):
            build.parse()
            config = build.config
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # otherwise the precision audit sees names alone
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _workspace(cuda, options, build.log))
            if options.tf32:
                config.set_flag(trt.BuilderFlag.TF32)
            else:
                config.clear_flag(trt.BuilderFlag.TF32)
            _read_timing_cache(config, options, build.log)
            build.set_batch(options.opt_batch, options.max_batch)
            (out / _trt.FILE).write_bytes(build.serialize(f"{facts['gpu']} ({facts['compute_capability']})", ""))
            _write_timing_cache(config, options, out)
        return [_trt.FILE]

    def executed(self, folder: Path, options: TensorRtOptions) -> list[Executed]:
        """The engine's layers as its inspector tells, timed over an inference of zeros."""
        trt = _library()
        times: dict[str, float] = {}
        profiler = _profiler(trt, times)  # the library does not keep it alive
        with TensorRtSession(trt, folder / _trt.FILE, replace(options, cuda_graph=False)) as session:
            inspector = session.engine.create_engine_inspector()
            information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
            del inspector  # it must not outlive its engine
            session.execution.profiler = profiler
            for _ in range(2):  # the first prepares
                session.infer(zeros(session.inputs))
        try:
            layers = json.loads(information)["Layers"]
            return [_layer(layer, times) for layer in layers if isinstance(layer, dict)]
        except (ValueError, KeyError, TypeError) as error:
            raise BuildError(f"the engine inspector's answer on {folder / _trt.FILE} cannot be read: {error!r}") from error

    def open(self, folder: Path, options: TensorRtOptions) -> TensorRtSession:
        """Read the engine onto the GPU."""
        return TensorRtSession(_library(), folder / _trt.FILE, options)


def _library() -> Any:
    trt = require("tensorrt")
    if tuple(int(part) for part in trt.__version__.split(".")[:2]) < _OLDEST:
        raise MissingDependency(
            f"tensorrt {trt.__version__} is installed; 10.3 or later is needed", hint=f"run: {INSTALL['tensorrt']}"
        )
    return trt


def _profiler(trt: Any, times: dict[str, float]) -> Any:
    """Notes each layer's time, microseconds."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]  # the base comes with the module
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = ms * 1000

    return Profiler()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BuildError(f"tensorrt cannot open {path}: {error}", hint="build the engine again") from error


def _workspace(cuda: Any, options: TensorRtOptions, log: _trt.Log) -> int:
    """Bytes of scratch memory that a layer may use."""
    if options.workspace_mib is not None:
        return options.workspace_mib << 20
    shared = cuda.Device(0).get_attribute(cuda.device_attribute.INTEGRATED)
    free, _total = cuda.mem_get_info()
    limit = int(free * (_WORKSPACE_SHARE_INTEGRATED if shared else _WORKSPACE_SHARE))
    log.lines.append(("INFO", f"workspace: {limit >> 20} MiB, of {free >> 20} MiB free"))
    return limit


def _read_timing_cache(config: Any, options: TensorRtOptions, log: _trt.Log) -> None:
    """Let the build begin with the measurements of earlier ones; those of another GPU or version are left aside."""
    path = Path(options.timing_cache) if options.timing_cache else None
    stored = path.read_bytes() if path is not None and path.is_file() else b""
    cache = config.create_timing_cache(stored)
    if stored and (cache is None or not config.set_timing_cache(cache, ignore_mismatch=False)):
        log.lines.append(("WARNING", f"{path} is damaged, or of another GPU or version: it is not used, and will be replaced"))
        stored, cache = b"", config.create_timing_cache(b"")
    if not stored and cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)


def _write_timing_cache(config: Any, options: TensorRtOptions, out: Path) -> None:
    cache = config.get_timing_cache()
    if cache is None:
        return
    data = bytes(cache.serialize())
    (out / TIMING_CACHE).write_bytes(data)
    if options.timing_cache is not None:
        path = Path(options.timing_cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_bytes(data)
        scratch.replace(path)  # whole or not at all: another build may be reading it


def _layer(layer: dict[str, Any], times: dict[str, float]) -> Executed:
    """One layer of the inspector's JSON; TensorRT 11 has DataType where 10.x has Format/Datatype."""
    name, kind = layer["Name"], layer.get("LayerType", "unknown")
    nodes = re.findall(r"\[ONNX Layer: ([^\]]*)\]", layer.get("Metadata") or "")
    if not nodes and kind not in ("Reformat", "NoOp"):  # those are called after the layer that they serve
        nodes = name.split(" + ")
        nodes += [tensor["Name"] for tensor in layer.get("Outputs", ())]
    types = [_type(tensor) for tensor in layer.get("Inputs", ())[:1]]
    if isinstance(weights := layer.get("Weights"), dict):
        types.append(_type({"DataType": weights.get("Type", "")}))
    # What it computes in is the widest of what it reads: int8 weights with a float input are a float convolution.
    precision = next((word for word in types if word != "int8"), "int8") if types else "unknown"
    return Executed(tuple(nodes), kind, precision, times.get(name))


def _type(tensor: Mapping[str, Any]) -> str:
    text = next((str(tensor[key]) for key in ("DataType", "Format/Datatype", "Format/DataType") if tensor.get(key)), "").lower()
    return next((ours for word, ours in _TYPE_WORDS if word in text), "unknown")
