"""What the layers of a model are: the table that reports show."""

from __future__ import annotations

from typing import Any

from torch import nn

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def layer_table(module: nn.Module, before: dict[str, int] | None = None) -> list[dict[str, Any]]:
    """One row per convolution and linear layer, in the model's order.

    Args:
        module: A float or quantized model.
        before: Output channels per layer before pruning, where the model was pruned.

    Returns:
        Rows with path, kind, channels (outputs), channels_before, params, sparsity (share of weights that are exactly zero, from
        0 to 1), weight_bits and activation_bits (32 for float layers; quantization fills in its own).
    """
    rows = []
    for path, part in module.named_modules():
        if isinstance(part, _LAYERS):
            channels = part.out_features if isinstance(part, nn.Linear) else part.out_channels
            rows.append(
                {
                    "path": path,
                    "kind": next(kind.__name__ for kind in _LAYERS if isinstance(part, kind)),
                    "channels": channels,
                    "channels_before": (before or {}).get(path, channels),
                    "params": sum(parameter.numel() for parameter in part.parameters(recurse=False)),
                    "sparsity": round(float((part.weight == 0).float().mean()), 6),
                    "weight_bits": 32,
                    "activation_bits": 32,
                }
            )
    return rows


def output_channels(module: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer, by path."""
    return {row["path"]: row["channels"] for row in layer_table(module)}
