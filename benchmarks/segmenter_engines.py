"""Every segmenter of edgekd in its ordinary size through every backend: does it build, does it run, and in integers?

Each is an ordinary run of ``edgekd compress``: a short training on real images, stage ``ptq``, and engines of both files on ONNX
Runtime, OpenVINO and TensorRT-RTX, which only builds here. What the networks have learned is not the question, so the training is
one epoch of few images (but for LONGER); checks and audit are those of any run. Speed is not measured.

    EDGEKD_DATA=... python benchmarks/segmenter_engines.py [--model unet fanet ...]

Writes results/segmenter_engines.json after every model: parameters, MACs, each engine's status and the share of the MACs that its
library runs in the precision that was asked, and how far outputs are from those before at every hop. Models that are not run now
keep their rows.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from run_recipe import RESULTS, ROOT, compress

RESULT = RESULTS / "segmenter_engines.json"
SEGMENTERS: dict[str, dict[str, Any]] = {
    "unet": {},
    "slim_unet": {"widths": [1, 0.5]},
    "slim_pspnet": {"widths": [1, 0.5]},
    "slim_deeplabv3plus": {"backbone": "mobilenet_v2", "widths": [1, 0.5]},
    "mobile_unet": {},
    "fanet": {},
    "sk_unet, width 8": {"width": 8},
    "segformer_b0": {},
    "segformer_b1": {},
    "segformer_b2": {},
    "pspnet": {},
    "pspnet, mobilenet_v2": {"backbone": "mobilenet_v2"},
    "deeplabv3plus": {},
    "deeplabv3plus, resnet18": {"backbone": "resnet18"},
    "deeplabv3plus, mobilenet_v2": {"backbone": "mobilenet_v2"},
    "scfnet": {},
}
"""Name, with the trunk or width where it is not the usual one, -> arguments. Slimmable models have an engine for each width."""
SIZE_PX = [128, 160]
LONGER = {"sk_unet, width 8": 20, "slim_deeplabv3plus": 8}
"""Epochs of all images, where not one of a tenth: after that these nets enlarge what rounding changes."""
SHORT = {"epochs": 5, "batch_size": 4, "optimizer": "adamw", "lr": 0.0003}
TRAINED: dict[str, dict[str, Any]] = {
    "sk_unet, width 8": {"quantizer": {"kind": "int8", "calibration": "percentile", "percentile": 99}, "train": SHORT},
    "slim_deeplabv3plus": {"train": SHORT | {"epochs": 9, "lr": 0.001}},
}
"""Stage quantize in place of ptq. On some images sk_unet's last product grows a thousandfold; ranges that hold these leave the
others a few codes: they are cut."""
TRAIN = {"epochs": 1, "batch_size": 4, "optimizer": "adamw", "lr": 0.001}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(SEGMENTERS), default=list(SEGMENTERS))
    parser.add_argument("--threads", type=int, default=2, help="of the trainings")
    given = parser.parse_args()
    for name in given.model:
        out = ROOT / "runs" / "segmenter_engines" / name.replace(", ", "-")
        code = compress(recipe(name), out.with_suffix(".yaml"), out, given.threads)
        if code not in (0, 1):  # 1: an engine failed, which its row says
            raise SystemExit(f"{name} failed with exit code {code}")
        known = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
        known = [row for row in known if row["model"] in SEGMENTERS and row["model"] != name] + [row_of(name, out)]
        known.sort(key=lambda row: list(SEGMENTERS).index(row["model"]))
        RESULT.write_text(json.dumps({"schema": 1, "size_px": SIZE_PX, "rows": known}, indent=1).replace(f"{ROOT}/", "") + "\n")
        print(f"wrote {RESULT.relative_to(ROOT)}: {name}", flush=True)


def recipe(name: str) -> dict[str, Any]:
    """The run's recipe as data."""
    saliency = name == "scfnet"
    train = {**TRAIN, "epochs": LONGER.get(name, 1)}
    stages: list[dict[str, Any]] = [
        {"kind": "finetune", "train": train},
        {"kind": "quantize", **TRAINED[name]} if name in TRAINED else {"kind": "ptq"},
    ]
    if name.startswith("slim_"):  # its widths are trained together
        stages[0] = {"kind": "distill", "method": {"name": "slimseg"}, "train": train}
    return {
        "name": name.replace(", ", "-").replace(" ", "_"),
        "task": {"kind": "saliency" if saliency else "segmentation"},
        "data": {"kind": "masks", "root": "sod_ecssd" if saliency else "seg_camvid", "size_px": SIZE_PX}
        | ({} if name in LONGER else {"labelled": 0.1}),
        "student": {"model": {"name": name.partition(",")[0], "arguments": SEGMENTERS[name]}},
        "stages": stages,
        "deploy": [
            {"backend": {"name": backend, **options}, "precision": ["float32", "int8"]}
            for backend, options in (
                ("onnxruntime", {"threads": 1}),
                ("openvino", {"threads": 1}),
                ("tensorrt_rtx", {"compute_capabilities": ["SM89"], "workspace_mib": 2048}),
            )
        ],
        "measure": {"warmup_s": 0.01, "duration_s": 0.05, "compare_s": 0.1},
    }


def row_of(name: str, out: Any) -> dict[str, Any]:
    """What a finished run says of its model and engines."""
    report = json.loads((out / "report" / "report.json").read_text())
    model = next(model for model in report["models"] if model["stage"] in ("finetune", "distill"))
    columns = ("role", "backend", "precision", "status", "reason", "metric")
    engines = []
    for engine in report["engines"]:
        layers = (engine["audit"] or {}).get("layers") or []
        macs = sum(layer["macs"] for layer in layers if layer["asked"] == engine["precision"])
        got = sum(layer["macs"] for layer in layers if layer["got"] == engine["precision"])
        engines.append({key: engine[key] for key in columns} | {"share": got / macs if macs else None})
    return {"model": name, "params": model["params"], "macs": model["macs"], "engines": engines, "parity": report["parity"]}


if __name__ == "__main__":
    main()
