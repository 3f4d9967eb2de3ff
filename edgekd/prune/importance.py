"""Cutting channels: what goes, and how much.

The dependency graph and the surgery are torch-pruning's (Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023,
arXiv 2301.12900). A group is all channels that must go together; its importance is the L2 norm of all weights in it.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import TrainingError
from edgekd.models import fixed_channels
from edgekd.nn.flops import macs

LARGEST = 0.95
"""No more than this share is cut, so that no layer is cut away."""


def prune(module: nn.Module, example: Tensor, *, ratio: float, round_to: int, scope: str) -> nn.Module:
    """A pruned copy of ``module``.

    Args:
        module: The model; unchanged. Its outputs keep their size.
        example: An input, [B, C, H, W].
        ratio: Share of channels to cut, 0 to 0.95.
        round_to: Channels that stay in a layer that is cut: the nearest multiple of this, and at least one of it.
        scope: ``layer`` cuts the share in every group; ``model`` ranks all groups together and cuts the least important.

    Raises:
        TrainingError: The library cannot follow the model, or the pruned model does not run.
    """
    pruned = copy.deepcopy(module).eval()
    fixed, size = _last_layer(pruned, example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library warns about every parameter that belongs to no layer
            pruner = _pruner(pruned, example, ratio, round_to, scope, [*fixed, *fixed_channels(pruned)])
            pruner.step()
        for node in pruner.DG.module2node.values():  # the graph refers to itself: a copy per try would wait for the collector
            vars(node).clear()
        same = pruned(example).shape == size
    except Exception as error:  # the library and the model's own code may raise anything; the cause stays attached
        raise TrainingError(
            f"{type(module).__name__} cannot be pruned: {type(error).__name__}: {error}",
            hint="remove the prune stage, or use a model whose channels torch-pruning can follow",
        ) from error
    if not same:
        raise TrainingError(
            f"{type(module).__name__} cannot be pruned: its outputs would no longer be {list(size)}",
            hint="remove the prune stage, or let the model end with one linear or convolution layer",
        )
    return pruned


def prune_to_macs(module: nn.Module, example: Tensor, *, share: float, round_to: int, scope: str) -> tuple[nn.Module, float]:
    """The pruned copy with the most channels whose multiply-accumulates are at most ``share`` of the original's.

    The ratio is found by bisection: MACs fall in steps of ``round_to`` channels, so the target is met from below.

    Returns:
        The pruned copy and the ratio that gave it.

    Raises:
        TrainingError: Even the largest cut leaves more than ``share``.
    """
    whole = macs(module, tuple(example.shape[1:]))
    low, high = 0.0, LARGEST
    best = prune(module, example, ratio=high, round_to=round_to, scope=scope)
    least = macs(best, tuple(example.shape[1:])) / whole
    if least > share:
        raise TrainingError(
            f"pruning cannot bring the MACs to {share:.1%} of the original's: at most {LARGEST:.0%} of the channels are cut, to "
            f"multiples of {round_to}, which leaves {least:.1%}",
            hint="raise the MACs target or lower round_to",
        )
    for _ in range(10):
        middle = (low + high) / 2
        candidate = prune(module, example, ratio=middle, round_to=round_to, scope=scope)
        if macs(candidate, tuple(example.shape[1:])) <= share * whole:
            high, best = middle, candidate
        else:
            low = middle
    return best, high


def _pruner(module: nn.Module, example: Tensor, ratio: float, round_to: int, scope: str, ignored: list[nn.Module]) -> Any:
    """The library's pruner with a rounding of our own.

    The library rounds down what stays. So with 16 channels and multiples of 8 the least cut halves the layer, and a cut below 8
    leaves none, upon which the library keeps the whole layer: the least important layers would survive uncut, and a larger ratio
    would give a larger model.
    """
    import torch_pruning as tp

    class Pruner(tp.pruner.BasePruner):  # type: ignore[misc]  # the library has no annotations
        def _round_to(self, cut: int, channels: int, multiple: int) -> int:
            stay = max(1, int((channels - cut) / multiple + 0.5)) * multiple
            if stay > channels:
                stay = channels - channels % multiple or channels
            return channels - stay

    return Pruner(
        module,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean", normalizer="mean"),
        global_pruning=scope == "model",
        pruning_ratio=ratio,
        max_pruning_ratio=LARGEST,
        ignored_layers=ignored,
        round_to=round_to,
    )


def _last_layer(module: nn.Module, example: Tensor) -> tuple[list[nn.Module], torch.Size]:
    """The linear or convolution layer that runs last, whose outputs are the model's own, and the size of the model's output."""
    ran: list[nn.Module] = []
    with contextlib.ExitStack() as hooks:
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                hooks.callback(part.register_forward_hook(lambda layer, *_: ran.append(layer)).remove)
        with torch.no_grad():
            size = module(example).shape
    return ran[-1:], size
