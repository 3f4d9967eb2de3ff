"""What a stage gets and gives, and the plainest one: ``finetune``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from edgekd import models
from edgekd._config import Config
from edgekd.data.base import Dataset, Split
from edgekd.data.batches import AnyAugment
from edgekd.models.config import ModelConfig
from edgekd.nn.layers import layer_table
from edgekd.tasks.base import Task
from edgekd.train.checkpoint import Architecture, Loaded, build_float
from edgekd.train.hardware import ComputeConfig, make_fabric
from edgekd.train.loop import Setting, ignore, train, warn
from edgekd.train.optim import TrainConfig
from edgekd.train.step import Objective, TaskOnly
from edgekd.train.super_resolution import SuperResolution, SuperResolutionConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class EngineTime:
    """How long an engine takes."""

    latency_ms: float
    """Median of one inference."""
    layers_us: Mapping[str, float]
    """Module path -> microseconds, as the backend's own profile has them."""


@dataclass
class Context:
    """What every stage of a run shares."""

    compute: ComputeConfig
    task: Task
    dataset: Dataset
    augment: AnyAugment
    seed: int
    search: tuple[Path, ...]
    """Folders in which a recipe's relative paths are looked up."""
    logs: Path
    """Folder of the TensorBoard logs."""
    teacher: Callable[[], Loaded] | None = None
    """Loads the teacher; None where the recipe has none."""
    finer: Callable[[int], Split] | None = None
    """Reads the training split so many times as fine; None where the data's kind cannot."""
    engine_time: Callable[[Loaded], EngineTime] | None = None
    """Builds the engine of a float or a quantized model on the recipe's first int8 backend and times it; None where the recipe
    has none."""
    on_epoch: Callable[[str, int, dict[str, Any]], None] = ignore
    """Told of every finished epoch: title, epochs in all, record."""
    on_step: Callable[[str, int, int, int], None] = ignore
    """Told of every step: title, steps done, steps in all, images so far in this epoch."""
    say: Callable[[str], None] = ignore
    """Told, in a line, of what a stage that does not train has found."""
    warn: Callable[[str], None] = warn
    """Told, in a sentence, of what is wrong but does not stop the run."""
    _fabric: Fabric | None = None

    @property
    def fabric(self) -> Fabric:
        """Made when a stage first trains: a run whose artifacts are all there never imports it."""
        if self._fabric is None:
            self._fabric = make_fabric(self.compute)
        return self._fabric

    def setting(self, title: str, work: Path, epochs: int) -> Setting:
        """The loop's view of this run."""
        return Setting(
            fabric=self.fabric,
            task=self.task,
            dataset=self.dataset,
            augment=self.augment,
            seed=self.seed,
            work=work,
            log=self.logs / title,
            title=title,
            on_epoch=lambda record: self.on_epoch(title, epochs, record),
            on_step=lambda done, total, images: self.on_step(title, done, total, images),
            warn=self.warn,
        )


@dataclass
class Trained:
    """What a stage gives back to the pipeline, which evaluates and stores it."""

    loaded: Loaded
    history: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    evidence: dict[str, Any] = field(default_factory=dict)
    """What else the stage has to say; it goes into the artifact's metrics."""


def fresh(config: ModelConfig, context: Context) -> Loaded:
    """A new model: its initial weights come from the recipe's seed, or from the file that the recipe names.

    Raises:
        DataError: The weights file is missing or does not fit.
        RecipeError: The file is a backbone's, and the model has none.
    """
    from edgekd.data.paths import find

    data = context.dataset
    torch.manual_seed(context.seed)
    loaded = build_float(Architecture(config.model_dump(mode="json"), data.num_classes, data.channels, data.height, data.width))
    if config.weights is not None:
        models.load_weights(loaded.module, find(config.weights, context.search))
    if config.backbone_weights is not None:
        models.load_backbone(loaded.module, find(config.backbone_weights, context.search))
    return loaded


class FinetuneConfig(Config):
    """Train on the labels alone."""

    kind: Literal["finetune"]
    train: TrainConfig
    """Budget and optimizer."""
    super_resolution: SuperResolutionConfig | None = None
    """Learn to draw a finer picture beside the boxes; for images with boxes. The branch that draws is gone afterwards."""


def run(config: FinetuneConfig, source: Loaded, context: Context, *, title: str, work: Path) -> Trained:
    """Train the source model on the labels.

    Args:
        config: The stage's section of the recipe.
        source: The model to go on from.
        context: The run.
        title: Names the training in progress bars and logs.
        work: Folder of the training state.
    """
    setting = context.setting(title, work, config.train.epochs)
    objective: Objective = TaskOnly()
    if config.super_resolution is not None:
        assert context.finer is not None  # the recipe's check
        torch.manual_seed(context.seed)
        objective = SuperResolution(config.super_resolution, source, context.dataset)
        setting.dataset = replace(context.dataset, train=context.finer(config.super_resolution.scale))
    history = train(student=source.module, objective=objective, config=config.train, setting=setting, student_taps=source.taps)
    return Trained(source, history, layer_table(source.module))
