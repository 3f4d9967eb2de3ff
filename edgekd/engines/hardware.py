"""What an engine's bytes depend on in this machine: its instruction set, and its NVIDIA GPU where there is one."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
"""The CPU flags that engines choose their kernels by; the last line is ARM's."""
DOTS = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Those of x86 whose instructions add products of 8 bits in 32."""


def cpu(root: Path = Path("/")) -> dict[str, Any]:
    """Model name, architecture, cores and the flags of ``FLAGS`` that this CPU has (empty where the system does not tell).

    Args:
        root: Where /proc is looked for.
    """
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    found = set(listed.group(1).split()) if listed else set()
    pairs = set(re.findall(r"^physical id\s*:\s*(\d+)$.*?^core id\s*:\s*(\d+)$", text, re.MULTILINE | re.DOTALL))
    return {
        "model": name.group(1).strip() if name else platform.processor() or platform.machine(),
        "arch": platform.machine(),
        "cores_logical": os.cpu_count() or 1,
        "cores_physical": len(pairs) or None,
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "flags": [flag for flag in FLAGS if flag in found],
    }


def adds_in_16_bits(facts: Mapping[str, Any]) -> bool:
    """Whether the engines' kernels for a CPU add pairs of products u8 * s8 in 16 bits, which saturate.

    All of x86 without VNNI or AMX does (pmaddubsw), and x86 that does not tell its flags may; ARM does not.

    Args:
        facts: arch and flags, from :func:`cpu`.
    """
    return str(facts["arch"]).lower() in ("x86_64", "amd64", "i386", "i686") and not set(DOTS) & set(facts["flags"])


def has_nvidia_driver(root: Path = Path("/")) -> bool:
    """Whether a driver for an NVIDIA GPU is loaded; /dev/dxg is the one of Windows' Linux subsystem."""
    return any((root / path).exists() for path in ("dev/nvidiactl", "dev/dxg", "dev/nvhost-gpu", "dev/nvgpu"))


def gpus() -> tuple[list[dict[str, Any]], str]:
    """The NVIDIA GPUs (name, capability as ``SM89``, memory_mib, driver), and why the list is empty where it is."""
    if not has_nvidia_driver():
        return [], "no NVIDIA driver is loaded"
    try:
        import pynvml
    except ImportError:
        return [], "an NVIDIA driver is loaded; pip install nvidia-ml-py to read the GPU"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"NVML does not answer: {error}"
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(
                {
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "capability": f"SM{major}{minor}",
                    "memory_mib": pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**20,
                    "driver": pynvml.nvmlSystemGetDriverVersion(),
                }
            )
        return found, "" if found else "the NVIDIA driver lists no GPU"
    except pynvml.NVMLError as error:
        return [], f"NVML does not answer: {error}"
    finally:
        pynvml.nvmlShutdown()
