"""The stage ``ptq``: quantize a trained model without training it, in seconds; and, where asked, climb the fallback ladder.

In this order: cross-layer equalization (edgekd.quantize.equalization), quantizers at the producers (edgekd.quantize.placement),
ranges from the calibration split (edgekd.quantize.observers), bias correction (edgekd.quantize.bias).

Neither NNCF nor ONNX Runtime's quantizer is called. Both put quantizers where they think best and write a graph of their own.
ONNX Runtime's has int32 biases, which TensorRT's parser refuses. With the placement of training, one calibrated model is written
in every backend's encoding, a short training can go on from it, and the precision audit knows its layers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import fx

from edgekd._config import Config
from edgekd.quantize import ladder, qat
from edgekd.quantize.bias import IMAGES, correct_biases
from edgekd.quantize.equalization import equalize
from edgekd.quantize.ladder import FallbackConfig
from edgekd.quantize.stage import calibration_batches, layers, prepare, warn_stretched
from edgekd.train.checkpoint import Loaded
from edgekd.train.loop import ignore
from edgekd.train.stage import Context, Trained


class PtqConfig(Config):
    """Post-training quantization: ranges from the calibration split, no training."""

    kind: Literal["ptq"]
    quantizer: qat.QuantizerConfig = Field(default_factory=qat.QuantizerConfig)
    """Bits and ranges; ranges are learned only where the fallback trains."""
    equalization: bool = False
    """Even out the ranges of neighbouring layers first (cross-layer equalization); the float function stays the same."""
    bias_correction: bool = True
    """Take the shift of each layer's mean output on the calibration images back in its bias."""
    fallback: FallbackConfig | None = None
    """What to do where the quantized model is too far below the float one; null takes it as it is."""


def run(config: PtqConfig, source: Loaded, context: Context, *, title: str, work: Path) -> Trained:
    """Quantize the source model; arguments as for the other stages."""
    start = source
    if config.equalization:
        module, pairs = equalize(source.module)
        start = Loaded(module, source.taps, source.architecture)
        if not pairs:
            context.warn("ptq: equalization found no two layers with nothing but a ReLU between them, and changed nothing")

    def make(skip: list[str]) -> Loaded:
        """The quantized model with these layers in float too."""
        quantizer = config.quantizer.model_copy(update={"skip": [*config.quantizer.skip, *skip]})
        heard = replace(context, warn=ignore) if skip else context  # else every rung of the ladder would say the same
        return quantize(quantizer, start, heard, bias_correction=config.bias_correction)

    if config.fallback is None:
        loaded = make([])
        return Trained(loaded, [], layers(loaded.module))
    return ladder.climb(config.fallback, config.quantizer, source, start, make, context, title=title, work=work)


def quantize(quantizer: qat.QuantizerConfig, source: Loaded, context: Context, *, bias_correction: bool) -> Loaded:
    """The model with quantizers, calibrated and, where asked, with corrected biases."""
    loaded = prepare(quantizer, source)
    assert isinstance(loaded.module, fx.GraphModule)
    warn_stretched(qat.calibrate(loaded.module, calibration_batches(context.dataset)), context)
    if bias_correction:
        correct_biases(loaded.module, source.module.eval(), list(calibration_batches(context.dataset, IMAGES)))
    loaded.module.eval()
    return loaded
