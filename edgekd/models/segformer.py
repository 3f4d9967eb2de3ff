"""SegFormer: a transformer whose four stages see the image at strides 4, 8, 16 and 32, and a decoder of linear layers.

Xie et al.: SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers. NeurIPS 2021, arXiv 2105.15203.
Written from the paper and the specification of TransKD, in plain torch: a dependency on transformers or on OpenMMLab for one file
would weigh more than the rest of edgekd, and torch.fx, which places the quantizers, must be able to follow the forward.

Differs from the paper: the logits are enlarged to the image's sides (bilinear), as its training does before the loss, so that
engines answer with what the metric needs; attention is written out as products and a softmax, which every engine has.

Shape letters: B images, C channels, H rows, W columns, N = H * W places, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from edgekd.models.backbones import enlarged

HEADS = (1, 2, 5, 8)
"""Of each stage's attention; a stage has as many times the channels of a head."""
REDUCTIONS = (8, 4, 2, 1)
"""Keys and values come from maps that are smaller by this, in both directions."""
EXPANSION = 4
"""Of the feed-forward part."""
STAGES = range(1, 5)
TAPS = {role: path for n in STAGES for role, path in ((f"embed{n}", f"stage{n}.embed"), (f"stage{n}", f"stage{n}"))} | {
    "bottom": "stage4",
    "top": "head@input",
    "head": "head",
}
"""Role -> module path: every stage's patch embeddings [B, N, C] and map, what the classifier reads (behind dropout), scores."""


class DropPath(nn.Module):
    """Leaves out a residual branch of some images while training; what stays is scaled up so that the mean stays.

    Huang et al.: Deep Networks with Stochastic Depth. ECCV 2016, arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch_BNC: Tensor) -> Tensor:
        """[B, N, C], some of the B all zero."""
        if not self.training or not self.rate:
            return branch_BNC
        kept = branch_BNC.new_empty(branch_BNC.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return branch_BNC * kept / (1 - self.rate)


class PatchEmbedding(nn.Module):
    """A map as tokens, row by row, normalised: [B, C, H, W] to [B, N, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, maps: Tensor) -> Tensor:
        """The tokens."""
        out: Tensor = self.norm(maps.flatten(2).transpose(1, 2))
        return out


class Attention(nn.Module):
    """Multi-head self-attention whose keys and values come from a smaller map: [B, N, C], same shape."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = (
            nn.Linear(channels, channels),
            nn.Linear(channels, 2 * channels),
            nn.Linear(channels, channels),
        )
        self.shrink = nn.Conv2d(channels, channels, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(channels) if reduction > 1 else None

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """What every place hears of all others."""
        q, fewer = self.q(tokens), tokens
        if self.shrink is not None and self.norm is not None:
            fewer = self.norm(self.shrink(_grid(tokens, height, width)).flatten(2).transpose(1, 2))
        k, v = self.kv(fewer).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


class MixFFN(nn.Module):
    """Two linear layers with a depthwise convolution between, which tells places apart without position codes: [B, N, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = EXPANSION * channels
        self.expand, self.project = nn.Linear(channels, inner), nn.Linear(inner, channels)
        self.mix, self.act = nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.GELU()

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The tokens, each with its neighbours in view."""
        mixed = self.mix(_grid(self.expand(tokens), height, width))
        out: Tensor = self.project(self.act(mixed.flatten(2).transpose(1, 2)))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added: [B, N, C], same shape."""

    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(channels), Attention(channels, heads, reduction)
        self.norm2, self.mlp = nn.LayerNorm(channels), MixFFN(channels)
        self.drop1, self.drop2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The block's result."""
        tokens = tokens + self.drop1(self.attention(self.norm1(tokens), height, width))
        return tokens + self.drop2(self.mlp(self.norm2(tokens), height, width))


class Stage(nn.Module):
    """Overlapping patches, blocks, a norm: [B, Cin, H, W] to [B, C, H / stride, W / stride], sides rounded up.

    Args:
        in_channels: Cin.
        channels: C.
        number: From 0, the finest.
        drop_paths: Of each block.
    """

    def __init__(self, in_channels: int, channels: int, number: int, drop_paths: Sequence[float]) -> None:
        super().__init__()
        kernel, stride = (7, 4) if number == 0 else (3, 2)
        self.patches, self.embed = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2), PatchEmbedding(channels)
        self.blocks = nn.ModuleList(Block(channels, HEADS[number], REDUCTIONS[number], rate) for rate in drop_paths)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The stage's map."""
        patches = self.patches(x)
        height, width = patches.shape[2], patches.shape[3]
        tokens = self.embed(patches)
        for block in self.blocks:
            tokens = block(tokens, height, width)
        return _grid(self.norm(tokens), height, width)


class SegFormer(nn.Module):
    """Images [B, in_channels, H, W] to logits [B, K, H, W]; sides are at least 32, best multiples of it.

    Args:
        num_classes: K.
        in_channels: Channels of the images.
        width: Channels of one attention head; the stages have 1, 2, 5 and 8 heads.
        depths: Blocks of each stage.
        decoder: Channels of the decoder.
        drop_path: Rate at which the last block's branches are left out in training; earlier blocks' grow to it evenly.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, num_classes: int, in_channels: int, width: int, depths: Sequence[int], decoder: int, drop_path: float
    ) -> None:
        super().__init__()
        if len(depths) != len(STAGES) or min(width, decoder, *depths) < 1:
            raise ValueError(f"width, decoder and 4 depths must be at least 1; received {width}, {decoder} and {list(depths)}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1; received {drop_path}")
        total = sum(depths)
        rates = [drop_path * index / max(1, total - 1) for index in range(total)]
        widths = [width * heads for heads in HEADS]
        stages = []
        for number, (channels, depth) in enumerate(zip(widths, depths, strict=True)):
            stages.append(Stage(widths[number - 1] if number else in_channels, channels, number, rates[:depth]))
            rates = rates[depth:]
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        # a linear layer at every place is a 1x1 convolution, and saves two turns of the map
        self.linear = nn.ModuleList(nn.Conv2d(channels, decoder, 1) for channels in widths)
        self.fuse = nn.Sequential(nn.Conv2d(4 * decoder, decoder, 1, bias=False), nn.BatchNorm2d(decoder), nn.ReLU())
        self.dropout, self.head = nn.Dropout2d(0.1), nn.Conv2d(decoder, num_classes, 1)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        one = self.stage1(images)
        two = self.stage2(one)
        three = self.stage3(two)
        maps = [linear(found) for linear, found in zip(self.linear, (one, two, three, self.stage4(three)), strict=True)]
        joined = torch.cat([*(enlarged(coarse, one) for coarse in reversed(maps[1:])), maps[0]], 1)
        return enlarged(self.head(self.dropout(self.fuse(joined))), images)


def _grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, N, C] to [B, C, H, W]."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def _initialise(module: nn.Module) -> None:
    """The published first weights: linear ones normal with deviation 0.02, cut at 2; convolutions He-normal, by fan-out."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fixed_channels(model: nn.Module) -> list[nn.Module]:
    """The layers whose outputs attention cuts into heads of one size."""
    return [layer for part in model.modules() if isinstance(part, Attention) for layer in (part.q, part.kv)]


def segformer_b0(
    *,
    num_classes: int,
    in_channels: int,
    width: int = 32,
    depths: Sequence[int] = (2, 2, 2, 2),
    decoder: int = 256,
    drop_path: float = 0.1,
) -> SegFormer:
    """On the encoder MiT-B0."""
    return SegFormer(num_classes, in_channels, width, depths, decoder, drop_path)


def segformer_b1(
    *,
    num_classes: int,
    in_channels: int,
    width: int = 64,
    depths: Sequence[int] = (2, 2, 2, 2),
    decoder: int = 256,
    drop_path: float = 0.1,
) -> SegFormer:
    """On the encoder MiT-B1: twice B0's channels."""
    return SegFormer(num_classes, in_channels, width, depths, decoder, drop_path)


def segformer_b2(
    *,
    num_classes: int,
    in_channels: int,
    width: int = 64,
    depths: Sequence[int] = (3, 4, 6, 3),
    decoder: int = 768,
    drop_path: float = 0.1,
) -> SegFormer:
    """On the encoder MiT-B2: B1 with twice as many blocks."""
    return SegFormer(num_classes, in_channels, width, depths, decoder, drop_path)
