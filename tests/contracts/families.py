"""One small model for each family that people deploy: 32 pixels, few channels, seconds to build in every engine.

Written here and not taken from the model table, so that each has what makes its family hard, and little else; but for
the attention of FANet.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from edgekd.models.fanet import FastAttention

CLASSES = 10


def block(cin, cout, size=3, *, stride=1, groups=1, activation=nn.ReLU):
    """Convolution, batch norm, activation."""
    conv = nn.Conv2d(cin, cout, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), *([activation()] if activation else []))


class Head(nn.Sequential):
    """Global average and a linear layer."""

    def __init__(self, channels):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, CLASSES))


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.body = nn.Sequential(block(cin, cout, stride=stride), block(cout, cout, activation=None))
        self.short = block(cin, cout, 1, stride=stride, activation=None) if stride > 1 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.body(x) + self.short(x))


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.body = nn.Sequential(
            block(cin, 4 * cin, 1, activation=nn.ReLU6),
            block(4 * cin, 4 * cin, stride=stride, groups=4 * cin, activation=nn.ReLU6),
            block(4 * cin, cout, 1, activation=None),
        )
        self.residual = stride == 1

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


class Grouped(nn.Module):
    """ShuffleNet's grouped convolutions with a channel shuffle between them."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = block(3, 16, stride=2), block(16, 16, 1, groups=4)
        self.two, self.head = block(16, 16, groups=4, stride=2), Head(16)

    def forward(self, x):
        x = self.one(self.stem(x))
        x = x.view(x.shape[0], 4, 4, 16, 16).transpose(1, 2).reshape(x.shape[0], 16, 16, 16)
        return self.head(self.two(x))


class Concatenating(nn.Module):
    """Inception's branches, one behind a pooling, and DenseNet's reuse of what came before."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.three = block(3, 8, stride=2), block(8, 4, 1), block(8, 8)
        self.pool, self.project = nn.MaxPool2d(3, 1, 1), block(8, 4, 1)
        self.dense, self.head = block(16, 8), Head(24)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.one(x), self.three(x), self.project(self.pool(x))], 1)
        return self.head(torch.cat([x, self.dense(x)], 1))


class UNet(nn.Module):
    """Two scales, a skip connection, and one of the ways up."""

    def __init__(self, way):
        super().__init__()
        self.fine, self.down, self.coarse = block(3, 8), nn.MaxPool2d(2), block(8, 16)
        if way == "transposed":
            self.up = nn.Sequential(nn.ConvTranspose2d(16, 16, 2, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        elif way == "bilinear":
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        else:
            self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.merge, self.head = block(24, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        fine = self.fine(x)
        return self.head(self.merge(torch.cat([self.up(self.coarse(self.down(fine))), fine], 1)))


class Decoder(nn.Module):
    """Transposed convolutions one after the other, with groups, overlap and output padding, as generators have them."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(block(3, 16, stride=2), block(16, 16, stride=2))
        self.up = nn.Sequential(
            *(nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=2), nn.ReLU()),
        )
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.last(self.up(self.down(x)))


class Attention(nn.Module):
    """Multi-head self-attention; with ``reduction`` keys and values come from a smaller map, as in SegFormer."""

    def __init__(self, width, heads, reduction=1):
        super().__init__()
        self.heads, self.width, self.reduction = heads, width, reduction
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        if reduction > 1:
            self.shrink, self.norm = nn.Conv2d(width, width, reduction, stride=reduction), nn.LayerNorm(width)

    def forward(self, x, side):
        batch, size = x.shape[0], self.width // self.heads
        q = self.q(x).reshape(batch, -1, self.heads, size).transpose(1, 2)
        if self.reduction > 1:
            grid = x.transpose(1, 2).reshape(batch, self.width, side, side)
            x = self.norm(self.shrink(grid).flatten(2).transpose(1, 2))
        k, v = self.kv(x).reshape(batch, -1, 2, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) * size**-0.5, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, -1, self.width))


class ViT(nn.Module):
    """Patches, a class token, positions, two blocks."""

    def __init__(self, width=16, side=4):
        super().__init__()
        self.patches, self.side = nn.Conv2d(3, width, 32 // side, stride=32 // side), side
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.2)
        self.places = nn.Parameter(torch.randn(1, side * side + 1, width) * 0.2)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    *(nn.LayerNorm(width), Attention(width, 2), nn.LayerNorm(width)),
                    nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
                ]
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for first, attention, second, mlp in self.blocks:
            x = x + attention(first(x), self.side)
            x = x + mlp(second(x))
        return self.head(self.norm(x)[:, 0])


class MixFFN(nn.Module):
    """SegFormer's feed-forward part: a depthwise convolution between its two linear layers."""

    def __init__(self, width):
        super().__init__()
        self.one, self.two = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.mix = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.width = 2 * width

    def forward(self, x, side):
        grid = self.one(x).transpose(1, 2).reshape(x.shape[0], self.width, side, side)
        return self.two(F.gelu(self.mix(grid).flatten(2).transpose(1, 2)))


class SegFormer(nn.Module):
    """Two stages of overlapping patches, attention over a reduced map and Mix-FFN; a decoder of linear layers."""

    def __init__(self):
        super().__init__()
        self.sides, widths = (8, 4), (8, 16)
        self.embed = nn.ModuleList(
            [nn.Conv2d(3, widths[0], 7, stride=4, padding=3), nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1)]
        )
        self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(width) for _ in range(4)) for width in widths)
        self.attention = nn.ModuleList([Attention(widths[0], 1, 4), Attention(widths[1], 2, 2)])
        self.mlp = nn.ModuleList(MixFFN(width) for width in widths)
        self.project = nn.ModuleList(nn.Linear(width, 8) for width in widths)
        self.fuse, self.head = block(16, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        maps = []
        for stage, side in enumerate(self.sides):
            before, first, second, after = self.norms[stage]
            x = self.embed[stage](x)
            batch, width = x.shape[0], x.shape[1]
            x = before(x.flatten(2).transpose(1, 2))
            x = x + self.attention[stage](first(x), side)
            x = after(x + self.mlp[stage](second(x), side))
            grid = self.project[stage](x).transpose(1, 2).reshape(batch, 8, side, side)
            maps.append(F.interpolate(grid, size=(8, 8), mode="bilinear", align_corners=False))
            x = x.transpose(1, 2).reshape(batch, width, side, side)
        return self.head(self.fuse(torch.cat(maps, 1)))


class Context(nn.Module):
    """DeepLab's dilated convolutions, one wider than the map, and PSPNet's averages over grids that do not divide it."""

    def __init__(self):
        super().__init__()
        self.stem, self.near = block(3, 8, stride=2), block(8, 8)
        self.near[0].dilation = self.near[0].padding = (2, 2)
        self.far = block(8, 8)
        self.far[0].dilation = self.far[0].padding = (18, 18)
        self.grid = nn.Sequential(nn.AdaptiveAvgPool2d(3), block(8, 4, 1))
        self.mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU())
        self.fuse, self.head = block(24, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        grid = F.interpolate(self.grid(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        mean = F.interpolate(self.mean(x), size=x.shape[-2:], mode="nearest")
        return self.head(self.fuse(torch.cat([self.near(x), self.far(x), grid, mean], 1)))


class Excited(nn.Module):
    """MobileNetV3's squeeze and excitation with hard-sigmoid and hard-swish, and a block with SiLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = block(3, 16, stride=2, activation=nn.Hardswish), nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.act, self.gate = nn.ReLU(), nn.Hardsigmoid()
        self.last, self.head = block(16, 16, 1, activation=nn.SiLU), Head(16)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.last(x * self.gate(self.excite(self.act(self.squeeze(self.pool(x)))))))


class Pooled(nn.Module):
    """Every pooling: maximum and average, with and without padding, and a mean."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = block(3, 8), block(8, 8), block(8, 16)
        self.largest, self.average = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.average(self.two(self.largest(self.one(x))))
        return self.fc(self.three(x).mean((2, 3)))


class Outputs(nn.Module):
    """A map and logits from one trunk, as detectors and multi-task models have them."""

    def __init__(self):
        super().__init__()
        self.stem, self.trunk = block(3, 8, stride=2), block(8, 8, stride=2)
        self.boxes, self.head = nn.Conv2d(8, 4, 1), Head(8)

    def forward(self, x):
        x = self.trunk(self.stem(x))
        return self.boxes(x), self.head(x)


class Inputs(nn.Module):
    """An image of its own size, a second one, and a vector, as trackers and models with metadata have them."""

    def __init__(self):
        super().__init__()
        self.search, self.template = block(3, 8, stride=2), block(3, 8, stride=4)
        self.pool, self.facts, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(5, 8), nn.Linear(24, CLASSES)

    def forward(self, search, template, facts):
        parts = [self.pool(self.search(search)).flatten(1), self.pool(self.template(template)).flatten(1)]
        return self.head(torch.cat([*parts, torch.relu(self.facts(facts))], 1))


@dataclass(frozen=True)
class Family:
    """How to make the model, and what it takes and gives."""

    make: object
    inputs: dict = field(default_factory=lambda: {"images": (3, 32, 32)})
    """Name -> shape of one item."""
    outputs: tuple = ("logits",)
    batch: int | None = None
    """Fixed in the file; None: free."""
    float_on_onnxruntime: tuple = ()
    """Int8 layers that it runs in float: transposed convolutions, for which it has no integer kernel, and convolutions that make
    an output, which is not quantized."""


def plain():
    return nn.Sequential(block(3, 8, stride=2), block(8, 16, 5), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), Head(16))


FAMILIES = {
    "plain": Family(plain),
    "resnet": Family(lambda: nn.Sequential(block(3, 8, stride=2), Residual(8, 8, 1), Residual(8, 16, 2), Head(16))),
    "depthwise": Family(lambda: nn.Sequential(block(3, 8, stride=2), Inverted(8, 8, 1), Inverted(8, 16, 2), Head(16))),
    "grouped": Family(Grouped),
    "concat": Family(Concatenating),
    "unet-nearest": Family(lambda: UNet("nearest"), outputs=("mask",), float_on_onnxruntime=("head",)),
    "unet-bilinear": Family(lambda: UNet("bilinear"), outputs=("mask",), float_on_onnxruntime=("head",)),
    "unet-transposed": Family(lambda: UNet("transposed"), outputs=("mask",), float_on_onnxruntime=("up.0", "head")),
    "decoder": Family(Decoder, outputs=("image",), float_on_onnxruntime=("up.0", "last")),
    "vit": Family(ViT),
    "segformer": Family(SegFormer, outputs=("mask",), float_on_onnxruntime=("head",)),
    "fast-attention": Family(lambda: nn.Sequential(block(3, 8, stride=2), FastAttention(8, 4), block(8, 8), Head(8))),
    "context": Family(Context, outputs=("mask",), float_on_onnxruntime=("head",)),
    "excitation": Family(Excited),
    "pooling": Family(Pooled),
    "outputs": Family(Outputs, outputs=("boxes", "scores"), float_on_onnxruntime=("boxes",)),
    "inputs": Family(Inputs, inputs={"search": (3, 32, 32), "template": (3, 16, 16), "facts": (5,)}),
    "static-batch": Family(plain, batch=2),
}
