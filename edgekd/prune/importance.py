"""Cutting channels: what goes, and how much.

The dependency graph and the surgery are torch-pruning's (Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023,
arXiv 2301.12900). A group is all channels that must go together; its importance is the L2 norm of all weights in it.
"""

from __future__ import annotations

import copy
import warnings

from torch import Tensor, nn

from edgekd.errors import TrainingError
from edgekd.models import fixed_channels
from edgekd.nn.flops import macs


def prune(module: nn.Module, example: Tensor, *, ratio: float, round_to: int, scope: str) -> nn.Module:
    """A pruned copy of ``module``.

    Args:
        module: The model; unchanged. Its outputs keep their size.
        example: An input, [B, C, H, W].
        ratio: Share of channels to cut, 0 to 1.
        round_to: Channels that stay are a multiple of this.
        scope: ``layer`` cuts the share in every group; ``model`` ranks all groups together and cuts the least important.

    Raises:
        TrainingError: The library cannot follow the model, or the pruned model does not run.
    """
    import torch_pruning as tp

    pruned = copy.deepcopy(module).eval()
    outputs = pruned(example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library warns about every parameter that belongs to no layer
            pruner = tp.pruner.BasePruner(
                pruned,
                example,
                importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean", normalizer="mean"),
                global_pruning=scope == "model",
                pruning_ratio=ratio,
                max_pruning_ratio=0.95,  # a layer is never cut away
                ignored_layers=[*_outputs(pruned, outputs.shape[1]), *fixed_channels(pruned)],
                round_to=round_to,
            )
            pruner.step()
        same = pruned(example).shape == outputs.shape
    except Exception as error:
        raise TrainingError(
            f"{type(module).__name__} cannot be pruned: {error}",
            hint="remove the prune stage, or use a model whose channels torch-pruning can follow",
        ) from error
    if not same:
        raise TrainingError(f"pruning changed the outputs of {type(module).__name__}; it cannot be pruned")
    return pruned


def prune_to_macs(module: nn.Module, example: Tensor, *, share: float, round_to: int, scope: str) -> tuple[nn.Module, float]:
    """The pruned copy with the most channels whose multiply-accumulates are at most ``share`` of the original's.

    The ratio is found by bisection: MACs fall in steps of ``round_to`` channels, so the target is met from below.

    Returns:
        The pruned copy and the ratio that gave it.

    Raises:
        TrainingError: Even the largest cut leaves more than ``share``.
    """
    limit = share * macs(module, tuple(example.shape[1:]))
    low, high, best = 0.0, 0.95, None
    for _ in range(12):
        middle = (low + high) / 2
        candidate = prune(module, example, ratio=middle, round_to=round_to, scope=scope)
        if macs(candidate, tuple(example.shape[1:])) <= limit:
            high, best = middle, (candidate, middle)
        else:
            low = middle
    if best is None:
        raise TrainingError(
            f"no pruning ratio up to 0.95 brings the MACs to {share:.0%} of the original's with round_to {round_to}",
            hint="raise the MACs target or lower round_to",
        )
    return best


def _outputs(module: nn.Module, size: int) -> list[nn.Module]:
    """The layers whose outputs are the model's own: the last linear or convolution layers with as many outputs as the model."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    last = layers[-1:]
    return [part for part in last if isinstance(part, nn.Linear) or part.out_channels == size] or last
