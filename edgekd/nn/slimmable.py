"""Layers that one network runs at several widths: a narrow one is made of the leading channels of a wide one.

Yu, Yang, Xu, Yang, Huang: Slimmable Neural Networks. ICLR 2019, arXiv 1812.08928. Official code: JiahuiYu/slimmable_networks.
Written from a specification of what the code computes.

A width w is a share of the channels, above 0 and at most 1: a layer of C channels has int(w C) at width w. Convolutions share
their weights among widths; every width has batch norms of its own. Images keep their channels at every width, and so do classes.

Differs from the official code: a layer is told its widths instead of reading a global list; channel counts are never rounded up
to multiples of 8, so that a narrow network is an ordinary one; the input of a convolution behind a concatenation is cut from each
of the joined maps, where the leading channels of all would pair maps with weights of other ones.

Shape letters: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.errors import RecipeError
from edgekd.nn.shapes import shapes_only

WIDTHS = (1.0, 0.75, 0.5, 0.25)
"""The published ones, the widest first."""
_ROUNDING = 1e-6
"""Of a width: 0.29 x 100 is 28.999999999999996 in floating point, and 0.3333333 x 48 is 15.9999984; they mean 29 and 16."""


def checked_widths(widths: Sequence[float]) -> tuple[float, ...]:
    """The widths, the widest first.

    Raises:
        ValueError: They are not different numbers in (0, 1], or 1 is not among them.
    """
    found = tuple(sorted((float(width) for width in widths), reverse=True))
    if not found or found[0] != 1 or found[-1] <= 0 or len(set(found)) != len(found):
        raise ValueError(f"widths must be different, above 0 and at most 1, and 1 must be one of them; received {list(widths)}")
    return found


def channels_at(width: float, channels: int) -> int:
    """int(w C), and 1 at least."""
    return max(1, int((width + _ROUNDING) * channels))


class SlimConv2d(nn.Conv2d):
    """A convolution at several widths, at the widest when it is made. Its input is one map, or several that were joined.

    Args:
        inputs: Channels of each joined map at the full width.
        out_channels: At the full width.
        kernel_size: Sides of the kernel, odd; the output has the input's sides, divided by the stride.
        widths: The widest first.
        stride: Of the kernel.
        dilation: Of the kernel.
        bias: Whether outputs have one.
        fixed_inputs: The input has all its channels at every width: images.
        fixed_outputs: So has the output: classes.
        depthwise: Every channel is convolved alone: as many outputs as inputs.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        out_channels: int,
        kernel_size: int,
        widths: Sequence[float],
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = False,
        fixed_inputs: bool = False,
        fixed_outputs: bool = False,
        depthwise: bool = False,
    ) -> None:
        if depthwise and (sum(inputs) != out_channels or fixed_inputs or fixed_outputs):
            raise ValueError(f"a depthwise convolution has as many outputs as inputs; received {list(inputs)}, {out_channels}")
        groups = out_channels if depthwise else 1
        padding = kernel_size // 2 * dilation
        super().__init__(sum(inputs), out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.widths = checked_widths(widths)
        self.width = self.widths[0]
        self.inputs = tuple(inputs)
        self.fixed_inputs, self.fixed_outputs, self.depthwise = fixed_inputs, fixed_outputs, depthwise

    def block(self, width: float) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias that a width uses: views of the layer's own, or parts of them joined."""
        weight, bias = self.weight, self.bias
        if width == 1:
            return weight, bias
        if self.depthwise:  # outputs are joined as inputs are
            return self._cut(weight, 0, width), None if bias is None else self._cut(bias, 0, width)
        if not self.fixed_outputs:
            count = channels_at(width, self.out_channels)
            weight, bias = weight[:count], None if bias is None else bias[:count]
        if not self.fixed_inputs:
            weight = self._cut(weight, 1, width)
        return weight, bias

    def _cut(self, values: Tensor, axis: int, width: float) -> Tensor:
        """The leading channels of each joined map."""
        parts = [part.narrow(axis, 0, channels_at(width, part.shape[axis])) for part in values.split(self.inputs, axis)]
        if values.is_meta:  # there torch.cat imports torch's compiler, which takes a second
            return values.narrow(axis, 0, sum(part.shape[axis] for part in parts))
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def forward(self, input: Tensor) -> Tensor:
        """[B, Cin(w), H, W] to [B, Cout(w), H, W] at the present width w."""
        weight, bias = self.block(self.width)
        groups = len(weight) if self.depthwise else 1
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, groups)


class SwitchableBatchNorm2d(nn.Module):
    """A batch norm for every width: gains, shifts and running statistics of its own.

    Args:
        channels: C at the full width.
        widths: The widest first.
    """

    def __init__(self, channels: int, widths: Sequence[float]) -> None:
        super().__init__()
        self.widths = checked_widths(widths)
        self.width = self.widths[0]
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels_at(width, channels)) for width in self.widths)

    def at(self, width: float) -> nn.Module:
        """The batch norm of a width."""
        return self.norms[self.widths.index(width)]

    def forward(self, input: Tensor) -> Tensor:
        """[B, C(w), H, W] to the same shape at the present width w."""
        out: Tensor = self.at(self.width)(input)
        return out


def make_slimmable(
    module: nn.Module, widths: Sequence[float], *, first: str, last: str, joined: Mapping[str, Sequence[int]]
) -> None:
    """Replace all convolutions and batch norms of a network, whose weights stay, by slimmable ones.

    Args:
        module: Its convolutions are padded to keep the sides, with square kernels, dense or depthwise.
        widths: The widest first.
        first: Path of the convolution that reads images.
        last: Of the one that gives classes.
        joined: Path of a convolution behind a concatenation -> channels of each joined map.

    Raises:
        ValueError: A convolution is of another kind.
    """
    for path, part in list(module.named_modules()):
        if isinstance(part, nn.Conv2d):
            module.set_submodule(path, _slim_conv(part, path, widths, path == first, path == last, joined.get(path)))
        elif isinstance(part, nn.BatchNorm2d):
            module.set_submodule(path, SwitchableBatchNorm2d(part.num_features, widths))


def _slim_conv(
    conv: nn.Conv2d, path: str, widths: Sequence[float], first: bool, last: bool, joined: Sequence[int] | None
) -> SlimConv2d:
    depthwise = conv.groups > 1
    with shapes_only():  # its first values would be drawn in vain
        slim = SlimConv2d(
            joined or [conv.in_channels],
            conv.out_channels,
            conv.kernel_size[0],
            widths,
            stride=conv.stride[0],
            dilation=conv.dilation[0],
            bias=conv.bias is not None,
            fixed_inputs=first,
            fixed_outputs=last,
            depthwise=depthwise,
        )
    same = ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    if different := [name for name in same if getattr(slim, name) != getattr(conv, name)]:
        raise ValueError(f"{path}: {different[0]} {getattr(conv, different[0])} is not that of a convolution that can be slimmed")
    slim.weight, slim.bias = conv.weight, conv.bias
    return slim


def _slimmable(module: nn.Module) -> list[SlimConv2d | SwitchableBatchNorm2d]:
    return [part for part in module.modules() if isinstance(part, (SlimConv2d, SwitchableBatchNorm2d))]


def widths_of(module: nn.Module) -> tuple[float, ...]:
    """The widths of a network, the widest first; none where it has no slimmable layers.

    Raises:
        RecipeError: Its layers have different ones.
    """
    found = list(dict.fromkeys(part.widths for part in _slimmable(module)))
    if len(found) > 1:
        raise RecipeError(f"the layers of {type(module).__name__} have different widths: {found}", hint="give all the same")
    return found[0] if found else ()


@contextmanager
def at_width(module: nn.Module, width: float) -> Iterator[None]:
    """Inside, the network runs at a width; afterwards at what it ran at before. Gradients may be taken outside.

    Args:
        module: With slimmable layers.
        width: One of theirs.

    Raises:
        RecipeError: The network has no such width.
    """
    if width not in (has := widths_of(module)):
        raise RecipeError(
            f"{type(module).__name__} has no width {width:g}",
            hint=f"its widths are: {', '.join(f'{one:g}' for one in has) or 'none: it is not slimmable'}",
        )
    before = [(part, part.width) for part in _slimmable(module)]
    for part, _ in before:
        part.width = width
    try:
        yield
    finally:
        for part, old in before:
            part.width = old


def plain_state(module: nn.Module, width: float) -> dict[str, Tensor]:
    """The state dict of the ordinary network that a width is, whose modules have the same names.

    Args:
        module: With slimmable layers; what has none is taken as it is.
        width: One of theirs.
    """
    state: dict[str, Tensor] = {}
    inside: tuple[nn.Module, ...] = ()
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(part, SlimConv2d):
            weight, bias = part.block(width)
            state |= {f"{prefix}weight": weight} | ({} if bias is None else {f"{prefix}bias": bias})
        elif isinstance(part, SwitchableBatchNorm2d):
            state |= {prefix + name: value for name, value in part.at(width).state_dict().items()}
            inside += tuple(part.modules())
        elif part not in inside:
            state |= {prefix + name: value for name, value in part.named_parameters(recurse=False)}
            state |= {prefix + name: value for name, value in part.named_buffers(recurse=False)}
    return {name: value.detach().clone() for name, value in state.items()}


def slim_state(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: a state dict for ``module`` from the one of the ordinary network that it is at the full width.

    Batch norms of narrow widths get the values of the leading channels, from which they are trained on.

    Args:
        module: With slimmable layers; what has none is taken as it is.
        state: Of the ordinary network, or of a part of it.
    """
    found = dict(state)
    for path, part in module.named_modules():
        if isinstance(part, SwitchableBatchNorm2d):
            prefix = f"{path}." if path else ""
            for name in part.norms[0].state_dict():
                if (value := found.pop(prefix + name, None)) is None:
                    continue
                for index, norm in enumerate(part.norms):
                    own = norm.state_dict()[name]
                    found[f"{prefix}norms.{index}.{name}"] = value[: len(own)].clone() if own.dim() else value
    return found
