"""Whether an ONNX file computes what the torch module computes, on real images, before anything is deployed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgekd.errors import ParityError
from edgekd.tasks.base import Task

BATCH = 64


@dataclass(frozen=True)
class OutputParity:
    """How far one output of the file is from torch's."""

    output: str
    images: int
    max_error: float
    """Largest absolute difference of a value, as a share of the largest magnitude that torch gives."""
    cosine: float
    """Cosine between all values of both, 1 where they agree."""
    changed: float
    """Share of decisions that differ, 0..1; 0 for outputs that nobody decides on."""


def measure(module: nn.Module, file: Path, images: Tensor, task: Task) -> list[OutputParity]:
    """Run both on the same images.

    Args:
        module: In eval mode; for a file of integers the trained, fake-quantized one.
        file: The ONNX file; ONNX Runtime runs it as written, without rewriting its graph.
        images: Normalised, float32 [N, C, H, W].
        task: Says what the outputs are called and what is decided on the first.

    Raises:
        ParityError: ONNX Runtime cannot run the file, or gives other outputs.
    """
    expected = _torch_outputs(module, images)
    received = _onnx_outputs(file, images)
    if list(received) != list(task.output_names) or len(expected) != len(received):
        raise ParityError(f"the ONNX file gives the outputs {', '.join(received)}; expected {', '.join(task.output_names)}")
    return [
        _compare(name, reference, received[name], task if index == 0 else None)
        for index, (name, reference) in enumerate(zip(task.output_names, expected, strict=True))
    ]


def check(found: Sequence[OutputParity], *, max_error: float, max_changed: float) -> dict[str, Any]:
    """Hold the differences against their limits.

    Returns:
        parity.json: what was measured and what was allowed.

    Raises:
        ParityError: One is over its limit; the message has the numbers.
    """
    for parity in found:
        measured = f"output {parity.output!r} on {parity.images} images: max error {parity.max_error:.2e} of its range, "
        measured += f"cosine {parity.cosine:.6f}, {parity.changed:.2%} of the decisions changed"
        few = parity.changed * parity.images <= max(1.0, max_changed * parity.images)  # one image on the edge proves nothing
        if not (parity.max_error <= max_error and few):  # not finite fails too
            raise ParityError(
                f"the ONNX file disagrees with torch: {measured}; allowed: {max_error:.0e} and {max_changed:.2%}",
                hint="raise export.max_error or export.max_changed only if you know why they differ",
            )
    return {"outputs": [asdict(parity) for parity in found], "allowed": {"max_error": max_error, "max_changed": max_changed}}


def _compare(name: str, expected: npt.NDArray[Any], received: npt.NDArray[Any], task: Task | None) -> OutputParity:
    if expected.shape != received.shape:
        raise ParityError(f"output {name!r} has shape {list(received.shape)} in ONNX and {list(expected.shape)} in torch")
    one, other = expected.astype(np.float64).ravel(), received.astype(np.float64).ravel()
    largest = max(float(np.abs(one).max()), 1e-30)
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    changed = 0.0 if task is None else float(np.mean(task.decisions(expected) != task.decisions(received)))
    return OutputParity(
        output=name,
        images=len(expected),
        max_error=float(np.abs(one - other).max()) / largest,
        cosine=float(one @ other) / norms if norms else float(np.array_equal(one, other)),
        changed=changed,
    )


def _torch_outputs(module: nn.Module, images: Tensor) -> list[npt.NDArray[Any]]:
    parts: list[list[npt.NDArray[Any]]] = []
    with torch.no_grad():
        for batch in images.split(BATCH):
            given = module(batch)
            parts.append([value.numpy() for value in (given if isinstance(given, tuple | list) else [given])])
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _onnx_outputs(file: Path, images: Tensor) -> dict[str, npt.NDArray[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names, source = [output.name for output in session.get_outputs()], session.get_inputs()[0].name
        parts = [session.run(names, {source: batch.numpy()}) for batch in images.split(BATCH)]
    except Exception as error:  # onnxruntime's errors share no base class
        raise ParityError(f"onnxruntime cannot run the exported file: {error}", hint="another export.opset may work") from error
    return {name: np.concatenate([part[index] for part in parts]) for index, name in enumerate(names)}
