"""The section ``export``: a checkpoint becomes model.onnx, io.json, layers.json, lint.json and parity.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from edgekd._config import Config
from edgekd.artifacts import Checkpoint, write_json
from edgekd.data.base import Dataset
from edgekd.data.batches import normalise
from edgekd.engines import onnx_layers, opsets
from edgekd.errors import ParityError
from edgekd.export import float16, lint, nms, onnx, parity, segments
from edgekd.export.qdq import ENCODINGS, coarsened, encode
from edgekd.export.simulate import simulated
from edgekd.quantize import stage as quantize_stage
from edgekd.quantize.fake_quant import BITS, Quantizer
from edgekd.tasks.base import Task

MAX_ERROR = {"float32": 1e-3, "float16": 3e-2, "bf16": 0.1, "u8": 0.1, "u7": 0.2, "s8": 0.1, "hybrid": 0.1, "few": 0.3}
MAX_CHANGED = {"float32": 0.001, "float16": 0.02, "bf16": 0.05, "u8": 0.05, "u7": 0.05, "s8": 0.05, "hybrid": 0.05, "few": 0.15}
"""Allowed by default. On integers a value on the edge between two codes may round either way, and the difference adds up; the
more the fewer codes there are ("few": some layer has less than 8 bits)."""
FLOATS, OUTLIERS = ("float32", "float16"), 1e-3
"""Precisions in which every value of a map, or of boxes to choose from, counts; in all others, all but one in a thousand do."""
PRECISIONS = {"hybrid": "float32"}
"""What a file in an encoding runs in, where that has another name."""
RANGE_IMAGES = 64
"""Calibration images on which a float32 file shows what float16 would not hold."""


class ExportConfig(Config):
    """How checkpoints become ONNX, and how closely the file must agree with torch, and engines with the file."""

    opset: int | None = Field(None, ge=18, le=22)
    """ONNX opset of the files; null: 20, or the newest that every engine of the recipe reads (docs/deployment.md)."""
    batch: int | None = Field(None, ge=1, le=4096)
    """The one batch size that the files take, and deploy.batch must be; null leaves it free."""
    parity_images: int = Field(256, ge=1, le=100_000)
    """Images on which the file is compared with torch (validation split), and engines with the file (test split)."""
    max_error: float | None = Field(None, gt=0)
    """Largest difference of an output value, as a share of the largest one; null: 0.001 (float32), 0.03 (float16), 0.1 (int8; u7:
    0.2; less than 8 bits: 0.3; an engine in bf16: 0.1)."""
    max_changed: float | None = Field(None, ge=0, le=1)
    """Largest share of decisions that may change; one image always may. null: 0.001 (float32), 0.02 (float16), 0.05 (int8;
    less than 8 bits: 0.15; an engine in bf16: 0.05)."""


def run(
    config: ExportConfig, checkpoint: Checkpoint, encoding: str, dataset: Dataset, task: Task, folder: Path
) -> dict[str, Any]:
    """Export a checkpoint and compare the file with torch.

    Args:
        config: The recipe's section.
        checkpoint: A float one for float32 and float16, else a quantized one.
        encoding: ``float32``, ``float16``, an encoding of integers (edgekd.export.qdq), or ``hybrid``: what was trained, in
            float operations (edgekd.export.simulate).
        dataset: Gives the preprocessing and the images to compare on.
        task: Names the outputs.
        folder: Where the files go.

    Returns:
        The artifact's metrics: encoding, size_bytes, and what parity.json holds.

    Raises:
        ExportError: The model cannot be written, or no engine could be built from it (edgekd.export.lint).
        ParityError: The file disagrees with torch.
    """
    loaded = quantize_stage.load(checkpoint)
    integers = encoding in ENCODINGS
    module = _as_written(loaded.module, encoding)
    # of the data's size, which is that of windows where the task has them
    example = torch.zeros(2, *np.moveaxis(dataset.val.images[:1], 3, 1).shape[1:])
    opset = config.opset or opsets.PREFERRED
    model = onnx.export(module, example, output_names=task.output_names, opset=opset, batch=config.batch)
    kept: list[float16.Kept] = []
    if encoding == "float16":
        calibration = np.array(dataset.calib.images[:RANGE_IMAGES])
        values = normalise(torch.from_numpy(calibration), dataset.mean, dataset.std).contiguous().numpy()
        model, kept = float16.to_float16(model, values, parity.run_once)
    path = folder / "model.onnx"
    onnx.save(model, path)
    write_json(folder / "layers.json", onnx_layers.layers(model))
    findings = lint.lint(model, encoding)
    write_json(folder / "lint.json", lint.as_json(findings))
    lint.refuse(findings)
    count = min(config.parity_images, len(dataset.val))
    images = normalise(torch.from_numpy(np.array(dataset.val.images[:count])), dataset.mean, dataset.std).contiguous()
    # with the trained model, not with its encoding: a wrong encoding would agree with itself
    expected = parity.torch_outputs(loaded.module, images, task.output_names)
    received = parity.file_outputs(path, images.numpy())
    allowed = limits(config, "few" if _few_bits(loaded.module) else encoding)
    found = parity.compare(expected, received, task, outliers=allowed.outliers)
    result: dict[str, Any] = {"split": "val"}
    if integers:
        result["tensors"] = _tensors(coarsened(loaded.module, encoding), model, images[: config.batch or parity.LOCAL_IMAGES])
    result |= parity.check(
        found,
        parity.metrics(expected, received, dataset.val.labels[:count], task),
        allowed,
        where=lambda _: parity.where_in_file(module, model, images[parity.worst_first(found, parity.LOCAL_IMAGES)], encoding),
    )
    if encoding == "float16":
        result["kept_float32"] = [asdict(entry) for entry in kept]
    write_json(folder / "parity.json", result)
    complete(model, folder, dataset, task, "int8" if integers else PRECISIONS.get(encoding, encoding))
    return {"encoding": encoding, "size_bytes": path.stat().st_size, "parity": result}


def complete(model: Any, folder: Path, dataset: Dataset, task: Task, precision: str) -> None:
    """Write io.json beside a model.onnx, and let the file suppress boxes itself where the task says so.

    Args:
        model: The onnx.ModelProto that is in the folder; changed with the file.
        folder: Holds model.onnx.
        dataset: Gives the preprocessing and the classes' names.
        task: Says what the outputs mean.
        precision: What engines of it run in.
    """
    postprocessing = task.postprocessing(dataset.classes)
    if postprocessing.get("nms") == "graph":
        nms.attach(model, postprocessing)
        onnx.save(model, folder / "model.onnx")
    write_json(folder / "io.json", {**onnx.describe(model, preprocessing(dataset), precision), "postprocessing": postprocessing})


def _tensors(quantized: nn.Module, model: Any, images: Tensor) -> dict[str, Any]:
    """Every quantized tensor of the file against the trained model's, on the encoding's grids and on equal inputs.

    Raises:
        ParityError: A value is more than one step away.
    """
    trained = segments.trained_tensors(quantized, [images])
    try:
        parts = segments.cut(model, trained)
    except ParityError as error:  # the comparison from end to end goes on
        return {"reason": f"not compared tensor by tensor: {error.message}"}
    outputs = parity.run_once(parts.model, {onnx.INPUT: images.numpy()} | parts.feeds)
    return segments.summary(segments.differences(parts, outputs), parts.modules)


def _as_written(model: nn.Module, encoding: str) -> nn.Module:
    if encoding in ENCODINGS:
        return encode(model, encoding)
    return simulated(model) if encoding == "hybrid" else model.eval()


def _few_bits(model: nn.Module) -> bool:
    """Whether any quantizer has less than 8 bits."""
    return any(part.bits < BITS for part in model.modules() if isinstance(part, Quantizer))


def limits(config: ExportConfig, kind: str) -> parity.Limits:
    """What may differ: as the recipe says, or by the encoding or the precision of what is compared."""
    return parity.Limits(
        max_error=MAX_ERROR[kind] if config.max_error is None else config.max_error,
        max_changed=MAX_CHANGED[kind] if config.max_changed is None else config.max_changed,
        outliers=0.0 if kind in FLOATS else OUTLIERS,
    )


def preprocessing(dataset: Dataset) -> dict[str, Any]:
    """How uint8 images become the model's input; edgekd.engines.preprocess does it on the target."""
    color = {1: "gray", 3: "RGB"}.get(dataset.channels, f"{dataset.channels} channels")
    return {"layout": "NCHW", "color": color, "scale": 1 / 255, "mean": list(dataset.mean), "std": list(dataset.std)}
