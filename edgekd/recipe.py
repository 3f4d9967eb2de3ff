"""The recipe: every section, and every check that can be made before any work is done.

Options live beside what they configure (train/optim.py, distill/, prune/stage.py, quantize/, engines/ ...); this is the one file
that knows all sections and how they depend on each other.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from edgekd import data as data_kinds
from edgekd import models
from edgekd._config import Config
from edgekd._explain import Problem, explain, recipe_error
from edgekd._yaml import Document, Path_, load
from edgekd.data import CocoConfig, DataConfig, ImageFolderConfig, MasksConfig, YoloConfig
from edgekd.data.boxes import LARGEST_PX
from edgekd.data.paths import find
from edgekd.distill import MethodConfig
from edgekd.distill.base import needs_teacher
from edgekd.distill.logits import LogitsConfig
from edgekd.distill.slimseg import SlimsegConfig
from edgekd.distill.stage import DistillConfig
from edgekd.engines import BackendOptions, backend
from edgekd.errors import EdgekdError, RecipeError
from edgekd.export.stage import PRECISIONS, ExportConfig
from edgekd.models import superyolo
from edgekd.models.config import CALLABLE, ModelConfig
from edgekd.nn.shapes import shapes_only
from edgekd.nn.taps import resolve
from edgekd.prune.stage import PruneConfig
from edgekd.quantize.hybrid import HybridConfig
from edgekd.quantize.ptq import PtqConfig
from edgekd.quantize.stage import QuantizeConfig
from edgekd.tasks import DetectionConfig, TaskConfig
from edgekd.train.checkpoint import Architecture
from edgekd.train.checkpoint import Loaded as Shell
from edgekd.train.hardware import ComputeConfig
from edgekd.train.optim import TrainConfig
from edgekd.train.stage import FinetuneConfig

StageConfig = Annotated[FinetuneConfig | DistillConfig | PruneConfig | QuantizeConfig | PtqConfig, Field(discriminator="kind")]
Role = Literal["teacher", "student_alone", "student"]
Precision = Literal["float32", "float16", "int8", "hybrid"]


LABELS = {"classification": "classes", "detection": "boxes", "segmentation": "masks", "saliency": "masks"}
"""Task -> the labels that it needs."""
LABELS_OF = {
    "image_folder": "classes",
    "digits": "classes",
    "coco": "boxes",
    "yolo": "boxes",
    "masks": "masks",
    "callable": "classes",
    "callable_boxes": "boxes",
    "callable_masks": "masks",
}
"""Kind of data -> its labels."""
SEGMENTERS = (
    "unet",
    "slim_unet",
    "slim_pspnet",
    "slim_deeplabv3plus",
    "mobile_unet",
    "fanet",
    "sk_unet",
    "segformer_b0",
    "segformer_b1",
    "segformer_b2",
    "pspnet",
    "deeplabv3plus",
)
"""edgekd's models that give logits for every pixel."""
SALIENCY = ("scfnet",)
"""edgekd's models that give one map of what stands out."""
MAPS = {"segmentation": SEGMENTERS, "saliency": SALIENCY}
GIVES = {
    "classification": "one class per image",
    "segmentation": "logits for every pixel",
    "saliency": "one map of what stands out",
}


class TeacherConfig(Config):
    """The big model that teaches."""

    model: ModelConfig
    train: TrainConfig | None = None
    """Train it on the labels first; null where model.weights is given."""


class StudentConfig(Config):
    """The small model that becomes the product."""

    model: ModelConfig


class DeployConfig(Config):
    """One backend on one target: an engine for each precision of each named model."""

    backend: Annotated[BackendOptions, Field(discriminator="name")]
    """How engines are built and run, with all its options."""
    precision: list[Precision] = Field(min_length=1)
    """float32 is the last float model; int8 needs a stage that quantizes: quantize or ptq; hybrid needs one with `quantizer:
    {kind: hybrid}`, and computes what was trained in float operations: it shows what the bits cost, and saves no time."""
    models: list[Role] = Field(default=["student"], min_length=1)
    """Whose engines; the teacher and the student trained alone are float32 only."""
    widths: list[float] | None = None
    """Of a student that slimseg has trained at several widths: those that get engines; null takes all. A budget takes the widest
    that meets it."""
    target: Literal["local"] = "local"
    """Where they are built and measured."""
    allow_fallback: bool = False
    """Measure an engine even where most of what was asked of it in int8 or float16 runs otherwise; else that is a failure."""
    batch: int = Field(1, ge=1, le=4096)
    """Images per inference."""


class MeasureConfig(Config):
    """How long engines are measured."""

    warmup_s: float = Field(0.3, ge=0, le=600)
    """Seconds of inference before measuring."""
    duration_s: float = Field(2.0, gt=0, le=3600)
    """Seconds of steady state for each engine alone in its process."""
    compare_s: float = Field(6.0, gt=0, le=3600)
    """Seconds for all engines of one deploy entry together, interleaved."""


class BudgetConfig(Config):
    """What the product may cost; met when one measured engine of the student is within all limits given."""

    latency_ms: float | None = Field(None, gt=0)
    """Largest median latency, milliseconds."""
    size_mib: float | None = Field(None, gt=0)
    """Largest engine, MiB on disk."""
    memory_mib: float | None = Field(None, gt=0)
    """Largest peak memory of the process that runs the engine, MiB."""
    accuracy_drop: float | None = Field(None, ge=0, le=100)
    """Most points of the task's metric below the teacher."""


class Recipe(Config):
    """The way from a teacher to measured engines."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run directory: letters, digits, dots, dashes and underscores."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Everything random follows from it."""
    task: TaskConfig
    data: DataConfig
    teacher: TeacherConfig | None = None
    student: StudentConfig
    stages: list[StageConfig] = Field(min_length=1, max_length=20)
    """What is done to the student, in this order."""
    compare: list[Literal["student_alone"]] = Field(default=[])
    """student_alone also trains the student without a teacher: same weights to begin with, same budget as the distill stage."""
    compute: ComputeConfig = ComputeConfig()
    export: ExportConfig = ExportConfig()
    deploy: list[DeployConfig] = Field(default=[])
    """Engines to build and measure."""
    measure: MeasureConfig = MeasureConfig()
    budget: BudgetConfig | None = None


@dataclass(frozen=True)
class Loaded:
    """A valid recipe and the file that it came from."""

    recipe: Recipe
    document: Document
    search: tuple[Path, ...]


def search_folders(file: Path) -> tuple[Path, ...]:
    """Where a recipe's relative paths are looked up: $EDGEKD_DATA, then beside the recipe."""
    data = os.environ.get("EDGEKD_DATA")
    return (*([Path(data)] if data else []), file.resolve().parent)


def load_recipe(file: Path) -> Loaded:
    """Read and check a recipe, without touching its data.

    Raises:
        RecipeError: All problems that were found, one a line, each with file, line, column and path.
    """
    document = load(file)
    recipe = parse(document)
    problems = check(recipe)
    if problems:
        raise recipe_error(document, problems)
    return Loaded(recipe, document, search_folders(file))


def parse(document: Document) -> Recipe:
    """Plain data to a typed Recipe.

    Raises:
        RecipeError: Unknown or missing keys, wrong types, values out of range.
    """
    try:
        # Strict, and through JSON: in Python mode "2" and true would become integers, or tuples would be refused.
        return Recipe.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        schema = Recipe.model_json_schema()
        problems = [explain(found, document.data, schema) for found in error.errors(include_url=False)]
        raise recipe_error(document, problems) from error


def check(recipe: Recipe) -> list[Problem]:
    """What one section demands of another."""
    return [
        *_check_task(recipe),
        *_check_teacher(recipe),
        *_check_order(recipe),
        *_check_widths(recipe),
        *_check_deploy(recipe),
        *_check_budget(recipe),
    ]


def student_widths(recipe: Recipe) -> tuple[float, ...]:
    """The widths of the finished student, the widest first; none where it is an ordinary network or has learnt one width only."""
    return models.widths(recipe.student.model) if last_slimming(recipe) is not None else ()


def last_slimming(recipe: Recipe) -> int | None:
    """The last stage that trains the student at several widths; after it every width is a network of its own."""
    found = [
        number
        for number, stage in enumerate(recipe.stages)
        if isinstance(stage, DistillConfig) and isinstance(stage.method, SlimsegConfig)
    ]
    return found[-1] if found else None


def role_at(width: float) -> str:
    """Whose a model is that is the student at a width: ``student`` at the full one, ``student@0.5`` at half of it."""
    return "student" if width == 1 else f"student@{width:g}"


def deployed_roles(recipe: Recipe, entry: DeployConfig) -> list[str]:
    """Whose engines an entry of deploy asks for, every width of the student for itself."""
    own = [role_at(width) for width in entry.widths or student_widths(recipe)] or ["student"]
    return [found for role in entry.models for found in (own if role == "student" else [role])]


def _check_task(recipe: Recipe) -> list[Problem]:
    """The data has the labels that the task needs, a detector the heads, and a method the outputs."""
    problems = []
    task = recipe.task
    needs, has = LABELS[task.kind], LABELS_OF[recipe.data.kind]
    if needs != has:
        kinds = " or ".join(kind for kind, labels in LABELS_OF.items() if labels == needs)
        other = next(name for name, labels in LABELS.items() if labels == has)
        problems.append(
            Problem(
                ("data", "kind"),
                f"the task {task.kind} needs {needs}, and {recipe.data.kind} gives {has}",
                f"use {kinds}, or the task {other}",
            )
        )
    for owner, model in _owners(recipe).items():
        strides = superyolo.STRIDES.get(model.name)
        path: Path_ = (owner, "model", "name")
        if isinstance(task, DetectionConfig):
            if strides is None and model.name != CALLABLE:
                detectors = ", ".join(superyolo.STRIDES)
                problems.append(Problem(path, f"{model.name} is no detector", f"use {detectors}, or callable for your own"))
            elif strides is not None and tuple(task.strides) != strides:
                problems.append(
                    Problem(
                        ("task", "strides"),
                        f"the {owner} {model.name} has heads of stride {list(strides)}; strides is {task.strides}",
                        f"write strides: {list(strides)}",
                    )
                )
        elif strides is not None:
            problems.append(Problem(path, f"{model.name} is a detector", "use the task detection, or another model"))
        elif model.name in models.names() and (made_for := _made_for(model.name)) != task.kind:
            right = ", ".join(MAPS[task.kind]) if task.kind in MAPS else "another model"
            problems.append(Problem(path, f"{model.name} gives {GIVES[made_for]}", f"use {right}, or the task {made_for}"))
    problems += [
        Problem(
            ("stages", number, "method"),
            f"logits compares the scores of classes, which the task {task.kind} does not give",
            "for boxes take raw_output" if isinstance(task, DetectionConfig) else "for masks take structured_kd",
        )
        for number, stage in enumerate(recipe.stages)
        if task.kind != "classification" and isinstance(getattr(stage, "method", None), LogitsConfig)
    ]
    return problems


def _made_for(model: str) -> str:
    """The task of one of edgekd's models that is no detector."""
    return next((task for task, names in MAPS.items() if model in names), "classification")


def _check_teacher(recipe: Recipe) -> list[Problem]:
    problems = []
    teacher = recipe.teacher
    for number, stage in enumerate(recipe.stages):
        method = getattr(stage, "method", None)
        own = isinstance(stage, QuantizeConfig) and stage.teacher == "float"
        if method is not None and teacher is None and not own and needs_teacher(method):
            problems.append(
                Problem(
                    ("stages", number, "method"),
                    f"the method {method.name!r} needs a teacher, and the recipe has none",
                    "add a teacher section",
                )
            )
        if isinstance(stage, QuantizeConfig) and stage.teacher == "teacher" and method is None:
            problems.append(
                Problem(
                    ("stages", number, "teacher"),
                    "a teacher without a method teaches nothing",
                    "give a method, or remove this key",
                )
            )
    if teacher is not None and teacher.train is None and teacher.model.weights is None:
        problems.append(
            Problem(
                ("teacher",),
                "an untrained teacher teaches nothing: it has neither model.weights nor train",
                "name a file in teacher.model.weights, or give teacher.train",
            )
        )
    if "student_alone" in recipe.compare and not any(isinstance(stage, DistillConfig) for stage in recipe.stages):
        problems.append(
            Problem(
                ("compare",), "student_alone needs a distill stage, whose budget it takes", "remove it, or add a distill stage"
            )
        )
    elif "student_alone" in recipe.compare and not isinstance(recipe.stages[0], DistillConfig):
        problems.append(
            Problem(
                ("compare",),
                "student_alone begins with fresh weights, and the distilled student does not: distill is not the first stage",
                "remove it, or put the distill stage first",
            )
        )
    return problems


def _check_order(recipe: Recipe) -> list[Problem]:
    problems = []
    trained = recipe.student.model.weights is not None
    quantized: str | None = None
    for number, stage in enumerate(recipe.stages):
        path: Path_ = ("stages", number, "kind")
        if quantized is not None:
            problems.append(
                Problem(
                    path,
                    f"{stage.kind} comes after {quantized}; a quantized model is final",
                    "put one stage that quantizes last: quantize, which takes a method of its own, or ptq",
                )
            )
        elif isinstance(stage, PruneConfig | QuantizeConfig | PtqConfig) and not trained:
            problems.append(
                Problem(
                    path,
                    f"{stage.kind} needs a trained student",
                    "put a finetune or distill stage before it, or give student.model.weights",
                )
            )
        trained = True
        if isinstance(stage, PruneConfig) and recipe.student.model.name in models.UNPRUNABLE:
            problems.append(
                Problem(
                    path,
                    f"the channels of {recipe.student.model.name} cannot be followed: its attention multiplies maps",
                    "remove this stage, or choose another model; one of less width is smaller too",
                )
            )
        if isinstance(stage, QuantizeConfig | PtqConfig):
            quantized = stage.kind
        if isinstance(stage, FinetuneConfig) and stage.super_resolution is not None:
            problems += _check_finer(("stages", number, "super_resolution"), stage.super_resolution.scale, recipe)
        timed = isinstance(stage, QuantizeConfig) and stage.latency_ms is not None
        if timed and not any("int8" in entry.precision for entry in recipe.deploy):
            problems.append(
                Problem(
                    ("stages", number, "quantizer", "budget", "latency_ms"),
                    "no engine in int8 is deployed whose latency could be measured",
                    "add a deploy entry with int8, or give size_mb or bops_g",
                )
            )
    return problems


def _check_widths(recipe: Recipe) -> list[Problem]:
    """A slimmable student is pruned and quantized one width at a time; and the widths that are deployed exist."""
    try:
        slimmable, widths = models.widths(recipe.student.model), student_widths(recipe)
    except EdgekdError:
        return []  # of arguments that cannot be: preflight says so
    problems = []
    last = last_slimming(recipe)
    for number, stage in enumerate(recipe.stages):
        if slimmable and isinstance(stage, PruneConfig | QuantizeConfig | PtqConfig) and (last is None or number < last):
            problems.append(
                Problem(
                    ("stages", number, "kind"),
                    f"{stage.kind} needs an ordinary network, and {recipe.student.model.name} runs at several widths",
                    "put a distill stage with the method slimseg before it, and none after: it makes a network of every width",
                )
            )
        if isinstance(getattr(stage, "method", None), SlimsegConfig) and not isinstance(stage, DistillConfig):
            problems.append(
                Problem(
                    ("stages", number, "method"),
                    f"slimseg trains several widths at once, and {stage.kind} works on one",
                    "choose another method, or a distill stage",
                )
            )
    for number, entry in enumerate(recipe.deploy):
        path: Path_ = ("deploy", number, "widths")
        if entry.widths is not None and ("student" not in entry.models or not widths):
            message = "the student has one width" if "student" in entry.models else "widths are the student's"
            problems.append(Problem(path, f"{message}, so there is nothing to choose", "remove this key"))
        elif entry.widths is not None and (len(set(entry.widths)) != len(entry.widths) or not set(entry.widths) <= set(widths)):
            allowed = ", ".join(f"{width:g}" for width in widths)
            problems.append(
                Problem(path, f"{entry.widths}: not all are different widths of the student", f"its widths: {allowed}")
            )
    return problems


def _check_finer(path: Path_, scale: int, recipe: Recipe) -> list[Problem]:
    """Whether training images can be read ``scale`` times as fine."""
    data = recipe.data
    if not isinstance(data, CocoConfig | YoloConfig):
        message = f"super_resolution reads images with boxes finer than size_px, and {data.kind} cannot"
        return [Problem(path, message, "remove it, or use coco or yolo data")]
    if scale * data.size_px > LARGEST_PX:
        message = f"{scale} times {data.size_px} px is more than {LARGEST_PX} px"
        return [Problem((*path, "scale"), message, "lower it, or data.size_px")]
    return []


def _check_deploy(recipe: Recipe) -> list[Problem]:
    problems = []
    lacks = _not_quantized(recipe)
    for number, entry in enumerate(recipe.deploy):
        if recipe.export.batch not in (None, entry.batch):
            problems.append(
                Problem(
                    ("deploy", number, "batch"),
                    f"batch is {entry.batch}, and the files take {recipe.export.batch} only (export.batch)",
                    "give the same number in both, or leave export.batch free",
                )
            )
        for index, precision in enumerate(entry.precision):
            path: Path_ = ("deploy", number, "precision", index)
            if (reason := entry.backend.unsupported(PRECISIONS.get(precision, precision))) is not None:
                problems.append(Problem(path, reason, "remove it here, or change the backend's options"))
            elif precision in lacks:
                problems.append(Problem(path, *lacks[precision]))
            if precision in entry.precision[:index]:
                problems.append(Problem(path, f"{precision} is given twice", "remove one of the two"))
        for index, role in enumerate(entry.models):
            path = ("deploy", number, "models", index)
            if role in entry.models[:index]:
                problems.append(Problem(path, f"{role} is given twice", "remove one of the two"))
            if role == "teacher" and recipe.teacher is None:
                problems.append(Problem(path, "the recipe has no teacher", "add a teacher section, or remove it here"))
            if role == "student_alone" and "student_alone" not in recipe.compare:
                problems.append(Problem(path, "student_alone is not trained", "add compare: [student_alone]"))
            if role != "student" and not set(entry.precision) - {"int8", "hybrid"}:
                problems.append(
                    Problem(
                        path,
                        f"{role} is deployed in float only, and this entry asks for int8 only",
                        "add float32 to its precision",
                    )
                )
    return problems


def _not_quantized(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Precisions for which no stage makes a student -> what to say, and the hint."""
    lacks = {
        "int8": (
            "int8 needs a quantized student, and no stage quantizes it",
            "add a quantize or a ptq stage, or deploy float32",
        ),
        "hybrid": (
            "hybrid needs a student with hybrid bits, and no stage gives it any",
            "add a quantize stage with `quantizer: {kind: hybrid}`, or remove it here",
        ),
    }
    for stage in recipe.stages:
        if isinstance(stage, QuantizeConfig | PtqConfig):
            lacks.pop("int8", None)
        if isinstance(stage, QuantizeConfig) and isinstance(stage.quantizer, HybridConfig):
            lacks.pop("hybrid", None)
    return lacks


def _check_budget(recipe: Recipe) -> list[Problem]:
    budget = recipe.budget
    if budget is None:
        return []
    problems = []
    if not any("student" in entry.models for entry in recipe.deploy):
        problems.append(Problem(("budget",), "a budget needs a deployed student", "add a deploy entry for the student"))
    if all(value is None for value in budget.model_dump().values()):
        problems.append(
            Problem(("budget",), "the budget has no limit", "give one of latency_ms, size_mib, memory_mib, accuracy_drop")
        )
    if budget.accuracy_drop is not None and recipe.teacher is None:
        problems.append(
            Problem(
                ("budget", "accuracy_drop"),
                "the drop is measured against the teacher, and the recipe has none",
                "add a teacher section",
            )
        )
    return problems


def allow_fallback(recipe: Recipe) -> Recipe:
    """The same recipe, with ``allow_fallback`` in every entry of deploy."""
    return recipe.model_copy(update={"deploy": [entry.model_copy(update={"allow_fallback": True}) for entry in recipe.deploy]})


def smoke(recipe: Recipe) -> Recipe:
    """The same recipe made tiny: one epoch of two steps per training, and engines measured for a moment.

    The pipeline thins the data of a smoke run; this only changes the recipe.
    """

    def shorter(train: TrainConfig | None) -> TrainConfig | None:
        if train is None:
            return None
        accumulate = min(train.accumulate, 2)
        parts = accumulate * recipe.compute.devices
        batch = max(1, min(SMOKE_BATCH, train.batch_size) // parts) * parts
        return train.model_copy(update={"epochs": 1, "batch_size": batch, "accumulate": accumulate, "warmup_epochs": 0.0})

    def smaller(stage: Any) -> Any:
        if isinstance(stage, QuantizeConfig) and isinstance(stage.quantizer, HybridConfig):
            stage = stage.model_copy(update={"quantizer": stage.quantizer.model_copy(update={"recalibration_batches": 2})})
        if (method := getattr(stage, "method", None)) is not None:  # what it trains before the student
            own = {name: 1 for name, value in method if name.endswith("epochs") and value > 1}
            stage = stage.model_copy(update={"method": method.model_copy(update=own)})
        if not isinstance(stage, PtqConfig):
            return stage.model_copy(update={"train": shorter(stage.train)})
        if stage.fallback is None:
            return stage
        # of a model that has learnt nothing any drop is noise
        easy = stage.fallback.model_copy(update={"max_drop": 100.0, "train": shorter(stage.fallback.train)})
        return stage.model_copy(update={"fallback": easy})

    stages = [smaller(stage) for stage in recipe.stages]
    teacher = recipe.teacher
    if teacher is not None:
        teacher = teacher.model_copy(update={"train": shorter(teacher.train)})
    measure = MeasureConfig(warmup_s=0.02, duration_s=0.1, compare_s=0.2)
    loose = {"max_changed": 1.0}
    few_bits = any(isinstance(stage, QuantizeConfig) and isinstance(stage.quantizer, HybridConfig) for stage in stages)
    if few_bits and recipe.export.max_error is None:
        # every layer of a deep network that has learnt nothing makes one step of few bits larger
        loose["max_error"] = SMOKE_ERROR
    update = {
        "data": _few_images(recipe.data, getattr(recipe.task, "windows", None) is not None),
        "teacher": teacher,
        "stages": stages,
        "measure": measure,
        "budget": None,
        "export": recipe.export.model_copy(update=loose),
    }
    return recipe.model_copy(update=update)


def _few_images(data: Any, whole: bool) -> Any:
    """A recipe's data section with a limit, where its kind has one; a good part of the few images keeps its labels.

    Images with masks or boxes are small, too: networks for them take any size, and ``whole`` says that something else does not.
    """
    update: dict[str, Any] = {}
    if "limit_per_class" in type(data).model_fields:
        update["limit_per_class"] = SMOKE_BATCH
    if "limit" in type(data).model_fields:
        update["limit"] = 2 * SMOKE_BATCH
    if isinstance(data, MasksConfig):
        update["labelled"] = max(0.75, data.labelled)
        if not whole:
            update["size_px"] = tuple(min(side, SMOKE_PX) for side in data.size_px)
    if isinstance(data, CocoConfig | YoloConfig):
        update["size_px"] = min(data.size_px, SMOKE_PX)
    return data.model_copy(update=update)


EXAMPLE_PX = 64
"""Side of the images for which models are looked at where only the data itself says how large they are."""
SMOKE_BATCH = 16
SMOKE_PX = 128
SMOKE_ERROR = 0.6
"""An export that is wrong is further away."""


def preflight(loaded: Loaded) -> None:
    """What can be checked in seconds on this machine: data and weights exist, taps exist, backends are installed.

    Raises:
        RecipeError: With the place in the recipe of everything that is missing.
    """
    recipe = loaded.recipe
    problems = [*_check_data(loaded), *_check_weights(loaded), *_check_models(recipe)]
    for number, entry in enumerate(recipe.deploy):
        maker = backend(entry.backend.name)
        found = maker.available(entry.backend)
        if not found.ok:
            key = "provider" if maker.available().ok else "name"
            problems.append(Problem(("deploy", number, "backend", key), found.reason, found.hint))
    if problems:
        raise recipe_error(loaded.document, problems)


def _attempt(path: Path_, action: Callable[[], Any]) -> list[Problem]:
    """Do something; the error that edgekd raises becomes a problem at a place."""
    try:
        action()
    except EdgekdError as error:
        return [Problem(path, error.message, error.hint)]
    return []


def _check_data(loaded: Loaded) -> list[Problem]:
    config = loaded.recipe.data
    path: Path_ = ("data", "root" if isinstance(config, ImageFolderConfig | CocoConfig | YoloConfig | MasksConfig) else "kind")
    problems = _attempt(path, lambda: data_kinds.preflight(config, search=loaded.search))
    for index, problem in enumerate(problems):
        # the message may say itself which key it is about
        if found := re.match(r"data((?:\.[a-z_]+)+)(?:: | (?=\S))", problem.message):
            inner = tuple(found[1][1:].split("."))
            problems[index] = replace(problem, path=("data", *inner), message=problem.message[found.end() :])
    return problems


def _owners(recipe: Recipe) -> dict[str, ModelConfig]:
    teacher = {} if recipe.teacher is None else {"teacher": recipe.teacher.model}
    return {**teacher, "student": recipe.student.model}


def _check_weights(loaded: Loaded) -> list[Problem]:
    problems: list[Problem] = []
    for owner, model in _owners(loaded.recipe).items():
        for key in ("weights", "backbone_weights"):
            if (weights := getattr(model, key)) is not None:
                problems += _attempt((owner, "model", key), lambda name=weights: find(name, loaded.search))  # type: ignore[misc]
    return problems


def _check_models(recipe: Recipe) -> list[Problem]:
    """Build the models without weights: their arguments fit, their taps exist, and methods find the taps that they ask for."""
    built: dict[str, Shell] = {}
    problems: list[Problem] = []
    for owner, config in _owners(recipe).items():
        found = _build(owner, config, getattr(recipe.data, "channels", 3), _image_px(recipe.data))
        if isinstance(found, Problem):
            problems.append(found)
        else:
            built[owner] = found
    for number, stage in enumerate(recipe.stages):
        method = getattr(stage, "method", None)
        own = isinstance(stage, QuantizeConfig) and stage.teacher == "float"
        student, teacher = built.get("student"), built.get("student" if own else "teacher")
        if method is not None and student is not None and (teacher is not None or not needs_teacher(method)):
            problems += _attempt(("stages", number, "method"), partial(_check_method, method, student, teacher))
    return problems


def _image_px(data: Any) -> tuple[int, int]:
    """Height and width of the data's images: methods refuse maps that are too small for them, or too large."""
    sides = getattr(data, "size_px", EXAMPLE_PX)
    return (sides, sides) if isinstance(sides, int) else sides


def _build(owner: str, config: ModelConfig, channels: int, size_px: tuple[int, int]) -> Shell | Problem:
    """The model on no device: shapes only, so neither memory nor time."""
    where = "call" if config.call else "arguments" if config.arguments else "name"
    try:
        with shapes_only():
            # The number of classes is the data's, which is not read yet; taps do not depend on it.
            module = models.build(config, num_classes=10, in_channels=channels)
        if config.backbone_weights is not None:
            where = "backbone_weights"
            models.check_backbone(module)
        where = "taps"
        shape = Architecture(config.model_dump(mode="json"), 10, channels, *size_px)
        return Shell(module, models.taps(config, module), shape)
    except EdgekdError as error:
        return Problem((owner, "model", where), error.message, error.hint)


def _check_method(method: MethodConfig, student: Shell, teacher: Shell | None) -> None:
    used: Any = teacher if needs_teacher(method) else None
    try:
        with shapes_only():
            distiller = method.build(student, used)
    except RuntimeError as error:  # torch's, from a model's forward
        height, width = student.architecture.height_px, student.architecture.width_px
        raise RecipeError(
            f"{method.name}: student or teacher does not run on images of {height} x {width} px: {error}",
            hint="correct data.size_px or the model's arguments",
        ) from error
    resolve(distiller.student_taps, student.taps)
    if used is not None:
        resolve(distiller.teacher_taps, used.taps)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "edgekd recipe"
    return schema
