"""Segmenters at several widths in one: at width w, each is the ordinary one of w times as many channels.

Convolutions behind a concatenation are cut for each of the joined maps, see edgekd.nn.slimmable.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from edgekd.models.deeplab import PUBLISHED, DeepLabV3Plus, deeplabv3plus, fine_channels
from edgekd.models.pspnet import PSPNet, pspnet
from edgekd.models.unet import DEEPEST, UNet, unet
from edgekd.nn.shapes import shapes_only
from edgekd.nn.slimmable import WIDTHS, checked_widths, make_slimmable, plain_state

AnyNet = TypeVar("AnyNet", bound=nn.Module)


def slim_unet(
    *, num_classes: int, in_channels: int, width: int = 16, depth: int = DEEPEST, widths: Sequence[float] = WIDTHS
) -> UNet:
    """U-Net; ``width`` and ``depth`` are those of its full width.

    Raises:
        ValueError: A width is not that of an ordinary U-Net, or an argument is out of range.
    """
    net = unet(num_classes=num_classes, in_channels=in_channels, width=width, depth=depth)
    joined = {f"decoder.{index}.blocks.conv1": [width * 2**index] * 2 for index in range(depth)}
    arguments = {"width": width, "depth": depth}
    return _slimmed("slim_unet", net, num_classes, in_channels, arguments, widths, joined)


def slim_pspnet(
    *,
    num_classes: int,
    in_channels: int,
    backbone: str = "resnet18",
    width: float = 1.0,
    output_stride: int = 8,
    decoder: int = 128,
    grids: Sequence[int] = (1, 2, 3, 6),
    widths: Sequence[float] = WIDTHS,
) -> PSPNet:
    """PSPNet; ``width`` and ``decoder`` are those of its full width.

    Raises:
        ValueError: A width is not that of an ordinary PSPNet, or an argument is out of range.
    """
    arguments: dict[str, Any] = {"backbone": backbone, "width": width, "output_stride": output_stride} | {
        "decoder": decoder,
        "grids": grids,
    }
    net = pspnet(num_classes=num_classes, in_channels=in_channels, **arguments)
    joined = {"fuse.conv": [net.backbone.channels[-1], *[net.pyramid.each] * len(grids)]}
    return _slimmed("slim_pspnet", net, num_classes, in_channels, arguments, widths, joined)


def slim_deeplabv3plus(
    *,
    num_classes: int,
    in_channels: int,
    backbone: str = "resnet50",
    width: float = 1.0,
    output_stride: int = 16,
    decoder: int = PUBLISHED,
    separable: bool = True,
    widths: Sequence[float] = WIDTHS,
) -> DeepLabV3Plus:
    """DeepLabV3+; ``width`` and ``decoder`` are those of its full width.

    Raises:
        ValueError: A width is not that of an ordinary DeepLabV3+, or an argument is out of range.
    """
    arguments: dict[str, Any] = {"backbone": backbone, "width": width, "output_stride": output_stride} | {
        "decoder": decoder,
        "separable": separable,
    }
    net = deeplabv3plus(num_classes=num_classes, in_channels=in_channels, **arguments)
    behind = ("decoder.0.0.conv", "decoder.0.1.conv") if separable else ("decoder.0.conv",)
    joined = {path: [decoder, fine_channels(decoder)] for path in behind}
    joined["pyramid.fuse.conv"] = [decoder] * (1 + len(net.pyramid.branches))
    return _slimmed("slim_deeplabv3plus", net, num_classes, in_channels, arguments, widths, joined)


@dataclass(frozen=True)
class Slim:
    """One of them, and what it is at a width."""

    build: Callable[..., nn.Module]
    plain: str
    """The name of the ordinary model."""
    plain_build: Callable[..., nn.Module]
    scaled: tuple[str, ...]
    """Its arguments that a width multiplies; what counts channels stays whole."""

    def at_width(self, arguments: Mapping[str, Any], width: float) -> dict[str, Any]:
        """The arguments of the ordinary net that a net with these arguments is at a width."""
        found = {name: value for name, value in arguments.items() if name != "widths"}
        for name in self.scaled:
            default = inspect.signature(self.build).parameters[name].default
            full = arguments.get(name, default)
            found[name] = round(full * width) if isinstance(default, int) else full * width
        return found


SLIM: dict[str, Slim] = {
    "slim_unet": Slim(slim_unet, "unet", unet, ("width",)),
    "slim_pspnet": Slim(slim_pspnet, "pspnet", pspnet, ("width", "decoder")),
    "slim_deeplabv3plus": Slim(slim_deeplabv3plus, "deeplabv3plus", deeplabv3plus, ("width", "decoder")),
}


def widths(name: str, arguments: Mapping[str, Any]) -> tuple[float, ...]:
    """The widths of a net with these arguments, the widest first; none where the name is no slimmable net's.

    Raises:
        ValueError: They cannot be.
    """
    return checked_widths(arguments.get("widths", WIDTHS)) if name in SLIM else ()


def _slimmed(
    name: str,
    net: AnyNet,
    num_classes: int,
    in_channels: int,
    arguments: Mapping[str, Any],
    widths: Sequence[float],
    joined: Mapping[str, Sequence[int]],
) -> AnyNet:
    """The net, of slimmable layers now, at every width an ordinary one."""
    shares = checked_widths(widths)
    first = next(path for path, part in net.named_modules() if isinstance(part, nn.Conv2d))
    make_slimmable(net, shares, first=first, last="head", joined=joined)
    for share in shares[1:]:
        with shapes_only():
            narrow = SLIM[name].at_width(arguments, share)
            plain = SLIM[name].plain_build(num_classes=num_classes, in_channels=in_channels, **narrow).state_dict()
        for place, value in plain_state(net, share).items():
            if value.shape != plain[place].shape:
                raise ValueError(
                    f"width {share:g} is no whole number of channels: {place} would be {list(value.shape)}, "
                    f"in the ordinary {SLIM[name].plain} of that width {list(plain[place].shape)}"
                )
    return net
