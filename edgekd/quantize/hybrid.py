"""Hybrid-bit quantization: every layer gets as many bits as its weights need.

Zhang, Lei, Xie, Li, Yang, Jia: Guided Hybrid Quantization for Object Detection in Remote Sensing Imagery via One-to-One
Self-Teaching. IEEE TGRS 2023, arXiv 2301.00131. Official code: icey-zhang/GHOST.

The bits of a layer are the smallest at which a k-means with 2^k centres of its float weights is close enough (bit_search.py). Its
weights then follow DoReFa (dorefa.py); the activation behind it has the same bits and the range 0..1. Trained under its float
twin with the method ``ost``, this is GHOST's second phase.

Differs from the paper, with ``placement: engine`` (the default): the image, residual sums and concatenations have quantizers too,
so that what reads them runs on integers: the image 8 bits, what is concatenated one scale and the most bits of its parts. All
ranges are learned (LSQ) from calibrated ones, because a trained network's activations do not end at 1, and one that is clipped
there has to learn again: ``ranges: unit`` has the published 0..1 behind a convolution's ReLU, 0..R for a sum of R of them, and
learned ranges for the rest. With 8 bits, weights are rounded to the 255 levels that int8 has, not to 256. ``placement: official``
is the published code's: quantizers behind ReLUs only, 8 bits with 256 levels, and layers above ``k_max`` where nothing suffices.

After the conversion the statistics of batch norms are wrong, because DoReFa's weights always reach 1: they are taken anew from
training images (our reading; the published code trains through it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx, nn

from edgekd._config import Config
from edgekd.quantize import bit_search, bops, dorefa
from edgekd.quantize.fake_quant import BITS, Quantizer, QuantLayer
from edgekd.quantize.placement import Placement

FLOAT_BITS = 32
MEGA, GIGA = 1e6, 1e9


class BitBudgetConfig(Config):
    """What the bits may cost; one of the three."""

    size_mb: float | None = Field(None, gt=0)
    """Largest size of all weights, at the bits trained, in megabytes of 10^6 bytes."""
    bops_g: float | None = Field(None, gt=0)
    """Most bit operations for one image, in units of 10^9."""
    latency_ms: float | None = Field(None, gt=0)
    """Largest median latency of the engine of the first deploy entry with int8, milliseconds; bits below 8 save none, so it
    decides how many layers stay in float, and `threshold` gives the others their bits."""

    @model_validator(mode="after")
    def _one(self) -> BitBudgetConfig:
        if sum(value is not None for value in (self.size_mb, self.bops_g, self.latency_ms)) != 1:
            raise ValueError("give one of size_mb, bops_g and latency_ms")
        return self


class HybridConfig(Config):
    """DoReFa weights and activations, with bits per layer found from the float weights."""

    kind: Literal["hybrid"]
    bits: int | None = Field(None, ge=2, le=8)
    """The same bits for every layer, as a baseline; null searches them."""
    threshold: float = Field(0.1, gt=0)
    """tau: a layer gets the fewest bits at which a million times the mean squared error of its k-means is below it."""
    space: Literal["raw", "normalised"] = "raw"
    """Search on the weights as they are, so that larger ones get more bits, or divided by their largest magnitude."""
    k_min: int = Field(2, ge=2, le=8)
    """Fewest bits of a layer."""
    k_max: int = Field(7, ge=2, le=8)
    """Most bits of a layer; up to 7 every engine stores the trained codes exactly in int8."""
    budget: BitBudgetConfig | None = None
    """Find the threshold that meets it; `threshold` is then not used, but with `latency_ms`."""
    placement: Literal["engine", "official"] = "engine"
    """Quantize everything that an engine needs to run on integers, or behind ReLUs only, as published."""
    ranges: Literal["learned", "unit"] = "learned"
    """Activation ranges start from the calibration split and are trained along; or unit, as published: 0..1 behind ReLUs, which
    costs most of what the float model has learned and needs a long training. `placement: official` is always unit."""
    restore_scale: Literal["auto", "always", "never"] = "auto"
    """Multiply DoReFa's weights by their largest magnitude; auto: where no batch norm follows that takes up the gain."""
    recalibration_batches: int = Field(50, ge=0, le=10_000)
    """Training batches from which batch norms take their statistics anew after the conversion."""
    skip: list[str] = Field(default_factory=list)
    """Module paths of layers that stay in float; * matches anything, as in `head.*`."""
    keep_float: list[Literal["first", "last", "outputs", "depthwise"]] = Field(default=["outputs"])
    """Layers that stay in float by their place or kind: the first and the last one executed, those that make an output of the
    model, depthwise convolutions."""

    @model_validator(mode="after")
    def _ordered(self) -> HybridConfig:
        if self.k_min > self.k_max:
            raise ValueError(f"k_min {self.k_min} is larger than k_max {self.k_max}")
        if self.bits is not None and self.budget is not None:
            raise ValueError("bits gives every layer the same, and budget searches: remove one of the two")
        return self

    @property
    def latency_ms(self) -> float | None:
        """The budget, where it is a latency."""
        return None if self.budget is None else self.budget.latency_ms


@dataclass(frozen=True)
class DorefaWeights:
    """DoReFa's weights with some bits (edgekd.quantize.dorefa)."""

    bits: int
    restore_scale: bool
    official: bool
    """256 levels with 8 bits, rather than int8's 255."""

    @property
    def _levels(self) -> int:
        """Of the symmetric grid -1..1, less one."""
        return 2 * (2 ** (BITS - 1) - 1) if self.bits == BITS and not self.official else 2**self.bits - 1

    def fake(self, weight: Tensor, axis: int) -> Tensor:  # noqa: ARG002  one scale for the whole tensor
        """DoReFa's values."""
        return dorefa.weights(weight.float(), self.bits, restore_scale=self.restore_scale, levels=self._levels).to(weight.dtype)

    def encode(self, weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """int8 codes; 8 bits of the official variant are fitted to them."""
        codes, scale = dorefa.weight_codes(
            weight.detach().float(), self.bits, restore_scale=self.restore_scale, levels=self._levels
        )
        return codes.float(), scale.float().reshape(()).expand(weight.shape[axis]).clone()


def find_bits(config: HybridConfig, traced: fx.GraphModule, placement: Placement, example: Tensor) -> dict[str, int]:
    """Module path -> bits of every layer that is quantized, from the float weights.

    Raises:
        TrainingError: The budget is too small even with the fewest bits.
    """
    paths = placement.layers
    if config.bits is not None:
        return dict.fromkeys(paths, config.bits)
    distortions = _distortions(config, traced, paths)
    official = config.placement == "official"
    if config.budget is None or config.latency_ms is not None:
        return distortions.bits(config.threshold, k_min=config.k_min, k_max=config.k_max, clip_fallback=not official)
    rows = bops.rows(traced, example)

    def cost(bits: Mapping[str, int]) -> float:
        assert config.budget is not None
        if config.budget.size_mb is not None:
            return bops.size_bytes(rows, bits) / MEGA
        return bops.bops_dataflow(rows, bits) / GIGA

    limit = config.budget.size_mb if config.budget.size_mb is not None else config.budget.bops_g
    what = "size_mb" if config.budget.size_mb is not None else "bops_g"
    assert limit is not None
    return bit_search.meet_budget(
        distortions, cost, limit, k_min=config.k_min, k_max=config.k_max, name=f"quantizer.budget.{what}"
    )


def _distortions(config: HybridConfig, model: nn.Module, paths: Iterable[str]) -> bit_search.Distortions:
    weights = {path: model.get_parameter(f"{path}.weight").detach().float().cpu().numpy().ravel() for path in paths}
    return bit_search.Distortions(weights, space=config.space)


def errors(config: HybridConfig, float_model: nn.Module, bits: Mapping[str, int]) -> dict[str, float]:
    """Module path -> the distortion of the layer's weights at its bits times their number, of every layer in ``bits``."""
    found = _distortions(config, float_model, bits)
    return {path: found.table[path][width - bit_search.WIDTHS[0]] * found.sizes[path] for path, width in bits.items()}


def scheme(config: HybridConfig, placement: Placement, path: str, bits: int) -> DorefaWeights:
    """How the weights of one layer become codes."""
    restore = config.restore_scale == "always" or (config.restore_scale == "auto" and not placement.has_norm(path))
    return DorefaWeights(bits, restore, config.placement == "official")


def groups(config: HybridConfig, placement: Placement) -> dict[fx.Node, fx.Node]:
    """Every node whose value is quantized -> the node that stands for its quantizer."""
    if config.placement == "official":
        return {node: node for node, maker in placement.behind_relus().items() if maker is not None}
    return placement.quantized()


def quantizer(config: HybridConfig, placement: Placement, group: fx.Node, bits: Mapping[str, int]) -> Quantizer:
    """The quantizer of a group of tensors."""
    if config.placement == "official":
        maker = placement.behind_relus()[group]
        assert maker is not None
        return Quantizer(signed=False, learned=False, bits=bits[maker], end=1.0, whole=True)
    signed = placement.signed(group)
    end = placement.unit_end(group) if config.ranges == "unit" and not signed else None
    # of what makes it; a sum has the bits of what reads it, and the image its own 8
    owners = placement.makers(group) or placement.takers(group)
    width = max((bits[path] for path in owners), default=BITS)
    width = BITS if placement.reads_input(group) else width
    return Quantizer(signed, learned=True, limit=placement.limit(group), bits=width, end=end)


@torch.no_grad()
def recalibrate(quantized: nn.Module, batches: Iterable[Tensor]) -> int:
    """Take the statistics of all batch norms anew, as plain averages over batches; quantizers with a learned range stand aside.

    Args:
        quantized: Changed in place; its mode is left as it was.
        batches: Normalised images, float32 [B, C, H, W] each.

    Returns:
        How many batches there were.
    """
    norms = [
        part for part in quantized.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats
    ]
    aside = [part for part in quantized.modules() if isinstance(part, Quantizer) and part.end is None]
    momenta, mode, count = [norm.momentum for norm in norms], quantized.training, 0
    quantized.train()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch: the average of all batches
        for part in aside:
            part.observer = _ignore
        for images in batches:
            quantized(images)
            count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for part in aside:
            part.observer = None
        quantized.train(mode)
    return count


def _ignore(values: Tensor) -> None:
    """An observer that notes nothing."""


def account(float_model: nn.Module, quantized: fx.GraphModule, example: Tensor) -> dict[str, Any]:
    """What the bits cost, as data for the report.

    Args:
        float_model: The float twin.
        quantized: The model with quantizers.
        example: An input, [B, C, H, W].

    Returns:
        ``mean_bits`` over quantized layers, ``size_mb`` and ``size_float_mb`` (weights and biases of convolutions and linear
        layers, at the bits trained; 10^6 bytes), ``bops_g`` and ``bops_float_g`` (10^9, by data flow), ``bops_paper_g`` (as
        the published script counts, its defects included).
    """
    bits = layer_bits(quantized)
    rows = bops.rows(float_model, example)
    return {
        "mean_bits": sum(bits.values()) / len(bits),
        "size_mb": bops.size_bytes(rows, bits) / MEGA,
        "size_float_mb": bops.size_bytes(rows, {}) / MEGA,
        "bops_g": bops.bops_dataflow(rows, bits) / GIGA,
        "bops_float_g": bops.bops_dataflow(rows, {}) / GIGA,
        "bops_paper_g": bops.bops_paper(rows, bits) / GIGA,
    }


def layer_bits(quantized: nn.Module) -> dict[str, int]:
    """Module path -> bits of the weights, of every quantized layer."""
    return {path: part.scheme.bits for path, part in quantized.named_modules() if isinstance(part, QuantLayer)}
