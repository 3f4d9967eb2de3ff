"""TensorRT-RTX: engines for NVIDIA GPUs, built ahead of time for named compute capabilities on a machine that needs no GPU.

Networks are strongly typed: every precision is in the graph. This backend builds engines; it does not run
them yet, and opening one says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgekd._optional import require
from edgekd.engines import hardware
from edgekd.engines.base import (
    DYNAMIC,
    Availability,
    Executed,
    Session,
    WrongMachineError,
    check_choice,
    check_int,
    precision_refusal,
)
from edgekd.errors import BuildError, MissingDependency

FILE = "engine.trt"
CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121", "current")
_UINT8_AS_INT8 = "Defaulting to INT8 instead"
"""What the parser's warning says where it silently changes a graph's meaning."""


@dataclass(frozen=True)
class TensorRtRtxOptions:
    """Options of the tensorrt_rtx backend."""

    precisions: ClassVar[tuple[str, ...]] = ("float32", "float16", "int8")
    encoding: ClassVar[str] = "s8"

    name: Literal["tensorrt_rtx"] = "tensorrt_rtx"
    compute_capabilities: tuple[str, ...] = ("SM89",)
    """GPUs to build for: SM75 (Turing), SM80 and SM86 (Ampere), SM89 (Ada), SM120 and SM121 (Blackwell); or ``current`` alone,
    which needs the GPU."""
    workspace_mib: int = 256
    """Scratch memory that a layer may use, MiB, 1 to 65536."""
    opt_batch: int = 1
    """The batch that kernels are chosen for, where the model's batch is free."""
    max_batch: int = 64
    """The largest batch that the engine takes, where the model's batch is free, 1 to 65536."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute_capabilities", tuple(self.compute_capabilities))  # a job's JSON has a list
        for name in self.compute_capabilities:
            check_choice("compute_capabilities", name, CAPABILITIES)
        if not self.compute_capabilities or len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise ValueError("compute_capabilities must name at least one, and none twice")
        if "current" in self.compute_capabilities and len(self.compute_capabilities) > 1:
            raise ValueError("compute_capabilities: 'current' stands alone")
        check_int("workspace_mib", self.workspace_mib, 1, 65536)
        check_int("max_batch", self.max_batch, 1, 65536)
        check_int("opt_batch", self.opt_batch, 1, self.max_batch)

    def unsupported(self, precision: str) -> str | None:
        """Why a graph of this precision cannot be built, or None."""
        if precision != "float16" and precision in self.precisions and "SM75" in self.compute_capabilities:
            # It turns an int8 head's product into a float32 one, so that is refused as well (tried with TensorRT-RTX 1.7).
            return f"tensorrt_rtx has no float32 matrix products on SM75, and a {precision} graph has some; name SM80 or later"
        return precision_refusal("tensorrt_rtx", self.precisions, precision)


class TensorRtRtx:
    """The tensorrt_rtx backend."""

    name = "tensorrt_rtx"

    def available(self) -> Availability:
        """Whether tensorrt_rtx can be imported: enough to build."""
        try:
            trt = require("tensorrt_rtx")
        except MissingDependency as error:
            return Availability(False, reason=error.message, hint=error.hint)
        return Availability(True, version=trt.__version__)

    def fingerprint(self, options: TensorRtRtxOptions) -> dict[str, Any]:
        """Library version and the GPUs it is for; the machine that builds does not matter."""
        version = require("tensorrt_rtx").__version__
        return {"library": "tensorrt_rtx", "version": version, "compute_capabilities": list(options.compute_capabilities)}

    def build(self, model: Path, options: TensorRtRtxOptions, out: Path) -> list[str]:
        """Parse the graph and build the engine ahead of time."""
        trt = require("tensorrt_rtx")
        if options.compute_capabilities == ("current",) and not hardware.has_nvidia_driver():
            raise WrongMachineError(
                "not built: compute capability 'current' needs an NVIDIA GPU, and there is none here",
                hint=f"name the GPUs to build for: {', '.join(CAPABILITIES[:-1])}",
            )
        log: list[tuple[str, str]] = []
        try:
            data = _build(trt, model, options, log)
        finally:
            (out / "build.log").write_text("".join(f"{severity}: {text}\n" for severity, text in log))
        if data is None:
            errors = [text for severity, text in log if severity in ("ERROR", "INTERNAL_ERROR")]
            names = ", ".join(options.compute_capabilities)
            raise BuildError(
                f"tensorrt_rtx cannot build {model} for {names}: {errors[-1] if errors else 'it gives no reason'}",
                hint="see build.log; another precision or compute capability may work",
            )
        (out / FILE).write_bytes(data)
        return [FILE]

    def executed(self, _folder: Path, _options: TensorRtRtxOptions) -> list[Executed]:
        """Say why it cannot be inspected: the library reads an engine on its GPU only."""
        raise WrongMachineError("built, not inspected: TensorRT-RTX reads an engine only on its GPU")

    def open(self, folder: Path, _options: TensorRtRtxOptions) -> Session:
        """Say why it cannot be run."""
        if not (folder / FILE).is_file():
            raise BuildError(f"{folder / FILE} does not exist", hint="build the engine again")
        if not hardware.has_nvidia_driver():
            raise WrongMachineError("built, not run: no NVIDIA GPU here", hint=f"copy {FILE} to a machine with a GPU")
        raise WrongMachineError("built, not run: this version of edgekd builds TensorRT-RTX engines and does not run them")


def _logger(trt: Any, log: list[tuple[str, str]]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base comes with the module
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity != trt.ILogger.Severity.VERBOSE:  # thousands of lines
                log.append((severity.name, " ".join(text.split())))

    return Logger()


def _build(trt: Any, model: Path, options: TensorRtRtxOptions, log: list[tuple[str, str]]) -> bytes | None:
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(model)):
        raise BuildError(
            f"tensorrt_rtx cannot read {model}: {_parser_errors(parser)}",
            hint="check that the file is a whole ONNX model, and that this operator and its quantization are supported",
        )
    if any(_UINT8_AS_INT8 in text for _severity, text in log):
        raise BuildError(
            f"{model} has activations in uint8, which tensorrt_rtx would read as int8: codes above 127 would be cut off",
            hint="write the graph with signed activations (int8, zero point 0) for this backend",
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    config.num_compute_capabilities = len(options.compute_capabilities)
    for index, name in enumerate(options.compute_capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    profile, free = builder.create_optimization_profile(), False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if DYNAMIC in shape[1:]:
            raise BuildError(
                f"input {tensor.name} has shape {list(shape)}; only the batch may be free", hint="export fixed sizes"
            )
        if shape[0] == DYNAMIC:
            free = True
            profile.set_shape(tensor.name, *((batch, *shape[1:]) for batch in (1, options.opt_batch, options.max_batch)))
    if free:
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan)


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(
        (f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else "")
        + " ".join(error.desc().split())
        for error in errors
    )
