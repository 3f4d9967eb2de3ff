"""TransKD: a transformer teaches a smaller one, stage by stage, by its maps and by its patch embeddings.

Liu, Yang, Roitberg, Zhang, Peng, Liu, Wang, Stiefelhagen: TransKD: Transformer Knowledge Distillation for Efficient Semantic
Segmentation. arXiv 2202.13393. Official code: RuipingL/TransKD. Written from a specification of what the code computes; of the
paper only the abstract was read, so names of symbols are ours.

At the end of each of four stages the student's map, fused with the coarser ones (CSF: cross selective fusion), is compared with
the teacher's; at its beginning the patch embedding, after a linear layer (PEA: patch embedding alignment). ``gl`` also mixes the
last embedding by attention and by gated convolutions (GL-Mixer); ``ea`` also embeds the student's maps with as many channels as
the teacher has (EA: embedding assistant).

Differs from the official code:
- A batch of one image goes through the squeeze with its norm's running statistics, 0 and 1 where every batch is one image. The
  code has weights of their own for it without a norm, which no other batch trains.
- The weights of both branches of the GL-Mixer start as ``mixer_start``; the code leaves them as the memory was.
- The task's loss is the recipe's, of logits at the image's own resolution where the code has a quarter of it; so are optimizer
  and schedule. The code has AdamW, a learning rate of 6e-5, 1000 epochs, batches of 2.
- The code's single-stage embeddings are ``embedding_weights`` with one entry that is not 0.

Shape letters: B images, C channels, H rows, W columns, N = H * W tokens, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from edgekd._config import Config
from edgekd.distill.base import Distiller
from edgekd.errors import RecipeError
from edgekd.nn.divergences import channel_divergence, pixel_divergence
from edgekd.nn.relations import hierarchical_context
from edgekd.nn.taps import resolve, tap_shapes
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import StepInputs

STAGES = 4
EMBEDS = tuple(f"embed{number + 1}" for number in range(STAGES))
MAPS = tuple(f"stage{number + 1}" for number in range(STAGES))
MIXER_HEADS = 8
OWN_SHARE, EXTRA_SHARE = (0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)
"""First weights, by stage, of the student's embedding and of the extra one."""
LEAST_SQUEEZED, SQUEEZE = 32, 16
COMPARE = {"hcl": hierarchical_context, "channel_kl": channel_divergence, "pixel_kl": pixel_divergence}


class TranskdConfig(Config):
    """Maps and patch embeddings of a transformer, stage by stage (TransKD, 2022)."""

    name: Literal["transkd"]
    variant: Literal["base", "gl", "ea"] = "base"
    """Maps and embeddings; with the global-local mixer on the last embedding; or with an extra embedding at every stage."""
    feature_weight: float = Field(1.0, ge=0, le=10_000)
    """w_f: weight of the maps' term; 0 leaves it out, with its fusion."""
    feature_loss: Literal["hcl", "channel_kl", "pixel_kl"] = "hcl"
    """How maps are compared: averages over coarser and coarser grids; or softmax over the places of every channel, or over the
    channels of every place, both with temperature 1."""
    hidden: int = Field(64, ge=1, le=4096)
    """D: channels in which maps are fused."""
    embedding_weights: list[float] = Field(default=[0.1, 0.1, 0.5, 1.0], min_length=STAGES, max_length=STAGES)
    """lambda of every stage's embedding term, the finest first; 0 leaves a stage out."""
    mixer_start: float = Field(1.0, ge=-10, le=10)
    """With gl: first weight of both branches of the mixer."""
    mixer_residual: bool = False
    """With gl: add what went into the mixer."""

    @model_validator(mode="after")
    def _something_is_taught(self) -> TranskdConfig:
        if min(self.embedding_weights) < 0:
            raise ValueError(f"embedding_weights must be at least 0, got {self.embedding_weights}")
        if not any(self.embedding_weights) and not self.feature_weight:
            raise ValueError("feature_weight and all embedding_weights are 0: nothing is taught; raise one of them")
        if self.variant == "gl" and not self.embedding_weights[-1]:
            raise ValueError("variant gl mixes the last stage's embedding, and its weight is 0; raise it, or use base")
        if self.variant == "ea" and not any(self.embedding_weights):
            raise ValueError("variant ea adds to embeddings, and all embedding_weights are 0; raise one, or use base")
        return self

    def build(self, student: Loaded, teacher: Loaded) -> TranskdDistiller:
        """The Distiller, with fusion, linear layers, and what the variant adds.

        Raises:
            RecipeError: The models lack the taps embed1 .. embed4 and stage1 .. stage4, or their sides differ.
        """
        return TranskdDistiller(self, _channels(student, teacher, self.variant), student.architecture.channels)


@dataclass(frozen=True)
class Channels:
    """Of the four stages, the finest first."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]


def _channels(student: Loaded, teacher: Loaded, variant: str) -> Channels:
    """Channels of both models, whose embeddings and maps must have the same places.

    Raises:
        RecipeError: They have not.
    """
    shapes = []
    for owner, loaded in (("student", student), ("teacher", teacher)):
        try:
            wanted = resolve((*EMBEDS, *MAPS), loaded.taps)
        except RecipeError as error:
            raise RecipeError(
                f"transkd: of the {owner}, {error.message}",
                hint="use segformer_b0 to segformer_b2, or name the modules that give embeddings and maps in the model's taps",
            ) from error
        shapes.append(tap_shapes(loaded.module, wanted, loaded.architecture.example()))
    ours, theirs = shapes
    for embed, stage in zip(EMBEDS, MAPS, strict=True):
        for owner, found in (("student", ours), ("teacher", theirs)):
            tokens, maps = found[embed], found[stage]
            if len(tokens) != 3 or len(maps) != 4 or tokens[1:] != (maps[2] * maps[3], maps[1]):
                raise RecipeError(
                    f"transkd: {embed} must be tokens [B, H W, C], {stage} a map [B, C, H, W]; the {owner}'s are {list(tokens)} "
                    f"and {list(maps)}",
                    hint="tap the patch embedding before the stage's blocks, and the stage's map behind them",
                )
        if ours[stage][2:] != theirs[stage][2:]:
            raise RecipeError(
                f"transkd: {stage} is {list(ours[stage][2:])} in the student and {list(theirs[stage][2:])} in the teacher",
                hint="both must divide the image by the same strides, as segformer_b0 to segformer_b2 do",
            )
    channels = Channels(*(tuple(shape[stage][1] for stage in MAPS) for shape in shapes))
    if variant == "gl" and channels.student[-1] % MIXER_HEADS:
        raise RecipeError(
            f"transkd: the mixer has {MIXER_HEADS} heads; the student's last stage has {channels.student[-1]} channels",
            hint="use a student whose last stage has a multiple of 8, or variant base or ea",
        )
    return channels


def selective_fusion(here_BDHW: Tensor, deeper_BDHW: Tensor, here_BD11: Tensor, deeper_BD11: Tensor) -> Tensor:
    """Alpha U + beta V with (alpha, beta) a softmax over the two branches, for each image and channel: [B, D, H, W].

    Args:
        here_BDHW: U, the stage's own map.
        deeper_BDHW: V, the fused map of the stage behind, enlarged.
        here_BD11: U's scores before softmax.
        deeper_BD11: V's.
    """
    alpha, beta = torch.stack([here_BD11, deeper_BD11]).softmax(0)
    return alpha * here_BDHW + beta * deeper_BDHW


def embedding_alignment(student_BNC: Tensor, teacher_BNC: Tensor) -> Tensor:
    """The mean squared difference of aligned embeddings, a scalar; no gradient flows into the teacher's."""
    return F.mse_loss(student_BNC, teacher_BNC.detach())


def gated_convolution(tokens_BNC: Tensor, value: nn.Conv1d, gate: nn.Conv1d) -> Tensor:
    """value(x) sigmoid(gate(x)) along the tokens, whose rows follow one another: [B, N, C]."""
    x_BCN = tokens_BNC.transpose(1, 2)
    return (value(x_BCN) * gate(x_BCN).sigmoid()).transpose(1, 2)


class Selection(nn.Module):
    """Scores of two branches from the mean over places of their sum: [B, D, H, W] twice to [B, D, 1, 1] twice."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        squeezed = max(hidden // SQUEEZE, LEAST_SQUEEZED)
        self.squeeze, self.norm = nn.Conv2d(hidden, squeezed, 1, bias=False), nn.BatchNorm2d(squeezed)
        self.here, self.deeper = nn.Conv2d(squeezed, hidden, 1), nn.Conv2d(squeezed, hidden, 1)

    def forward(self, here: Tensor, deeper: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of the stage's own map and of the deeper one."""
        means = self.squeeze((here + deeper).mean((2, 3), keepdim=True))
        if len(means) > 1:
            normed = self.norm(means)
        else:  # one value a channel has no variance
            norm = self.norm
            normed = F.batch_norm(means, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        small = normed.relu()
        return self.here(small), self.deeper(small)


class CrossSelectiveFusion(nn.Module):
    """The student's four maps, each fused with those behind it and brought to the teacher's channels.

    Args:
        channels: Of both models' stages.
        hidden: D.
    """

    def __init__(self, channels: Channels, hidden: int) -> None:
        super().__init__()
        self.enter = nn.ModuleList(_normed(nn.Conv2d(count, hidden, 1, bias=False)) for count in channels.student)
        self.select = nn.ModuleList(Selection(hidden) for _ in range(STAGES - 1))
        self.leave = nn.ModuleList(_normed(nn.Conv2d(hidden, count, 3, padding=1, bias=False)) for count in channels.teacher)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[B, C, H, W] each, the finest first, to [B, C', H, W], C' the teacher's."""
        entered = [layer(one) for layer, one in zip(self.enter, maps, strict=True)]
        fused = [entered[-1]]
        for here, select in zip(reversed(entered[:-1]), reversed(self.select), strict=True):
            deeper = F.interpolate(fused[-1], size=here.shape[2:], mode="nearest")
            fused.append(selective_fusion(here, deeper, *select(here, deeper)))
        return [layer(one) for layer, one in zip(self.leave, reversed(fused), strict=True)]


class GlobalLocalMixer(nn.Module):
    """w_a attention(x) + w_c gated convolution(x): [B, N, C], same shape.

    Args:
        channels: C, a multiple of 8.
        start: First value of w_a and w_c.
        residual: Add x.
    """

    def __init__(self, channels: int, start: float, residual: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(channels, 3 * channels, bias=False), nn.Linear(channels, channels)
        self.value, self.gate = (nn.Conv1d(channels, channels, 3, padding=1) for _ in range(2))
        self.far, self.near = nn.Parameter(torch.tensor(start)), nn.Parameter(torch.tensor(start))
        self.residual = residual

    def forward(self, tokens: Tensor) -> Tensor:
        """The mixed tokens."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, MIXER_HEADS, -1)).movedim(1, 3).unbind(1)
        seen = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        mixed: Tensor = self.far * seen + self.near * gated_convolution(tokens, self.value, self.gate)
        return mixed + tokens if self.residual else mixed


class ExtraEmbedding(nn.Module):
    """Overlapping patches with the teacher's channels: [B, Cin, H, W] to tokens [B, N, C].

    Args:
        in_channels: Of the image, or of the student's map before.
        channels: C.
        first: Of the image: patches of 7 x 7 at every 4th place; else 3 x 3 at every 2nd.
    """

    def __init__(self, in_channels: int, channels: int, *, first: bool) -> None:
        super().__init__()
        kernel, stride = (7, 4) if first else (3, 2)
        self.patches, self.norm = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2), nn.LayerNorm(channels)
        nn.init.normal_(self.patches.weight, std=sqrt(2 / (kernel**2 * channels)))
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, maps: Tensor) -> Tensor:
        """The tokens."""
        out: Tensor = self.norm(self.patches(maps).flatten(2).transpose(1, 2))
        return out


class EmbeddingAssistant(nn.Module):
    """u P(E) + v M: the student's aligned embedding and an extra one, of which both shares are learned.

    Args:
        in_channels: Of what the extra embedding sees.
        channels: The teacher's.
        number: Of the stage, from 0.
    """

    def __init__(self, in_channels: int, channels: int, number: int) -> None:
        super().__init__()
        self.embed = ExtraEmbedding(in_channels, channels, first=number == 0)
        self.own, self.extra = (nn.Parameter(torch.tensor(shares[number])) for shares in (OWN_SHARE, EXTRA_SHARE))

    def forward(self, aligned_BNC: Tensor, maps: Tensor) -> Tensor:
        """[B, N, C], from the aligned embedding and the images or the map of the stage before."""
        out: Tensor = self.own * aligned_BNC + self.extra * self.embed(maps)
        return out


class TranskdDistiller(Distiller):
    """The terms ``features`` and ``embeddings``.

    Args:
        config: The method's section.
        channels: Of both models' stages.
        in_channels: Of the images.
    """

    def __init__(self, config: TranskdConfig, channels: Channels, in_channels: int) -> None:
        super().__init__()
        self.config = config
        active = [number for number in range(STAGES) if config.embedding_weights[number]]
        maps = MAPS if config.feature_weight else ()
        self.teacher_taps = (*(EMBEDS[number] for number in active), *maps)
        seen = [MAPS[number - 1] for number in active if number] if config.variant == "ea" else []
        self.student_taps = tuple(dict.fromkeys((*(EMBEDS[number] for number in active), *maps, *seen)))
        self.fusion = CrossSelectiveFusion(channels, config.hidden) if maps else None
        self.align = nn.ModuleDict({str(n): nn.Linear(channels.student[n], channels.teacher[n]) for n in active})
        self.mixer = (
            GlobalLocalMixer(channels.student[-1], config.mixer_start, config.mixer_residual) if config.variant == "gl" else None
        )
        before = (in_channels, *channels.student)
        extra = active if config.variant == "ea" else []
        self.assist = nn.ModuleDict({str(n): EmbeddingAssistant(before[n], channels.teacher[n], n) for n in extra})

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """Both terms; gradients pass through the method's layers into the student."""
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        config, terms = self.config, {}
        ours = {role: value.float() for role, value in step.student.taps.items()}
        theirs = {role: value.detach().float() for role, value in step.teacher.taps.items()}
        with torch.autocast(step.images.device.type, enabled=False):
            if self.fusion is not None:
                compare = COMPARE[config.feature_loss]
                fused = self.fusion([ours[role] for role in MAPS])
                parts = [compare(one, theirs[role]) for one, role in zip(fused, MAPS, strict=True)]
                terms["features"] = config.feature_weight * torch.stack(parts).sum()
            if self.align:
                parts = [
                    config.embedding_weights[int(key)]
                    * embedding_alignment(self._aligned(key, ours, step.images), theirs[EMBEDS[int(key)]])
                    for key in self.align
                ]
                terms["embeddings"] = torch.stack(parts).sum()
        return terms

    def _aligned(self, key: str, ours: dict[str, Tensor], images: Tensor) -> Tensor:
        """A stage's embedding with the teacher's channels, [B, N, C]."""
        number = int(key)
        tokens = ours[EMBEDS[number]]
        if self.mixer is not None and number == STAGES - 1:
            tokens = self.mixer(tokens)
        aligned: Tensor = self.align[key](tokens)
        if key in self.assist:
            aligned = self.assist[key](aligned, ours[MAPS[number - 1]] if number else images.float())
        return aligned


def _normed(conv: nn.Conv2d) -> nn.Sequential:
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))
