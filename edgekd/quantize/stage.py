"""The stage ``quantize``: calibrate, then train with fake quantization; and reading quantized checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, fx, nn

from edgekd._config import Config
from edgekd.artifacts import Checkpoint
from edgekd.data.base import Dataset
from edgekd.data.batches import epoch_batches, eval_batch_size, eval_batches
from edgekd.distill import MethodConfig
from edgekd.distill.stage import fit
from edgekd.errors import TrainingError
from edgekd.nn.layers import layer_table
from edgekd.quantize import hybrid, latency, qat
from edgekd.quantize.fake_quant import QuantLayer, output_axis
from edgekd.quantize.hybrid import HybridConfig
from edgekd.train.checkpoint import Loaded, build_float, load_weights, read_architecture
from edgekd.train.optim import TrainConfig
from edgekd.train.stage import Context, Trained

LATENCY_IMAGES = 32
"""Calibration images of engines that are only timed."""


class QuantizeConfig(Config):
    """Quantization-aware training."""

    kind: Literal["quantize"]
    quantizer: Annotated[qat.QuantizerConfig | HybridConfig, Field(discriminator="kind")] = Field(
        default_factory=qat.QuantizerConfig
    )
    """Bits and ranges: `kind: int8`, or `kind: hybrid` for bits per layer."""
    train: TrainConfig
    """Budget and optimizer; a tenth of the learning rate of the float training is usual."""
    method: MethodConfig | None = None
    """Train under a teacher with this method; null trains on the labels alone."""
    teacher: Literal["float", "teacher"] = "float"
    """Who teaches: the float model that this stage starts from, or the recipe's teacher."""
    task_weight: float = Field(0.1, ge=0, le=1000)
    """Weight of the task loss where there is a method."""

    @property
    def latency_ms(self) -> float | None:
        """What an engine may take, where that decides which layers are quantized."""
        return self.quantizer.latency_ms if isinstance(self.quantizer, HybridConfig) else None


def prepare(config: qat.AnyQuantizer, source: Loaded) -> Loaded:
    """The source model with quantizers, not yet calibrated."""
    quantized = qat.prepare(source.module, source.taps, config, source.architecture.example())
    return _described(quantized, source)


def rehearse(config: qat.AnyQuantizer, source: Loaded) -> None:
    """Go through the stage once on noise, so that a model that cannot be quantized says so before hours of training.

    Raises:
        TrainingError: It cannot be traced, calibrated or trained.
    """
    quantized = prepare(config, source).module
    assert isinstance(quantized, fx.GraphModule)
    example = torch.randn_like(source.architecture.example())
    try:
        qat.calibrate(quantized, [example])
        quantized.train()(example).sum().backward()
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:  # from the user's own operations between quantizers
        raise TrainingError(
            f"{type(source.module).__name__} cannot be quantized: {error}",
            hint="leave the layers around that operation in float: quantizer.skip in the quantize stage",
        ) from error


def _described(quantized: fx.GraphModule, source: Loaded) -> Loaded:
    taps = {role: f"taps.{role}" for role in source.taps}  # the trace re-homes them (edgekd.quantize.placement)
    return Loaded(quantized, taps, source.architecture.with_plans(quantization=qat.plan(quantized)))


def run(config: QuantizeConfig, source: Loaded, context: Context, *, title: str, work: Path) -> Trained:
    """Quantize the source model and train it; arguments as for the other stages."""
    teacher = None
    if config.method is not None:
        twin = Loaded(copy.deepcopy(source.module), source.taps, source.architecture)
        teacher = context.teacher() if config.teacher == "teacher" and context.teacher is not None else twin
    quantizer, evidence = within_latency(config.quantizer, source, context, work)
    loaded = prepare(quantizer, source)
    assert isinstance(loaded.module, fx.GraphModule)
    if isinstance(config.quantizer, HybridConfig):
        evidence["hybrid"] = hybrid.account(source.module, loaded.module, source.architecture.example())
        count = config.quantizer.recalibration_batches
        hybrid.recalibrate(loaded.module, recalibration_batches(context, config.train.batch_size, count))
    warn_stretched(qat.calibrate(loaded.module, calibration_batches(context.dataset)), context)
    history = fit(
        loaded,
        config.train,
        context,
        title=title,
        work=work,
        method=config.method,
        teacher=teacher,
        task_weight=config.task_weight,
    )
    return Trained(loaded, history, layers(loaded.module), evidence)


def warn_stretched(found: Sequence[qat.Stretched], context: Context) -> None:
    """Say that ranges are for few of the calibration images, and of what use that is not to the others."""
    if not found:
        return
    worst = found[0]
    context.warn(
        f"calibration: the range of {worst.name!r} ends at {worst.end:.3g}, three in four images stay below {worst.usual:.3g} "
        f"there: few of the codes are left for them. So it is at {len(found)} tensors. Look at what the float model says of the "
        "calibration images that reach so far, or cut them off: calibration: percentile, percentile: 99 in the stage's quantizer"
    )


def within_latency(
    quantizer: qat.AnyQuantizer, source: Loaded, context: Context, work: Path
) -> tuple[qat.AnyQuantizer, dict[str, Any]]:
    """The quantizer with the layers that a latency budget leaves in float, and how they were found; unchanged without one."""
    if not isinstance(quantizer, HybridConfig) or (limit := quantizer.latency_ms) is None:
        return quantizer, {}

    def keeping(paths: list[str]) -> HybridConfig:
        return quantizer.model_copy(update={"skip": [*quantizer.skip, *paths]})

    def find() -> dict[str, Any]:
        assert context.engine_time is not None  # the recipe's check
        images = list(calibration_batches(context.dataset, LATENCY_IMAGES))
        bits = hybrid.layer_bits(prepare(quantizer, source).module)

        def make(paths: list[str]) -> Loaded:
            made = qat.prepare(source.module, source.taps, keeping(paths), source.architecture.example(), bits)
            qat.calibrate(made, images)
            return _described(made, source)

        errors = hybrid.errors(quantizer, source.module, bits)
        return latency.search(limit, errors, source, make, context.engine_time, context.say)

    # one process looks, and all go its way
    found = latency.remembered(work, find) if context.fabric.is_global_zero else {}
    found = context.fabric.broadcast(found)
    return keeping(found["kept"]), {"latency": found}


def recalibration_batches(context: Context, batch_size: int, count: int) -> Iterator[Tensor]:
    """At most so many batches of training images, augmented as for training, in an order that the seed alone decides.

    Every process gets the same whole batches, so that all take the same statistics.
    """
    data, left, epoch = context.dataset, count, 0
    size = min(batch_size, len(data.train))
    while left > 0:
        generator = torch.Generator().manual_seed(context.seed * 1_000_003 + epoch)
        batches = epoch_batches(
            data.train, size, generator=generator, augment=context.augment, mean=data.mean, std=data.std, drop_last=True
        )
        for images, _ in batches:
            yield images
            left -= 1
            if left == 0:
                return
        epoch += 1


def calibration_batches(data: Dataset, most: int | None = None) -> Iterator[Tensor]:
    """The calibration split, or at most so many images spread evenly over it, normalised: float32 [B, C, H, W] each."""
    split = data.calib
    if most is not None and most < len(split):
        index = np.linspace(0, len(split) - 1, most).round().astype(int)
        split = replace(split, images=split.images[index], labels=split.labels[index])
    return (images for images, _ in eval_batches(split, eval_batch_size(split, 128), mean=data.mean, std=data.std))


def layers(quantized: nn.Module) -> list[dict[str, Any]]:
    """The layer table with its bits."""
    bits = {row["path"]: row for row in qat.layers(quantized)}
    rows = layer_table(quantized)
    for row in rows:
        layer = quantized.get_submodule(row["path"])
        if isinstance(layer, QuantLayer):
            codes, _ = layer.scheme.encode(layer.weight.detach(), output_axis(layer))
            row["sparsity"] = round(float((codes == 0).float().mean()), 6)
            row.update({key: bits[row["path"]][key] for key in ("weight_bits", "activation_bits")})
    return rows


def load(checkpoint: Checkpoint) -> Loaded:
    """Rebuild any checkpoint, float or quantized, with its weights, in eval mode."""
    architecture = read_architecture(checkpoint)
    loaded = build_float(architecture)
    if architecture.quantization is not None:
        quantized = qat.rebuild(loaded.module, loaded.taps, architecture.quantization, architecture.example())
        loaded = Loaded(quantized, {role: f"taps.{role}" for role in loaded.taps}, architecture)
    load_weights(loaded.module, checkpoint)
    loaded.module.eval()
    return loaded
