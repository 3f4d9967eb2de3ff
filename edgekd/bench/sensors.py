"""What the machine was doing while something was measured: clocks, temperatures, load, other processes, energy.

Every reading is optional: what this system does not tell is None, with a reason. Read from /proc and /sys directly, which needs
no package and works alike on a server and on a Jetson. ``root`` is where they are looked for.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.engines import hardware

ROOT = Path("/")


def read(root: Path = ROOT) -> dict[str, Any]:
    """One reading of every sensor, as the bench record holds it."""
    clock_mhz, clock_reason = clocks(root)
    temperature_c, temperature_reason = temperatures(root)
    gpu, gpu_reason = gpu_readings()
    return {
        "clock_mhz": clock_mhz,
        "clock_reason": clock_reason,
        "temperature_c": temperature_c,
        "temperature_reason": temperature_reason,
        "load_1m": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": gpu,
        "gpu_reason": gpu_reason,
    }


def clocks(root: Path = ROOT) -> tuple[list[float] | None, str]:
    """Each core's clock in MHz."""
    files = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"), key=str)
    try:
        if files:
            return [int(file.read_text()) / 1000 for file in files], ""
        listed = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", (root / "proc/cpuinfo").read_text(), re.MULTILINE)
    except (OSError, ValueError) as error:
        return None, f"the clocks cannot be read: {error}"
    return ([float(value) for value in listed], "") if listed else (None, "this system does not tell the clocks")


def temperatures(root: Path = ROOT) -> tuple[dict[str, float] | None, str]:
    """Each thermal zone's temperature in degrees Celsius."""
    found = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        with contextlib.suppress(OSError, ValueError):  # a zone that is switched off answers with an error
            found[f"{zone.name} {(zone / 'type').read_text().strip()}"] = int((zone / "temp").read_text()) / 1000
    return (found, "") if found else (None, "this system has no readable thermal zone")


def gpu_readings() -> tuple[list[dict[str, float]] | None, str]:
    """Each NVIDIA GPU's temperature (°C), SM clock (MHz) and power (W)."""
    if not hardware.has_nvidia_driver():
        return None, "no NVIDIA driver is loaded"
    try:
        import pynvml
    except ImportError:
        return None, "pip install nvidia-ml-py to read the GPU"
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            {
                "temperature_c": float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
                "clock_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
                "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            }
            for handle in handles
        ], ""
    except pynvml.NVMLError as error:
        return None, f"NVML does not answer: {error}"


@dataclass(frozen=True)
class CpuTime:
    """Seconds of CPU time since some fixed moment, and the moment of the reading."""

    wall_s: float
    busy_s: float
    """All processes of the machine together."""
    stolen_s: float
    """Taken by other virtual machines on the same host."""
    own_s: float
    """This process."""


def cpu_time(root: Path = ROOT) -> CpuTime | None:
    """A reading of the cores that this process may use, to take differences of; None where there is no /proc/stat."""
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set()
    try:
        lines = [line.split() for line in (root / "proc/stat").read_text().splitlines()]
        listed = [fields for fields in lines if fields and fields[0] in mine] or lines[:1]  # the first line is all cores
        cores = [[int(value) for value in fields[1:9]] for fields in listed]
        user, nice, system, _idle, _iowait, irq, softirq, steal = (sum(values) for values in zip(*cores, strict=True))
    except (OSError, ValueError, IndexError):
        return None
    tick = os.sysconf("SC_CLK_TCK")
    return CpuTime(time.monotonic(), (user + nice + system + irq + softirq) / tick, steal / tick, time.process_time())


@dataclass(frozen=True)
class Neighbours:
    """How many cores were not ours, on average over an interval."""

    other_cores: float
    stolen_cores: float


def neighbours(before: CpuTime | None, after: CpuTime | None) -> Neighbours | None:
    """What other processes and other machines used between two readings, in cores."""
    if before is None or after is None or after.wall_s - before.wall_s < 0.1:  # /proc/stat ticks every 10 ms
        return None
    wall_s = after.wall_s - before.wall_s
    other_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return Neighbours(max(other_s, 0.0) / wall_s, max(after.stolen_s - before.stolen_s, 0.0) / wall_s)


def judge(
    before: dict[str, Any], after: dict[str, Any], others: Neighbours | None, *, threads: int, cores: int
) -> tuple[list[str], bool]:
    """Warnings about a measurement, and whether it may be used at all.

    It is invalid where clocks moved by more than 10 %, where other processes left fewer free cores than the engine has threads,
    or where other virtual machines took more than 5 % of a core.

    Args:
        before: ``read()`` after warm-up: an idle core clocks lower than a busy one.
        after: ``read()`` right after the last inference.
        others: What the neighbours used meanwhile.
        threads: Of the engine.
        cores: That this process may use.
    """
    warnings, valid = [], True
    if before["clock_mhz"] and after["clock_mhz"]:
        start, end = max(before["clock_mhz"]), max(after["clock_mhz"])
        moved = abs(end - start) / start
        if moved > 0.02:
            warnings.append(f"the CPU's clock moved by {moved:.0%}: {start:.0f} MHz before, {end:.0f} MHz after")
        valid &= moved <= 0.10
    if others is not None and others.other_cores > 0.25:
        contended = others.other_cores + threads > cores + 0.1
        effect = f"fewer than the {threads} that the engine needs were free" if contended else "shared caches and clocks suffer"
        warnings.append(f"other processes used {others.other_cores:.1f} of {cores} cores: {effect}")
        valid &= not contended
    if others is not None and others.stolen_cores > 0.02:
        warnings.append(f"other virtual machines took {others.stolen_cores:.0%} of a core")
        valid &= others.stolen_cores <= 0.05
    if hasattr(sys, "gettotalrefcount") or sys.flags.dev_mode:
        warnings.append("this is a debug build or development mode of Python: small models look slower than they are")
    return warnings, valid


class EnergyMeter:
    """Energy of the CPU packages through the kernel's powercap interface (RAPL).

    Args:
        root: Where /sys is looked for.
    """

    source = "RAPL, CPU packages, idle power subtracted"

    def __init__(self, root: Path = ROOT) -> None:
        self.reason = ""
        self._domains: list[tuple[Path, int]] = []
        try:
            for folder in sorted((root / "sys/class/powercap").glob("*rapl:[0-9]*")):
                if (folder / "name").read_text().startswith("package"):
                    int((folder / "energy_uj").read_text())
                    self._domains.append((folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())))
        except (OSError, ValueError) as error:  # usually: only root may read it
            self.reason, self._domains = f"the energy counter cannot be read: {error}", []
        if not self._domains and not self.reason:
            self.reason = "this system has no energy counter (powercap)"

    def __bool__(self) -> bool:
        return bool(self._domains)

    def counters_uj(self) -> list[int]:
        """Each package's counter in microjoules."""
        return [int(file.read_text()) for file, _range in self._domains]

    def joules(self, before_uj: list[int], after_uj: list[int]) -> float:
        """Energy between two readings; a counter that wrapped once is unwrapped."""
        pairs = zip(before_uj, after_uj, self._domains, strict=True)
        return sum((after - before) % (limit + 1) for before, after, (_file, limit) in pairs) / 1e6

    def idle_watts(self, seconds: float = 0.5) -> float:
        """The packages' power while this process sleeps."""
        before, start = self.counters_uj(), time.monotonic()
        time.sleep(seconds)
        return self.joules(before, self.counters_uj()) / (time.monotonic() - start)
