"""Attention-based feature distillation: every block of the teacher chooses which blocks of the student learn from it.

Ji, Heo, Park: Show, Attend and Distill: Knowledge Distillation via Attention-based Feature Matching. AAAI 2021, arXiv 2102.02973,
in the form in which GHOST (IEEE TGRS 2023, arXiv 2301.00131) compares with it. Official code:
clovaai/attention-feature-distillation. Written from the specification.

Differs from the official code: no position embedding in the queries' product; weights are those of GHOST's convention (ost.py
says how its 400 becomes 25 for batches of 8).

Shape letters: B images, C channels, H rows, W columns, S and T blocks of the student and of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from edgekd._config import Config
from edgekd.distill.base import Distiller, map_channels
from edgekd.errors import TrainingError
from edgekd.nn.relations import Embedding, attention_map, resized, unit_vectors
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import StepInputs

QUERY = 128
"""q: the length of keys and queries."""


class AfdConfig(Config):
    """Attention-based feature distillation (Ji et al. 2021)."""

    name: Literal["afd"]
    weight: float = Field(25.0, ge=0, le=10_000)
    """Weight of the distillation term; 25 with task_weight 1 is GHOST's 400 for batches of 8."""
    layers: list[str] | None = None
    """Taps whose maps are compared, all with all; null takes every map that student and teacher share."""

    def build(self, student: Loaded, teacher: Loaded) -> AfdDistiller:
        """The Distiller, with keys and queries."""
        return AfdDistiller(self, map_channels(student, teacher, self.layers, method=self.name))


def attention(keys_BSTQ: Tensor, queries_BTQ: Tensor) -> Tensor:
    """How much each teacher block looks at each student block: softmax over S of <key, query> / sqrt(q), [B, T, S]."""
    scores_BTS = torch.einsum("bstq,btq->bts", keys_BSTQ, queries_BTQ) / keys_BSTQ.shape[-1] ** 0.5
    return torch.softmax(scores_BTS, dim=2)


def matched_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], attention_BTS: Tensor) -> Tensor:
    """The sum over teacher blocks of the batch means of attention times squared distance of the values.

    Args:
        student: Maps [B, C, H, W]; averaged to the teacher's size before they are scaled to length 1.
        teacher: Maps [B, C', H', W']; no gradient flows into them.
        attention_BTS: [B, T, S].
    """
    total = attention_BTS.new_zeros(())
    ours = [attention_map(maps) for maps in student]
    for index, maps in enumerate(teacher):
        theirs = attention_map(maps.detach())
        value, size = unit_vectors(theirs), list(theirs.shape[2:])
        far_BS = torch.stack([(unit_vectors(resized(one, size)) - value).square().mean(1) for one in ours], 1)
        total = total + (attention_BTS[:, index] * far_BS).sum(1).mean()
    return total


class AfdDistiller(Distiller):
    """The term ``afd``."""

    def __init__(self, config: AfdConfig, channels: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.config = config
        self.student_taps = self.teacher_taps = tuple(channels)
        self.keys = nn.ModuleDict({role: Embedding(ours, QUERY, relu=True) for role, (ours, _) in channels.items()})
        self.spread = Embedding(QUERY, QUERY * len(channels), relu=False)  # one key per teacher block
        self.queries = nn.ModuleDict({role: Embedding(theirs, QUERY, relu=False) for role, (_, theirs) in channels.items()})

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The term.

        Raises:
            TrainingError: The batch has one image, over which keys and queries cannot be normalised.
        """
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        if len(step.images) < 2:
            raise TrainingError(
                "afd needs at least 2 images in a batch", hint="raise train.batch_size, or lower train.accumulate"
            )
        ours = [step.student.taps[role] for role in self.student_taps]
        theirs = [step.teacher.taps[role].detach() for role in self.teacher_taps]
        keys = [
            self.spread(self.keys[role](maps.float().mean((2, 3)))) for role, maps in zip(self.student_taps, ours, strict=True)
        ]
        keys_BSTQ = torch.stack([key.unflatten(1, (len(theirs), QUERY)) for key in keys], 1)
        queries_BTQ = torch.stack(
            [self.queries[role](maps.float().mean((2, 3))) for role, maps in zip(self.teacher_taps, theirs, strict=True)], 1
        )
        return {"afd": self.config.weight * matched_distance(ours, theirs, attention(keys_BSTQ, queries_BTQ))}
