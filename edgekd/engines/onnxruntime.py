"""ONNX Runtime: on the CPU, and on NVIDIA GPUs through its CUDA and TensorRT execution providers.

On the CPU an engine is the *optimized* graph: build lets ONNX Runtime fuse and lay out the model for this CPU and saves the
result; open loads it with optimizations off. It gives the same outputs bit for bit at the same speed, and leaves a file in which
one can read what runs (QLinearConv or Conv). It is bound to the CPU's instruction set, which the engine's fingerprint records.

On a GPU an engine is the model as it was exported, which ONNX Runtime optimizes on every load: it refuses to save a graph with
compiled nodes (what TensorRT makes), and one optimized for CUDA may hold copies between devices. For TensorRT the compiled
engine lies beside it, in TensorRT's own file, and open refuses one that would have to be compiled again.

ONNX Runtime goes on with the CPU where a provider cannot start, and says so in its log only. Here that is an error.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

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

FILE = "model.onnx"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
INSTALL = "run: pip uninstall onnxruntime; pip install onnxruntime-gpu (it needs CUDA and cuDNN; provider tensorrt TensorRT too)"
_LEVELS = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}
_KERNEL = "_kernel_time"
_PROFILED = 5
"""Inferences; a kernel's time is their median."""
_DTYPES = {"float": "float32", "double": "float64"}
_PLANS = (".engine", ".profile")
"""What TensorRT's cache leaves: compiled engines, and the shapes that they are for."""
_USED_BY = {
    "device_id": ("cuda", "tensorrt"),
    "cudnn_search": ("cuda",),
    **dict.fromkeys(("workspace_mib", "opt_batch", "max_batch"), ("tensorrt",)),
}
"""Options of a GPU, and the providers that read them."""


@dataclass(frozen=True)
class OnnxRuntimeOptions:
    """Options of the onnxruntime backend."""

    name: Literal["onnxruntime"] = "onnxruntime"
    threads: int = 1
    """Threads that share one inference, 1 to 1024."""
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """Execution provider; cuda and tensorrt need the package onnxruntime-gpu and an NVIDIA GPU."""
    optimization: Literal["all", "extended", "basic", "none"] = "all"
    """How far ONNX Runtime rewrites the graph; ``all`` includes layouts for this CPU."""
    device_id: int = 0
    """cuda, tensorrt: number of the GPU, 0 to 63."""
    cudnn_search: Literal["exhaustive", "heuristic", "default"] = "exhaustive"
    """cuda: how cuDNN finds the algorithm of a convolution; exhaustive times all of them at the first inference of a shape."""
    workspace_mib: int = 256
    """tensorrt: scratch memory that a layer may use, MiB, 1 to 65536."""
    opt_batch: int = 1
    """tensorrt: the batch that kernels are chosen for, where the model's batch is free."""
    max_batch: int = 64
    """tensorrt: the largest batch that the engine takes, where the model's batch is free, 1 to 65536."""

    def __post_init__(self) -> None:
        check_int("threads", self.threads, 1, 1024)
        check_choice("provider", self.provider, tuple(PROVIDERS))
        check_choice("optimization", self.optimization, tuple(_LEVELS))
        check_int("device_id", self.device_id, 0, 63)
        check_choice("cudnn_search", self.cudnn_search, ("exhaustive", "heuristic", "default"))
        check_int("workspace_mib", self.workspace_mib, 1, 65536)
        check_int("max_batch", self.max_batch, 1, 65536)
        check_int("opt_batch", self.opt_batch, 1, self.max_batch)
        for field in fields(self):
            users = _USED_BY.get(field.name, (self.provider,))
            if self.provider not in users and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} is an option of provider {' and '.join(users)}; provider {self.provider} does not read it"
                )

    @property
    def precisions(self) -> tuple[str, ...]:
        """What graphs the provider runs; the CUDA provider has no convolution on integers."""
        return {
            "cpu": ("float32", "int8"),
            "cuda": ("float32", "float16"),
            "tensorrt": ("float32", "float16", "int8"),
        }[self.provider]

    @property
    def encoding(self) -> str:
        """The CPU's kernels take unsigned activations, TensorRT signed ones."""
        return "s8" if self.provider == "tensorrt" else "u8"

    def unsupported(self, precision: str) -> str | None:
        """Why a graph of this precision cannot be built, or None."""
        if self.provider == "cuda" and precision == "int8":
            return "onnxruntime's CUDA provider has no int8 convolutions: it would run them in float; provider tensorrt has them"
        where = {"cpu": "on the CPU", "cuda": "with CUDA", "tensorrt": "with TensorRT"}[self.provider]
        return precision_refusal(f"onnxruntime {where}", self.precisions, precision)


class OnnxRuntimeSession:
    """A graph, loaded."""

    device_ns: int | None = None

    def __init__(self, runtime: Any, inner: Any) -> None:
        self._errors = _errors(runtime)
        self._inner = inner
        self.inputs = tuple(_spec(item) for item in inner.get_inputs())
        self.outputs = tuple(_spec(item) for item in inner.get_outputs())
        self._names = [spec.name for spec in self.outputs]

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see ``Session.infer``. From and to the CPU's memory, so on a GPU both copies are part of it."""
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

    def available(self, options: OnnxRuntimeOptions | None = None) -> Availability:
        """Whether onnxruntime can be imported, and has the provider."""
        try:
            runtime = require("onnxruntime")
        except MissingDependency as error:
            return Availability(False, reason=error.message, hint=error.hint)
        listed = runtime.get_available_providers() if options is not None else []
        if options is not None and (provider := PROVIDERS[options.provider]) not in listed:
            reason = f"provider {options.provider} needs onnxruntime's {provider}; the installed one has {', '.join(listed)}"
            return Availability(False, reason=reason, hint=INSTALL)
        return Availability(True, version=runtime.__version__, debug="build type=Debug" in runtime.get_build_info())

    def fingerprint(self, options: OnnxRuntimeOptions) -> dict[str, Any]:
        """Library version and CPU architecture and flags, or the GPU and what drives it."""
        version = require("onnxruntime").__version__
        if options.provider == "cpu":
            cpu = hardware.cpu()
            return {
                "library": "onnxruntime",
                "version": version,
                "arch": cpu["arch"],
                "cpu_flags": cpu["flags"],
                "cpu": cpu["model"],
            }
        gpus, reason = hardware.gpus()
        gpu = gpus[options.device_id] if options.device_id < len(gpus) else {}
        found = {"library": "onnxruntime", "version": version, "gpu": gpu.get("name", reason), "driver": gpu.get("driver", "")}
        if options.provider == "tensorrt":
            found["tensorrt"] = _tensorrt_version()
        return found

    def build(self, model: Path, options: OnnxRuntimeOptions, out: Path) -> list[str]:
        """On the CPU optimize the graph and save it; on a GPU keep the model, and have TensorRT compile it."""
        runtime = require("onnxruntime")
        missing = self.available(options)
        if not missing.ok:
            raise WrongMachineError(f"not built: {missing.reason}", hint=missing.hint)
        settings = _settings(runtime, options, options.optimization)
        settings.log_severity_level = 2
        if options.provider == "cpu":
            settings.optimized_model_filepath = str(out / FILE)
            # A product and its bias fused to a Gemm would run in float; apart, the product runs on integers.
            keep = ["MatMulAddFusion"] if _asked(model) == "int8" else []
            with native_log(out / "build.log"):
                session = _session(runtime, model, settings, options, keep)
            report(out, {"providers": session.get_providers()})
            return [FILE]
        shutil.copyfile(model, out / FILE)
        shutil.copyfile(model.with_name("io.json"), out / "io.json")
        with native_log(out / "build.log"):
            session = _session(runtime, out / FILE, settings, options)
        report(
            out,
            {
                "providers": session.get_providers(),
                "NVIDIA_TF32_OVERRIDE": os.environ["NVIDIA_TF32_OVERRIDE"],
                **session.get_provider_options()[PROVIDERS[options.provider]],
            },
        )
        plans = sorted(path.name for path in out.iterdir() if path.suffix in _PLANS)
        if options.provider == "tensorrt" and not plans:
            raise BuildError(
                f"TensorRT compiled no part of {model}", hint="see build.log; provider cuda may run what TensorRT does not take"
            )
        return [FILE, *plans]

    def executed(self, folder: Path, options: OnnxRuntimeOptions) -> list[Executed]:
        """The kernels of profiled inferences of zeros: their names are the nodes', with more where nodes were fused.

        TensorRT compiles many nodes to one, and ONNX Runtime does not say which, nor what runs in it. So its engines are not
        inspected, unless layers were left to another provider: these are told.
        """
        runtime = require("onnxruntime")
        settings = _settings(runtime, options, _level(options))
        settings.enable_profiling = True
        with tempfile.TemporaryDirectory() as scratch:
            settings.profile_file_prefix = str(Path(scratch) / "profile")
            session = _session(runtime, folder / FILE, settings, options)
            feeds = zeros(tuple(_spec(item) for item in session.get_inputs()))
            try:
                for _ in range(_PROFILED):
                    session.run(None, feeds)
                events = json.loads(Path(session.end_profiling()).read_text())
            except _errors(runtime) as error:
                raise BuildError(f"onnxruntime cannot profile {folder / FILE}: {_line(error)}") from error
        found = _kernels(events, PROVIDERS[options.provider])
        if options.provider == "tensorrt" and not any(each.elsewhere and each.nodes and _is_layer(each.kind) for each in found):
            raise WrongMachineError(
                "not inspected: every layer is in TensorRT's engine, and ONNX Runtime does not say what each runs in there"
            )
        return found

    def open(self, folder: Path, options: OnnxRuntimeOptions) -> OnnxRuntimeSession:
        """Load the graph; on the CPU as it is."""
        runtime = require("onnxruntime")
        before = _plans(folder)
        settings = _settings(runtime, options, _level(options))
        session = _session(runtime, folder / FILE, settings, options)
        if _plans(folder) != before:
            raise BuildError(
                f"TensorRT did not take the compiled engine in {folder}, and compiled the model again",
                hint="build the engine again on this machine",
            )
        return OnnxRuntimeSession(runtime, session)


def _kernels(events: list[dict[str, Any]], provider: str) -> list[Executed]:
    """The kernels in a profile, each with the median of its times."""
    times: dict[tuple[str, str, str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            kind, where = event["args"]["op_name"], event["args"].get("provider", provider)
            key = (event["name"].removesuffix(_KERNEL), kind, _precision(kind, event["args"]), where)
            times.setdefault(key, []).append(event["dur"])
    return [
        Executed(
            (re.sub(r"^fused |(_token_\d+|_nchwc|/.*)$", "", name),),
            kind,
            precision,
            float(np.median(durations)),
            "" if where == provider else where.removesuffix("ExecutionProvider").replace("CUDA", "CUDA provider"),
        )
        for (name, kind, precision, where), durations in times.items()
    ]


def _precision(kind: str, facts: Mapping[str, Any]) -> str:
    """Operators on integers are named for it; all others compute in the floats that they read first."""
    if kind.startswith(("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize")):
        return "int8"
    first = next((dtype for tensor in facts.get("input_type_shape", ()) for dtype in tensor), "float")
    return first if first in ("float16", "bfloat16") else "float32"


def _is_layer(kind: str) -> bool:
    return any(word in kind for word in ("Conv", "Gemm", "MatMul"))


def _asked(model: Path) -> str:
    """What the graph asks for, from the io.json beside it."""
    return str(json.loads(model.with_name("io.json").read_text()).get("precision", "float32"))


def _tensorrt_version() -> str:
    """Of the Python package that onnxruntime-gpu finds TensorRT in; empty where the system has it."""
    try:
        return importlib.metadata.version("tensorrt")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _level(options: OnnxRuntimeOptions) -> str:
    """How far to optimize when an engine is loaded: a CPU's already is."""
    return "none" if options.provider == "cpu" else options.optimization


def _plans(folder: Path) -> dict[str, tuple[int, int]]:
    """The compiled engines, and what changes when one is written again."""
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.glob("*.engine")}


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


def _providers(options: OnnxRuntimeOptions, model: Path) -> list[Any]:
    """The provider that was asked and its options, then those that may take what it leaves: the audit tells of that."""
    cpu = PROVIDERS["cpu"]
    cuda = (
        PROVIDERS["cuda"],
        {
            "device_id": options.device_id,
            "use_tf32": 0,  # float32 is to mean float32
            "cudnn_conv_algo_search": options.cudnn_search.upper(),
        },
    )
    if options.provider == "cpu":
        return [cpu]
    if options.provider == "cuda":
        return [cuda, cpu]
    asked, batches = _asked(model), {"min": 1, "opt": options.opt_batch, "max": options.max_batch}
    shapes = {f"trt_profile_{name}_shapes": _shapes(model, batch) for name, batch in batches.items()}
    tensorrt = {
        "device_id": options.device_id,
        "trt_max_workspace_size": options.workspace_mib << 20,
        "trt_engine_cache_enable": 1,
        "trt_engine_cache_path": str(model.parent),
        # What the graph asks for: up to TensorRT 10 it takes quantized or half tensors only where the builder allows them.
        "trt_int8_enable": int(asked == "int8"),
        "trt_fp16_enable": int(asked == "float16"),
        **{name: text for name, text in shapes.items() if text},
    }
    return [(PROVIDERS["tensorrt"], tensorrt), cuda, cpu]


def _shapes(model: Path, batch: int) -> str:
    """The free inputs at one batch, as TensorRT's provider reads them: ``images:8x3x32x32``; nothing where all are fixed."""
    inputs = json.loads(model.with_name("io.json").read_text())["inputs"]
    if any(DYNAMIC in each["shape"][1:] for each in inputs):
        raise BuildError(f"{model} has an input of which more than the batch is free", hint="export fixed sizes")
    free = [each for each in inputs if each["shape"][0] == DYNAMIC]
    return ",".join(f"{each['name']}:{'x'.join(map(str, (batch, *each['shape'][1:])))}" for each in free)


def _session(runtime: Any, model: Path, settings: Any, options: OnnxRuntimeOptions, disabled: list[str] | None = None) -> Any:
    provider = PROVIDERS[options.provider]
    if options.provider != "cpu":
        # The CUDA provider has an option for this and TensorRT's has none. Read by NVIDIA's libraries when they are loaded.
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    refused: tuple[type[Exception], ...] = (*_errors(runtime), ValueError)
    try:
        session = runtime.InferenceSession(
            str(model),
            settings,
            providers=_providers(options, model),
            disabled_optimizers=disabled,
            enable_fallback=0,
        )
    except refused as error:
        if options.provider != "cpu" and not hardware.has_nvidia_driver():
            raise WrongMachineError(f"provider {options.provider} needs an NVIDIA GPU, and there is none here") from error
        raise BuildError(
            f"onnxruntime cannot load {model}: {_line(error)}", hint="check that the file is a whole ONNX model; export it again"
        ) from error
    if provider not in session.get_providers():
        raise WrongMachineError(
            f"onnxruntime could not start its {provider} and would run on {', '.join(session.get_providers())}",
            hint=f"a GPU, its driver, or a library is missing; {INSTALL}",
        )
    return session


def _errors(runtime: Any) -> tuple[type[Exception], ...]:
    state = runtime.capi.onnxruntime_pybind11_state
    names = ("Fail", "EPFail", "EngineError", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile")
    # UnicodeError: a message that quotes a damaged file
    return (*(getattr(state, name) for name in (*names, "NotImplemented", "RuntimeException")), RuntimeError, UnicodeError)


def _spec(item: Any) -> TensorSpec:
    dtype = item.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else DYNAMIC for size in item.shape)
    return TensorSpec(item.name, _DTYPES.get(dtype, dtype), shape)


def _line(error: Exception) -> str:
    """The library's message without its status number, on one line."""
    return " ".join(str(error).removeprefix("[ONNXRuntimeError] : ").split())
