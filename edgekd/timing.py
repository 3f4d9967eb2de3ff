"""How long the engine of a model would take that is not trained yet: exported, built and measured like the recipe's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.artifacts import write_json
from edgekd.data.base import Dataset
from edgekd.deployment import opset
from edgekd.engines import encoding_for, onnx_layers, options_dict
from edgekd.errors import TrainingError
from edgekd.export import onnx
from edgekd.export import stage as export_stage
from edgekd.export.qdq import encode
from edgekd.jobs import BenchJob, BuildJob, JobResult
from edgekd.recipe import Recipe
from edgekd.targets.local import Local
from edgekd.tasks.base import Task
from edgekd.train.checkpoint import Loaded
from edgekd.train.stage import EngineTime

IMAGES = 16


class EngineTimer:
    """Builds and times engines in a folder of its own, which holds nothing afterwards.

    Args:
        recipe: Its first deploy entry with int8 says which backend, and how many images at a time.
        dataset: Its calibration images are what engines are timed on.
        task: Says what the outputs are called and mean.
        cpu: The CPU's description, as edgekd.bench.host gives it.
        folder: Where to work; made where it is missing.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, task: Task, cpu: Any, folder: Path) -> None:
        self.entry = next(entry for entry in recipe.deploy if "int8" in entry.precision)  # there is one: the recipe's check
        self.recipe, self.dataset, self.task, self.cpu, self.folder = recipe, dataset, task, cpu, folder
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
        file = onnx.export(
            module,
            torch.zeros(2, *np.moveaxis(self.dataset.calib.images[:1], 3, 1).shape[1:]),
            output_names=self.task.output_names,
            opset=opset(self.recipe),
            batch=self.recipe.export.batch,
        )
        path = self.folder / "model.onnx"
        onnx.save(file, path)
        write_json(self.folder / "layers.json", onnx_layers.layers(file))
        export_stage.complete(file, self.folder, self.dataset, self.task, precision)
        built = self._job(
            BuildJob(model=str(path), backend=options_dict(self.entry.backend), precision=precision, out=str(engine))
        )
        images = self.folder / "images.npy"
        np.save(images, np.ascontiguousarray(self.dataset.calib.images[:IMAGES]), allow_pickle=False)
        measure = self.recipe.measure
        timed = self._job(BenchJob(str(engine), str(images), self.entry.batch, measure.warmup_s, measure.duration_s))
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
