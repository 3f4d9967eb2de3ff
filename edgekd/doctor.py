"""``edgekd doctor``: what this machine is, and what that means for deploying on it."""

from __future__ import annotations

from typing import Any

from edgekd.bench import host


def inspect() -> dict[str, Any]:
    """The facts, JSON-able: see ``edgekd.bench.host.describe``; and ``advice``, what follows from them."""
    facts = host.describe()
    return {**facts, "advice": advise(facts)}


def advise(facts: dict[str, Any]) -> list[str]:
    """What the facts mean, one sentence or two per entry; the first is about INT8 on this CPU."""
    advice = [_int8(set(facts["cpu"]["flags"]), facts["cpu"]["arch"])]
    cores = facts["cpu"]["cores_usable"]
    if cores < 2:
        advice.append("Only one core: training and everything else share it with what is measured; close other programs.")
    if facts["memory_mib"] is not None and facts["memory_mib"] < 2048:
        advice.append(f"{facts['memory_mib']:.0f} MiB of memory: train elsewhere, and run only the worker here.")
    advice.extend(_gpu(gpu) for gpu in facts["gpus"])
    if not facts["gpus"]:
        why = facts["gpu_reason"]
        advice.append(f"No NVIDIA GPU ({why}): TensorRT-RTX engines can be built here for named compute capabilities, not run.")
    useless = () if facts["gpus"] else ("tensorrt",)  # it builds nothing for GPUs elsewhere
    missing = [
        (name, state["hint"]) for name, state in facts["backends"].items() if not state["available"] and name not in useless
    ]
    advice.extend(f"Backend {name} is not installed; {hint}" for name, hint in missing)
    return advice


def _int8(flags: set[str], arch: str) -> str:
    if "amx_int8" in flags:
        return "INT8: the CPU has AMX tiles for it; wide convolutions run about 4 times as fast as float32."
    if "avx512_vnni" in flags or "avx_vnni" in flags:
        return "INT8: the CPU has VNNI; wide convolutions run up to about 4 times as fast as float32."
    if "avx2" in flags:
        return (
            "INT8: AVX2 without VNNI. Expect 1.5 to 2 times the speed of float32, not 4; and its instruction (VPMADDUBSW) "
            "adds pairs of products in 16 bits, which overflow with 8-bit codes: edgekd writes activations of 7 bits for it."
        )
    if flags & {"i8mm", "asimddp"}:
        return "INT8: the CPU has ARM's dot products (SDOT, I8MM); wide convolutions run 2 to 4 times as fast as float32."
    if arch in ("aarch64", "arm64"):
        return "INT8: an ARM CPU whose dot products this system does not list; without them expect at most 2 times float32."
    return "INT8: no instruction for it is known here (no AVX2, VNNI, AMX or ARM dot products): expect smaller files, not speed."


def _gpu(gpu: dict[str, Any]) -> str:
    number = int(gpu["capability"].removeprefix("SM"))
    gains = (
        "INT8 and FP16 tensor cores"
        if number >= 75
        else "FP16 tensor cores but no INT8 ones"
        if number >= 70
        else "no tensor cores"
    )
    return f"GPU {gpu['name']} ({gpu['capability']}, driver {gpu['driver']}) has {gains}."


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as plain text, one line each."""
    cpu = facts["cpu"]
    cores = f"{cpu['cores_usable']} of {cpu['cores_logical']} logical cores usable"
    memory = "unknown" if facts["memory_mib"] is None else f"{facts['memory_mib'] / 1024:.1f} GiB"
    return [
        f"CPU       {cpu['model']} ({cpu['arch']}), {cores}",
        f"flags     {' '.join(cpu['flags']) or 'unknown'}",
        f"memory    {memory}",
        f"system    {facts['distribution'] or facts['os']}, {facts['os']}, Python {facts['python']}",
        *(f"GPU       {gpu['name']} ({gpu['capability']}), driver {gpu['driver']}" for gpu in facts["gpus"]),
        *([] if facts["gpus"] else [f"GPU       none: {facts['gpu_reason']}"]),
        *(
            f"backend   {name} {state['version']}" if state["available"] else f"backend   {name} is missing; {state['hint']}"
            for name, state in facts["backends"].items()
        ),
        *(f"advice    {sentence}" for sentence in advise(facts)),
    ]
