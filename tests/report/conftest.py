"""Small synthetic run directories, written with the real artifact store."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest

from edgekd.artifacts import Store, content_id, write_json

HOSTILE = '<script>alert("x")</script> | `tick` [link](http://evil.test) \x1b[31mred\x1b[0m'


TENSORS = {"count": 21, "values": 1_250_000, "max_steps": 1.0, "module": "layer2.0", "differing": 2.4e-5}


def nearest_rank(values, percent):
    ordered = sorted(values)
    return ordered[max(-(-percent * len(ordered) // 100), 1) - 1]


def audit(precision):
    """engine.json's audit of two layers; int8 asks for both and gets one."""
    rows = [("stem.0", 300, "QLinearConv", precision), ("fc", 100, "Gemm", "float32")]
    return {
        "layers": [
            {"path": path, "op": "Conv", "macs": macs, "asked": precision, "got": got, "kind": kind, "time_us": 3.2}
            for path, macs, kind, got in rows
        ],
        "other_time": 0.1,
        "reason": "",
    }


class RunWriter:
    """Writes a run step by step, as the pipeline does: artifacts with the store, run.json last."""

    def __init__(self, root: Path):
        self.root, self.store, self.random, self.order = root, Store(root), random.Random(1), 0
        self.data = {
            "schema": 1,
            "name": "digits",
            "recipe_path": "recipes/digits.yaml",
            "recipe_text": "name: digits\nseed: 7\n",
            "command": "edgekd compress recipes/digits.yaml",
            "seed": 7,
            "started": "2026-01-02T03:04:05Z",
            "finished": "2026-01-02T03:07:05Z",
            "seconds": 180.0,
            "edgekd": "0.1.0",
            "smoke": False,
            "environment": {
                "cpu": {
                    "model": "Example CPU",
                    "arch": "x86_64",
                    "cores_logical": 4,
                    "cores_usable": 2,
                    "flags": ["avx2", "avx512_vnni"],
                },
                "memory_mib": 8192.0,
                "os": "Linux 6.1",
                "distribution": "Debian 12",
                "python": "3.11.9",
                "gpus": [],
                "gpu_reason": "no NVIDIA driver is loaded",
                "backends": {
                    "onnxruntime": {"available": True, "version": "1.32.0", "reason": "", "hint": ""},
                    "openvino": {
                        "available": False,
                        "version": None,
                        "reason": "openvino is not installed",
                        "hint": "pip install openvino",
                    },
                },
            },
            "task": "classification",
            "data": {
                "kind": "digits",
                "classes": 10,
                "counts": {"train": 1078, "val": 240, "test": 360, "calib": 119},
                "fingerprint": "f" * 64,
            },
            "steps": [],
            "models": [],
            "cells": [],
            "comparisons": [],
            "budget": None,
            "warnings": [],
        }

    def artifact(self, kind, stage, role, *, config, metrics, files, environment=None):
        """Write one artifact; ``files`` maps names to text or JSON-able data."""
        self.order += 1
        with self.store.draft(
            id=content_id({"order": self.order, "stage": stage, "role": role}),
            order=self.order,
            kind=kind,
            stage=stage,
            role=role,
            parents=(),
            config=config,
            environment=environment or {"edgekd": "0.1.0"},
        ) as draft:
            for name, content in files.items():
                path = draft.folder / name
                path.write_text(content) if isinstance(content, str) else write_json(path, content)
            draft.metrics = metrics
        folder = next(self.root.glob(f"{self.order:02}-*")).name
        self.data["steps"].append(
            {"folder": folder, "kind": kind, "stage": stage, "role": role, "status": "done", "reason": "", "seconds": 1.5}
        )
        return folder

    def model(self, role, stage, *, params, macs, accuracy, epochs=4, channels=(16, 32, 64), bits=32, terms=("task", "logits")):
        layers = [
            {
                "path": f"stage{number}.conv",
                "kind": "Conv2d",
                "channels": count,
                "channels_before": before,
                "params": 9 * count,
                "sparsity": 0.0,
                "weight_bits": bits,
                "activation_bits": bits,
            }
            for number, (count, before) in enumerate(zip(channels, (16, 32, 64), strict=True))
        ]
        history = [
            {
                "epoch": epoch,
                "lr": 0.1 / epoch,
                "terms": {name: 2.0 / epoch / (1 + number) for number, name in enumerate(terms)},
                "val": accuracy - 0.3 / epoch**2,
                "images_per_s": 900.0,
                "seconds": 1.1,
            }
            for epoch in range(1, epochs + 1)
        ]
        folder = self.artifact(
            "checkpoint",
            stage,
            role,
            config={"kind": stage},
            metrics={
                "params": params,
                "macs": macs,
                "metric": {"name": "accuracy", "value": accuracy},
                "val_metric": accuracy,
                "epochs": epochs,
                "layers": layers,
            },
            files={
                "model.safetensors": "weights",
                "model.json": {"model": {"name": "resnet8"}},
                "metrics.jsonl": "".join(json.dumps(record) + "\n" for record in history),
            },
            environment={"edgekd": "0.1.0", "libraries": {"torch": "2.13.0"}, "device": "cpu", "threads": 2},
        )
        self.data["models"].append({"role": role, "stage": stage, "title": "resnet8", "folder": folder})
        return folder

    def samples(self, middle_ms, count=400):
        return [int(middle_ms * 1e6 * (1 + 0.04 * abs(self.random.gauss(0, 1)))) for _ in range(count)]

    def latency(self, samples_ns):
        values = [sample / 1e6 for sample in samples_ns]
        return {
            "p50": nearest_rank(values, 50),
            "p90": nearest_rank(values, 90),
            "p99": nearest_rank(values, 99),
            "mean": sum(values) / len(values),
            "min": min(values),
            "max": max(values),
            "std": 0.01,
        }

    def cell(
        self,
        backend,
        precision,
        role,
        *,
        status="measured",
        reason=None,
        middle_ms=1.0,
        accuracy=0.98,
        size_bytes=400_000,
        **options,
    ):
        more = {key: options.pop(key) for key in ("valid", "warnings", "energy") if key in options}
        backend_options = {"name": backend, **options}
        cell = {
            "backend": backend_options,
            "backend_name": backend,
            "precision": precision,
            "target": "local",
            "role": role,
            "stage": "quantize" if precision == "int8" else "prune",
            "batch": 1,
            "status": status,
            "reason": reason,
            "onnx": None,
            "engine": None,
            "bench": None,
        }
        self.data["cells"].append(cell)
        if status in ("measured", "built"):
            cell["onnx"] = self.artifact(
                "onnx",
                "export",
                role,
                config={"encoding": precision},
                metrics={},
                files={
                    "model.onnx": "graph",
                    "parity.json": {
                        "outputs": [
                            {"output": "logits", "images": 240, "max_error": 1.5e-6, "cosine": 0.9999998, "changed": 0.0}
                        ],
                        "allowed": {"max_error": 1e-3, "max_changed": 0.02},
                        **({"tensors": TENSORS} if precision == "int8" else {}),
                    },
                },
                environment={"edgekd": "0.1.0", "onnx": "1.23.0"},
            )
            cell["engine"] = self.artifact(
                "engine",
                "engine",
                role,
                config={"backend": backend_options, "precision": precision, "target": "local"},
                metrics={"size_bytes": size_bytes},
                files={
                    "engine.json": {
                        "schema": 1,
                        "backend": backend_options,
                        "precision": precision,
                        "fingerprint": {"version": "1.32.0"},
                        "files": {"engine.bin": size_bytes},
                        "size_bytes": size_bytes,
                        "seconds": 0.8,
                        "audit": audit(precision),
                    }
                },
            )
        if status == "measured":
            samples_ns = self.samples(middle_ms)
            reading = {
                "clock_mhz": [2500.0, 2510.0],
                "clock_reason": "",
                "temperature_c": None,
                "temperature_reason": "this system has no readable thermal zone",
                "load_1m": 1.1,
                "gpu": None,
                "gpu_reason": "no NVIDIA driver is loaded",
            }
            record = {
                "backend": backend,
                "precision": precision,
                "batch": 1,
                "threads": options.get("threads", 1),
                "load_ms": 12.5,
                "first_ms": 3 * middle_ms,
                "warmup": {"runs": 20, "seconds": 0.3},
                "samples_ns": samples_ns,
                "latency_ms": self.latency(samples_ns),
                "peak_memory_mib": 90.0 + size_bytes / 2**20,
                "engine_memory_mib": 2.5,
                "size_bytes": size_bytes,
                "sensors": {"before": reading, "after": reading},
                "energy": None,
                "energy_reason": "" if "energy" in more else "this system has no energy counter (powercap)",
                "warnings": [],
                "valid": True,
                "host": {},
                "metric": {"name": "accuracy", "value": accuracy, "images": 360},
                **more,
            }
            cell["parity"] = record["parity"] = {
                "split": "test",
                "outputs": [
                    {
                        "output": "logits",
                        "images": 256,
                        "max_error": 0.02,
                        "cosine": 0.999,
                        "changed": 0.004,
                        "worst": {"image": 17, "position": [3], "expected": 4.25, "received": 4.5},
                    }
                ],
                "allowed": {"max_error": 0.1, "max_changed": 0.05},
                "metric": {"name": "accuracy", "before": 0.975, "after": 0.9725},
            }
            cell["bench"] = self.artifact("bench", "bench", role, config={"batch": 1}, metrics={}, files={"record.json": record})
        return len(self.data["cells"]) - 1

    def comparison(self, backend, cells, speedups, *, valid=True):
        """``cells[0]`` is the reference; ``speedups`` are those of the others."""
        middle = [1.0, *(1 / speedup for speedup in speedups)]
        samples = [self.samples(value, 60) for value in middle]
        record = {
            "batch": 1,
            "threads": 1,
            "engines": [
                {"engine": "", "backend": backend, "precision": "", "latency_ms": self.latency(own), "samples_ns": own}
                for own in samples
            ],
            "noise_floor": {"ratio": 1.0, "interval": [0.99, 1.01]},
            "ratios": [
                {
                    "engine": number,
                    "reference": 0,
                    "speedup": speedup,
                    "interval": [speedup * 0.98, speedup * 1.02],
                    "verdict": "faster" if speedup > 1.03 else "slower" if speedup < 0.97 else "no difference",
                }
                for number, speedup in enumerate(speedups, 1)
            ],
            "warnings": [],
            "valid": valid,
            "sensors": {},
            "host": {},
        }
        folder = self.artifact("bench", "compare", "student", config={}, metrics={}, files={"record.json": record})
        self.data["comparisons"].append({"folder": folder, "backend_name": backend, "target": "local", "cells": cells})
        return folder

    def ladder(self, *, reached=True, precision="int8", kept=("stage1.conv",)):
        """The checkpoint of a stage ``ptq`` whose first step was not good enough."""
        rows = [("int8", [], 0.91, 1.0), ("keep in float", list(kept), 0.972 if reached else 0.93, 0.8)]
        steps = [
            {
                "name": name,
                "kept": kept_,
                "metric": value,
                "drop": round(100 * (0.975 - value), 6),
                "int8_macs": share,
                "seconds": 1.25,
                "within": value > 0.97,
            }
            for name, kept_, value, share in rows
        ]
        ranking = [{"path": "stage1.conv", "divergence": 0.125}, {"path": "stage2.conv", "divergence": 0.0003}]
        found = {"max_drop": 0.5, "metric": "accuracy", "float": 0.975, "reached": reached, "precision": precision}
        metrics = {"params": 1000, "macs": 2000, "metric": {"name": "accuracy", "value": 0.97}, "val_metric": None, "epochs": 0}
        metrics |= {"layers": [], "ladder": {**found, "ranking": ranking, "steps": steps}}
        folder = self.artifact("checkpoint", "ptq", "student", config={}, metrics=metrics, files={"metrics.jsonl": ""})
        self.data["models"].append({"role": "student", "stage": "ptq", "title": "resnet8", "folder": folder})
        return folder

    def save(self):
        write_json(self.root / "run.json", self.data)
        return self.root


def fill(run: RunWriter) -> RunWriter:
    """A finished run with cells of every status, two comparisons and a budget that is missed."""
    run.model("teacher", "teacher", params=272_474, macs=40_800_000, accuracy=0.9889, terms=("task",))
    run.model("student_alone", "student_alone", params=78_042, macs=12_500_000, accuracy=0.9611, terms=("task",))
    run.model("student", "distill", params=78_042, macs=12_500_000, accuracy=0.9806)
    run.model("student", "prune", params=45_120, macs=7_400_000, accuracy=0.9778, channels=(16, 24, 40))
    run.model("student", "quantize", params=45_120, macs=7_400_000, accuracy=0.975, channels=(16, 24, 40), bits=8)
    teacher = run.cell("onnxruntime", "float32", "teacher", middle_ms=1.8, accuracy=0.9889, size_bytes=1_100_000, threads=1)
    plain = run.cell("onnxruntime", "float32", "student", middle_ms=0.62, accuracy=0.9778, size_bytes=190_000, threads=1)
    int8 = run.cell(
        "onnxruntime",
        "int8",
        "student",
        middle_ms=0.25,
        accuracy=0.975,
        size_bytes=70_000,
        threads=1,
        warnings=["other processes used 0.4 of 2 cores"],
    )
    run.comparison("onnxruntime", [plain, teacher, int8], [0.35, 2.5])
    ov_teacher = run.cell("openvino", "float32", "teacher", middle_ms=1.7, accuracy=0.9889, size_bytes=1_150_000, threads=1)
    ov_plain = run.cell("openvino", "float32", "student", middle_ms=0.5, accuracy=0.9778, size_bytes=200_000, threads=1)
    ov_int8 = run.cell(
        "openvino",
        "int8",
        "student",
        middle_ms=0.55,
        accuracy=0.9722,
        size_bytes=90_000,
        threads=1,
        valid=False,
        warnings=["the CPU's clock moved by 14%: 2500 MHz before, 2150 MHz after"],
    )
    run.comparison("openvino", [ov_plain, ov_teacher, ov_int8], [0.3, 0.91])
    run.cell(
        "tensorrt_rtx",
        "int8",
        "student",
        status="built",
        reason="built, not run: no GPU",
        size_bytes=310_000,
        compute_capabilities=["SM89"],
    )
    run.cell("tensorrt_rtx", "float32", "student", status="failed", reason=f"the parser refused node {HOSTILE}")
    run.cell("tensorrt_rtx", "float16", "student", status="skipped", reason="tensorrt_rtx is not installed")
    checks = [
        {"limit": "latency_ms", "allowed": 0.2, "measured": 0.2531, "ok": False, "cell": int8},
        {"limit": "size_mib", "allowed": 1.0, "measured": 70_000 / 2**20, "ok": True, "cell": int8},
        {"limit": "accuracy_drop", "allowed": 3.0, "measured": 1.39, "ok": True, "cell": int8},
    ]
    run.data["budget"] = {"limits": {"latency_ms": 0.2, "size_mib": 1.0, "accuracy_drop": 3.0}, "checks": checks, "ok": False}
    run.data["warnings"] = ["3 images of class 7 are duplicates"]
    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The finished run that ``full`` copies: the store waits for the disk after every file."""
    writer = fill(RunWriter(tmp_path_factory.mktemp("finished") / "run"))
    writer.save()
    return writer


@pytest.fixture
def writer(tmp_path):
    return RunWriter(tmp_path / "run")


@pytest.fixture
def full(writer, finished):
    """A finished run directory; ``writer`` goes on from it."""
    shutil.copytree(finished.root, writer.root, dirs_exist_ok=True)
    writer.data, writer.order = copy.deepcopy(finished.data), finished.order
    return writer.root


@pytest.fixture
def hostile():
    """The reason of the failed engine: tags, Markdown and terminal sequences."""
    return HOSTILE
