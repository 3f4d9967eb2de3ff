"""Quantization-aware training: a float model gets quantizers, is calibrated, trained, stored as a plan, and rebuilt."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from edgekd._config import Config
from edgekd.errors import ArtifactError, TrainingError, nearest
from edgekd.quantize import hybrid
from edgekd.quantize.fake_quant import Int8Weights, Quantizer, QuantLayer, WeightScheme, quantized_layer
from edgekd.quantize.hybrid import HybridConfig
from edgekd.quantize.observers import Calibration, Observer, find_scale
from edgekd.quantize.placement import LAYERS, Placement, kept_in_float, trace

Inputs = Tensor | tuple[Tensor, ...]
"""What a model takes: one tensor, or several."""
STRETCHED = 8
"""A range that ends beyond so many times what three in four images reach leaves these 32 of 256 codes."""


@dataclass(frozen=True)
class Stretched:
    """A tensor whose calibrated range is for few of the images."""

    name: str
    end: float
    """Where the range ends: a magnitude."""
    usual: float
    """What three in four images stay below."""


class QuantizerConfig(Config):
    """8-bit weights, symmetric per output channel; 8-bit activations, symmetric per tensor."""

    kind: Literal["int8"] = "int8"
    """8 bits everywhere."""
    ranges: Literal["learned", "calibrated"] = "learned"
    """Activation ranges start from the calibration split; learned ones are then trained along, where anything is trained."""
    calibration: Calibration = "mse"
    """Where an activation range ends: least squared error, largest value, percentile, or least KL divergence (not for images)."""
    percentile: float = Field(99.99, gt=50, lt=100)
    """Of the magnitudes of an activation; what lies beyond is clipped. For calibration: percentile."""
    skip: list[str] = Field(default_factory=list)
    """Module paths of layers that stay in float; * matches anything, as in `head.*`."""
    keep_float: list[Literal["first", "last", "outputs", "depthwise"]] = Field(default_factory=list)
    """Layers that stay in float by their place or kind: the first and the last one executed, those that make an output of the
    model, depthwise convolutions."""


AnyQuantizer = QuantizerConfig | HybridConfig


def prepare(
    module: nn.Module,
    taps: Mapping[str, str],
    config: AnyQuantizer,
    example: Inputs,
    bits: Mapping[str, int] | None = None,
) -> fx.GraphModule:
    """A copy of a float model with quantizers in it, not yet calibrated.

    Args:
        module: The float model; unchanged.
        taps: Role -> module path; the copy has an identity at ``taps.<role>`` for each.
        config: What is quantized, and how.
        example: An input, [B, C, H, W]; a tuple where the model takes several.
        bits: Of each layer, with a hybrid configuration; None searches them in the model's weights.

    Raises:
        TrainingError: The model cannot be traced, has nothing to quantize, or gives other values when traced; or ``skip``
            or ``keep_float`` name what it does not have.
    """
    model = plain(copy.deepcopy(module).eval())
    _check_skip(model, config.skip)
    traced, places = trace(model, taps)
    kept = kept_in_float(traced, config.keep_float)
    placement = Placement(traced, lambda path: path in kept or any(fnmatchcase(path, pattern) for pattern in config.skip))
    if not placement.layers:
        raise TrainingError(
            f"{type(module).__name__} has no convolution or linear layer to quantize", hint="remove the quantize stage"
        )
    _check_trace(traced, model, example)
    if isinstance(config, HybridConfig):
        first = example if isinstance(example, Tensor) else example[0]
        widths = dict(bits) if bits is not None else hybrid.find_bits(config, traced, placement, first)
        groups = hybrid.groups(config, placement)
    else:
        widths, groups = {}, placement.quantized()
    names: dict[Any, str] = {}
    for node, group in groups.items():
        names.setdefault(group, node.name)  # a quantizer is named after the first tensor that it serves
    schemes = {path: _scheme(config, placement, path, widths) for path in placement.layers}
    traced.quantizers = nn.ModuleDict({name: _quantizer(config, placement, group, widths) for group, name in names.items()})
    for node, group in groups.items():
        _insert(traced, node, f"quantizers.{names[group]}")
    traced.taps = nn.ModuleDict({role: nn.Identity() for role in places})
    for role, node in places.items():
        followers = [user for user in node.users if str(user.target).startswith("quantizers.")]
        _insert(traced, followers[0] if followers else node, f"taps.{role}")
    for path in placement.layers:
        traced.set_submodule(path, quantized_layer(traced.get_submodule(path), schemes[path]))  # type: ignore[arg-type]
    traced.graph.lint()
    traced.recompile()
    traced.meta["config"] = config.model_dump(mode="json")
    return traced.train(module.training)


def _scheme(config: AnyQuantizer, placement: Placement, path: str, bits: Mapping[str, int]) -> WeightScheme:
    return hybrid.scheme(config, placement, path, bits[path]) if isinstance(config, HybridConfig) else Int8Weights()


def _quantizer(config: AnyQuantizer, placement: Placement, group: fx.Node, bits: Mapping[str, int]) -> Quantizer:
    if isinstance(config, HybridConfig):
        return hybrid.quantizer(config, placement, group, bits)
    return Quantizer(placement.signed(group), learned=config.ranges == "learned", limit=placement.limit(group))


def plain(model: nn.Module) -> nn.Module:
    """The same model in modules that the rules know: nothing in place, and timm's norm-with-activation as two modules."""
    for path, part in list(model.named_modules()):
        if getattr(part, "inplace", False):
            part.inplace = False
        activation, drop = getattr(part, "act", None), getattr(part, "drop", None)
        if isinstance(part, nn.BatchNorm2d) and isinstance(activation, nn.Module) and isinstance(drop, nn.Module):
            norm = nn.BatchNorm2d(part.num_features, part.eps, part.momentum, part.affine, part.track_running_stats)
            norm.load_state_dict({name: value for name, value in part.state_dict().items() if name in norm.state_dict()})
            between = [] if isinstance(drop, nn.Identity) else [drop]
            model.set_submodule(path, nn.Sequential(norm, *between, activation).eval())
    return model


def _insert(traced: Any, node: Any, target: str) -> None:
    """Have everything that reads ``node`` read it through the module at ``target``."""
    with traced.graph.inserting_after(node):
        inserted = traced.graph.create_node("call_module", target, (node,))
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)


def _check_skip(model: nn.Module, patterns: list[str]) -> None:
    paths = [path for path, part in model.named_modules() if isinstance(part, LAYERS)]
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise TrainingError(
                f"quantizer.skip: no layer matches {pattern!r}{nearest(pattern, paths)}",
                hint=f"the model's layers: {', '.join(paths)}",
            )


def _check_trace(traced: nn.Module, model: nn.Module, example: Inputs) -> None:
    """A trace freezes Python's decisions; where it gives other values, it is not the model."""
    examples = (example,) if isinstance(example, Tensor) else example
    with torch.no_grad():
        expected, received = _tensors(model(*examples)), _tensors(traced(*examples))
    same = len(expected) == len(received) > 0
    if not same or not all(torch.allclose(one, other, equal_nan=True) for one, other in zip(expected, received, strict=True)):
        raise TrainingError(
            f"{type(model).__name__} cannot be quantized: its trace gives other values than the model itself",
            hint="its forward must give tensors and take the same path every time",
        )


def _tensors(value: Any) -> list[Tensor]:
    """What a forward gave, as a list: nothing where it is neither a tensor nor a tuple of them."""
    parts = list(value) if isinstance(value, tuple | list) else [value]
    return parts if all(isinstance(part, Tensor) for part in parts) else []


def calibrate(quantized: fx.GraphModule, batches: Iterable[Inputs]) -> list[Stretched]:
    """Set every quantizer's scale from the values that it sees in these images, which pass through the float model.

    Args:
        quantized: What :func:`prepare` gave; changed in place.
        batches: Normalised images, float32 [B, C, H, W] each; tuples where the model takes several inputs.

    Returns:
        The tensors whose range is for few of the images, the worst first.

    Raises:
        TrainingError: A tensor is not finite.
    """
    settings = read_config(quantized.meta["config"])
    # a hybrid one learns the ranges that it does not fix
    config = settings if isinstance(settings, QuantizerConfig) else QuantizerConfig()
    quantizers = {name: part for name, part in named_quantizers(quantized).items() if part.end is None}
    mode = quantized.training
    quantized.eval()
    images_of = {node.name for node in quantized.graph.nodes if node.op == "placeholder"}
    observers = {name: Observer() for name in quantizers}
    for name, quantizer in quantizers.items():
        quantizer.observer = observers[name]
    try:
        with torch.no_grad():
            for images in batches:
                quantized(*((images,) if isinstance(images, Tensor) else images))
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
    stretched = []
    for name, quantizer in quantizers.items():
        # Pixels have few values, and the background's bin may hold most of them: to clip all beyond it then costs little
        # divergence and much of the picture.
        way: Calibration = "minmax" if config.calibration == "entropy" and name in images_of else config.calibration
        scale = find_scale(observers[name], quantizer.low, quantizer.high, calibration=way, percentile=config.percentile)
        if not 0 < scale < float("inf"):
            raise TrainingError(
                f"the values at {name!r} are not finite on the calibration images", hint="check the float model's weights"
            )
        with torch.no_grad():
            quantizer.log_scale.fill_(scale).log_()
        if 0 < observers[name].usual * STRETCHED < scale * quantizer.high:
            stretched.append(Stretched(name, scale * quantizer.high, observers[name].usual))
    quantized.train(mode)
    return sorted(stretched, key=lambda one: one.end / one.usual, reverse=True)


def read_config(data: Mapping[str, Any]) -> AnyQuantizer:
    """The configuration in a plan."""
    kind: type[AnyQuantizer] = HybridConfig if data["kind"] == "hybrid" else QuantizerConfig
    return kind.model_validate(data)


def named_quantizers(quantized: nn.Module) -> dict[str, Quantizer]:
    """The quantizers by name, in the order of the graph."""
    return {path.removeprefix("quantizers."): part for path, part in quantized.named_modules() if isinstance(part, Quantizer)}


def plan(quantized: fx.GraphModule) -> dict[str, Any]:
    """What :func:`rebuild` needs, as data: the configuration, and what it led to, for comparison."""
    return {
        "config": quantized.meta["config"],
        "quantizers": {name: {"signed": part.signed, "bits": part.bits} for name, part in named_quantizers(quantized).items()},
        "layers": hybrid.layer_bits(quantized),
    }


def rebuild(module: nn.Module, taps: Mapping[str, str], plan_: Mapping[str, Any], example: Inputs) -> fx.GraphModule:
    """The quantized model of a plan, its weights and scales not yet loaded.

    Raises:
        ArtifactError: This edgekd places quantizers elsewhere than the one that wrote the plan.
    """
    rebuilt = prepare(module, taps, read_config(plan_["config"]), example, plan_["layers"])
    if plan(rebuilt) != dict(plan_):
        raise ArtifactError("the quantization plan was written by another version of edgekd", hint="quantize again with this one")
    return rebuilt


def layers(quantized: nn.Module) -> list[dict[str, Any]]:
    """The quantized layers: path, weight_bits, activation_bits (of what the layer reads); none of a float model."""
    if not isinstance(quantized, fx.GraphModule):
        return []
    modules = dict(quantized.named_modules())
    feeds = {}
    for node in quantized.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], QuantLayer):
            maker = node.all_input_nodes[0]
            feed = modules.get(str(maker.target)) if maker.op == "call_module" else None
            feeds[node.target] = feed.bits if isinstance(feed, Quantizer) else hybrid.FLOAT_BITS
    return [
        {"path": path, "weight_bits": part.scheme.bits, "activation_bits": feeds[path]}
        for path, part in modules.items()
        if isinstance(part, QuantLayer)
    ]
