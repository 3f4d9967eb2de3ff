"""The last hop: whether a built engine computes what its ONNX file does, and from which layer on it does not."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.artifacts import Artifact, write_json
from edgekd.engines.base import DYNAMIC
from edgekd.engines.detections import OUTPUT
from edgekd.engines.preprocess import normalize
from edgekd.errors import BuildError, EdgekdError
from edgekd.export import bisect, onnx, parity
from edgekd.export.stage import ExportConfig, limits
from edgekd.jobs import BuildJob, Job, JobResult, PredictJob
from edgekd.tasks.base import Task

SEARCH_IMAGES = 32
"""Images on which graphs that end early are compared, once an engine failed."""
_SAME = 10
"""An engine that is built again and is so many times closer to the file is another engine: the one that failed is damaged."""

Array = npt.NDArray[Any]
Run = Callable[[Job, Path], JobResult]


def reference(model: Artifact, images: npt.NDArray[np.uint8]) -> dict[str, Array]:
    """What the ONNX file gives for images, uint8 [N, H, W, C], run as it is written."""
    return parity.file_outputs(model.file("model.onnx"), normalize(images, model.json("io.json")["preprocessing"]))


def measure(
    expected: Mapping[str, Array],
    received: Mapping[str, Array],
    labels: Array,
    model: Artifact,
    backend: Mapping[str, Any],
    task: Task,
    config: ExportConfig,
) -> tuple[list[parity.OutputParity], dict[str, Any], parity.Limits]:
    """How far an engine is from its file, the metric of both, and what is allowed.

    Args:
        expected: Of the file, on the first images of the test split.
        received: Of the engine, on at least these images.
        labels: Of at least these images.
        model: The OnnxModel.
        backend: The backend's options.
        task: Names the outputs and decides.
        config: The recipe's section.

    Raises:
        ParityError: The engine has other outputs.
    """
    count = len(next(iter(expected.values())))
    # boxes of a graph have no place of their own: the task holds them against the raw predictions
    before, first = ({name: array[:count] for name, array in given.items() if name != OUTPUT} for given in (expected, received))
    lower = backend.get("inference_precision") == "bf16"  # then what the file has in float32 is not
    # else as the file's own hop: what it has in few bits is told there
    allowed = limits(config, "bf16") if lower else parity.Limits(**model.json("parity.json")["allowed"])
    found = parity.compare(before, first, task, what=f"the {backend['name']} engine", outliers=allowed.outliers)
    return found, parity.metrics(expected, first, labels[:count], task), allowed


def where(
    failed: parity.OutputParity,
    model: Artifact,
    backend: Mapping[str, Any],
    images: npt.NDArray[np.uint8],
    engine: Array,
    allowed: parity.Limits,
    run: Run,
) -> str:
    """From which layer on an engine is wrong, as the end of a sentence; builds an engine per point that the search looks at.

    Args:
        failed: The output that is wrong.
        model: The OnnxModel.
        backend: The backend's options.
        images: uint8 [N, H, W, C].
        engine: What the engine gave for the failed output, on these images.
        allowed: A point is wrong where its error is larger than max_error.
        run: Has a worker do a job, in a folder.
    """
    proto = onnx.load(model.file("model.onnx"))
    io = model.json("io.json")
    graph = bisect.Graph(proto, integers=io["precision"] == "int8")
    order = parity.worst_first([failed], SEARCH_IMAGES)
    inputs = normalize(images[order], io["preprocessing"])
    fixed = io["inputs"][0]["shape"][0]
    batch = len(order) if fixed == DYNAMIC else fixed
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        np.save(root / "images.npy", images[order], allow_pickle=False)

        @functools.cache
        def outputs_at(tensor: str) -> tuple[Array, Array]:
            folder = root / str(len(list(root.iterdir())))
            (folder / "engine").mkdir(parents=True)
            cut = graph.cut(tensor)
            onnx.save(cut, folder / "model.onnx")
            write_json(folder / "io.json", onnx.describe(cut, io["preprocessing"], io["precision"]))
            jobs: Sequence[Job] = (
                BuildJob(str(folder / "model.onnx"), dict(backend), io["precision"], str(folder / "engine")),
                PredictJob(str(folder / "engine"), str(root / "images.npy"), str(folder / "outputs.npz"), batch=batch),
            )
            for job in jobs:
                result = run(job, folder / "job")
                if result.status != "ok":
                    raise BuildError(f"a graph that ends at {graph.points[tensor].path} does not {job.kind}: {result.reason}")
            with np.load(folder / "outputs.npz", allow_pickle=False) as arrays:
                received = next(iter(dict(arrays).values()))
            return parity.file_outputs(folder / "model.onnx", inputs)[tensor], received

        try:
            expected, again = outputs_at(failed.output)
            before = bisect.relative_error(expected, engine[order])
            if bisect.relative_error(expected, again) * _SAME < before:
                return "; an engine that is built again from the same file is right: this one is damaged"
            found = bisect.first_wrong(
                graph, failed.output, lambda tensor: bisect.relative_error(*outputs_at(tensor)), allowed.max_error
            )
        except EdgekdError as error:
            return f"; the layer cannot be found: {error.message}"
    return f"; it goes wrong at {parity.described(found)}"
