"""Graph flow: how the graph of a network's channels changes from a shallow to a deep layer, taught with labels and without.

Zou, Qi, Zhou, Sun, Sun, Shan: Graph Flow: Cross-Layer Graph Flow Distillation for Dual Efficient Medical Image Segmentation. IEEE
TMI 2023, arXiv 2203.08667. Official code: WrinkleXuan/Graph-FLow, whose file of losses was never published. Written from a
specification of what is known: its networks and its trainer; of the paper the abstract was read.

A vertex is a channel: the patch around its strongest place. An edge is the product of two vertices. What is matched is how both
change from the shallow to the deep layer. The teacher's maps are first paraphrased into the student's channels, by autoencoders
that are trained before the student and then left alone (``prepare``). Beside it stand the divergence of the pixels' distributions
and a critic of the logits, which learns after every step of the student from the same logits.

Our reading, where the code is missing: patches are padded with zeros, edges are plain products with the diagonal, changes are
deep minus shallow, both terms are sums over an image and means over the batch. That fits all that is known, such as the tiny
weights; ``edge: cosine`` and ``reduction: mean`` are for weights near 1. The divergence of pixels is a mean over pixels and
classes.

Differs from the official code:
- What the critic sees can be averaged down (``score_side_px``): at the image's resolution it costs more than teacher and student.
- The paraphrasers' teacher is in evaluation mode, their step counter counts every step once, and they train as long before the
  rate falls to a hundredth as after.
- The task's loss, the student's optimizer and its schedule are the recipe's.
Unlabelled images (``data.labelled``) are half of each batch, as published: the task's loss sees the labelled half, all other
terms the whole batch, with the same weights; teacher and paraphrasers are trained on labelled images alone.

Shape letters: B images, C channels, K classes, H rows, W columns, P = k * k places of a patch.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from edgekd._config import Config
from edgekd.distill.base import Distiller, map_pairs, score_maps
from edgekd.nn.adversary import Adversary
from edgekd.nn.critics import ATTENTION_SIDE_PX, AttentionCritic, score_map
from edgekd.nn.divergences import PixelReduction, pixel_divergence
from edgekd.nn.paraphraser import Paraphraser
from edgekd.nn.precision import exact
from edgekd.nn.relations import cosine_similarities, stretched
from edgekd.train.checkpoint import Loaded
from edgekd.train.loop import Setting
from edgekd.train.paraphrase import fit_paraphrasers
from edgekd.train.step import StepInputs

BETAS = (0.9, 0.99)


class GraphFlowConfig(Config):
    """Changes of a graph of channels between two layers, pixels, and a critic; learns from unlabelled images too (2023)."""

    name: Literal["graph_flow"]
    vertex_weight: float = Field(1e-5, ge=0, le=10_000)
    """lambda_1: weight of the changes of vertices."""
    edge_weight: float = Field(1e-9, ge=0, le=10_000)
    """lambda_2: weight of the changes of edges."""
    holistic_weight: float = Field(0.1, ge=0, le=10_000)
    """lambda_3: weight of the student's adversarial term; 0 leaves it out, and there is no critic."""
    pixel_weight: float = Field(1.0, ge=0, le=10_000)
    """lambda_4: weight of the pixels' divergence; 0 leaves it out."""
    pixel_reduction: PixelReduction = "mean_element"
    """What the pixels' divergence is divided by: B K H W, B H W (mean_pixel), or H W (sum_over_batch)."""
    layers: list[tuple[str, str]] | None = Field(None, min_length=1)
    """Pairs of taps, shallow and deep, with as many channels in the student; null takes its first map and the last like it."""
    patch_px: int = Field(3, ge=1, le=31)
    """k: side of the patch that is a vertex, odd; 9 was published for some data."""
    edge: Literal["inner", "cosine"] = "inner"
    """The product of two vertices, or the cosine of the angle between them."""
    reduction: Literal["sum", "mean"] = "sum"
    """Of the squared differences of an image; over the batch it is always a mean."""
    paraphraser_epochs: int = Field(200, ge=1, le=10_000)
    """Epochs of the paraphrasers, before the student's."""
    paraphraser_batch_size: int = Field(8, ge=1, le=65_536)
    """Images of a paraphraser's step."""
    paraphraser_lr: float = Field(3e-4, gt=0, le=10)
    """The paraphrasers' learning rate at the first step."""
    paraphraser_loss: Literal["mse", "l1"] = "mse"
    """What is between a teacher's map and its restored form."""
    adversarial: Literal["wgan-gp", "hinge"] = "wgan-gp"
    """The critic's loss; hinge has no penalty."""
    critic_weight: float = Field(1.0, gt=0, le=10_000)
    """lambda_d: weight of the critic's own loss."""
    penalty_weight: float = Field(10.0, ge=0, le=10_000)
    """Weight of the gradient penalty within it."""
    critic_lr: float = Field(3e-5, gt=0, le=1)
    """The critic's learning rate at the first step; Adam with (0.9, 0.99)."""
    score_side_px: int | None = Field(None, ge=ATTENTION_SIDE_PX, le=2048)
    """Shorter side of the logits that the critic sees, in pixels: larger ones are averaged down; null, as published, does not."""
    half_labelled: bool = True
    """Where the data has unlabelled images, they are half of each batch; false draws from all images alike."""

    @field_validator("patch_px")
    @classmethod
    def _odd(cls, side: int) -> int:
        if side % 2 == 0:
            raise ValueError(f"a patch has a middle: its side must be odd; received {side}")
        return side

    def build(self, student: Loaded, teacher: Loaded) -> GraphFlowDistiller:
        """The Distiller, with a critic and paraphrasers that know nothing yet.

        Raises:
            RecipeError: The outputs are no score maps of one size, the critic cannot read them, or the layers do not fit.
        """
        classes = score_maps(student, teacher, method=self.name, critic=self.holistic_weight > 0)
        pairs, channels = map_pairs(student, teacher, self.layers, method=self.name)
        return GraphFlowDistiller(self, pairs, channels, {role: teacher.taps[role] for role in channels}, classes)


def vertices(maps_BCHW: Tensor, patch_px: int = 3) -> Tensor:
    """Each channel's patch around its strongest place, row by row: [B, C, P].

    Args:
        maps_BCHW: [B, C, H, W]. The place is the first of the largest values, and a constant for the gradient; what a patch has
            beyond the map is 0.
        patch_px: k, odd.
    """
    reach, width = patch_px // 2, maps_BCHW.shape[3]
    place_BC1 = maps_BCHW.detach().flatten(2).argmax(dim=2, keepdim=True)
    offsets = torch.arange(patch_px, device=maps_BCHW.device)
    wide = width + 2 * reach
    # in the padded map a place is the upper left corner of its patch
    corner_BC1 = place_BC1.div(width, rounding_mode="floor") * wide + place_BC1 % width
    indices_BCP = corner_BC1 + (offsets[:, None] * wide + offsets).flatten()
    return F.pad(maps_BCHW, (reach, reach, reach, reach)).flatten(2).gather(2, indices_BCP)


def edges(vertices_BCP: Tensor, kind: Literal["inner", "cosine"] = "inner") -> Tensor:
    """The product of every two vertices, each with itself too: [B, C, C]."""
    if kind == "cosine":
        return cosine_similarities(vertices_BCP.transpose(1, 2))
    return vertices_BCP @ vertices_BCP.transpose(1, 2)


def graph_flow(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    patch_px: int = 3,
    edge: Literal["inner", "cosine"] = "inner",
    reduction: Literal["sum", "mean"] = "sum",
) -> tuple[Tensor, Tensor]:
    """L_V and L_E: the squared differences of how vertices and edges change from the shallow to the deep map, two scalars.

    Args:
        student: Shallow and deep map, [B, C, H, W]; all four are brought to the smallest sides (bilinear).
        teacher: Its maps, paraphrased into C channels; no gradient flows into them.
        patch_px: k, odd.
        edge: What an edge is.
        reduction: Over an image; over the batch it is a mean.
    """
    maps = [exact(one) for one in (*student, *(one.detach() for one in teacher))]
    size = tuple(min(sides) for sides in zip(*(one.shape[2:] for one in maps), strict=True))
    found = [vertices(stretched(one, size), patch_px) for one in maps]
    joined = [edges(one, edge) for one in found]
    changes = [(theirs_deep - theirs) - (deep - shallow) for shallow, deep, theirs, theirs_deep in (found, joined)]
    far_vertices, far_edges = (
        (change.square().sum((1, 2)) if reduction == "sum" else change.square().mean((1, 2))).mean() for change in changes
    )
    return far_vertices, far_edges


class GraphFlowDistiller(Distiller):
    """The terms ``vertices``, ``edges``, ``pixel`` and ``holistic``; the critic's loss is reported as ``critic``.

    Args:
        config: The method's section.
        pairs: Taps, shallow and deep.
        channels: Role -> channels in the student and in the teacher.
        places: Role -> module path in the teacher.
        classes: K.
    """

    def __init__(
        self,
        config: GraphFlowConfig,
        pairs: list[tuple[str, str]],
        channels: dict[str, tuple[int, int]],
        places: dict[str, str],
        classes: int,
    ) -> None:
        super().__init__()
        self.config, self.pairs, self.places = config, pairs, places
        self.student_taps = self.teacher_taps = tuple(channels)
        self.half_labelled = config.half_labelled
        self.paraphrasers = nn.ModuleDict({role: Paraphraser(theirs, ours) for role, (ours, theirs) in channels.items()})
        self.paraphrasers.requires_grad_(False)
        self.lost: Tensor
        self.register_buffer("lost", torch.full((len(channels),), torch.nan))
        if config.holistic_weight:
            self.adversary = Adversary(
                AttentionCritic(classes, "tanh"),
                lambda owned: torch.optim.Adam(owned, lr=config.critic_lr, betas=BETAS),
                weight=config.critic_weight,
                kind=config.adversarial,
                penalty_weight=config.penalty_weight,
            )

    def prepare(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> None:  # noqa: ARG002
        """Train the paraphrasers on the teacher's maps."""
        lost = fit_paraphrasers(
            dict(self.paraphrasers.items()),  # type: ignore[arg-type]  # they are
            teacher,
            self.places,
            setting,
            epochs=self.config.paraphraser_epochs,
            batch_size=self.config.paraphraser_batch_size,
            lr=self.config.paraphraser_lr,
            loss=self.config.paraphraser_loss,
        )
        self.lost.copy_(torch.tensor(list(lost.values())))

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The student's terms; the critic is a constant in them."""
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        config, terms = self.config, {}
        with torch.autocast(step.images.device.type, enabled=False):
            ours = {role: tap.float() for role, tap in step.student.taps.items()}
            with torch.no_grad():
                theirs = {role: self.paraphrasers[role](tap.float()) for role, tap in step.teacher.taps.items()}
            flows = [
                graph_flow(
                    (ours[shallow], ours[deep]),
                    (theirs[shallow], theirs[deep]),
                    patch_px=config.patch_px,
                    edge=config.edge,
                    reduction=config.reduction,
                )
                for shallow, deep in self.pairs
            ]
            terms["vertices"] = config.vertex_weight * torch.stack([flow[0] for flow in flows]).mean()
            terms["edges"] = config.edge_weight * torch.stack([flow[1] for flow in flows]).mean()
            if config.pixel_weight:
                far = pixel_divergence(step.student.logits, step.teacher.logits, reduction=config.pixel_reduction)
                terms["pixel"] = config.pixel_weight * far
            if self.adversary is not None:
                scores = (score_map(outputs.logits, config.score_side_px) for outputs in (step.student, step.teacher))
                terms["holistic"] = config.holistic_weight * self.adversary.judge(*scores)
        return terms

    def statistics(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> dict[str, float]:  # noqa: ARG002
        """Tap -> the share of the teacher's map that its paraphraser could not restore."""
        return {f"not restored of {role}": share for role, share in zip(self.paraphrasers, self.lost.tolist(), strict=True)}
