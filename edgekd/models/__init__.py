"""Models by name: edgekd's own table, timm and torchvision (zoo.py), and the user's functions (user.py).

A family's file declares its *taps*: role -> module path, so that recipes and methods ask for ``stage3`` and not for module names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from edgekd.errors import RecipeError, nearest
from edgekd.models import (
    deeplab,
    fanet,
    mobile_unet,
    mobilenet_v2,
    pspnet,
    resnet_cifar,
    scfnet,
    segformer,
    shufflenet_v2,
    sk_unet,
    slim,
    superyolo,
    unet,
    user,
    vgg,
    wide_resnet,
    zoo,
)
from edgekd.models.config import CALLABLE, ModelConfig
from edgekd.models.weights import check_backbone, load_backbone, load_weights
from edgekd.nn.taps import INPUT, check_paths

__all__ = [
    "MODELS",
    "UNPRUNABLE",
    "Entry",
    "ModelConfig",
    "at_width",
    "build",
    "check_backbone",
    "fixed_channels",
    "load_backbone",
    "load_weights",
    "names",
    "taps",
    "widths",
]


@dataclass(frozen=True)
class Entry:
    """One model of the table: its builder, and the taps of its family."""

    build: Callable[..., nn.Module]
    taps: dict[str, str]


MODELS: dict[str, Entry] = {
    "resnet8": Entry(resnet_cifar.resnet8, resnet_cifar.TAPS),
    "resnet14": Entry(resnet_cifar.resnet14, resnet_cifar.TAPS),
    "resnet20": Entry(resnet_cifar.resnet20, resnet_cifar.TAPS),
    "resnet32": Entry(resnet_cifar.resnet32, resnet_cifar.TAPS),
    "resnet56": Entry(resnet_cifar.resnet56, resnet_cifar.TAPS),
    "resnet8x4": Entry(resnet_cifar.resnet8x4, resnet_cifar.TAPS),
    "resnet32x4": Entry(resnet_cifar.resnet32x4, resnet_cifar.TAPS),
    "wrn_16_1": Entry(wide_resnet.wrn_16_1, wide_resnet.TAPS),
    "wrn_16_2": Entry(wide_resnet.wrn_16_2, wide_resnet.TAPS),
    "wrn_40_1": Entry(wide_resnet.wrn_40_1, wide_resnet.TAPS),
    "wrn_40_2": Entry(wide_resnet.wrn_40_2, wide_resnet.TAPS),
    "vgg8": Entry(vgg.vgg8, vgg.TAPS),
    "vgg13": Entry(vgg.vgg13, vgg.TAPS),
    "mobilenetv2": Entry(mobilenet_v2.mobilenetv2, mobilenet_v2.TAPS),
    "shufflenetv2": Entry(shufflenet_v2.shufflenetv2, shufflenet_v2.TAPS),
    "superyolo": Entry(superyolo.superyolo, superyolo.TAPS),
    "superyolo_small": Entry(superyolo.superyolo_small, superyolo.SMALL_TAPS),
    "unet": Entry(unet.unet, unet.TAPS),
    "segformer_b0": Entry(segformer.segformer_b0, segformer.TAPS),
    "segformer_b1": Entry(segformer.segformer_b1, segformer.TAPS),
    "segformer_b2": Entry(segformer.segformer_b2, segformer.TAPS),
    "mobile_unet": Entry(mobile_unet.mobile_unet, mobile_unet.TAPS),
    "fanet": Entry(fanet.fanet, fanet.TAPS),
    "sk_unet": Entry(sk_unet.sk_unet, sk_unet.TAPS),
    "pspnet": Entry(pspnet.pspnet, pspnet.TAPS),
    "deeplabv3plus": Entry(deeplab.deeplabv3plus, deeplab.TAPS),
    "scfnet": Entry(scfnet.scfnet, scfnet.TAPS),
}
MODELS |= {name: Entry(one.build, MODELS[one.plain].taps) for name, one in slim.SLIM.items()}


def names() -> list[str]:
    """The names of edgekd's own models, in the order of the table."""
    return list(MODELS)


def build(config: ModelConfig, *, num_classes: int, in_channels: int) -> nn.Module:
    """Construct the model with random weights; ``config.weights`` is the caller's to load.

    Args:
        config: Which model.
        num_classes: Length of the logits.
        in_channels: Channels of the images.

    Raises:
        RecipeError: The arguments do not fit the constructor, the zoo has no such model, or the user's function failed.
        MissingDependency: The zoo's package is not installed.
    """
    if config.name == CALLABLE:
        assert config.call is not None  # ModelConfig's validator: callable comes with call
        return _out_of_place(user.build(config.call, dict(config.arguments), num_classes=num_classes, in_channels=in_channels))
    if config.name not in MODELS:
        return _out_of_place(zoo.build(config.name, dict(config.arguments), num_classes=num_classes, in_channels=in_channels))
    builder = MODELS[config.name].build
    accepted = [name for name in inspect.signature(builder).parameters if name not in ("num_classes", "in_channels")]
    _check_arguments(config, accepted)
    arguments: dict[str, Any] = dict(config.arguments)
    try:
        return builder(num_classes=num_classes, in_channels=in_channels, **arguments)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(
            f"model {config.name!r} cannot be built with arguments {arguments}: {error}",
            hint=f"its arguments are: {', '.join(accepted) or 'none'}",
        ) from error


def _out_of_place(model: nn.Module) -> nn.Module:
    """Switch off in-place activations: they overwrite what a tap recorded, or what a quantizer saved for its gradient."""
    for module in model.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
    return model


def _check_arguments(config: ModelConfig, accepted: list[str]) -> None:
    for name in config.arguments:
        if name in ("num_classes", "in_channels"):
            raise RecipeError(f"model {config.name!r}: {name} follows from the data", hint=f"remove {name} from arguments")
        if name not in accepted:
            raise RecipeError(
                f"model {config.name!r} has no argument {name!r}{nearest(name, accepted)}",
                hint=f"its arguments are: {', '.join(accepted) or 'none'}",
            )


def taps(config: ModelConfig, model: nn.Module) -> dict[str, str]:
    """The model's taps, role -> module path: those of its family or zoo, then those of ``config.taps``, which win.

    Raises:
        RecipeError: A path does not exist in the model.
    """
    found: dict[str, str] = {}
    if config.name in MODELS:
        places = dict(model.named_modules())  # a U-Net of less than the full depth has fewer stages
        found = {role: place for role, place in MODELS[config.name].taps.items() if place.removesuffix(INPUT) in places}
    elif config.name != CALLABLE:
        found = zoo.taps(config.name, model)
    found.update(config.taps)
    check_paths(model, found)
    return found


def widths(config: ModelConfig) -> tuple[float, ...]:
    """The widths at which a slimmable model runs, the widest first; none for any other model.

    Raises:
        RecipeError: The widths that its arguments give cannot be.
    """
    try:
        return slim.widths(config.name, config.arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model {config.name!r} cannot be built with arguments {config.arguments}: {error}") from error


def at_width(config: ModelConfig, width: float) -> ModelConfig:
    """The ordinary model that a slimmable one is at a width; its weights are edgekd.nn.slimmable.plain_state."""
    one = slim.SLIM[config.name]
    return ModelConfig(name=one.plain, arguments=one.at_width(config.arguments, width), taps=config.taps)


UNPRUNABLE = ("fanet",)
"""Names of models through whose products of maps torch-pruning does not find its way: it searches for hours."""


def fixed_channels(model: nn.Module) -> list[nn.Module]:
    """The layers whose output channels pruning must leave alone: the model tells them apart by position, or reads them unseen."""
    return [part for family in (shufflenet_v2, scfnet, segformer) for part in family.fixed_channels(model)]
