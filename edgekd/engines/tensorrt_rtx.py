"""TensorRT-RTX: engines for NVIDIA GPUs, built ahead of time for named compute capabilities on a machine that needs no GPU.

Networks are strongly typed: every precision is in the graph. This backend builds engines; it does not run
them yet, and opening one says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgekd._optional import require
from edgekd.engines import _trt, hardware
from edgekd.engines.base import (
    Availability,
    Executed,
    Session,
    WrongMachineError,
    check_choice,
    check_int,
    precision_refusal,
)
from edgekd.errors import BuildError, MissingDependency

CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121", "current")


@dataclass(frozen=True)
class TensorRtRtxOptions:
    """Options of the tensorrt_rtx backend."""

    precisions: ClassVar[tuple[str, ...]] = ("float32", "float16", "int8")
    encoding: ClassVar[str] = "s8"

    name: Literal["tensorrt_rtx"] = "tensorrt_rtx"
    compute_capabilities: tuple[str, ...] = ("SM89",)
    """GPUs to build for: SM75 (Turing), SM80 and SM86 (Ampere), SM89 (Ada), SM120 and SM121 (Blackwell); or ``current`` alone,
    which needs the GPU."""
    workspace_mib: int = 1024
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

    def available(self, _options: Any = None) -> Availability:
        """Whether tensorrt_rtx can be imported: enough to build."""
        try:
            trt = require("tensorrt_rtx")
        except MissingDependency as error:
            return Availability(False, reason=error.message, hint=error.hint)
        return Availability(True, version=trt.__version__)

    def fingerprint(self, options: TensorRtRtxOptions) -> dict[str, Any]:
        """Library version and the GPUs it is for; the machine that builds does not matter."""
        version = require("tensorrt_rtx").__version__
        names = list(options.compute_capabilities)
        if names == ["current"] and (gpus := hardware.gpus()[0]):
            names = [gpus[0]["capability"]]
        return {"library": "tensorrt_rtx", "version": version, "compute_capabilities": names}

    def build(self, model: Path, options: TensorRtRtxOptions, out: Path) -> list[str]:
        """Parse the graph and build the engine ahead of time."""
        trt = require("tensorrt_rtx")
        if options.compute_capabilities == ("current",) and not hardware.has_nvidia_driver():
            raise WrongMachineError(
                "not built: compute capability 'current' needs an NVIDIA GPU, and there is none here",
                hint=f"name the GPUs to build for: {', '.join(CAPABILITIES[:-1])}",
            )
        gpu = next(iter(hardware.gpus()[0]), None) if options.compute_capabilities == ("current",) else None
        if gpu is not None and not hasattr(trt.ComputeCapability, gpu["capability"]):  # it would build one that runs nowhere
            raise WrongMachineError(
                f"not built: TensorRT-RTX does not support {gpu['capability']} ({gpu['name']})",
                hint=f"use backend tensorrt on this GPU, or name other GPUs to build for: {', '.join(CAPABILITIES[:-1])}",
            )
        with _trt.Build(trt, self.name, model, out) as build:
            build.parse()
            build.config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
            build.config.num_compute_capabilities = len(options.compute_capabilities)
            for index, name in enumerate(options.compute_capabilities):
                build.config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
            build.set_batch(options.opt_batch, options.max_batch)
            data = build.serialize(", ".join(options.compute_capabilities), " or compute capability")
        (out / _trt.FILE).write_bytes(data)
        return [_trt.FILE]

    def executed(self, _folder: Path, _options: TensorRtRtxOptions) -> list[Executed]:
        """Say why it cannot be inspected: the library reads an engine on its GPU only."""
        raise WrongMachineError("built, not inspected: TensorRT-RTX reads an engine only on its GPU")

    def open(self, folder: Path, _options: TensorRtRtxOptions) -> Session:
        """Say why it cannot be run."""
        if not (folder / _trt.FILE).is_file():
            raise BuildError(f"{folder / _trt.FILE} does not exist", hint="build the engine again")
        if not hardware.has_nvidia_driver():
            raise WrongMachineError("built, not run: no NVIDIA GPU here", hint=f"copy {_trt.FILE} to a machine with a GPU")
        raise WrongMachineError("built, not run: this version of edgekd builds TensorRT-RTX engines and does not run them")
