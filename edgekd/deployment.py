"""The deploy matrix of a run: ONNX, engines, measurements, comparisons, budget.

Every cell (backend, precision, whose model) ends as measured, built, skipped or failed, with a reason where it is not measured:
one backend's refusal does not cost the others their results.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import __version__, engine_parity
from edgekd._optional import require
from edgekd.artifacts import Artifact, Checkpoint, Store, content_id, write_json
from edgekd.data.base import Dataset
from edgekd.data.windows import windowed
from edgekd.display import Display
from edgekd.engines import audit, encoding_for, opsets, options_dict
from edgekd.engines import backend as find_backend
from edgekd.errors import BuildError, EdgekdError
from edgekd.export import lint, parity
from edgekd.export import stage as export_stage
from edgekd.jobs import BenchJob, BuildJob, CompareJob, JobResult, PredictJob
from edgekd.quantize import ladder
from edgekd.recipe import DeployConfig, Recipe, deployed_roles
from edgekd.targets.local import Local
from edgekd.tasks.base import Task

EXPORT_LIBRARIES = ("torch", "onnx", "onnxscript", "onnxslim")
JUDGING = {"boundary_px"}
"""What of a task changes the metrics of an engine and nothing else."""
BENCH_IMAGES = 64
QUANTIZED = ("quantize", "ptq")
"""The stages whose checkpoint is a quantized one."""
MATTERS = 0.98
"""An int8 engine that is slower by less than this is as fast for all that anyone cares, however surely it was measured."""


class Deployment:
    """Fills ``record["cells"]``, ``record["comparisons"]`` and ``record["budget"]``."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        dataset: Dataset,
        task: Task,
        record: dict[str, Any],
        display: Display,
        save: Callable[[], None],
        order: int,
    ) -> None:
        self.recipe, self.store, self.task = recipe, store, task
        self.whole = dataset
        self.dataset = dataset if task.windows is None else windowed(dataset, task.windows)
        """What engines see."""
        self.record, self.display, self.save, self.order = record, display, save, order
        self.target = Local()
        # What a measurement depends on: on another machine, or with another GPU, it is made again.
        self.host = {"cpu": record["environment"]["cpu"], "gpus": [gpu["name"] for gpu in record["environment"]["gpus"]]}
        self.exported: dict[tuple[str, str], Artifact | EdgekdError] = {}
        self.references: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        """What each ONNX file gives for the images on which engines are compared with it."""
        self.opset = opset(recipe)
        record["warnings"] += opsets.beyond(self.opset, _readers(recipe))
        self.slower: list[str] = []
        """What was compressed and did not get faster: the run has failed, and says so."""

    def run(self, checkpoints: dict[str, list[Checkpoint]]) -> None:
        """Build and measure every cell of the recipe's deploy section."""
        if not self.recipe.deploy:
            return
        test = self.dataset.test
        images = {"bench": test.images[:BENCH_IMAGES], "predict": test.images}
        inputs = {name: self._inputs(name, array) for name, array in images.items()}
        for entry in self.recipe.deploy:
            group: list[int] = []
            for role in deployed_roles(self.recipe, entry):
                for precision in _precisions(entry, checkpoints[role]):
                    checkpoint = _source(checkpoints[role], precision)
                    if checkpoint is None:
                        continue  # int8 is the student's alone; float32 there always is (Run.train)
                    cell = self._cell(entry, role, precision, checkpoint, inputs)
                    self.record["cells"].append(cell)
                    self.save()
                    self.display.cell(cell, self.store.root)
                    if cell["status"] == "measured":
                        group.append(len(self.record["cells"]) - 1)
            if len(group) > 1:
                self._compare(entry, group, inputs["bench"])
        self.record["warnings"] += self.slower
        self.record["budget"] = check_budget(self.recipe, self.record, self.store.root)
        self.save()

    def _inputs(self, name: str, images: np.ndarray[Any, Any]) -> Path:
        folder = self.store.root / "inputs"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}-{self.dataset.fingerprint[:12]}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):  # missing or damaged: written again
            if np.array_equal(np.load(path, mmap_mode="r", allow_pickle=False), images):
                return path
        partial = path.with_suffix(".partial")
        with partial.open("wb") as stream:
            np.save(stream, np.ascontiguousarray(images), allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        return path

    def _cell(
        self, entry: DeployConfig, role: str, precision: str, checkpoint: Checkpoint, inputs: dict[str, Path]
    ) -> dict[str, Any]:
        options = options_dict(entry.backend)
        cell: dict[str, Any] = {
            "backend": options,
            "backend_name": entry.backend.name,
            "precision": precision,
            "target": entry.target,
            "role": role,
            "stage": checkpoint.stage,
            "batch": entry.batch,
            "status": "failed",
            "reason": None,
            "onnx": None,
            "engine": None,
            "bench": None,
            "parity": None,
        }
        self.record["doing"] = f"{entry.backend.name} {precision} {role}"
        reason = ladder.refusal(checkpoint.metrics) if precision == "int8" else None
        if reason is not None:
            lacks = entry.backend.unsupported("float16")
            cell["status"], cell["reason"] = ("skipped", reason) if lacks is None else ("failed", f"{reason}, and {lacks}")
            return cell
        try:
            onnx = self._onnx(checkpoint, entry, precision)
            cell["onnx"] = onnx.folder.name
            engine = self._engine(onnx, entry, precision, role)
            if isinstance(engine, JobResult):
                return _unfinished(cell, engine)
            cell["engine"] = engine.folder.name
            refused = None if entry.allow_fallback else audit.refusal(engine.metrics["audit"])
            if refused is not None:
                raise BuildError(
                    refused,
                    hint="to measure it all the same: allow_fallback: true in this entry of deploy, or --allow-fallback for all",
                )
            bench = self._bench(onnx, engine, entry, cell, inputs)
            if isinstance(bench, JobResult):
                cell = _unfinished(cell, bench)
                cell["status"] = "built" if bench.status == "skipped" else cell["status"]
                return cell
            cell["bench"] = bench.folder.name
            cell["parity"] = bench.json("record.json")["parity"]
            cell["status"] = "measured"
        except EdgekdError as error:
            cell["reason"] = error.message + (f" ({error.hint})" if error.hint else "")
        return cell

    def _onnx(self, checkpoint: Checkpoint, entry: DeployConfig, precision: str) -> Artifact:
        encoding = encoding_for(entry.backend, self.host["cpu"]) if precision == "int8" else precision
        key = (checkpoint.id, encoding)
        if key not in self.exported:
            try:
                self.exported[key] = exported = self._export(checkpoint, encoding)
                self._say_findings(exported, encoding)
            except EdgekdError as error:
                self.exported[key] = error  # every cell that needs this file fails for the same reason
        found = self.exported[key]
        if isinstance(found, EdgekdError):
            raise found
        return found

    def _export(self, checkpoint: Checkpoint, encoding: str) -> Artifact:
        # not asked of the package: onnxruntime-gpu is the same module
        versions = {library: version(library) for library in EXPORT_LIBRARIES} | {
            "onnxruntime": require("onnxruntime").__version__
        }
        settings = self.recipe.export.model_copy(update={"opset": self.opset})
        config = {"encoding": encoding, **settings.model_dump(mode="json")}
        inputs = {
            "kind": "onnx",
            "checkpoint": checkpoint.id,
            "config": config,
            "data": self.dataset.fingerprint,
            "postprocessing": self.task.postprocessing(self.dataset.classes),
        }

        def fill(folder: Path) -> dict[str, Any]:
            self.display.say(f"exporting {checkpoint.stage} ({checkpoint.role}) as ONNX, {encoding}")
            metrics = export_stage.run(settings, checkpoint, encoding, self.dataset, self.task, folder)
            for entry in metrics["parity"].get("kept_float32", []):
                self.display.say(f"{entry['path']} ({entry['op']}) stays in float32: {entry['tensor']} {entry['reason']}")
            return metrics

        return self._artifact("onnx", "export", checkpoint.role, inputs, (checkpoint.id,), config, versions, fill)

    def _say_findings(self, exported: Artifact, encoding: str) -> None:
        """What the linter found in an exported file, where it costs a backend of this recipe something."""
        findings = lint.from_json(exported.json("lint.json"))
        backends = {entry.backend.name for entry in self.recipe.deploy}
        for line in lint.lines(findings, backends):
            self.record["warnings"].append(f"{exported.role}, {encoding}: {line}")
            self.display.warn(line)

    def _engine(self, onnx: Artifact, entry: DeployConfig, precision: str, role: str) -> Artifact | JobResult:
        options = options_dict(entry.backend)
        fingerprint = find_backend(entry.backend.name).fingerprint(entry.backend)
        runs = export_stage.PRECISIONS.get(precision, precision)
        config = {"backend": options, "precision": precision, "target": entry.target}
        inputs = {"kind": "engine", "onnx": onnx.id, "config": config, "fingerprint": fingerprint}

        def fill(folder: Path) -> dict[str, Any]:
            self.display.say(f"building {entry.backend.name} {precision} ({role})")
            start = time.monotonic()
            result = self._job(BuildJob(model=str(onnx.file("model.onnx")), backend=options, precision=runs, out=str(folder)))
            size = sum(path.stat().st_size for path in folder.iterdir() if path.name in result.payload["files"])
            return {
                "size_bytes": size,
                "build_s": round(time.monotonic() - start, 3),
                "fingerprint": fingerprint,
                "audit": result.payload.get("audit", {"layers": [], "reason": "the model's layers are not known"}),
            }

        return self._or_result("engine", "engine", role, inputs, (onnx.id,), config, fingerprint, fill)

    def _bench(
        self, onnx: Artifact, engine: Artifact, entry: DeployConfig, cell: dict[str, Any], images: dict[str, Path]
    ) -> Artifact | JobResult:
        measure, role = self.recipe.measure, cell["role"]
        config: dict[str, Any] = {"batch": entry.batch, "warmup_s": measure.warmup_s, "duration_s": measure.duration_s}
        allowed = self.recipe.export.model_dump(mode="json", include={"parity_images", "max_error", "max_changed"})
        task = self.recipe.task.model_dump(mode="json", include=JUDGING, exclude_none=True)
        inputs = {
            "kind": "bench",
            "engine": engine.id,
            **({"task": task} if task else {}),
            "config": config,
            "parity": allowed,
            "host": self.host,
            "data": self.dataset.fingerprint,
        }

        def fill(folder: Path) -> dict[str, Any]:
            self.display.say(f"measuring {engine.config['backend']['name']} {engine.config['precision']} ({role})")
            outputs = self._predict(engine, images["predict"])
            hop = self._parity(onnx, engine, outputs, cell)
            found = self.task.details(self._stitched(outputs), self.whole.test.labels)
            metric = {
                "name": self.task.metric_name,
                "value": found[self.task.metric_name],
                "images": len(self.whole.test.labels),
                "details": found,
            }
            bench = self._job(BenchJob(engine=str(engine.folder), inputs=str(images["bench"]), **config)).payload
            write_json(folder / "record.json", {**bench, "metric": metric, "parity": hop})
            return {"metric": metric, "latency_ms": bench["latency_ms"], "valid": bench["valid"]}

        return self._or_result("bench", "bench", role, inputs, (engine.id,), config, self.host, fill)

    def _predict(self, engine: Artifact, images: Path) -> dict[str, np.ndarray[Any, Any]]:
        """All outputs of an engine on the test split."""
        path = self.store.root / "work" / "job" / "outputs.npz"
        batch = self.recipe.export.batch or min(32, len(self.dataset.test.labels))
        self._job(PredictJob(engine=str(engine.folder), inputs=str(images), out=str(path), batch=batch))
        with np.load(path, allow_pickle=False) as arrays:
            outputs = dict(arrays)
        path.unlink()
        return outputs

    def _stitched(self, outputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """An engine's outputs for whole images."""
        if (windows := self.task.windows) is None:
            return outputs
        size = self.whole.test.images.shape[1:3]
        return {name: windows.stitch(array, *size) for name, array in outputs.items()}

    def _parity(
        self, onnx: Artifact, engine: Artifact, outputs: dict[str, np.ndarray[Any, Any]], cell: dict[str, Any]
    ) -> dict[str, Any]:
        """Compare an engine with its ONNX file, on the first images of the test split; what was found is kept in the cell too.

        Raises:
            ParityError: They disagree; the message has the numbers and the layer.
        """
        backend = engine.config["backend"]
        if backend["name"] == "null":
            return {"reason": "the null backend computes nothing"}
        test = self.dataset.test
        images = test.images[: self.recipe.export.parity_images]
        if onnx.id not in self.references:
            self.references[onnx.id] = engine_parity.reference(onnx, np.array(images))
        found, metric, allowed = engine_parity.measure(
            self.references[onnx.id], outputs, test.labels, onnx, backend, self.task, self.recipe.export
        )
        cell["parity"] = {"split": "test", **parity.evidence(found, metric, allowed)}

        def where(failed: parity.OutputParity) -> str:
            self.display.say(f"searching the layer at which {backend['name']} {cell['precision']} goes wrong")
            array = outputs[failed.output][: len(images)]
            return engine_parity.where(failed, onnx, backend, images, array, allowed, self.target.run)

        parity.check(found, metric, allowed, what=f"the {backend['name']} engine", than="its ONNX file", where=where)
        return dict(cell["parity"])

    def _compare(self, entry: DeployConfig, group: list[int], images: Path) -> None:
        """Measure the cells of one deploy entry interleaved; the float32 student is the reference where there is one."""
        cells = self.record["cells"]
        group = sorted(group, key=lambda index: (cells[index]["role"] != "student", cells[index]["precision"] != "float32"))
        engines = [self.store.root / cells[index]["engine"] for index in group]
        config: dict[str, Any] = {
            "batch": entry.batch,
            "warmup_s": self.recipe.measure.warmup_s,
            "duration_s": self.recipe.measure.compare_s,
        }
        ids = [folder.name.rsplit("-", 1)[-1] for folder in engines]
        inputs = {"kind": "compare", "engines": ids, "config": config, "host": self.host, "data": self.dataset.fingerprint}

        def fill(folder: Path) -> dict[str, Any]:
            self.display.say(f"comparing {len(engines)} engines of {entry.backend.name}, interleaved")
            result = self._job(CompareJob(engines=[str(engine) for engine in engines], inputs=str(images), **config))
            write_json(folder / "record.json", result.payload)
            return {"ratios": result.payload["ratios"], "valid": result.payload["valid"]}

        try:
            found = self._or_result("bench", "compare", "student", inputs, tuple(ids), config, self.host, fill)
        except EdgekdError as error:
            self.record["warnings"].append(f"the comparison of {entry.backend.name}'s engines failed: {error.message}")
            return
        if isinstance(found, JobResult):
            self.record["warnings"].append(f"the engines of {entry.backend.name} were not compared: {found.reason}")
            return
        self.record["comparisons"].append(
            {"folder": found.folder.name, "backend_name": entry.backend.name, "target": entry.target, "cells": group}
        )
        if found.metrics["valid"] and not self.record["smoke"]:  # a smoke run measures for a moment: its times mean nothing
            self.slower += slower_than_float([cells[index] for index in group], found.metrics["ratios"])

    def _or_result(self, *arguments: Any) -> Artifact | JobResult:
        """An artifact, or the result of the job that said why there is none."""
        try:
            return self._artifact(*arguments)
        except _NotDoneError as error:
            return error.result

    def _artifact(
        self,
        kind: str,
        stage: str,
        role: str,
        inputs: dict[str, Any],
        parents: tuple[str, ...],
        config: dict[str, Any],
        environment: dict[str, Any],
        fill: Callable[[Path], dict[str, Any]],
    ) -> Artifact:
        """Find an artifact, or make it with ``fill``, which writes its files and returns its metrics."""
        self.order += 1
        key = content_id({**inputs, "versions": environment, "edgekd": __version__})
        start = time.monotonic()
        found = self.store.find(key)
        if found is not None and not found.metrics.get("valid", True):
            shutil.rmtree(found.folder)  # the machine was disturbed while it was measured: it may be quiet now
            found = None
        status = "reused"
        if found is None:
            status = "done"
            with self.store.draft(
                id=key,
                order=self.order,
                kind=kind,
                stage=stage,
                role=role,
                parents=parents,
                config=config,
                environment={"edgekd": __version__, **environment},
            ) as draft:
                draft.metrics = fill(draft.folder)
            found = self.store.peek(key)
            assert found is not None
        self.record["steps"].append(
            {
                "folder": found.folder.name,
                "kind": kind,
                "stage": stage,
                "role": role,
                "status": status,
                "reason": "",
                "seconds": round(time.monotonic() - start, 2),
            }
        )
        return found

    def _job(self, job: BuildJob | BenchJob | CompareJob | PredictJob) -> JobResult:
        work = self.store.root / "work" / "job"
        work.mkdir(parents=True, exist_ok=True)
        result = self.target.run(job, work)
        if result.status != "ok":
            raise _NotDoneError(result)
        return result


def opset(recipe: Recipe) -> int:
    """Of all ONNX files of a run."""
    return recipe.export.opset or opsets.choose(_readers(recipe))


def _readers(recipe: Recipe) -> dict[str, str]:
    """Backend -> its version, of all that the recipe names."""
    return {entry.backend.name: find_backend(entry.backend.name).available().version for entry in recipe.deploy}


def slower_than_float(cells: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> list[str]:
    """A line for every int8 engine of the student that is slower than its float32 twin.

    Args:
        cells: What was compared, the reference first.
        ratios: The comparison's.
    """
    reference = cells[0]
    if (reference["role"], reference["precision"]) != ("student", "float32"):
        return []
    return [
        f"{cell['backend_name']} int8: slower than its float32 twin: {ratio['speedup']:.2f} times its speed "
        f"[{ratio['interval'][0]:.2f}, {ratio['interval'][1]:.2f}]; its layers are too small for int8 to pay here"
        for ratio in ratios
        if ratio["verdict"] == "slower"
        and ratio["interval"][1] < MATTERS
        and (cell := cells[ratio["engine"]])["precision"] == "int8"
        and cell["role"] == "student"  # another width, or another model, is no twin
        and cell["backend_name"] != "null"
    ]


class _NotDoneError(Exception):
    """A job was skipped or failed; leaves the draft's ``with`` block, so that no artifact is written."""

    def __init__(self, result: JobResult) -> None:
        super().__init__(result.error or result.reason)
        self.result = result


def _precisions(entry: DeployConfig, checkpoints: list[Checkpoint]) -> list[str]:
    """What an entry builds: what it asks for, and float16 where the precision ladder ended there in place of int8."""
    quantized = _source(checkpoints, "int8") if "int8" in entry.precision else None
    instead = quantized is not None and ladder.refusal(quantized.metrics) is not None
    more = ["float16"] if instead and "float16" not in entry.precision and entry.backend.unsupported("float16") is None else []
    return [*entry.precision, *more]


def _source(checkpoints: list[Checkpoint], precision: str) -> Checkpoint | None:
    """The checkpoint that an engine of this precision is made from: the quantized one, or the last float one before it."""
    quantized = [checkpoint for checkpoint in checkpoints if checkpoint.stage in QUANTIZED]
    if precision in ("int8", "hybrid"):
        return quantized[-1] if quantized else None
    floats = [checkpoint for checkpoint in checkpoints if checkpoint.stage not in QUANTIZED]
    return floats[-1] if floats else None


def _unfinished(cell: dict[str, Any], result: JobResult) -> dict[str, Any]:
    cell["status"] = result.status
    cell["reason"] = result.reason or result.error + (f" ({result.hint})" if result.hint else "")
    return cell


def check_budget(recipe: Recipe, record: dict[str, Any], root: Path) -> dict[str, Any] | None:
    """Hold every measured engine of the student against the budget; the one that misses least is shown.

    Of a student with several widths, the widest that is within it.

    Returns:
        {"limits", "checks", "ok"}, or None where the recipe has no budget.
    """
    if recipe.budget is None:
        return None
    limits = {name: value for name, value in recipe.budget.model_dump().items() if value is not None}
    teacher = next((model for model in record["models"] if model["role"] == "teacher"), None)
    teacher_value = _metric(root / teacher["folder"]) if teacher is not None else None
    candidates = []
    for index, cell in enumerate(record["cells"]):
        role, _, width = cell["role"].partition("@")
        if role == "student" and cell["status"] == "measured" and cell["backend_name"] != "null":
            measured, valid = _measured(root / cell["bench"], teacher_value)
            checks = [
                {
                    "limit": name,
                    "allowed": allowed,
                    "measured": measured[name],
                    # a disturbed measurement says nothing of latency; all else is as it is
                    "ok": measured[name] is not None and measured[name] <= allowed and (valid or name != "latency_ms"),
                    "cell": index,
                }
                for name, allowed in limits.items()
            ]
            misses = sum(not check["ok"] for check in checks)
            narrowness = 0.0 if misses else -float(width or 1)
            candidates.append((misses, narrowness, measured["latency_ms"], checks))
    if not candidates:
        return {"limits": limits, "checks": [], "ok": False}
    misses, _, _, checks = min(candidates, key=lambda candidate: candidate[:3])
    return {"limits": limits, "checks": checks, "ok": misses == 0}


def _measured(bench: Path, teacher_value: float | None) -> tuple[dict[str, Any], bool]:
    """What the budget limits, and whether the measurement is valid."""
    record = json.loads((bench / "record.json").read_text())
    drop = 100 * (teacher_value - record["metric"]["value"]) if teacher_value is not None else 0.0
    return {
        "latency_ms": record["latency_ms"]["p50"],
        "size_mib": record["size_bytes"] / 2**20,
        "memory_mib": record["peak_memory_mib"],
        "accuracy_drop": drop,
    }, bool(record["valid"])


def _metric(folder: Path) -> float:
    from edgekd.artifacts import read_artifact

    return float(read_artifact(folder).metrics["metric"]["value"])
