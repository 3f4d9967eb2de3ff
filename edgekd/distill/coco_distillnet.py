"""CoCo DistillNet: how alike a place of a shallow layer and one of a deep layer are, and a critic that sees the image.

Zou, Sun: CoCo DistillNet: a Cross-layer Correlation Distillation Network for Pathological Gastric Cancer Segmentation. BIBM 2021,
arXiv 2108.12173. The authors' code is in WrinkleXuan/Graph-FLow, whose file of losses was never published. Written from a
specification of what is known: its networks and its trainer; of the paper the abstract was read.

Every place of a map is a vector over its channels. What is matched are the products of all places of the shallow map with all
places of the deep one, in which the channels are gone: student and teacher may differ in them. The teacher's maps are first
paraphrased into the student's channels, by autoencoders that are trained before the student and then left alone (``prepare``).
Beside it stands a critic of image and logits, which learns after every step of the student from the same logits.

The formula of the correlation was not found. Our reading, from what its function was given: vectors of length 1, and the mean of
the squared differences. ``normalise`` and ``kind`` are the other readings.

Differs from the official code:
- The mean of squares is taken from matrices over channels, in float64, and the similarities of places are never stored: the same
  number, in a quarter of the time for 32 channels at 32 x 32 places. A vector that is 0 is like nothing and gets no gradient.
- What the critic sees can be averaged down (``score_side_px``): at the image's resolution it costs more than teacher and student.
- The paraphrasers are those of graph_flow, trained for its 200 epochs; the published student used those of epoch 190.
- The task's loss, the student's optimizer and its schedule are the recipe's.

Shape letters: B images, C channels, K classes, H rows, W columns, N = H * W places.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from edgekd._config import Config
from edgekd.distill.base import Distiller, map_pairs, score_maps
from edgekd.errors import RecipeError
from edgekd.nn.adversary import Adversary
from edgekd.nn.critics import PATCH_SIDE_PX, PatchCritic, score_map, with_image
from edgekd.nn.paraphraser import Paraphraser
from edgekd.nn.precision import exact
from edgekd.train.checkpoint import Loaded
from edgekd.train.loop import Setting
from edgekd.train.paraphrase import fit_paraphrasers
from edgekd.train.step import StepInputs

BETAS = (0.9, 0.99)
EPSILON = 1e-12

Kind = Literal["cross", "selfcorr"]
Normalise = Literal["l2", "none", "channels"]


class CocoDistillnetConfig(Config):
    """Similarities of places across two layers, and a critic that sees the image too (2021)."""

    name: Literal["coco_distillnet"]
    correlation_weight: float = Field(1.0, gt=0, le=10_000)
    """lambda_s: weight of the correlation's term."""
    holistic_weight: float = Field(0.1, ge=0, le=10_000)
    """lambda_adv: weight of the student's adversarial term; 0 leaves it out, and there is no critic."""
    layers: list[tuple[str, str]] | None = Field(None, min_length=1)
    """Pairs of taps, shallow and deep, with as many channels in the student; null takes its first map and the last like it."""
    kind: Kind = "cross"
    """What is compared: products of places across both layers, or the product of each layer's similarities within it."""
    normalise: Normalise = "l2"
    """What is done to a place's vector: brought to length 1, nothing, or, with channels, products divided by their number."""
    max_side: int = Field(64, ge=1, le=1024)
    """Sides of the compared maps, in places: larger ones are averaged down."""
    paraphraser: bool = True
    """Paraphrase the teacher's maps; false compares them as they are, and needs pairs of as many channels in the teacher too."""
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
    critic_lr: float = Field(2e-5, gt=0, le=1)
    """The critic's learning rate at the first step; Adam with (0.9, 0.99)."""
    score_side_px: int | None = Field(None, ge=PATCH_SIDE_PX, le=2048)
    """Shorter side of what the critic sees, in pixels: larger ones are averaged down; null, as published, does not."""

    def build(self, student: Loaded, teacher: Loaded) -> CocoDistillnetDistiller:
        """The Distiller, with a critic and paraphrasers that know nothing yet.

        Raises:
            RecipeError: The outputs are no score maps of one size, the critic cannot read them, or the layers do not fit.
        """
        classes = score_maps(student, teacher, method=self.name, critic=self.holistic_weight > 0, least_px=PATCH_SIDE_PX)
        pairs, channels = map_pairs(student, teacher, self.layers, method=self.name)
        for shallow, deep in [] if self.paraphraser else pairs:
            if channels[shallow][1] != channels[deep][1]:
                counts = " and ".join(f"{role!r} has {channels[role][1]}" for role in (shallow, deep))
                raise RecipeError(
                    f"{self.name}.layers: without paraphrasers a pair needs as many channels in the teacher; {counts}",
                    hint="set paraphraser to true, or tap the teacher elsewhere",
                )
        places = {role: teacher.taps[role] for role in channels}
        return CocoDistillnetDistiller(self, pairs, channels, places, student.architecture.channels + classes)


def place_vectors(maps_BCHW: Tensor, normalise: Normalise = "l2") -> Tensor:
    """Each place's channels as a vector, of length 1 unless ``normalise`` says otherwise: [B, C, N] in float64.

    With ``channels`` they are divided by sqrt(C), so products of two are by C. A vector no longer than 1e-12 becomes 0, a
    constant: a place where nothing is has no direction, and its gradient would be of the order of 1e12.
    """
    vectors_BCN = maps_BCHW.flatten(2).double()
    if normalise == "none":
        return vectors_BCN
    if normalise == "channels":
        return vectors_BCN / vectors_BCN.shape[1] ** 0.5
    lengths_B1N = vectors_BCN.norm(dim=1, keepdim=True)
    return torch.where(lengths_B1N > EPSILON, vectors_BCN / lengths_B1N.clamp_min(EPSILON), 0.0)


def correlation_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    kind: Kind = "cross",
    normalise: Normalise = "l2",
    max_side: int = 64,
) -> Tensor:
    """L_CoCo: the mean over images and pairs of places of (teacher's - student's correlation)^2, a scalar of the student's dtype.

    With a, b the place vectors of the shallow and the deep map, the correlation of places i and j is a_i . b_j (``cross``), or
    the entry (i, j) of A_a A_b / N, A = the products of all places within a layer (``selfcorr``).

    Args:
        student: Shallow and deep map, [B, C, H, W], each with sides of its own.
        teacher: The same with its own channels; no gradient flows into them. Both networks' maps of a layer are averaged down to
            the smaller sides; for ``selfcorr``, all four.
        kind: The correlation.
        normalise: See :func:`place_vectors`.
        max_side: No side has more places than this.
    """
    sizes = [
        [min(*sides, max_side) for sides in zip(ours.shape[2:], theirs.shape[2:], strict=True)]
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    if kind == "selfcorr":
        sizes = [[min(sides) for sides in zip(*sizes, strict=True)]] * 2
    networks = []
    for maps in (student, tuple(one.detach() for one in teacher)):
        pooled = [F.adaptive_avg_pool2d(exact(one), (size[0], size[1])) for one, size in zip(maps, sizes, strict=True)]
        shallow_BCN, deep_BCN = (place_vectors(one, normalise) for one in pooled)
        if kind == "selfcorr":  # (a^T a)(b^T b) / N = ((b a^T / N) a)^T b
            shallow_BCN = deep_BCN @ shallow_BCN.transpose(1, 2) @ shallow_BCN / shallow_BCN.shape[2]
        networks.append((shallow_BCN, deep_BCN))
    (ours_shallow, ours_deep), (theirs_shallow, theirs_deep) = networks
    # The difference of both correlations is x^T y, with x and y of all channels, and its sum of squares that of x x^T * y y^T.
    x = torch.cat([theirs_shallow, ours_shallow], 1)
    y = torch.cat([theirs_deep, -ours_deep], 1)
    squares = ((x @ x.transpose(1, 2)) * (y @ y.transpose(1, 2))).sum()
    return (squares / (len(x) * x.shape[2] * y.shape[2])).to(exact(student[0]).dtype)


class CocoDistillnetDistiller(Distiller):
    """The terms ``correlation`` and ``holistic``; the critic's loss is reported as ``critic``.

    Args:
        config: The method's section.
        pairs: Taps, shallow and deep.
        channels: Role -> channels in the student and in the teacher.
        places: Role -> module path in the teacher.
        seen: Channels of what the critic sees: the image's and K.
    """

    def __init__(
        self,
        config: CocoDistillnetConfig,
        pairs: list[tuple[str, str]],
        channels: dict[str, tuple[int, int]],
        places: dict[str, str],
        seen: int,
    ) -> None:
        super().__init__()
        self.config, self.pairs, self.places = config, pairs, places
        self.student_taps = self.teacher_taps = tuple(channels)
        self.paraphrasers = nn.ModuleDict(
            {role: Paraphraser(theirs, ours) for role, (ours, theirs) in channels.items()} if config.paraphraser else {}
        )
        self.paraphrasers.requires_grad_(False)
        self.lost: Tensor
        self.register_buffer("lost", torch.full((len(self.paraphrasers),), torch.nan))
        if config.holistic_weight:
            self.adversary = Adversary(
                PatchCritic(seen),
                lambda owned: torch.optim.Adam(owned, lr=config.critic_lr, betas=BETAS),
                weight=config.critic_weight,
                kind=config.adversarial,
                penalty_weight=config.penalty_weight,
            )

    def prepare(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> None:  # noqa: ARG002
        """Train the paraphrasers on the teacher's maps."""
        if not self.paraphrasers:
            return
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
        ours, theirs = step.student.taps, dict(step.teacher.taps)
        with torch.autocast(step.images.device.type, enabled=False):
            with torch.no_grad():
                theirs.update({role: said(theirs[role].float()) for role, said in self.paraphrasers.items()})
            far = [
                correlation_loss(
                    (ours[shallow], ours[deep]),
                    (theirs[shallow], theirs[deep]),
                    kind=config.kind,
                    normalise=config.normalise,
                    max_side=config.max_side,
                )
                for shallow, deep in self.pairs
            ]
            terms["correlation"] = config.correlation_weight * torch.stack(far).sum()
            if self.adversary is not None:
                seen = (
                    score_map(with_image(step.images, outputs.logits.float()), config.score_side_px)
                    for outputs in (step.student, step.teacher)
                )
                terms["holistic"] = config.holistic_weight * self.adversary.judge(*seen)
        return terms

    def statistics(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> dict[str, float]:  # noqa: ARG002
        """Tap -> the share of the teacher's map that its paraphraser could not restore."""
        return {f"not restored of {role}": share for role, share in zip(self.paraphrasers, self.lost.tolist(), strict=True)}
