"""What bits cost on paper: the size of the weights, and bit operations.

Zhang et al.: Guided Hybrid Quantization for Object Detection in Remote Sensing Imagery via One-to-One Self-Teaching. IEEE TGRS
2023, arXiv 2301.00131; official code: icey-zhang/GHOST. With P parameters, O multiply-accumulates of one image (and one addition
per output value where there is a bias) and k bits of layer i:

    size  sum P_i k_i / 8 bytes        bit operations  sum O_i k_i b_i

b_i are the bits of what layer i reads: 32 for the image. Layers in float count 32 on both sides. Batch norms, activations and
scales do not count.

:func:`bops_dataflow` takes for b_i the bits of the layers whose results really arrive there: the largest of them where maps are
added or joined. :func:`bops_paper` and :func:`size_paper_bytes` count as the published script does, two mistakes included: b_i is
the bits of the layer before in the list, whatever it reads; and for the h float layers at the end of the list it adds, at 32
bits, the entries that begin h - 1 too early. They are for comparison with published numbers only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from edgekd.nn.flops import layer_macs
from edgekd.quantize.placement import LAYERS, trace

FLOAT = 32
"""Bits of the image, and of everything that is not quantized."""
SIZES = ("size", "dim", "numel", "shape", "ndim", "device", "dtype")
"""Methods and attributes of a tensor that tell nothing of its values."""


@dataclass(frozen=True)
class Row:
    """One convolution or linear layer."""

    path: str
    params: int
    """Weights and biases."""
    macs: int
    """Of one image; one more per output value where there is a bias."""
    producers: tuple[str, ...]
    """Layers whose results it reads."""
    reads_image: bool


def rows(model: nn.Module, example: Tensor) -> list[Row]:
    """All convolutions and linear layers, in the order in which the model defines them.

    Args:
        model: A float model that torch.fx can trace.
        example: An input, [B, C, H, W].

    Raises:
        TrainingError: It cannot be traced.
    """
    traced = model if isinstance(model, fx.GraphModule) else trace(copy.deepcopy(model).eval(), {})[0]
    macs, parts = layer_macs(traced, tuple(example.shape[1:])), dict(traced.named_modules())
    # defined order is that of the user's module: a graph module keeps only the hierarchy, in the order of execution
    order = [path for path, part in model.named_modules() if isinstance(part, LAYERS) and path in macs]
    sources = _sources(traced)
    found = []
    for path in order:
        layer, (producers, image) = parts[path], sources[path]
        weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
        # a gathering layer reads all weights of an output channel for each output value
        outputs = macs[path] // weight[0].numel() if bias is not None and not isinstance(layer, nn.ConvTranspose2d) else 0
        params = weight.numel() + (bias.numel() if bias is not None else 0)
        found.append(Row(path, params, macs[path] + outputs, tuple(sorted(producers)), image))
    return found


def _sources(traced: fx.GraphModule) -> dict[str, tuple[set[str], bool]]:
    """Layer -> the layers whose results it reads, and whether it reads an input of the model."""
    parts = dict(traced.named_modules())
    behind: dict[fx.Node, tuple[set[str], bool]] = {}
    found: dict[str, tuple[set[str], bool]] = {}
    for node in traced.graph.nodes:
        before = [behind[source] for source in node.all_input_nodes]
        merged = (set().union(*(paths for paths, _ in before)), any(image for _, image in before))
        if node.op == "placeholder":
            merged = (set(), True)
        elif _asks_for_size(node):
            merged = (set(), False)
        elif node.op == "call_module" and isinstance(parts[node.target], LAYERS):
            old = found.get(node.target, (set(), False))  # a layer that is called twice reads what both calls read
            found[node.target] = (old[0] | merged[0], old[1] or merged[1])
            merged = ({node.target}, False)
        behind[node] = merged
    return found


def _asks_for_size(node: fx.Node) -> bool:
    """Whether a node is ``x.size(0)`` or ``x.shape``: a layer that is given it reads nothing of what made x."""
    attribute = node.op == "call_function" and node.target is getattr and node.args[1] in SIZES
    return attribute or (node.op == "call_method" and node.target in SIZES)


def size_bytes(table: Sequence[Row], bits: Mapping[str, int]) -> float:
    """Bytes of all weights and biases, packed at their bits.

    Args:
        table: Of the model.
        bits: Module path -> bits of the quantized layers.
    """
    return sum(row.params * bits.get(row.path, FLOAT) / 8 for row in table)


def bops_dataflow(table: Sequence[Row], bits: Mapping[str, int]) -> float:
    """Bit operations of one image; arguments as for :func:`size_bytes`."""
    total = 0.0
    for row in table:
        reads = [bits.get(path, FLOAT) for path in row.producers] + ([FLOAT] if row.reads_image else [])
        total += row.macs * (bits[row.path] * max(reads, default=FLOAT) if row.path in bits else FLOAT * FLOAT)
    return total


def bops_paper(table: Sequence[Row], bits: Mapping[str, int]) -> float:
    """Bit operations as the published script counts them; arguments as for :func:`size_bytes`."""
    quantized = [row for row in table if row.path in bits]
    before = [FLOAT, *(bits[row.path] for row in quantized)]
    total = sum(row.macs * bits[row.path] * last for row, last in zip(quantized, before, strict=False))
    return total + sum(row.macs * FLOAT * FLOAT for row in _counted_in_float(table, bits))


def size_paper_bytes(table: Sequence[Row], bits: Mapping[str, int]) -> float:
    """Bytes as the published script counts them; arguments as for :func:`size_bytes`."""
    total = sum(row.params * bits[row.path] / 8 for row in table if row.path in bits)
    return total + sum(row.params * FLOAT / 8 for row in _counted_in_float(table, bits))


def _counted_in_float(table: Sequence[Row], bits: Mapping[str, int]) -> list[Row]:
    """What the script takes for the float layers: as many entries as there are, up to the first one of them."""
    ordered = [row for row in table if row.path in bits] + [row for row in table if row.path not in bits]
    heads = sum(row.path not in bits for row in table)
    first = len(table) - heads
    return ordered[max(0, first - heads + 1) : first + 1] if heads else []
