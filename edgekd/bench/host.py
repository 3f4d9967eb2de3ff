"""What the machine is: recorded with every measurement, and shown by ``edgekd doctor``."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgekd.engines import BACKENDS, hardware


def describe(backends: Iterable[str] = BACKENDS) -> dict[str, Any]:
    """CPU, memory, operating system, Python, GPUs and backends, as JSON-able facts.

    Args:
        backends: Which to import and report; a measuring process names the ones that it has loaded anyway.
    """
    gpus, gpu_reason = hardware.gpus()
    return {
        "cpu": hardware.cpu(),
        "memory_mib": memory_mib(),
        "os": f"{platform.system()} {platform.release()}",
        "distribution": _distribution(),
        "python": platform.python_version(),
        "gpus": gpus,
        "gpu_reason": gpu_reason,
        "backends": {name: _backend(name) for name in backends},
    }


def memory_mib(root: Path = Path("/")) -> float | None:
    """Memory that this process may use, MiB: the machine's, or its container's limit where that is lower."""
    try:
        total = int(re.findall(r"MemTotal:\s+(\d+) kB", (root / "proc/meminfo").read_text())[0]) / 1024
    except (OSError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20 if hasattr(os, "sysconf") else None
    try:
        return min(total, int((root / "sys/fs/cgroup/memory.max").read_text()) / 2**20)
    except (OSError, ValueError):  # no such file, or "max"
        return total


def rss_mib(field: str = "VmRSS", root: Path = Path("/")) -> float | None:
    """This process's resident memory (``VmRSS``) or its peak (``VmHWM``), MiB; None where there is no /proc.

    ``getrusage`` is no substitute for the peak: its ru_maxrss survives exec, so a worker would report the size of the process
    that started it.
    """
    try:
        return int(re.findall(rf"{field}:\s+(\d+) kB", (root / "proc/self/status").read_text())[0]) / 1024
    except (OSError, IndexError):
        return None


def _backend(name: str) -> dict[str, Any]:
    found = BACKENDS[name].available()
    return {"available": found.ok, "version": found.version or None, "reason": found.reason, "hint": found.hint}


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None
