"""The fallback ladder: what to give up, and in which order, where int8 costs too much of the metric.

1. ``int8``: everything on integers, as ``ptq`` calibrated it.
2. ``keep in float``: the layers that int8 hurts most stay in float, one more at a time.
3. ``train``: the best of these is trained for a while with its quantizers (where a budget is given).
4. ``float16``: int8 does not reach it; the float model is deployed in float16 (where that is allowed).

The ladder ends at the first step within ``max_drop``. Layers are ranked on calibration images: how far the outputs move when this
layer alone is quantized. Steps are judged on the validation split. The test split is not looked at.

Every candidate is made as the result is, by placing quantizers around the skipped layers and calibrating again: a layer that
stays in float changes which tensors are quantized, so a model with some quantizers merely switched off is not what would be
deployed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from edgekd._config import Config
from edgekd.distill.stage import fit
from edgekd.nn.flops import layer_macs
from edgekd.quantize import qat
from edgekd.quantize.stage import calibration_batches, layers, prepare
from edgekd.train.checkpoint import Loaded
from edgekd.train.loop import Setting, evaluate
from edgekd.train.optim import TrainConfig
from edgekd.train.stage import Context, Trained

IMAGES = 128
"""Calibration images that layers are ranked on."""


class FallbackConfig(Config):
    """The ladder from int8 for all layers to float16."""

    max_drop: float = Field(ge=0, le=100)
    """Most points of the task's metric below the float model, on the validation split; the first step within it is the result."""
    max_float: float = Field(0.5, ge=0, le=1)
    """Largest share of the multiply-accumulates in layers that are kept in float; 0 keeps none."""
    train: TrainConfig | None = None
    """Then train the best step with its quantizers; null does not."""
    float16: bool = True
    """Then deploy float16 in place of int8, if that is within max_drop; else the run fails, with the best step as its result."""


def climb(
    config: FallbackConfig,
    quantizer: qat.QuantizerConfig,
    source: Loaded,
    start: Loaded,
    make: Callable[[list[str]], Loaded],
    context: Context,
    *,
    title: str,
    work: Path,
) -> Trained:
    """Climb until a step is within ``max_drop``.

    Args:
        config: How far, and by which steps.
        quantizer: What is quantized where nothing is given up.
        source: The float model that all steps are held against.
        start: What quantizers are placed in: the source, or its equalized twin.
        make: Gives the quantized model with these layers in float.
        context: The run.
        title: Names the training.
        work: Folder of its state.

    Returns:
        The first step within ``max_drop``, else the best one. ``evidence["ladder"]`` has all steps: max_drop, metric, float (its
        value), reached, precision ("int8" or "float16": what to deploy), ranking (path, divergence) and steps (name, kept,
        metric, drop, int8_macs, seconds, within).
    """
    ladder = _Ladder(config, source, context, context.setting(title, work, config.train.epochs if config.train else 0))
    everything = make([])
    if ladder.judge("int8", [], everything):
        return ladder.result(reached=True)
    if config.max_float > 0:
        images = torch.cat(list(calibration_batches(context.dataset, IMAGES)))
        context.say(f"  ranking {len(qat.layers(everything.module))} layers by what int8 does to the outputs")
        # every process goes the same way, even where another device ranks two layers in another order
        ladder.ranking += context.fabric.broadcast(rank_layers(quantizer, start, everything.module, images))
        for kept in ladder.choices():
            if ladder.judge("keep in float", kept, make(kept)):
                return ladder.result(reached=True)
    if config.train is not None:
        loaded, kept = copy.deepcopy(ladder.best), ladder.kept
        history = fit(loaded, config.train, context, title=title, work=work, method=None, teacher=None, task_weight=1.0)
        if ladder.judge("train", kept, loaded, history):
            return ladder.result(reached=True)
    if config.float16:
        try:
            reached = ladder.judge("float16", [], Loaded(Half(source.module), {}, source.architecture))
        except RuntimeError as error:  # an operation of a user's model that torch does not have in float16 on this device
            reached = False
            context.warn(f"precision ladder: {type(source.module).__name__} does not run in float16: {error}")
        if reached:
            return ladder.result(reached=True, precision="float16")
    return ladder.result(reached=False)


class _Ladder:
    """What the steps came to, and the best quantized model of them."""

    def __init__(self, config: FallbackConfig, source: Loaded, context: Context, setting: Setting) -> None:
        self.config, self.context, self.setting = config, context, setting
        self.macs = layer_macs(source.module, tuple(source.architecture.example().shape[1:]))
        self.steps: list[dict[str, Any]] = []
        self.ranking: list[tuple[str, float]] = []
        self.best: Loaded
        self.kept: list[str] = []
        """Layers that the best one has in float."""
        self._history: list[dict[str, Any]] = []
        self._least = float("inf")
        self._floor = self._metric(source.module)
        self._mark = time.monotonic()

    def _metric(self, module: nn.Module) -> float:
        value = evaluate(module, self.context.dataset.val, self.setting)
        module.to("cpu")
        return value

    def _share(self, paths: list[str]) -> float:
        return sum(self.macs.get(path, 0) for path in paths) / max(1, sum(self.macs.values()))

    def judge(self, name: str, kept: list[str], loaded: Loaded, history: list[dict[str, Any]] | None = None) -> bool:
        """Measure a step on the validation split; whether it is within the limit."""
        value = self._metric(loaded.module)
        points = 100 * (self._floor - value) * (1 if self.context.task.higher_is_better else -1)
        drop = round(points, 6)  # beyond that it is the rounding of two means over the same images
        int8 = [row["path"] for row in qat.layers(loaded.module)]
        now = time.monotonic()
        row = {"name": name, "kept": kept, "metric": value, "drop": drop, "int8_macs": self._share(int8)}
        self.steps.append({**row, "seconds": round(now - self._mark, 3), "within": drop <= self.config.max_drop})
        self._mark = now
        what = f"{name} {kept[-1]}" if name == "keep in float" else name
        self.context.say(
            f"  {what}: {self.context.task.metric_name} {value:.4f} on the validation split, {drop:.2f} points below float"
        )
        if int8 and drop < self._least:  # of equals the first, which keeps least in float
            self._least, self.best, self.kept, self._history = drop, loaded, kept, history or []
        return drop <= self.config.max_drop

    def choices(self) -> Iterator[list[str]]:
        """Layers to keep in float: the most sensitive one, then one more at a time, never more than allowed and never all."""
        kept: list[str] = []
        for path, _ in self.ranking:
            if self._share([*kept, path]) <= self.config.max_float and len(kept) + 1 < len(self.ranking):
                kept = [*kept, path]
                yield kept

    def result(self, *, reached: bool, precision: str = "int8") -> Trained:
        """The best quantized model: the last step's where it is within the limit, because none before it was."""
        evidence = {
            "max_drop": self.config.max_drop,
            "metric": self.context.task.metric_name,
            "float": self._floor,
            "reached": reached,
            "precision": precision,
            "ranking": [{"path": path, "divergence": divergence} for path, divergence in self.ranking],
            "steps": self.steps,
        }
        return Trained(self.best, self._history, layers(self.best.module), {"ladder": evidence})


class Half(nn.Module):
    """A model in float16 with float32 inputs and outputs, as the exported file has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = copy.deepcopy(model).half().eval()

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, C, H, W] to the model's output in float32."""
        output: Tensor = self.inner(images.half())
        return output.float()


@torch.no_grad()
def rank_layers(quantizer: qat.QuantizerConfig, source: Loaded, quantized: nn.Module, images: Tensor) -> list[tuple[str, float]]:
    """The quantized layers by what int8 does to the outputs when no other layer is quantized, the worst first.

    Args:
        quantizer: The configuration that ``quantized`` was made with.
        source: The float model.
        quantized: Names the layers.
        images: Normalised calibration images, float32 [N, C, H, W].

    Returns:
        Module path and divergence: the mean squared error of the outputs as a share of their mean square.
    """
    source.module.eval()
    expected = source.module(images)
    size = expected.square().mean().clamp_min(1e-30)
    paths = [row["path"] for row in qat.layers(quantized)]
    found = []
    for path in paths:
        others = [*quantizer.skip, *(other for other in paths if other != path)]
        alone = prepare(quantizer.model_copy(update={"skip": others}), source).module
        assert isinstance(alone, fx.GraphModule)
        qat.calibrate(alone, [images])
        error = (alone.eval()(images) - expected).square().mean()
        found.append((path, float(error / size)))
    return sorted(found, key=lambda entry: -entry[1])


def refusal(metrics: Mapping[str, Any]) -> str | None:
    """Why a checkpoint is not deployed in int8 though it is a quantized one; None where it is.

    Args:
        metrics: The checkpoint's.
    """
    found = metrics.get("ladder")
    if found is None or found["precision"] == "int8":
        return None
    return f"no int8 model is {_within(found)}; float16 is"


def failure(metrics: Mapping[str, Any]) -> str | None:
    """What the run has to say of a ladder whose last step was not within ``max_drop``; None where one was."""
    found = metrics.get("ladder")
    if found is None or found["reached"]:
        return None
    least = min(found["steps"], key=lambda step: step["drop"])
    return f"precision ladder: no step is {_within(found)}; the nearest, {least['name']}, is {least['drop']:.2f} points below"


def _within(found: dict[str, Any]) -> str:
    return f"within {found['max_drop']:g} points of the float model's {found['metric']} on the validation split"
