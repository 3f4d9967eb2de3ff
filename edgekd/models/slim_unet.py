"""U-Net at several widths in one: at width w it is the ordinary U-Net (edgekd.models.unet) of w times as many channels.

The joined maps of its decoder are cut each for itself, see edgekd.nn.slimmable.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.models.unet import DEEPEST, Layers, UNet
from edgekd.nn.slimmable import WIDTHS, SlimConv2d, SwitchableBatchNorm2d, checked_widths


def slim_unet(
    *, num_classes: int, in_channels: int, width: int = 16, depth: int = DEEPEST, widths: Sequence[float] = WIDTHS
) -> UNet:
    """U-Net of slimmable layers; ``width`` and ``depth`` are those of its full width.

    Raises:
        ValueError: A width does not leave a whole number of the finest maps' channels, or an argument is out of range.
    """
    shares = checked_widths(widths)
    if broken := [share for share in shares if not _whole(share * width)]:
        raise ValueError(f"width {width} times {broken[0]:g} is no whole number of channels")
    layers = Layers(
        conv=lambda inputs, channels, size: SlimConv2d(inputs, channels, size, shares),
        first=lambda inputs, channels: SlimConv2d([inputs], channels, 3, shares, fixed_inputs=True),
        last=lambda inputs, classes: SlimConv2d([inputs], classes, 1, shares, bias=True, fixed_outputs=True),
        norm=lambda channels: SwitchableBatchNorm2d(channels, shares),
    )
    return UNet(num_classes, in_channels, width, depth, layers)


def widths(arguments: Mapping[str, Any]) -> tuple[float, ...]:
    """The widths of a net with these arguments, the widest first.

    Raises:
        ValueError: They cannot be.
    """
    return checked_widths(arguments.get("widths", WIDTHS))


def at_width(arguments: Mapping[str, Any], width: float) -> dict[str, Any]:
    """The arguments of the ordinary U-Net that a net with these arguments is at a width."""
    full = arguments.get("width", inspect.signature(slim_unet).parameters["width"].default)
    return {"width": round(full * width), "depth": arguments.get("depth", DEEPEST)}


def _whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-6 and round(value) >= 1
