"""Runs a recipe: checkpoints first, then the deploy matrix, then the report. Finished artifacts are reused.

The run directory is the only state. ``run.json`` says what was planned and what became of it; it is written after every step, so
an interrupted or failed run can be reported too.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgekd import __version__, models, report
from edgekd import data as data_kinds
from edgekd.artifacts import Artifact, Checkpoint, Store, content_id, file_sha256, write_json
from edgekd.bench.host import describe as describe_host
from edgekd.data.base import Dataset, Split
from edgekd.data.windows import windowed
from edgekd.deployment import Deployment
from edgekd.display import Display
from edgekd.distill import stage as distill_stage
from edgekd.distill.base import needs_teacher
from edgekd.distill.stage import DistillConfig
from edgekd.errors import ArtifactError, BudgetExceeded, EdgekdError
from edgekd.models.config import ModelConfig
from edgekd.nn.flops import macs, parameters
from edgekd.prune import stage as prune_stage
from edgekd.prune.importance import prune
from edgekd.prune.stage import PruneConfig
from edgekd.quantize import ladder, ptq
from edgekd.quantize import stage as quantize_stage
from edgekd.quantize.ptq import PtqConfig
from edgekd.quantize.stage import QuantizeConfig
from edgekd.recipe import SMOKE_BATCH, Loaded, Recipe, TeacherConfig, last_slimming, role_at, student_widths
from edgekd.tasks import AnyTask
from edgekd.tasks import build as build_task
from edgekd.timing import EngineTimer
from edgekd.train import checkpoint as checkpoints
from edgekd.train import stage as finetune_stage
from edgekd.train.hardware import check_processes, rank
from edgekd.train.loop import evaluate
from edgekd.train.stage import Context, EngineTime, FinetuneConfig, Trained, fresh
from edgekd.train.widths import cut

RUN = "run.json"
# The stage's config type says which function runs it.
STAGES: dict[type, Any] = {
    FinetuneConfig: finetune_stage.run,
    DistillConfig: distill_stage.run,
    PruneConfig: prune_stage.run,
    QuantizeConfig: quantize_stage.run,
    PtqConfig: ptq.run,
}
# Libraries that shape a checkpoint; another version of one of them means another id.
TRAINING_LIBRARIES = ("torch", "lightning-fabric", "torch-pruning")
SMOKE_COUNTS = {"train": 2 * SMOKE_BATCH, "val": SMOKE_BATCH, "test": SMOKE_BATCH, "calib": SMOKE_BATCH}
# What of a task matters to engines alone.
DEPLOYED = {"confidence", "nms", "boundary_px"}


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    report: dict[str, Any]
    folder: Path
    failures: list[str]


def compress(loaded: Loaded, *, out: Path, smoke: bool, display: Display, command: str) -> Outcome:
    """Run a recipe to its report.

    Args:
        loaded: The checked recipe.
        out: The run directory; made where it is missing.
        smoke: The recipe was made tiny; its data is thinned too.
        display: Told of progress.
        command: How the run was started, for the report.

    Raises:
        EdgekdError: The run failed before the report; what was finished stays.
        BudgetExceeded: The report is written, and no engine of the student is within the budget.
    """
    check_processes(loaded.recipe.compute, command)
    out = out.resolve()  # workers run in a folder of their own, where a relative path would lead elsewhere
    with _locked(out):
        return Run(loaded, out, smoke, display, command).whole()


class Run:
    """One run of one recipe. Its methods are called in the order in which they stand."""

    def __init__(self, loaded: Loaded, out: Path, smoke: bool, display: Display, command: str) -> None:
        self.recipe: Recipe = loaded.recipe
        self.display, self.smoke, self.search = display, smoke, loaded.search
        self.store = Store(out, display.warn)
        display.say(f"reading data ({self.recipe.data.kind})")
        self.dataset = data_kinds.load(self.recipe.data, search=loaded.search)
        if smoke:
            self.dataset = thin(self.dataset, SMOKE_COUNTS)
        self.task = build_task(self.recipe.task, self.dataset)
        self.context = Context(
            compute=self.recipe.compute,
            task=self.task,
            dataset=self.dataset,
            augment=self.recipe.data.augment,
            seed=self.recipe.seed,
            search=loaded.search,
            logs=out / "tensorboard",
            on_epoch=display.epoch,
            on_step=display.step,
            say=display.say,
            warn=display.warn,
        )
        self.context.engine_time = self._engine_time
        self.context.finer = self._finer
        self.order = 0
        self.started = time.monotonic()
        self.record: dict[str, Any] = self._header(loaded, command)
        self._teacher: checkpoints.Loaded | None = None

    def whole(self) -> Outcome:
        """Checkpoints, engines, report."""
        try:
            self.rehearse()
            students = self.train()
            if rank() != 0:
                return Outcome({}, self.store.root, [])
            deployment = Deployment(
                self.recipe, self.store, self.dataset, self.task, self.record, self.display, self.save, self.order
            )
            made = [checkpoint for role, found in students.items() if role.startswith("student") for checkpoint in found]
            missed = [line for checkpoint in made if (line := ladder.failure(checkpoint.metrics)) is not None]
            self.record["warnings"] += missed
            deployment.run(students)
        except EdgekdError as error:
            if rank() == 0:
                self.record["steps"].append({"status": "failed", "reason": error.message, "stage": self.record.pop("doing", "")})
                self.finish()
            raise
        summary = self.finish()
        failures = [
            f"{cell['backend_name']} {cell['precision']}: {cell['reason']}"
            for cell in self.record["cells"]
            if cell["status"] == "failed"
        ]
        failures += [*deployment.slower, *missed]
        budget = self.record["budget"]
        if budget is not None and not budget["ok"]:
            over = ", ".join(_miss(check) for check in budget["checks"] if not check["ok"])
            raise BudgetExceeded(
                f"over budget: {over or 'no engine was measured'}", hint=f"see {self.store.root}/report/report.md"
            )
        return Outcome(summary, self.store.root, failures)

    def rehearse(self) -> None:
        """Prune and quantize an untrained student once, so that a model that cannot be says so before hours of training."""
        if not any(isinstance(stage, PruneConfig | QuantizeConfig | PtqConfig) for stage in self.recipe.stages):
            return
        model = self.recipe.student.model.model_copy(update={"weights": None})
        if models.widths(model):  # what is pruned and quantized is one width of it
            model = models.at_width(model, 1.0)
        student = fresh(model, self.context)
        for stage in self.recipe.stages:
            if isinstance(stage, PruneConfig):
                student.module = prune(
                    student.module, student.architecture.example(), ratio=0.3, round_to=stage.round_to, scope=stage.scope
                )
            if isinstance(stage, QuantizeConfig | PtqConfig):
                quantize_stage.rehearse(stage.quantizer, student)

    def train(self) -> dict[str, list[Checkpoint]]:
        """All checkpoints: the teacher, the student trained alone, the student after each stage.

        Of a student that was trained at several widths, each goes through the stages that are left for itself.
        """
        recipe = self.recipe
        result: dict[str, list[Checkpoint]] = {}
        teacher = None
        if recipe.teacher is not None:
            teacher = self._teacher_checkpoint(recipe.teacher)
            result["teacher"] = [teacher]
            self.context.teacher = lambda: self._load_teacher(teacher)
        if "student_alone" in recipe.compare:
            budget = next(stage for stage in recipe.stages if isinstance(stage, DistillConfig))
            alone = FinetuneConfig(kind="finetune", train=budget.train)
            result["student_alone"] = [self._stage(alone, None, None, role="student_alone", name="student_alone")]
        result["student"], roles = [], ["student"]
        if recipe.student.model.weights is not None and isinstance(recipe.stages[0], PruneConfig | QuantizeConfig | PtqConfig):
            result["student"].append(self._given(recipe.student.model, "student", "weights"))  # the float twin of what follows
        for number, stage in enumerate(recipe.stages):
            for role in roles:
                before = result[role][-1] if result[role] else None
                result[role].append(self._stage(stage, before, teacher, role=role, name=stage.kind))
            if number == last_slimming(recipe) and (widths := student_widths(recipe)):
                whole, roles = result["student"][-1], [role_at(width) for width in widths]
                for role, width in zip(roles, widths, strict=True):
                    result.setdefault(role, []).append(self._width(whole, width, role))
        return result

    def _width(self, whole: Checkpoint, width: float, role: str) -> Checkpoint:
        """One width of the slimmable student, as a network of its own."""
        return self._checkpoint(
            {"width": width},
            role=role,
            name="width",
            inputs={"source": whole.id},
            parents=(whole.id,),
            make=lambda work: _untrained(cut(checkpoints.load_float(whole), width)),  # noqa: ARG005
        )

    def _teacher_checkpoint(self, config: TeacherConfig) -> Checkpoint:
        if config.train is not None:
            return self._stage(
                FinetuneConfig(kind="finetune", train=config.train),
                None,
                None,
                role="teacher",
                name="teacher",
                model=config.model,
            )
        return self._given(config.model, "teacher", "teacher")

    def _given(self, model: ModelConfig, role: str, name: str) -> Checkpoint:
        """A model as its weights file has it."""
        return self._checkpoint(
            {"weights only": True},
            role=role,
            name=name,
            inputs={"model": self._model_inputs(model)},
            parents=(),
            make=lambda work: _untrained(fresh(model, self.context)),  # noqa: ARG005
        )

    def _stage(
        self,
        stage: Any,
        source: Checkpoint | None,
        teacher: Checkpoint | None,
        *,
        role: str,
        name: str,
        model: ModelConfig | None = None,
    ) -> Checkpoint:
        model = model or self.recipe.student.model
        method = getattr(stage, "method", None)
        uses_teacher = method is not None and getattr(stage, "teacher", "teacher") == "teacher" and needs_teacher(method)
        parents = [parent for parent in (source, teacher if uses_teacher else None) if parent is not None]

        def make(work: Path) -> Trained:
            loaded = checkpoints.load_float(source) if source is not None else fresh(model, self.context)
            title = f"{self.order:02}-{name}"
            trained: Trained = STAGES[type(stage)](stage, loaded, self.context, title=title, work=work)
            return trained

        inputs = {
            "source": source.id if source is not None else self._model_inputs(model),
            "teacher": teacher.id if teacher is not None and uses_teacher else None,
        }
        if isinstance(stage, QuantizeConfig) and stage.latency_ms is not None:  # its result holds for this machine alone
            inputs["cpu"] = self.record["environment"]["cpu"]
        return self._checkpoint(
            stage.model_dump(mode="json"), role=role, name=name, inputs=inputs, parents=tuple(p.id for p in parents), make=make
        )

    def _checkpoint(
        self, config: dict[str, Any], *, role: str, name: str, inputs: dict[str, Any], parents: tuple[str, ...], make: Any
    ) -> Checkpoint:
        """Find the checkpoint, or make it: train, evaluate on the test split, store."""
        self.order += 1
        versions = {library: version(library) for library in TRAINING_LIBRARIES}
        compute = self.recipe.compute.model_dump(mode="json", exclude={"threads"})
        key = content_id(
            {
                "kind": "checkpoint",
                "config": config,
                "inputs": inputs,
                "data": self.dataset.fingerprint,
                "augment": self.recipe.data.augment.model_dump(mode="json"),
                "task": _of_the_task(self.recipe.task),
                "seed": self.recipe.seed,
                "compute": compute,
                "versions": {"edgekd": __version__, **versions},
            }
        )
        self.record["doing"] = name
        start = time.monotonic()
        found = self._find(key)
        status = "reused" if found is not None else "done"
        if found is None:
            self.display.stage(name, role)
            trained: Trained = make(self.store.work(key))
            found = self._store(key, config, name, role, parents, trained, versions, start)
        else:
            self.display.reused(found.folder.name)
        self._note(found, name, role, start, status)
        assert isinstance(found, Checkpoint)
        return found

    def _find(self, key: str) -> Artifact | None:
        """The finished checkpoint, if there is one; the first process looks, and the others do as it does.

        A process that still saw what the first one is about to remove as damaged would go on to the next stage alone, and all
        would wait for each other for ever.
        """
        found = self.store.find(key) if rank() == 0 else None
        if self.context.compute.devices > 1:
            there = self.context.fabric.broadcast(found is not None)
            if rank() != 0 and there:
                found = self.store.peek(key)
        return found

    def _store(
        self,
        key: str,
        config: dict[str, Any],
        name: str,
        role: str,
        parents: tuple[str, ...],
        trained: Trained,
        versions: dict[str, str],
        start: float,
    ) -> Artifact:
        loaded, context = trained.loaded, self.context
        setting = context.setting(name, self.store.work(key), 0)
        metric = evaluate(loaded.module, self.dataset.test, setting)
        loaded.module.to("cpu")
        if context.fabric.is_global_zero:
            environment = {
                "edgekd": __version__,
                "libraries": versions,
                "device": str(context.fabric.device),
                "threads": _threads(),
            }
            with self.store.draft(
                id=key,
                order=self.order,
                kind="checkpoint",
                stage=name,
                role=role,
                parents=parents,
                config=config,
                environment=environment,
            ) as draft:
                checkpoints.save(draft.folder, loaded.module, loaded.architecture, trained.history)
                shape = tuple(loaded.architecture.example().shape[1:])
                draft.metrics = {
                    "params": parameters(loaded.module),
                    "macs": macs(loaded.module, shape),
                    "metric": {"name": self.task.metric_name, "value": metric},
                    "val_metric": trained.history[-1]["val"] if trained.history else None,
                    "epochs": len(trained.history),
                    "layers": trained.layers,
                    **trained.evidence,
                }
                draft.seconds = time.monotonic() - start
        context.fabric.barrier()
        self.display.trained(name, self.task.metric_name, metric, time.monotonic() - start)
        found = self.store.peek(key)
        if found is None:
            raise ArtifactError(
                f"the checkpoint {name} was written and is not there", hint="is another program writing to the run directory?"
            )
        return found

    def _note(self, artifact: Artifact, name: str, role: str, start: float, status: str) -> None:
        self.record["steps"].append(
            {
                "folder": artifact.folder.name,
                "kind": artifact.kind,
                "stage": name,
                "role": role,
                "status": status,
                "reason": "",
                "seconds": round(time.monotonic() - start, 2),
            }
        )
        architecture = artifact.json(checkpoints.MODEL)["model"]
        title = architecture["call"] if architecture["name"] == "callable" else architecture["name"]
        self.record["models"].append({"role": role, "stage": name, "title": title, "folder": artifact.folder.name})
        self.save()

    def _finer(self, scale: int) -> Split:
        data: Any = self.recipe.data  # of a kind that has size_px: the recipe's check
        config = data.model_copy(update={"size_px": data.size_px * scale})
        self.display.say(f"reading training images at {config.size_px} px")
        found = data_kinds.load(config, search=self.search)
        return thin(found, SMOKE_COUNTS).train if self.smoke else found.train

    def _engine_time(self, model: checkpoints.Loaded) -> EngineTime:
        cpu, folder = self.record["environment"]["cpu"], self.store.root / "work" / "timing"
        data = self.dataset if self.task.windows is None else windowed(self.dataset, self.task.windows)
        return EngineTimer(self.recipe, data, self.task, cpu, folder)(model)

    def _load_teacher(self, checkpoint: Checkpoint) -> checkpoints.Loaded:
        if self._teacher is None:
            self._teacher = checkpoints.load_float(checkpoint)
        return self._teacher

    def _model_inputs(self, model: ModelConfig) -> dict[str, Any]:
        from edgekd.data.paths import find

        weights = file_sha256(find(model.weights, self.context.search)) if model.weights is not None else None
        inputs = {"model": model.model_dump(mode="json", exclude={"weights", "backbone_weights"}), "weights": weights}
        if model.backbone_weights is not None:
            inputs["backbone_weights"] = file_sha256(find(model.backbone_weights, self.context.search))
        code = code_of(model)
        return inputs if code is None else {**inputs, "code": code}

    def _header(self, loaded: Loaded, command: str) -> dict[str, Any]:
        data = self.dataset
        return {
            "schema": 1,
            "name": self.recipe.name,
            "recipe_path": str(loaded.document.file),
            "recipe_text": loaded.document.text,
            "command": command,
            "seed": self.recipe.seed,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "finished": None,
            "seconds": None,
            "edgekd": __version__,
            "smoke": self.smoke,
            "environment": describe_host(),
            "task": self.recipe.task.kind,
            "data": {
                "kind": self.recipe.data.kind,
                "classes": data.num_classes,
                "counts": {split.name: len(split.labels) for split in (data.train, data.val, data.test, data.calib)},
                "fingerprint": data.fingerprint,
                "warnings": list(data.warnings),
            },
            "steps": [],
            "models": [],
            "cells": [],
            "comparisons": [],
            "budget": None,
            "warnings": list(data.warnings),
        }

    def save(self) -> None:
        """Write run.json; only the first process does."""
        if rank() == 0:
            write_json(self.store.root / RUN, self.record)

    def finish(self) -> dict[str, Any]:
        """Write run.json for the last time, and the report."""
        self.record.pop("doing", None)
        self.record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.record["seconds"] = round(time.monotonic() - self.started, 1)
        self.save()
        return report.write(self.store.root)


def _miss(check: dict[str, Any]) -> str:
    measured = "unknown" if check["measured"] is None else f"{check['measured']:.4g}"
    return f"{check['limit']} {measured} (allowed {check['allowed']:.4g})"


def code_of(model: ModelConfig) -> str | None:
    """What stands for a model's code where it is not edgekd's own: changed code makes another checkpoint.

    The sha256 of all Python files of a user's module, or of its top package; a zoo's name and version.
    """
    if model.call is not None:
        spec = importlib.util.find_spec(model.call.split(":")[0].split(".")[0])
        if spec is None or spec.origin is None:
            return None
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        return content_id({path.relative_to(origin.parent).as_posix(): file_sha256(path) for path in files})
    zoo, colon, _ = model.name.partition(":")
    return f"{zoo} {version(zoo)}" if colon else None


def _of_the_task(task: AnyTask) -> dict[str, Any]:
    """What of a task makes a checkpoint another one; without windows, that there are none says nothing."""
    found = task.model_dump(mode="json", exclude=DEPLOYED)
    return {key: value for key, value in found.items() if (key, value) != ("windows", None)}


def thin(dataset: Dataset, counts: dict[str, int]) -> Dataset:
    """A data set with at most ``counts`` images per split, evenly spaced so that all classes stay."""
    import dataclasses

    import numpy as np

    def cut(split: Split, count: int) -> Split:
        index = np.unique(np.linspace(0, len(split.labels) - 1, min(count, len(split.labels))).round().astype(int))
        return dataclasses.replace(split, images=np.ascontiguousarray(split.images[index]), labels=split.labels[index])

    splits: dict[str, Any] = {name: cut(getattr(dataset, name), count) for name, count in counts.items()}
    fingerprint = content_id({"thinned": counts, "of": dataset.fingerprint})
    return dataclasses.replace(dataset, **splits, fingerprint=fingerprint)


def _untrained(loaded: checkpoints.Loaded) -> Trained:
    from edgekd.nn.layers import layer_table

    return Trained(loaded, [], layer_table(loaded.module))


def _threads() -> int:
    import torch

    return torch.get_num_threads()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the run directory: two runs in one directory would delete each other's drafts."""
    out.mkdir(parents=True, exist_ok=True)
    if rank() != 0:
        yield
        return
    try:
        stream = (out / ".lock").open("a+")
    except OSError as error:
        raise ArtifactError(
            f"the run directory {out} cannot be written: {error}", hint="give another directory with --out"
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            raise ArtifactError(
                f"{out} is in use by another run (process {stream.read().strip() or 'unknown'})",
                hint="wait for it, or give another directory with --out",
            ) from error
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def command_line() -> str:
    """How this process was started, as a user would type it."""
    import shlex

    return shlex.join(["edgekd", *sys.argv[1:]])
