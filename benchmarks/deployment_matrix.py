"""The deployment matrix: families of networks x backends x precisions, trained and measured on real images of 112 pixels.

Each family is trained in float, then quantized with training (QAT), with several seeds; every engine is built, audited, evaluated
on the test split, and measured against its float twin in turns, at one thread and at two. Each run is an ordinary
``edgekd compress``, so that the numbers are those that a user would get; it is resumed where it was interrupted.

    EDGEKD_DATA=... python benchmarks/deployment_matrix.py [--family resnet18 ...] [--seeds 3] [--epochs 150] [--qat-epochs 20]

Needs Imagenette (cls_imagenette128 under $EDGEKD_DATA). Writes results/deployment_matrix.json: of every run the training budget,
every engine (built or why not, audit, metric) and every comparison with its raw samples in nanoseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from run_recipe import RESULTS, ROOT, collect

RESULT = RESULTS / "deployment_matrix.json"
RUNS = ROOT / "runs" / "matrix"
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "callable", "call": "networks:resnet18", "taps": {"logits": "fc"}},
    "vgg8": {"name": "vgg8"},
    "mobilenetv2": {"name": "mobilenetv2"},
    "shufflenetv2": {"name": "shufflenetv2"},
}
CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=150, help="of the float training")
    parser.add_argument("--qat-epochs", type=int, default=20, help="of the training with quantizers")
    parser.add_argument("--threads", type=int, default=2, help="of the trainings")
    given = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    for seed in range(given.seeds):  # all families of one seed first: an unfinished matrix is still balanced
        for family in given.family:
            run(family, seed, given)
    runs = [kept(path) for path in sorted(RUNS.glob("*/report/report.json"))]
    RESULT.write_text(json.dumps({"schema": 1, "runs": runs}).replace(f"{ROOT}/", ""))
    print(f"wrote {RESULT.relative_to(ROOT)}: {len(runs)} runs")


def run(family: str, seed: int, given: argparse.Namespace) -> None:
    """One ordinary run; what is finished of it is reused."""
    name = f"{family}-{seed}"
    file = RUNS / f"{name}.yaml"
    file.write_text(json.dumps(recipe(name, FAMILIES[family], seed, given), indent=1))  # JSON is YAML
    folders = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "edgekd", "compress", str(file.relative_to(ROOT)), "--out", f"runs/matrix/{name}"]
    done = subprocess.run(command, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": folders})
    report = RUNS / name / "report" / "report.json"
    if done.returncode not in (0, 1, 3) or not report.is_file():  # 1: some engine failed or is slower, which the report says
        raise SystemExit(f"{name} failed with exit code {done.returncode}")


def recipe(name: str, model: dict[str, Any], seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """The run's recipe as data."""
    cpu = [
        {"backend": {"name": backend, "threads": threads}, "precision": ["float32", "int8"], "allow_fallback": True}
        for backend in ("onnxruntime", "openvino")
        for threads in (1, 2)
    ]
    gpu = [
        {"backend": {"name": "tensorrt_rtx", "compute_capabilities": [capability]}, "precision": ["float32", "float16", "int8"]}
        for capability in CAPABILITIES
    ]
    return {
        "name": name,
        "seed": seed,
        "task": {"kind": "classification"},
        "data": {
            "kind": "image_folder",
            "root": "cls_imagenette128",
            "size_px": 112,
            "augment": {"flip": True, "crop_padding_px": 8},
        },
        "student": {"model": model},
        "stages": [
            {"kind": "finetune", "train": {"epochs": given.epochs, "batch_size": 50, "lr": 0.05, "warmup_epochs": 2}},
            {"kind": "quantize", "train": {"epochs": given.qat_epochs, "batch_size": 50, "lr": 0.002}},
        ],
        "compute": {"precision": "bf16-mixed", "threads": given.threads},
        "deploy": [
            *cpu,
            *(gpu if seed == 0 else []),
        ],  # engines for GPUs elsewhere are built of one seed: the others differ in weights
        "measure": {"warmup_s": 0.5, "duration_s": 2, "compare_s": 8},
    }


def kept(report: Path) -> dict[str, Any]:
    """What a run says of its engines, without what only draws its pictures."""
    found = collect(report.parents[1])
    whole = found["report"]
    family, _, seed = whole["name"].rpartition("-")
    columns = ("backend", "precision", "threads", "compute_capabilities", "status", "reason", "metric", "latency_ms", "audit")
    return {
        "family": family,
        "seed": int(seed),
        "recipe": whole["recipe"],
        "models": whole["models"],
        "engines": [{key: engine.get(key) for key in (*columns, "size_bytes", "valid")} for engine in whole["engines"]],
        "summaries": whole["comparisons"],
        "comparisons": found["comparisons"],
        "environment": whole["environment"],
        "warnings": whole["warnings"],
    }


if __name__ == "__main__":
    main()
