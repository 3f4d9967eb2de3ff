"""Hybrid bits and what teaches them: GHOST's comparison on real images, from one float twin per seed.

For each data set and seed a float model is trained once. From it start, with equal budgets: uniform bits (8, 6, 5, 4, 3); hybrid
bits of the size that uniform 5 bits have (and 4, and 3); hybrid bits under the float twin with each method, and uniform 5 bits
with ``ost``. Data of few images have more epochs, of many fewer. Values are those after the last epoch, mAP50, accuracy or mIoU
on the test split, by the trained model itself. ``--engines`` trains anew where this machine has not, and builds and measures
engines, into a file of its own: on a machine that does nothing else.

    EDGEKD_DATA=... python benchmarks/ghost.py [--data airbus bccd simd cifar10 camvid] [--seeds 3] [--epochs 40] [--qat-epochs 8]
    [--variant ...]

Each run is an ordinary ``edgekd compress`` into runs/ghost/DATA-SEED, so what is finished is reused. Writes after every variant
results/ghost_DATA.json, or ghost_engines_DATA.json: all values per seed, size, bit operations, gate rates, engines with raw
samples; and per variant the mean difference from the float twin and from uniform 5 bits with a 95 % interval (Student's t over
seeds).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from run_recipe import RESULTS, ROOT, compress

from edgekd.artifacts import read_artifact

RUNS = ROOT / "runs" / "ghost"
AUGMENT = {"mosaic": 0.5, "scale": 0.3, "translate": 0.1, "flip": True, "flip_vertical": True, "hue": 0.015} | {
    "saturation": 0.4,
    "value": 0.3,
}


def boxes(root: str, size_px: int) -> dict[str, Any]:
    """The recipe's sections for the small detector."""
    return {
        "task": {"kind": "detection", "strides": [4]},
        "data": {"kind": "coco", "root": root, "size_px": size_px, "augment": AUGMENT},
        "student": {"model": {"name": "superyolo_small", "arguments": {"width": 0.25}}},
    }


DATA: dict[str, dict[str, Any]] = {
    "airbus": boxes("det_airbus_aircraft", 256),
    "bccd": boxes("det_bccd", 256),
    "simd": boxes("det_simd_sample", 320),
    "cifar10": {
        "task": {"kind": "classification"},
        "data": {"kind": "image_folder", "root": "cls_cifar10", "size_px": 32, "limit_per_class": 1000}
        | {"augment": {"flip": True, "crop_padding_px": 4}},
        "student": {"model": {"name": "resnet20"}},
    },
    "camvid": {
        "task": {"kind": "segmentation", "class_weights": "balanced"},
        "data": {"kind": "masks", "root": "seg_camvid", "size_px": [128, 176]}
        | {"augment": {"scale": 0.3, "flip": True, "saturation": 0.3, "value": 0.3}},
        "student": {"model": {"name": "unet", "arguments": {"width": 8}}},
    },
}
OST_LAYERS = {"camvid": ["stage1", "stage2", "stage3", "stage4", "bottom", "top"]}
"""Taps that one-to-one methods compare, where the model has no blocks of its own."""
LONGER = {"simd": 5, "cifar10": 0.5}
"""Data of few images, or of many -> how many times as many epochs."""
BATCH = {"cifar10": 64}
"""Images of a batch, where not 8."""
UNIFORM = (8, 6, 5, 4, 3)
METHODS: dict[str, dict[str, Any]] = {
    "ost": {"name": "ost", "weight": 25},
    "afd": {"name": "afd", "weight": 25},
    "scrm": {"name": "scrm", "weight": 1},
    "hcl": {"name": "hcl", "weight": 0.1},
    "raw output": {"name": "raw_output", "weight": 0.1},
    "ost, weight 2.5": {"name": "ost", "weight": 2.5},
    "ost, published gate": {"name": "ost", "weight": 25, "detach_gate": False},
}
REFERENCE = "uniform 5"
LIKE = {"hybrid, size of 4 bits": "uniform 4", "hybrid, size of 3 bits": "uniform 3"}
"""Variant -> the uniform one whose size it may have, where that is not the reference."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Seeds -> the factor of Student's t for 95 %, two-sided."""


def variants() -> dict[str, dict[str, Any]]:
    """Name -> what distinguishes its quantize stage; the most telling first."""
    hybrid: dict[str, Any] = {"quantizer": {"kind": "hybrid"}}
    found = {
        "hybrid": hybrid,
        "hybrid + ost": {**hybrid, "method": METHODS["ost"]},
        REFERENCE: {"quantizer": {"kind": "hybrid", "bits": 5}},
    }
    found |= {f"uniform {bits}": {"quantizer": {"kind": "hybrid", "bits": bits, "k_max": 8}} for bits in UNIFORM if bits != 5}
    found |= {f"hybrid + {name}": {**hybrid, "method": method} for name, method in METHODS.items() if name != "ost"}
    found |= dict.fromkeys(LIKE, hybrid)
    found["uniform 5 + ost"] = {"quantizer": {"kind": "hybrid", "bits": 5}, "method": METHODS["ost"]}
    found["hybrid + ost, published ranges"] = {"quantizer": {"kind": "hybrid", "ranges": "unit"}, "method": METHODS["ost"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--variant", nargs="+", choices=list(variants()), default=list(variants()))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40, help="of the float training")
    parser.add_argument("--qat-epochs", type=int, default=8, help="of each training with quantizers")
    parser.add_argument("--threads", type=int, default=2, help="of the trainings")
    parser.add_argument("--engines", action="store_true", help="build and measure engines too")
    given = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    for data in given.data:
        restore(data, given)
        for name in given.variant:
            for seed in range(given.seeds):  # all seeds of a variant first: an unfinished comparison is still balanced
                like = LIKE.get(name, REFERENCE) if "bits" not in variants()[name]["quantizer"] else None
                # the budget of hybrid bits is what uniform bits take, with any seed
                size = None if like is None else uniform_size(run(data, 0, like, given, None))
                run(data, seed, name, given, size)
            write(data, given)


def restore(data: str, given: argparse.Namespace) -> None:
    """Put the values of the result file back where runs leave them: another machine then goes on with what is missing."""
    path = result(data, given)
    for value in json.loads(path.read_text())["values"] if path.is_file() else []:
        folder = place(data, value["seed"], value["variant"], given)
        budget = [stage["train"]["epochs"] for stage in value["recipe"]["stages"]]
        if not (folder / "value.json").is_file() and budget == epochs(data, given):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "value.json").write_text(json.dumps(value))


def result(data: str, given: argparse.Namespace) -> Path:
    """The result file: values of other machines' trainings are not mixed with engines of this one's."""
    return RESULTS / f"ghost_{'engines_' if given.engines else ''}{data}.json"


def finished(given: argparse.Namespace) -> Path:
    """The folder of all values that go into one kind of result file."""
    return RUNS / ("engines" if given.engines else "values")


def place(data: str, seed: int, name: str, given: argparse.Namespace) -> Path:
    """The folder of one value."""
    slug = name.replace(" ", "_").replace("+", "and").replace(",", "")
    return finished(given) / f"{data}-{seed}-{slug}-{given.epochs}-{given.qat_epochs}"


def epochs(data: str, given: argparse.Namespace) -> list[int]:
    """Of the float training and of that with quantizers."""
    return [round(count * LONGER.get(data, 1)) for count in (given.epochs, given.qat_epochs)]


def uniform_size(folder: Path) -> float:
    """Megabytes of the weights of a finished variant."""
    return float(json.loads((folder / "value.json").read_text())["account"]["size_mb"])


def run(data: str, seed: int, name: str, given: argparse.Namespace, size_mb: float | None) -> Path:
    """One ordinary run -> the folder that holds value.json; a finished one is not run again."""
    shared = RUNS / f"{data}-{seed}"
    folder = place(data, seed, name, given)
    if (folder / "value.json").is_file():
        return folder
    content = recipe(data, seed, name, given, size_mb)
    code = compress(content, folder / "recipe.yaml", shared, given.threads)
    if code not in (0, 1):  # 1: some engine failed or is slower, which the report says
        raise SystemExit(f"{data} {seed} {name} failed with exit code {code}")
    record = json.loads((shared / "run.json").read_text())
    report = json.loads((shared / "report" / "report.json").read_text())
    artifacts = {model["stage"]: read_artifact(shared / model["folder"]) for model in record["models"]}
    quantized = artifacts["quantize"]
    history = [json.loads(line) for line in (quantized.folder / "metrics.jsonl").read_text().splitlines()]
    value = {
        "data": data,
        "seed": seed,
        "variant": name,
        "float": artifacts["finetune"].metrics["metric"]["value"],
        "value": quantized.metrics["metric"]["value"],
        "metric": quantized.metrics["metric"]["name"],
        "account": quantized.metrics["hybrid"],
        "bits": {row["path"]: row["weight_bits"] for row in quantized.metrics["layers"]},
        "statistics": history[-1].get("statistics"),
        "seconds": quantized.seconds,
        "recipe": content,
        "engines": [
            {key: engine[key] for key in ("title", "backend", "precision", "metric", "latency_ms", "size_bytes", "status")}
            for engine in report["engines"]
        ],
        "comparisons": [
            json.loads((shared / comparison["folder"] / "record.json").read_text()) for comparison in record["comparisons"]
        ],
    }
    (folder / "value.json").write_text(json.dumps(value))
    return folder


def recipe(data: str, seed: int, name: str, given: argparse.Namespace, size_mb: float | None) -> dict[str, Any]:
    """The run's recipe as data."""
    stage = json.loads(json.dumps(variants()[name]))
    if data in OST_LAYERS and "method" in stage and stage["method"]["name"] != "raw_output":
        stage["method"]["layers"] = OST_LAYERS[data]
    if size_mb is not None:
        stage["quantizer"]["budget"] = {"size_mb": size_mb}
    alone, together = epochs(data, given)
    train = {"batch_size": BATCH.get(data, 8), "optimizer": "adamw", "ema_decay": 0.998}
    deploy = [
        {"backend": {"name": backend, "threads": 1}, "precision": ["float32", "int8"], "allow_fallback": True}
        for backend in ("onnxruntime", "openvino")
    ]
    return {
        "name": f"ghost-{data}-{seed}",
        "seed": seed,
        **DATA[data],
        "stages": [
            {
                "kind": "finetune",
                "train": {**train, "epochs": alone, "lr": 0.002, "weight_decay": 5e-4, "warmup_epochs": 2},
            },
            {"kind": "quantize", "task_weight": 1, "train": {**train, "epochs": together, "lr": 5e-4, "weight_decay": 0}} | stage,
        ],
        "deploy": deploy if given.engines else [],
    }


def write(data: str, given: argparse.Namespace) -> None:
    """The result file, from all variants that are finished."""
    pattern = f"{data}-*-{given.epochs}-{given.qat_epochs}/value.json"
    values = [json.loads(path.read_text()) for path in sorted(finished(given).glob(pattern))]

    def of(variant: str | None) -> dict[int, float]:
        return {value["seed"]: value["value"] for value in values if value["variant"] == variant}

    reference = of(REFERENCE)
    summary = {}
    for name in variants():
        found = [value for value in values if value["variant"] == name]
        if found:
            summary[name] = {
                "seeds": [value["seed"] for value in found],
                "mean": statistics.mean(value["value"] for value in found),
                "size_mb": statistics.mean(value["account"]["size_mb"] for value in found),
                "bops_g": statistics.mean(value["account"]["bops_g"] for value in found),
                "mean_bits": statistics.mean(value["account"]["mean_bits"] for value in found),
                "from_float": interval([value["value"] - value["float"] for value in found]),
                "from_uniform_5": interval(
                    [value["value"] - reference[value["seed"]] for value in found if value["seed"] in reference]
                ),
                "from_same_size": interval(
                    [value["value"] - same[value["seed"]] for value in found if value["seed"] in (same := of(LIKE.get(name)))]
                ),
            }
    path = result(data, given)
    path.write_text(json.dumps({"schema": 1, "data": data, "summary": summary, "values": values}).replace(f"{ROOT}/", ""))
    print(f"wrote {path.relative_to(ROOT)}: {len(values)} values")


def interval(differences: list[float]) -> dict[str, Any]:
    """Mean and, from two seeds on, its 95 % interval."""
    if not differences:
        return {"mean": None, "low": None, "high": None}
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    half = T_95.get(count, 2.776) * statistics.stdev(differences) / count**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


if __name__ == "__main__":
    main()
