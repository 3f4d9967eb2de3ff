"""Checkpoints: weights as safetensors, and model.json, which says how to build the model that they belong to.

A pruned model is rebuilt from its channel plan (edgekd.nn.channels) and a quantized one from its quantization plan
(edgekd.quantize): nothing is ever unpickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from edgekd import models
from edgekd.artifacts import Checkpoint, write_json
from edgekd.errors import ArtifactError
from edgekd.models.config import ModelConfig
from edgekd.nn.channels import apply_channel_plan

WEIGHTS, MODEL, METRICS = "model.safetensors", "model.json", "metrics.jsonl"


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a model without its weights."""

    model: dict[str, Any]
    """The recipe's model section."""
    classes: int
    channels: int
    height_px: int
    width_px: int
    channel_plan: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None

    def example(self, batch: int = 2) -> Tensor:
        """An input of the right shape, float32 [batch, C, H, W], for tracing."""
        return torch.zeros(batch, self.channels, self.height_px, self.width_px)

    def config(self) -> ModelConfig:
        """The model section, validated again."""
        return ModelConfig.model_validate(self.model)

    def with_plans(self, **plans: dict[str, Any]) -> Architecture:
        """A copy with a channel plan or a quantization plan."""
        return replace(self, **plans)  # type: ignore[arg-type]


@dataclass
class Loaded:
    """A model with its weights, its taps, and how to build it again."""

    module: nn.Module
    taps: dict[str, str]
    architecture: Architecture
    extra: dict[str, Any] = field(default_factory=dict)


def build_float(architecture: Architecture) -> Loaded:
    """The model without its weights; pruned as its channel plan says, not quantized."""
    config = architecture.config()
    module = models.build(config, num_classes=architecture.classes, in_channels=architecture.channels)
    if architecture.channel_plan is not None:
        apply_channel_plan(module, architecture.channel_plan)
    return Loaded(module.eval(), models.taps(config, module), architecture)


def read_architecture(checkpoint: Checkpoint) -> Architecture:
    """The checkpoint's model.json.

    Raises:
        ArtifactError: It lacks a field or has an unknown one.
    """
    try:
        return Architecture(**checkpoint.json(MODEL))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{checkpoint.folder / MODEL}: {error}") from error


def load_float(checkpoint: Checkpoint) -> Loaded:
    """Rebuild a checkpoint's float model with its weights, in eval mode.

    Raises:
        ArtifactError: The checkpoint is quantized (edgekd.quantize.stage.load reads those).
    """
    architecture = read_architecture(checkpoint)
    if architecture.quantization is not None:
        raise ArtifactError(f"{checkpoint.folder} is quantized; a float model was expected")
    loaded = build_float(architecture)
    load_weights(loaded.module, checkpoint)
    return loaded


def load_weights(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the checkpoint's weights into a module that was built for them.

    Raises:
        ArtifactError: The file is damaged, or its weights are another model's.
    """
    path = checkpoint.file(WEIGHTS)
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read as safetensors: {error}") from error
    except RuntimeError as error:  # load_state_dict lists every name that is missing, too many or of another shape
        raise ArtifactError(f"the weights in {path} do not fit the model of its {MODEL}: {error}") from error


def save(folder: Path, module: nn.Module, architecture: Architecture, history: list[dict[str, Any]]) -> None:
    """Write model.safetensors, model.json and metrics.jsonl into a draft's folder."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    (folder / WEIGHTS).write_bytes(serialize(tensors))  # not save_file: its errors are no OSError where the disk is full
    write_json(folder / MODEL, asdict(architecture))
    (folder / METRICS).write_text("".join(json.dumps(record) + "\n" for record in history))
