"""How long the engine of a model would take that is not trained yet: exported, built and measured like the recipe's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifacts import write_json
from edgekd.data.base import Dataset
from edgekd.engines import encoding_for, onnx_layers, options_dict
from edgekd.errors import TrainingError
from edgekd.export import onnx
from edgekd.export.qdq import encode
from edgekd.export.stage import preprocessing
from edgekd.jobs import BenchJob, BuildJob, JobResult
from edgekd.recipe import DeployConfig, MeasureConfig
from edgekd.targets.local import Local
from edgekd.tasks.base import Task
from edgekd.train.checkpoint import Loaded
from edgekd.train.stage import EngineTime

IMAGES = 16


class EngineTimer:
    """Builds and times engines in a folder of its own, which holds nothing afterwards.

    Args:
        entry: Which backend, and how many images at a time.
        measure: How long.
        dataset: Its calibration images are what engines are timed on.
        task: Names the outputs.
        opset: Of the files.
        cpu: The CPU's description, as edgekd.bench.host gives it.
        folder: Where to work; made where it is missing.
    """

    def __init__(
        self, entry: DeployConfig, measure: MeasureConfig, dataset: Dataset, task: Task, opset: int, cpu: Any, folder: Path
    ) -> None:
        self.entry, self.measure, self.dataset, self.task = entry, measure, dataset, task
        self.opset, self.cpu, self.folder = opset, cpu, folder
        self.target = Local()

    def __call__(self, loaded: Loaded) -> EngineTime:
        """Build and time the engine of a float model, or in integers of a quantized one.

        Raises:
            TrainingError: It cannot be built or measured on this machine.
            ExportError: The model cannot be written.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        engine = self.folder / "engine"
        engine.mkdir(parents=True)
        try:
            return self._timed(loaded, engine)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _timed(self, loaded: Loaded, engine: Path) -> EngineTime:
        quantized = loaded.architecture.quantization is not None
        precision = "int8" if quantized else "float32"
        module = encode(loaded.module, encoding_for(self.entry.backend, self.cpu)) if quantized else loaded.module.eval()
        file = onnx.export(module, loaded.architecture.example(), output_names=self.task.output_names, opset=self.opset)
        path = self.folder / "model.onnx"
        onnx.save(file, path)
        write_json(self.folder / "layers.json", onnx_layers.layers(file))
        write_json(self.folder / "io.json", onnx.describe(file, preprocessing(self.dataset), precision))
        built = self._job(
            BuildJob(model=str(path), backend=options_dict(self.entry.backend), precision=precision, out=str(engine))
        )
        images = self.folder / "images.npy"
        np.save(images, np.ascontiguousarray(self.dataset.calib.images[:IMAGES]), allow_pickle=False)
        warmup_s, duration_s = self.measure.warmup_s, self.measure.duration_s
        timed = self._job(BenchJob(str(engine), str(images), self.entry.batch, warmup_s, duration_s))
        layers: dict[str, float] = {}
        for row in built.payload.get("audit", {}).get("layers", []):
            if row["time_us"] is not None:
                layers[row["path"]] = layers.get(row["path"], 0.0) + float(row["time_us"])
        return EngineTime(float(timed.payload["latency_ms"]["p50"]), layers)

    def _job(self, job: BuildJob | BenchJob) -> JobResult:
        result = self.target.run(job, self.folder / "job")
        if result.status != "ok":
            raise TrainingError(
                f"quantizer.budget.latency_ms: no engine could be timed: {result.reason or result.error}",
                hint=result.hint or "the first deploy entry with int8 must be one that runs on this machine",
            )
        return result
