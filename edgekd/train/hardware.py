"""Where training runs: the recipe's ``compute`` section, and the Fabric made from it."""

from __future__ import annotations

import atexit
import os
import shlex
import sys
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from edgekd._config import Config
from edgekd.errors import RecipeError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class ComputeConfig(Config):
    """Where and how training runs. Engines are measured elsewhere: see ``deploy``."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA GPU where there is one."""
    devices: int = Field(1, ge=1, le=1024)
    """Processes in all, one per GPU or CPU share. More than one is started by torchrun."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several processes work together."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic of the forward and backward pass; the weights stay float32."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads per process; null leaves torch's choice. Another number of threads gives other last bits."""


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among them; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def check_processes(config: ComputeConfig, command: str) -> None:
    """Refuse a recipe whose number of processes differs from what was started.

    Raises:
        RecipeError: With the command to use instead.
    """
    if config.devices != world_size():
        # This very Python: `torchrun` need not be on the path, and where it is, it may belong to another environment. And
        # --standalone, because torchrun's fixed port may be another run's.
        launcher = f"{shlex.quote(sys.executable)} -m torch.distributed.run"
        hint = (
            f"start it with: {launcher} --standalone --nproc-per-node {config.devices} -m {command}"
            if config.devices > 1
            else f"set compute.devices to {world_size()}, or start it without torchrun"
        )
        raise RecipeError(f"compute.devices is {config.devices}, but {world_size()} process(es) were started", hint=hint)


def make_fabric(config: ComputeConfig) -> Fabric:
    """The Fabric of this run, launched (under torchrun: with its process group).

    Raises:
        RecipeError: This machine lacks what the recipe asks for.
    """
    import torch
    from lightning_fabric import Fabric

    nodes = max(1, world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size()))))
    per_node = max(1, config.devices // nodes)
    accelerator = _accelerator(config, torch.cuda.device_count(), per_node)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    fabric = Fabric(
        accelerator=accelerator,
        devices=per_node,
        num_nodes=nodes,
        strategy="ddp" if config.strategy == "auto" and config.devices > 1 else config.strategy,
        precision=config.precision,
    )
    fabric.launch()
    if fabric.world_size > 1:
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    import torch.distributed

    # Fabric does this for GPUs only; gloo's threads, still running when the interpreter goes, abort the process now and then.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _accelerator(config: ComputeConfig, gpus: int, per_node: int) -> Literal["cpu", "cuda"]:
    """What ``auto`` means here, with the checks that Fabric would leave to a foreign error or to a silent replacement."""
    accelerator: Literal["cpu", "cuda"] = (
        "cuda" if config.accelerator == "cuda" or (config.accelerator == "auto" and gpus) else "cpu"
    )
    if accelerator == "cuda" and gpus < per_node:
        raise RecipeError(
            f"compute.accelerator {config.accelerator} with {per_node} device(s) on this machine needs as many CUDA GPUs; "
            f"torch finds {gpus}",
            hint="set compute.accelerator to cpu, or lower compute.devices",
        )
    if accelerator == "cpu" and config.precision == "16-mixed":
        raise RecipeError(
            "compute.precision 16-mixed needs a CUDA GPU; this run is on the CPU", hint="use bf16-mixed, or 32-true, on a CPU"
        )
    return accelerator
