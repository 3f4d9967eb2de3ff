"""Super-resolution as a second task of a float training: the detector learns maps from which a finer picture can be drawn.

Zhang et al.: SuperYOLO: Super Resolution Assisted Object Detection in Multimodal Remote Sensing Imagery. IEEE TGRS 2023, arXiv
2209.13351; and the first phase of GHOST (IEEE TGRS 2023, arXiv 2301.00131; icey-zhang/GHOST). The training images are read at
``scale`` times the size of the model's input, which is the finer picture averaged; a branch on a fine and a coarse map draws the
finer picture, and the mean absolute difference of their values in 0..1 is added to the loss. The branch is gone after the
training: the model, its weights' names and its engine are those of a training without it.

Differs from the official code: the branch is smaller, and enlarges in one step, by a convolution and a pixel shuffle (Shi et
al., CVPR 2016, arXiv 1609.05158), where EDSR (Lim et al., CVPRW 2017, arXiv 1707.02921) doubles several times.

Shape letters: B images, C channels of an image, F channels inside the branch, h and w a map's sides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from edgekd._config import Config
from edgekd.data.base import Dataset
from edgekd.errors import TrainingError
from edgekd.nn.taps import resolve, tap_shapes
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import StepInputs, TrainState, train_step


class SuperResolutionConfig(Config):
    """Draw the training images at a finer resolution, beside the task."""

    scale: int = Field(2, ge=2, le=4)
    """Times as fine as the model's input."""
    weight: float = Field(0.1, gt=0)
    """Of the mean absolute difference, of values in 0..1."""
    fine: str = "block4"
    """Role of the finer map: one of the model's taps."""
    coarse: str = "block8"
    """Role of the coarser map."""
    channels: int = Field(32, ge=1, le=1024)
    """Inside the branch."""
    blocks: int = Field(4, ge=1, le=64)
    """Residual blocks of the branch."""


class Branch(nn.Module):
    """Draws a picture from two maps: [B, C1, h, w] and [B, C2, h / s, w / s] to [B, C, factor h, factor w].

    Args:
        in_channels: Of both maps.
        channels: F.
        blocks: Residual blocks.
        out_channels: C.
        factor: How many times larger than the finer map the picture is.
    """

    def __init__(self, in_channels: tuple[int, int], channels: int, blocks: int, out_channels: int, factor: int) -> None:
        super().__init__()
        fine, coarse = in_channels
        self.fine, self.coarse = nn.Conv2d(fine, channels, 1), nn.Conv2d(coarse, channels, 1)
        self.join = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))
            for _ in range(blocks)
        )
        self.draw = nn.Sequential(nn.Conv2d(channels, out_channels * factor**2, 3, padding=1), nn.PixelShuffle(factor))

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """The picture; values around 0..1."""
        coarse = functional.interpolate(self.coarse(coarse), size=fine.shape[2:], mode="bilinear", align_corners=False)
        first: Tensor = self.join(torch.cat([self.fine(fine), coarse], 1)).relu()
        x = first
        for block in self.body:
            x = x + block(x)
        picture: Tensor = self.draw(x + first)
        return picture


class SuperResolution(nn.Module):
    """The objective of a float training with a super-resolution branch.

    Args:
        config: The stage's section.
        student: What is trained; its taps and shapes are read.
        dataset: Its mean and standard deviation make values of pixels.

    Raises:
        RecipeError: The model has no such map.
        TrainingError: The maps do not fit.
    """

    teacher_taps: tuple[str, ...] = ()
    mean: Tensor
    std: Tensor

    def __init__(self, config: SuperResolutionConfig, student: Loaded, dataset: Dataset) -> None:
        super().__init__()
        self.config = config
        self.student_taps: tuple[str, ...] = (config.fine, config.coarse)
        example = student.architecture.example()
        shapes = tap_shapes(student.module, resolve(self.student_taps, student.taps), example)
        fine, coarse = shapes[config.fine], shapes[config.coarse]
        sides = example.shape[2] // fine[2] if len(fine) == len(coarse) == 4 else 0
        if not sides or fine[2] * sides != example.shape[2] or fine[2] < coarse[2]:
            raise TrainingError(
                f"super_resolution: {config.fine!r} is {list(fine)} and {config.coarse!r} {list(coarse)} for images of "
                f"{example.shape[2]} px",
                hint="fine and coarse must be maps whose sides divide the image's, fine the larger one",
            )
        self.branch = Branch((fine[1], coarse[1]), config.channels, config.blocks, example.shape[1], config.scale * sides)
        self.register_buffer("mean", torch.tensor(dataset.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(dataset.std).view(1, -1, 1, 1), persistent=False)

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """``step.images`` are the finer pictures."""
        pixels = step.images * self.std + self.mean
        drawn = self.branch(*(step.student.taps[role] for role in self.student_taps))
        return {"super_resolution": self.config.weight * (drawn.float() - pixels).abs().mean()}

    def train_step(self, state: TrainState, images: Tensor, labels: Tensor) -> dict[str, float]:
        """One step on finer pictures, [B, C, scale H, scale W], and their boxes: the student sees them averaged."""
        labels = torch.cat([labels[..., :1], labels[..., 1:5] / self.config.scale, labels[..., 5:]], -1)
        with _averaged(state.inner, self.config.scale):
            return train_step(state, images, labels)


@contextlib.contextmanager
def _averaged(model: nn.Module, scale: int) -> Iterator[None]:
    """Have the model see its input ``scale`` times smaller, every pixel the mean of those that it covers."""

    def shrink(module: nn.Module, args: Sequence[Any]) -> tuple[Tensor]:  # noqa: ARG001  the hook's signature
        return (functional.avg_pool2d(args[0], scale),)

    handle = model.register_forward_pre_hook(shrink)
    try:
        yield
    finally:
        handle.remove()
