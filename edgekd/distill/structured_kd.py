"""Structured distillation for dense prediction: pixels, pairs of regions, and score maps as a whole.

Liu, Chen, Liu, Qin, Luo, Wang: Structured Knowledge Distillation for Semantic Segmentation. CVPR 2019. Liu, Shu, Wang, Shen:
Structured Knowledge Distillation for Dense Prediction. TPAMI 2020, arXiv 1903.04197. Official code:
irfanICMLL/structure_knowledge_distillation. Written from a specification of what the code computes (branch master, the journal's)
and of what its authors said of it; of the papers themselves only the abstracts were read.

Three terms stand beside the task's: the divergence of every pixel's distribution over classes; the squared difference of the
cosines between all pairs of regions of one map; and what a critic says of the student's score map, which it is trained to score
low and the teacher's high. The student moves first, then the critic, on the score maps that the student had before it moved.

Differs from the official code:
- The pixel term is a mean over the batch, where the code sums over it: its weight 10 is 80 here for batches of 8. ``pixel_form:
  ce`` and ``pixel_reduction: sum_over_batch`` give its numbers.
- Score maps come from networks that answer at a stride of 8 there, 65 x 65 for a crop of 512. Here they may have the image's own
  resolution: what the critic sees is averaged down until the shorter side has ``score_side_px``. ``null`` leaves it as it is.
- The critic's batch norm has no running statistics, which nothing reads. Its third input scaling, of bytes, is left out.
- The task's loss, and that of an auxiliary head where a network has one, is the recipe's. So are the student's optimizer and
  schedule; the critic's are the code's.
Differs from the paper, as the code does: regions are pooled by their maximum and are half a map large (``pool: avg``, ``node_px:
2`` is the paper's reading); the lengths of their vectors are constants for the gradient (``detach_norm``); the critic sees raw
scores alone (``critic_input: conditional`` shows it the image and the probabilities); the student moves before the critic.
Our reading: where both maps differ in size, the student's is resized to the teacher's (bilinear); where several layers are given,
their terms are averaged.

Shape letters: B images, C channels, K classes, H rows, W columns, M regions.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from edgekd._config import Config
from edgekd.distill.base import Distiller, map_channels, score_maps
from edgekd.errors import RecipeError
from edgekd.nn.adversary import Adversary
from edgekd.nn.critics import ATTENTION_SIDE_PX, AttentionCritic, score_map, with_image
from edgekd.nn.divergences import PixelReduction, pixel_divergence
from edgekd.nn.precision import exact
from edgekd.nn.relations import cosine_similarities
from edgekd.nn.taps import tap_shapes
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import StepInputs

MOMENTUM, WEIGHT_DECAY, BETAS = 0.9, 5e-4, (0.9, 0.99)
MOST_NODES = 4096
"""Regions of a map: their cosines are 64 MiB an image."""


class StructuredKdConfig(Config):
    """Structured distillation: pixels, pairs of regions, and a critic of whole score maps (2019)."""

    name: Literal["structured_kd"]
    pixel_weight: float = Field(10.0, ge=0, le=10_000)
    """lambda_pi: weight of the pixel term; 0 leaves it out."""
    pixel_reduction: PixelReduction = "mean_pixel"
    """What the pixel term is divided by: B H W, H W (sum_over_batch, as published), or B K H W (mean_element). B are the images
    that are computed at once: a batch, or a process's or train.accumulate's part of it."""
    pixel_form: Literal["kl", "ce"] = "kl"
    """The divergence, or as published the cross-entropy: a constant more, the same gradient."""
    temperature: float = Field(1.0, gt=0, le=100)
    """T: both logits of the pixel term are divided by it, and the term is multiplied by its square."""
    pair_weight: float = Field(0.5, ge=0, le=10_000)
    """lambda_pa: weight of the pair-wise term; 0 leaves it out."""
    layers: list[str] | None = Field(None, min_length=1)
    """Taps whose regions are compared; null takes the last map that student and teacher share."""
    pool: Literal["max", "avg"] = "max"
    """How a region's places become one vector."""
    node_scale: float = Field(0.5, gt=0, le=1)
    """s: sides of a region as a share of the map's sides."""
    node_px: int | None = Field(None, ge=1, le=1024)
    """Sides of a region in places of the map, in place of node_scale."""
    detach_norm: bool = True
    """Take the lengths of the regions' vectors for constants in the gradient."""
    holistic_weight: float = Field(0.1, ge=0, le=10_000)
    """lambda_d: weight of the student's holistic term; 0 leaves it out, and there is no critic."""
    critic_weight: float = Field(0.1, gt=0, le=10_000)
    """lambda_d of the critic's own loss."""
    penalty_weight: float = Field(10.0, ge=0, le=10_000)
    """lambda_gp: weight of the gradient penalty within the critic's loss."""
    adversarial: Literal["wgan-gp", "hinge"] = "wgan-gp"
    """The critic's loss; hinge has no penalty."""
    critic_input: Literal["logits", "conditional"] = "logits"
    """Raw logits; or, as in the paper, the image and the probabilities."""
    critic_norm: Literal["batch", "tanh", "none"] = "batch"
    """What the critic does to raw logits first."""
    critic_optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with momentum 0.9 and weight decay 0.0005, or as in the IFVD code Adam with (0.9, 0.99) and none."""
    critic_lr: float = Field(4e-4, gt=0, le=1)
    """The critic's learning rate at the first step."""
    score_side_px: int | None = Field(ATTENTION_SIDE_PX, ge=ATTENTION_SIDE_PX, le=2048)
    """Shorter side of the score maps that the critic sees, in pixels: larger ones are averaged down; null leaves them.
    The critic gives one score for 64 to 79 pixels, and another one for every 16 more."""

    def build(self, student: Loaded, teacher: Loaded) -> StructuredKdDistiller:
        """The Distiller, with a critic.

        Raises:
            RecipeError: The outputs are no score maps of one size, the critic cannot read them, or the layers do not fit.
        """
        classes = score_maps(student, teacher, method=self.name, critic=self.holistic_weight > 0)
        layers = tuple(map_channels(student, teacher, self.layers, method=self.name, last=1)) if self.pair_weight else ()
        for role, (rows, columns) in _sides(teacher, layers).items():
            down, across = node_sides(rows, columns, scale=self.node_scale, px=self.node_px)
            if (nodes := -(-rows // down) * -(-columns // across)) > MOST_NODES:
                raise RecipeError(
                    f"{self.name}: {nodes} regions of {role!r} are too many: all pairs are compared; at most {MOST_NODES}",
                    hint="raise node_px or node_scale, or choose a coarser map in layers",
                )
        return StructuredKdDistiller(self, layers, classes, student.architecture.channels)


def node_sides(height: int, width: int, *, scale: float = 0.5, px: int | None = None) -> tuple[int, int]:
    """Rows and columns of a region: ``scale`` of the map's sides, rounded down, or ``px``; 1 at least, the map at most."""
    sides = (int(height * scale), int(width * scale)) if px is None else (px, px)
    return max(1, min(sides[0], height)), max(1, min(sides[1], width))


def nodes(maps_BCHW: Tensor, sides: tuple[int, int], pool: Literal["max", "avg"] = "max") -> Tensor:
    """A vector for every region: [B, C, M].

    Args:
        maps_BCHW: [B, C, H, W].
        sides: Rows and columns of a region. Regions do not overlap; the last ones hold what the map has left.
        pool: The largest value, or the mean of those that there are.
    """
    if pool == "max":
        return F.max_pool2d(maps_BCHW, sides, sides, ceil_mode=True).flatten(2)
    return F.avg_pool2d(maps_BCHW, sides, sides, ceil_mode=True, count_include_pad=False).flatten(2)


def pairwise(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    *,
    scale: float = 0.5,
    px: int | None = None,
    pool: Literal["max", "avg"] = "max",
    detach_norm: bool = True,
) -> Tensor:
    """L_pa: the mean over images and all M x M pairs of regions of the squared difference of both cosines.

    Args:
        student_BCHW: [B, C, H, W].
        teacher_BCHW: [B, C', H', W']; its sides decide the regions', and no gradient flows into it.
        scale: Sides of a region as a share of the map's.
        px: Sides of a region, in place of ``scale``.
        pool: How a region becomes a vector.
        detach_norm: Take the vectors' lengths for constants.

    Returns:
        A scalar, 0 for equal maps and at most 4.
    """
    size = teacher_BCHW.shape[2:]
    ours, theirs = exact(student_BCHW), exact(teacher_BCHW.detach())
    if ours.shape[2:] != size:
        ours = F.interpolate(ours, size=size, mode="bilinear", align_corners=True)
    sides = node_sides(size[0], size[1], scale=scale, px=px)
    similar = partial(cosine_similarities, detach_norm=detach_norm)
    return F.mse_loss(similar(nodes(ours, sides, pool)), similar(nodes(theirs, sides, pool)))


class StructuredKdDistiller(Distiller):
    """The terms ``pixel``, ``pair`` and ``holistic``; the critic's loss is reported as ``critic``.

    Args:
        config: The method's section.
        layers: Taps whose regions are compared.
        classes: K.
        channels: Of the images, for a critic that sees them.
    """

    def __init__(self, config: StructuredKdConfig, layers: tuple[str, ...], classes: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.student_taps = self.teacher_taps = layers
        if config.holistic_weight:
            critic = (
                AttentionCritic(classes, config.critic_norm)
                if config.critic_input == "logits"
                else AttentionCritic(channels + classes, "none")
            )
            self.adversary = Adversary(
                critic,
                self._optimizer,
                weight=config.critic_weight,
                kind=config.adversarial,
                penalty_weight=config.penalty_weight,
            )

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The student's terms; the critic is a constant in them."""
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        config, terms = self.config, {}
        with torch.autocast(step.images.device.type, enabled=False):
            if config.pixel_weight:
                terms["pixel"] = config.pixel_weight * pixel_divergence(
                    step.student.logits,
                    step.teacher.logits,
                    config.temperature,
                    reduction=config.pixel_reduction,
                    form=config.pixel_form,
                )
            if self.student_taps:
                parts = [
                    pairwise(
                        step.student.taps[role],
                        step.teacher.taps[role],
                        scale=config.node_scale,
                        px=config.node_px,
                        pool=config.pool,
                        detach_norm=config.detach_norm,
                    )
                    for role in self.student_taps
                ]
                terms["pair"] = config.pair_weight * torch.stack(parts).mean()
            if self.adversary is not None:
                ours, theirs = (self._seen(step.images, outputs.logits) for outputs in (step.student, step.teacher))
                terms["holistic"] = config.holistic_weight * self.adversary.judge(ours, theirs)
        return terms

    def _seen(self, images_BCHW: Tensor, logits_BKHW: Tensor) -> Tensor:
        """What the critic is shown of one model's output."""
        scores = score_map(logits_BKHW, self.config.score_side_px)
        return scores if self.config.critic_input == "logits" else with_image(images_BCHW, scores.softmax(1))

    def _optimizer(self, owned: list[nn.Parameter]) -> torch.optim.Optimizer:
        lr = self.config.critic_lr
        if self.config.critic_optimizer == "adam":
            return torch.optim.Adam(owned, lr=lr, betas=BETAS)
        return torch.optim.SGD(owned, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def _sides(teacher: Loaded, layers: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    shapes = tap_shapes(teacher.module, {role: teacher.taps[role] for role in layers}, teacher.architecture.example())
    return {role: (shape[2], shape[3]) for role, shape in shapes.items()}
