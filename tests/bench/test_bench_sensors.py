"""Sensors read from a made-up /proc and /sys, so that the tests know the truth."""

import os

import pytest

from edgekd.bench import host, sensors
from edgekd.engines import hardware

QUIET = {"clock_mhz": [3000.0, 1500.0]}


def put(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_clocks_in_megahertz(tmp_path):
    assert sensors.clocks(tmp_path) == (None, pytest.approx(sensors.clocks(tmp_path)[1]))
    put(tmp_path, "proc/cpuinfo", "processor : 0\ncpu MHz\t\t: 2445.424\nprocessor : 1\ncpu MHz : 2000\n")
    assert sensors.clocks(tmp_path) == ([2445.424, 2000.0], "")
    put(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "3100000\n")
    assert sensors.clocks(tmp_path) == ([3100.0], "")


def test_temperatures_in_degrees(tmp_path):
    assert sensors.temperatures(tmp_path)[0] is None
    put(tmp_path, "sys/class/thermal/thermal_zone0/type", "x86_pkg_temp\n")
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", "45500\n")
    put(tmp_path, "sys/class/thermal/thermal_zone1/type", "gpu\n")  # a zone without a readable temperature
    assert sensors.temperatures(tmp_path) == ({"thermal_zone0 x86_pkg_temp": 45.5}, "")


def test_energy_counts_packages_once_and_unwraps(tmp_path):
    for name, label, energy in (
        ("intel-rapl:0", "package-0", 900),
        ("intel-rapl:0:0", "core", 5),
        ("intel-rapl:1", "package-1", 100),
    ):
        put(tmp_path, f"sys/class/powercap/{name}/name", label)
        put(tmp_path, f"sys/class/powercap/{name}/energy_uj", str(energy))
        put(tmp_path, f"sys/class/powercap/{name}/max_energy_range_uj", "999")
    meter = sensors.EnergyMeter(tmp_path)
    assert meter
    assert meter.counters_uj() == [900, 100]
    # the first went on to 999 and from 0 to 99: 200 microjoules; the second from 100 to 150
    assert meter.joules([900, 100], [100, 150]) == pytest.approx(250e-6)


def test_no_energy_counter_has_a_reason(tmp_path):
    meter = sensors.EnergyMeter(tmp_path)
    assert not meter
    assert "no energy counter" in meter.reason
    put(tmp_path, "sys/class/powercap/intel-rapl:0/name", "package-0")
    assert "cannot be read" in sensors.EnergyMeter(tmp_path).reason


def test_neighbours_are_what_is_not_ours():
    before = sensors.CpuTime(wall_s=100.0, busy_s=50.0, stolen_s=1.0, own_s=3.0)
    after = sensors.CpuTime(wall_s=102.0, busy_s=53.0, stolen_s=1.1, own_s=5.0)
    others = sensors.neighbours(before, after)
    assert others.other_cores == pytest.approx(0.5)  # 3 s busy, 2 of them ours, in 2 s
    assert others.stolen_cores == pytest.approx(0.05)
    assert sensors.neighbours(None, after) is None


def test_cpu_time_of_this_machine(tmp_path):
    reading = sensors.cpu_time()
    assert reading is None or reading.busy_s > 0
    put(tmp_path, "proc/stat", "cpu  100 20 30 4000 5 6 7 8 0 0\n")
    made_up = sensors.cpu_time(tmp_path)
    ticks = 100  # per second, on every Linux that Python runs on today
    assert (made_up.busy_s, made_up.stolen_s) == ((100 + 20 + 30 + 6 + 7) / ticks, 8 / ticks)
    mine = min(os.sched_getaffinity(0))
    other = max(os.sched_getaffinity(0)) + 1  # a core that this process may not use is no neighbour of it
    text = f"cpu  900 0 0 0 0 0 0 0 0 0\ncpu{mine} 50 0 0 0 0 0 0 1 0 0\ncpu{other} 850 0 0 0 0 0 0 0 0 0\n"
    put(tmp_path, "proc/stat", text)
    assert sensors.cpu_time(tmp_path).busy_s == 50 / ticks


@pytest.mark.parametrize(
    ("after_mhz", "others", "threads", "words", "valid"),
    [
        ([3000.0], sensors.Neighbours(0.0, 0.0), 1, [], True),
        ([2900.0], sensors.Neighbours(0.0, 0.0), 1, ["clock moved by 3%"], True),
        ([2000.0], sensors.Neighbours(0.0, 0.0), 1, ["clock moved by 33%"], False),
        ([3000.0], sensors.Neighbours(0.9, 0.0), 1, ["other processes used 0.9 of 2 cores: shared"], True),
        ([3000.0], sensors.Neighbours(0.9, 0.0), 2, ["fewer than the 2 that the engine needs"], False),
        ([3000.0], sensors.Neighbours(0.0, 0.04), 1, ["other virtual machines took 4%"], True),
        ([3000.0], sensors.Neighbours(0.0, 0.3), 1, ["other virtual machines took 30%"], False),
        (None, None, 1, [], True),
    ],
)
def test_judging_a_measurement(after_mhz, others, threads, words, valid, monkeypatch):
    warnings, verdict = sensors.judge(QUIET, {"clock_mhz": after_mhz}, others, threads=threads, cores=2)
    assert verdict == valid
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))


def test_cpu_flags_of_other_machines(tmp_path):
    put(tmp_path, "proc/cpuinfo", "model name\t: Xeon\nflags\t\t: fpu avx2 avx512_vnni amx_int8 sse\n")
    assert hardware.cpu(tmp_path)["flags"] == ["avx2", "avx512_vnni", "amx_int8"]
    assert hardware.cpu(tmp_path)["model"] == "Xeon"
    put(tmp_path, "proc/cpuinfo", "processor : 0\nFeatures : fp asimd asimddp\nModel : Jetson\n")
    assert hardware.cpu(tmp_path)["flags"] == ["asimd", "asimddp"]


def test_memory_limit_of_a_container(tmp_path):
    put(tmp_path, "proc/meminfo", "MemTotal:       2097152 kB\n")
    assert host.memory_mib(tmp_path) == 2048
    put(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    assert host.memory_mib(tmp_path) == 2048
    put(tmp_path, "sys/fs/cgroup/memory.max", str(512 * 2**20))
    assert host.memory_mib(tmp_path) == 512


def test_resident_memory(tmp_path):
    put(tmp_path, "proc/self/status", "Name: x\nVmHWM:     4096 kB\nVmRSS:    1024 kB\n")
    assert (host.rss_mib(root=tmp_path), host.rss_mib("VmHWM", tmp_path)) == (1.0, 4.0)
    assert host.rss_mib(root=tmp_path / "none") is None


def test_description_is_json_and_complete():
    import json

    facts = json.loads(json.dumps(host.describe(["null"])))
    assert facts["cpu"]["cores_usable"] >= 1
    assert facts["backends"] == {"null": {"available": True, "version": "1", "reason": "", "hint": ""}}
    assert bool(facts["gpus"]) != bool(facts["gpu_reason"])
