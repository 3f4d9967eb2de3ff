"""Cross-layer equalization: the same float function with weights and activations that lose less when they are quantized.

Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019, arXiv 1906.04721, section 4.1,
equations 7 to 14. Written from the paper.

Between two layers with nothing but a ReLU between them, channel i of the tensor can be divided by any s_i > 0 in the first layer
and multiplied again in the second. The paper's s_i = sqrt(r1_i / r2_i) gives both layers the same range in each channel, r1_i
being the largest weight of output channel i of the first layer and r2_i that of input channel i of the second (equation 11).

Differs from the paper: a batch norm is not folded into the convolution. Its gain counts in the range of the weights in front of
it, and 1/s goes into its gain and its shift, which is the same function and keeps the model's parameters as they were, so that
the checkpoint is rebuilt like any other. A depthwise convolution between two others needs no rule of its own: the pairs are gone
through until nothing moves, and the three ranges then meet in their geometric mean. A ReLU6 ends a chain (6 would have to become
6 / s_i per channel). Channels that are dead in one of the two layers stay as they are: their factor would blow up the shift that
is left of them. High biases are not absorbed (section 4.1.3), which changes the function; bias correction takes back what they
cost.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from edgekd.quantize.placement import DROPOUTS, trace
from edgekd.quantize.qat import plain

SWEEPS = 100
STILL = 1e-4
"""The sweeps end where no factor is further from 1 than this."""
DEAD = 1e-5
"""A channel whose range is below this share of its layer's largest is dead."""
# f(s x) = s f(x) for s > 0, channel by channel
PASSES = (
    *(nn.ReLU, F.relu, torch.relu, "relu", nn.Identity, *DROPOUTS, nn.MaxPool2d, F.max_pool2d),
    *(nn.AvgPool2d, F.avg_pool2d, nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d),
)


@dataclass(frozen=True)
class Pair:
    """Two layers between which channels can be scaled: module paths."""

    first: str
    norm: str | None
    """The first layer's batch norm."""
    second: str
    second_norm: str | None
    """The second layer's: it counts in the range of the folded weights, and is not changed."""


def equalize(module: nn.Module) -> tuple[nn.Module, list[Pair]]:
    """A copy of a float model that computes the same with equalized ranges, in eval mode, and the pairs that were equalized.

    Args:
        module: The float model; unchanged.

    Raises:
        TrainingError: It cannot be traced.
    """
    model = plain(copy.deepcopy(module).eval())
    traced, _ = trace(model, {})
    found = pairs(traced)
    for _ in range(SWEEPS):
        moved = [_balance(traced, pair) for pair in found]  # a list: every pair gets its turn
        if not any(moved):
            break
    return model, found


def pairs(traced: fx.GraphModule) -> list[Pair]:
    """All pairs of convolutions, or of linear layers, in the order of execution.

    Between the two stand at most the first one's batch norm and what only passes a scale on, each with a single reader.
    """
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    shared = _shared_parameters(traced)

    def part(node: fx.Node) -> nn.Module | None:
        """The module of a node that calls it and no other does."""
        single = node.op == "call_module" and calls[node.target] == 1 and str(node.target) not in shared
        return modules[str(node.target)] if single else None

    def norm_of(node: fx.Node) -> fx.Node | None:
        """The plain batch norm that alone reads a convolution's output."""
        follower = next(iter(node.users)) if len(node.users) == 1 and isinstance(part(node), nn.Conv2d) else None
        return follower if follower is not None and type(part(follower)) in (nn.BatchNorm2d, nn.SyncBatchNorm) else None

    found = []
    for node in traced.graph.nodes:
        kind = next((kind for kind in (nn.Conv2d, nn.Linear) if isinstance(part(node), kind)), None)
        norm = norm_of(node)
        if kind is None or (norm is not None and not cast(nn.BatchNorm2d, part(norm)).affine):
            continue
        here = node if norm is None else norm
        while len(here.users) == 1:
            follower = next(iter(here.users))
            if follower.all_input_nodes != [here]:
                break
            if isinstance(part(follower), kind):
                after = norm_of(follower)
                found.append(Pair(str(node.target), _name(norm), str(follower.target), _name(after)))
                break
            if not _passes(follower, modules):
                break
            here = follower
    return found


def _name(node: fx.Node | None) -> str | None:
    return None if node is None else str(node.target)


def _passes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) in PASSES
    return any(node.target is kind or (isinstance(kind, str) and node.target == kind) for kind in PASSES)


def _shared_parameters(module: nn.Module) -> set[str]:
    """Paths of modules that hold a parameter which another module holds too."""
    owners: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


@torch.no_grad()
def _balance(traced: nn.Module, pair: Pair) -> bool:
    """Scale one pair by equation 11; whether anything moved."""
    first, second = traced.get_submodule(pair.first), traced.get_submodule(pair.second)
    norm = cast(nn.BatchNorm2d, traced.get_submodule(pair.norm)) if pair.norm is not None else None
    one_C = folded(first, norm).flatten(1).amax(1)
    other_C = input_range(second, traced.get_submodule(pair.second_norm) if pair.second_norm is not None else None)
    alive_C = (one_C > DEAD * one_C.amax()) & (other_C > DEAD * other_C.amax())
    factor_C = torch.where(alive_C, (one_C / other_C).sqrt(), 1.0)
    weight, shift = (first.get_parameter("weight"), cast(Tensor | None, first.bias)) if norm is None else (norm.weight, norm.bias)
    for tensor in (weight, shift):
        if tensor is not None:
            tensor.div_(factor_C.view(-1, *[1] * (tensor.ndim - 1)))
    _multiply_inputs(second, factor_C)
    return bool((factor_C - 1).abs().amax() > STILL)


def folded(layer: nn.Module, norm: nn.Module | None) -> Tensor:
    """The magnitudes of a layer's weights with its batch norm's gain in them, the weights' shape."""
    weight = layer.get_parameter("weight").abs()
    if norm is None:
        return weight
    assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    assert norm.running_var is not None
    gain_C = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.abs())
    return weight * gain_C.view(-1, *[1] * (weight.ndim - 1))


def input_range(layer: nn.Module, norm: nn.Module | None) -> Tensor:
    """The largest magnitude of the folded weights that read each input channel, [Cin]; Cin = groups * channels per group."""
    weight = folded(layer, norm)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).amax((1, 3)).flatten()


def _multiply_inputs(layer: nn.Module, factor_C: Tensor) -> None:
    weight = layer.get_parameter("weight")
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    factors = factor_C.view(groups, 1, weight.shape[1], 1)
    weight.copy_((weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1) * factors).view_as(weight))
