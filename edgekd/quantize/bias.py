"""Empirical bias correction: rounding weights shifts the mean of a layer's outputs, and its bias takes the shift back.

Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, ICCV 2019, arXiv 1906.04721, section 4.2 and
appendix D: the means are measured on images, and layers are corrected in the order of execution, each on the outputs of those
that were corrected before it. Written from the paper.

Differs from the paper: where a batch norm follows a convolution without a bias, its running mean takes the shift, which is the
same function. Two kinds of layers stay as they are: those with neither, and those that one forward calls more than once, whose
calls would need different biases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from edgekd.quantize.fake_quant import QuantConv2d, QuantLinear

IMAGES = 256
"""So many calibration images are enough for a mean, and bound the memory: the graph is run node by node, all images at once."""


@torch.no_grad()
def correct_biases(quantized: fx.GraphModule, reference: nn.Module, batches: Sequence[Tensor]) -> list[str]:
    """Correct every quantized layer's bias, in place.

    Args:
        quantized: Calibrated (edgekd.quantize.qat); its layers have the module paths of the reference.
        reference: The float model that it was made from, in eval mode.
        batches: Normalised calibration images, float32 [B, C, H, W] each.

    Returns:
        Module paths of the layers that were corrected.
    """
    quantized.eval()
    calls = Counter(node.target for node in quantized.graph.nodes if node.op == "call_module")
    layers: dict[fx.Node, Tensor] = {}
    for node in quantized.graph.nodes:
        place = _place(quantized, node) if calls[node.target] == 1 else None
        if place is not None:
            layers[node] = place
    expected = output_means(reference, [str(node.target) for node in layers], batches)
    runs = [fx.Interpreter(quantized) for _ in batches]
    for node in quantized.graph.nodes:
        if node.op == "output":
            break
        for run, images in zip(runs, batches, strict=True):
            run.env[node] = images if node.op == "placeholder" else run.run_node(node)
        if node in layers:
            path = str(node.target)
            layer = quantized.get_submodule(path)
            shift = _over([_sums(run.env[node], layer) for run in runs]) - expected[path]
            if layers[node] is layer.bias:
                layers[node].sub_(shift)
                for run in runs:
                    run.env[node] = run.run_node(node)
            else:
                layers[node].add_(shift)
        for run in runs:
            for dead in run.user_to_last_uses.get(node, []):
                del run.env[dead]
    return [str(node.target) for node in layers]


def _place(quantized: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The tensor that can take a shift of this layer's output: its bias, else its batch norm's running mean, else None."""
    layer = quantized.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(layer, QuantConv2d | QuantLinear):
        return None
    if layer.bias is not None:
        return layer.bias
    follower = next(iter(node.users)) if len(node.users) == 1 else None
    if follower is None or follower.op != "call_module":
        return None
    norm = quantized.get_submodule(str(follower.target))
    return norm.running_mean if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) else None


@torch.no_grad()
def output_means(model: nn.Module, paths: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The mean output of layers per channel, [C] by module path, over images and places."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda layer, _, out, path=path: seen[path].append(_sums(out, layer)))
        for path in paths
    ]
    try:
        for images in batches:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: _over(parts) for path, parts in seen.items()}


def _sums(output: Tensor, layer: nn.Module) -> Tensor:
    """Per channel the sum, and in a second column the count: float64 [C, 2]."""
    values = output.movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1).double()
    return torch.stack([values.sum(1), torch.full((len(values),), float(values.shape[1]), dtype=torch.float64)], 1)


def _over(parts: Sequence[Tensor]) -> Tensor:
    total = torch.stack(list(parts)).sum(0)
    return (total[:, 0] / total[:, 1]).float()
