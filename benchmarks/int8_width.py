"""How wide must layers and images be for int8 to pay? Models at several widths and sides, int8 against float32, interleaved.

ResNet-8 on images of 32 pixels, the small detector on images of 512; ResNet-18, VGG-8 and MobileNetV2 on images of 112 to 224, at
one thread and at two.

Weights are random: they do not change what an engine computes, only what comes out. For each case and backend, both engines are
built and measured in turns in one process, at batch 1. Writes results/int8_width.json with every raw sample and with the machine
of each row: models that are not measured now keep theirs.

    python benchmarks/int8_width.py [--seconds 6] [--model resnet8 superyolo_small ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from edgekd import __version__, models
from edgekd.bench.host import describe
from edgekd.data.batches import normalise
from edgekd.data.digits import DigitsConfig, load
from edgekd.export import onnx
from edgekd.export.qdq import encode
from edgekd.export.stage import preprocessing
from edgekd.jobs import BuildJob, CompareJob
from edgekd.models.config import ModelConfig
from edgekd.nn.flops import macs, parameters
from edgekd.quantize import qat
from edgekd.targets.local import Local

RESULT = Path(__file__).parent / "results" / "int8_width.json"
SIDES, THREADS = (112, 160, 224), (1, 2)


class Case(NamedTuple):
    """One pair of engines, on each backend."""

    model: str
    width: float
    """The model's argument; 1 for a model that has none."""
    side_px: int
    threads: int = 1


CASES = [
    *(Case("resnet8", width, 32) for width in (1, 2, 4, 8)),
    *(Case("superyolo_small", width, 512) for width in (0.25, 0.5, 1.0)),
    *(Case(model, 1, *rest) for model in ("resnet18", "vgg8", "mobilenetv2") for rest in product(SIDES, THREADS)),
]
MODELS = list(dict.fromkeys(case.model for case in CASES))
CONFIGS: dict[str, dict[str, Any]] = {"resnet18": {"name": "callable", "call": "networks:resnet18", "taps": {"logits": "fc"}}}
"""Of models that are not edgekd's."""
IMAGES = 16
CALIBRATION = 8
BACKENDS = ("onnxruntime", "openvino")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="per pair of engines")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    given = parser.parse_args()
    rows = []
    if RESULT.is_file():  # of the models that are not measured now
        rows = [row for row in json.loads(RESULT.read_text())["rows"] if row["model"] not in given.model]
    digits = load(DigitsConfig(size_px=32, channels=3))
    with tempfile.TemporaryDirectory() as scratch:
        for case in [case for case in CASES if case.model in given.model]:
            images = Path(scratch) / f"{case.side_px}.npy"
            np.save(images, enlarged(digits.test.images[:IMAGES], case.side_px))
            folder = Path(scratch) / "-".join(map(str, case))
            module = export_both(case, digits, folder)
            for backend in BACKENDS:
                record = compare(folder, backend, case.threads, images, given.seconds)
                (ratio,) = record["ratios"]
                rows.append(
                    {
                        "host": describe(),
                        "model": case.model,
                        "size_px": case.side_px,
                        "width": case.width,
                        "threads": case.threads,
                        "channels": channels(module),
                        "params": parameters(module),
                        "macs": macs(module, (3, case.side_px, case.side_px)),
                        "backend": backend,
                        "speedup": ratio["speedup"],
                        "interval": ratio["interval"],
                        "verdict": ratio["verdict"],
                        "noise_floor": record["noise_floor"],
                        "valid": record["valid"],
                        "warnings": record["warnings"],
                        "latency_ms": {engine["precision"]: engine["latency_ms"] for engine in record["engines"]},
                        "samples_ns": {engine["precision"]: engine["samples_ns"] for engine in record["engines"]},
                    }
                )
                low, high = ratio["interval"]
                print(f"{case} {backend}: int8 {ratio['speedup']:.2f}x float32 [{low:.2f}, {high:.2f}]", flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"schema": 2, "edgekd": __version__, "batch": 1, "rows": rows}))


def enlarged(images: Any, side: int) -> Any:
    """Images [N, H, W, C] at another side, every pixel as a square of them, those at the border cut."""
    times = -(-side // images.shape[1])
    return np.ascontiguousarray(np.array(images).repeat(times, axis=1).repeat(times, axis=2)[:, :side, :side])


def channels(module: torch.nn.Module) -> list[int]:
    """Of the least wide and of the widest convolution."""
    found = [part.out_channels for part in module.modules() if isinstance(part, torch.nn.Conv2d)]
    return [min(found), max(found)]


def export_both(case: Case, digits: Any, folder: Path) -> torch.nn.Module:
    """The float32 and the int8 file of one model, each in a folder of its own; returns the float model."""
    torch.manual_seed(0)
    own = {"name": case.model, "arguments": {} if case.width == 1 else {"width": case.width}}
    config = ModelConfig(**CONFIGS.get(case.model, own))
    module = models.build(config, num_classes=10, in_channels=3)
    images = normalise(
        torch.from_numpy(enlarged(digits.calib.images[:CALIBRATION], case.side_px)), digits.mean, digits.std
    ).contiguous()
    with torch.no_grad():
        module.train()(images)  # batch norms of real images
    module.eval()
    quantized = qat.prepare(module, models.taps(config, module), qat.QuantizerConfig(keep_float=["outputs"]), images[:2])
    qat.calibrate(quantized, [images])
    for precision, form in (("float32", module), ("int8", encode(quantized, "u8"))):
        out = folder / precision
        out.mkdir(parents=True)
        model = onnx.export(form, images[:2], output_names=["logits"], opset=20)
        onnx.save(model, out / "model.onnx")
        (out / "io.json").write_text(json.dumps(onnx.describe(model, preprocessing(digits), precision)))
    return module


def compare(folder: Path, backend: str, threads: int, images: Path, seconds: float) -> dict[str, Any]:
    """Build both engines and measure them interleaved; float32 is the reference."""
    engines = []
    for precision in ("float32", "int8"):
        out = folder / f"{backend}-{precision}"
        out.mkdir()
        job = BuildJob(str(folder / precision / "model.onnx"), {"name": backend, "threads": threads}, precision, str(out))
        answer(Local().run(job, folder))
        engines.append(str(out))
    return answer(Local().run(CompareJob(engines, str(images), warmup_s=0.5, duration_s=seconds, max_rounds=1000), folder))


def answer(result: Any) -> dict[str, Any]:
    if result.status != "ok":
        raise SystemExit(f"{result.error or result.reason}\n{result.log_tail}")
    return result.payload


if __name__ == "__main__":
    main()
