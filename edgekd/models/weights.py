"""Weights from a file, without ever unpickling an object."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from edgekd.errors import DataError, RecipeError
from edgekd.nn.slimmable import slim_state

SHOWN = 3
"""Names of each kind of disagreement that a message lists."""


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Fill the model, parameters and buffers, from a file; the names and shapes must be the model's own.

    Args:
        model: Changed in place; unchanged where an error is raised.
        path: A .safetensors file, or what torch.save wrote from a state_dict or from a dict that holds one as ``state_dict`` or
            ``model``. A prefix ``module.`` on every name (left by DistributedDataParallel) is dropped.

    Raises:
        DataError: The file is missing, damaged, holds something else, or does not fit the model.
    """
    path = Path(path)
    _fill(model, _read(path), path)


def load_backbone(model: nn.Module, path: Path | str) -> None:
    """Fill the model's ``backbone`` alone, from a file of a classifier: torchvision's ResNets, edgekd's ``mobilenetv2``.

    A slimmable backbone is filled at its full width, and its narrow widths' batch norms with the leading channels' values.

    Args:
        model: Changed in place; unchanged where an error is raised.
        path: As for :func:`load_weights`.

    Raises:
        RecipeError: The model has no backbone whose weights a classifier could give.
        DataError: As for :func:`load_weights`.
    """
    check_backbone(model)
    path, backbone = Path(path), model.backbone
    state = backbone.from_classifier(_read(path))  # type: ignore[operator,union-attr]
    _fill(backbone, slim_state(backbone, state), path)  # type: ignore[arg-type]


def check_backbone(model: nn.Module) -> None:
    """Check that :func:`load_backbone` can fill the model.

    Raises:
        RecipeError: It cannot.
    """
    if not hasattr(getattr(model, "backbone", None), "from_classifier"):
        raise RecipeError(
            f"backbone_weights: {type(model).__name__} has no backbone that a classifier's weights fit",
            hint="use a model on a ResNet or on MobileNetV2, or give the whole model's weights",
        )


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(
            f"the weights file {path} does not exist", hint="give the path of a .safetensors or torch state_dict file"
        )
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    # Old files lack the batch norms' step counters, which no one reads at a fixed momentum.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    mismatched = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(found)} {what}: {', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if found
    ]
    if problems:
        raise DataError(
            f"the weights in {path} do not fit the model ({len(own)} tensors): {'; '.join(problems)}",
            hint="give the weights of this very architecture, with the same arguments, number of classes and input channels",
        )
    model.load_state_dict(state, strict=False)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read as safetensors: {error}", hint="is the file complete?") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            # torch warns of a pickle protocol that it did not write, and then loads the file or refuses it: the outcome says more
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is not a plain state_dict: torch refuses it with weights_only=True, and edgekd unpickles nothing",
            hint="save it again where it was made: torch.save(model.state_dict(), path), or as safetensors",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read as a torch file: {error}", hint="is the file complete?") from error
    if isinstance(data, Mapping):
        data = next((data[key] for key in ("state_dict", "model") if isinstance(data.get(key), Mapping)), data)
    if not isinstance(data, Mapping) or not data or not all(isinstance(value, Tensor) for value in data.values()):
        raise DataError(
            f"{path} holds no state_dict: expected names with tensors, at the top or under 'state_dict' or 'model'",
            hint="save it with torch.save(model.state_dict(), path)",
        )
    return {str(name): tensor for name, tensor in data.items()}
