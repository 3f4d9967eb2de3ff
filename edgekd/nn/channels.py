"""The channel plan: what structured pruning did to a model, as data.

Pruning changes the parameters' shapes and the layers' channel counts and nothing else. So a pruned model is its unpruned original
with, per module, the recorded attributes and parameter shapes: no pickled module is needed to rebuild it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgekd.errors import ArtifactError

ATTRIBUTES = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels", "num_groups",
    "normalized_shape", "embed_dim", "num_heads",
)  # fmt: skip


def channel_plan(module: nn.Module) -> dict[str, Any]:
    """The shapes and channel attributes of every module that has any: {path: {"attributes": {...}, "shapes": {...}}}."""
    plan: dict[str, Any] = {}
    for path, part in module.named_modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        shapes = {name: list(tensor.shape) for name, tensor in tensors}
        own = vars(part)  # not what a property computes from the layers inside
        attributes = {name: _plain(own[name]) for name in ATTRIBUTES if isinstance(own.get(name), int | tuple)}
        if shapes or attributes:
            plan[path] = {"attributes": attributes, "shapes": shapes}
    return plan


def apply_channel_plan(module: nn.Module, plan: dict[str, Any]) -> None:
    """Give a freshly built model the shapes of a plan; its weights are undefined until they are loaded.

    Raises:
        ArtifactError: The plan names a module or a tensor that the model does not have.
    """
    modules = dict(module.named_modules())
    for path, entry in plan.items():
        if path not in modules:
            raise ArtifactError(f"the channel plan names {path!r}, which {type(module).__name__} does not have")
        part = modules[path]
        for name, value in entry["attributes"].items():
            setattr(part, name, tuple(value) if isinstance(value, list) else value)
        for name, shape in entry["shapes"].items():
            old = getattr(part, name, None)
            if old is None:
                raise ArtifactError(f"the channel plan names {path}.{name}, which {type(part).__name__} does not have")
            if list(old.shape) == shape:
                continue
            new = torch.empty(shape, dtype=old.dtype)
            setattr(part, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _plain(value: int | tuple[int, ...]) -> int | list[int]:
    return list(value) if isinstance(value, tuple) else value
