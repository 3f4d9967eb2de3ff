"""A quantized model on real digits, made once."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from edgekd import models
from edgekd.data.batches import normalise
from edgekd.data.digits import DigitsConfig, load
from edgekd.models.config import ModelConfig
from edgekd.quantize import qat


@dataclass(frozen=True)
class Twin:
    """A float model, its quantized copy, and normalised images [64, 3, 32, 32] of real digits."""

    module: Any
    quantized: Any
    images: Any


@pytest.fixture(scope="session")
def digits():
    return load(DigitsConfig(size_px=32, channels=3))


@pytest.fixture(scope="session")
def twin(digits):
    """Call with a model's name: its float form, trained for a moment so that its batch norms are real, and the quantized one."""
    images = normalise(torch.from_numpy(np.array(digits.val.images[:64])), digits.mean, digits.std).contiguous()
    labels = torch.from_numpy(np.array(digits.val.labels[:64]))
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            config = ModelConfig(name=name)
            module = models.build(config, num_classes=10, in_channels=3).train()
            optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
            for _ in range(12):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(module(images), labels).backward()
                optimizer.step()
            module.eval()
            quantized = qat.prepare(module, models.taps(config, module), qat.QuantizerConfig(), images[:2])
            qat.calibrate(quantized, [images])
            made[name] = Twin(module, quantized.eval(), images)
        return made[name]

    return make
