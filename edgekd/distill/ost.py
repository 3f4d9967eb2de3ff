"""One-to-one self-teaching with switches: every block of the student is compared with the same block of its teacher.

Zhang, Lei, Xie, Li, Yang, Jia: Guided Hybrid Quantization for Object Detection in Remote Sensing Imagery via One-to-One
Self-Teaching. IEEE TGRS 2023, arXiv 2301.00131. Official code: icey-zhang/GHOST. The switching module (SCM) is adapted from Ji et
al., Show, Attend and Distill, AAAI 2021. Written from the specification of what the code computes; the paper's tables were not
read.

A block's value is where its map is strong: v = the mean over channels of the squares, scaled to length 1 per image. A gate, drawn
anew for every image and block, decides whether the block is taught: it opens where <key, query> / sqrt(128) + Gumbel noise > 0,
with the key from the student's pooled map and the query from the teacher's. Its gradient is that of the sigmoid (straight
through).

Differs from the official code:
- The gate's gradient does not reach the student (``detach_gate: true``, the default): it could only learn to close its gates,
  since a gate that opens always costs. ``detach_gate: false`` is the published behaviour.
- Keys and queries stay at their random initial weights, as published, where no optimizer was given them. ``train_gate: true``
  trains them, with a penalty that keeps the rate of open gates at ``gate_rate``; alone they would close all gates.
- The task loss counts once here and is a mean over the batch; there it counts twice and is a sum over a batch of B. The published
  weight 400 is ``weight: 400 / (2 B)`` with ``task_weight: 1``: 25 for B = 8, the default.
- The map of a block that is larger on one side is averaged down to the other's (twins never need it).

Shape letters: B images, C channels, H rows, W columns.
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
from edgekd.nn.relations import Embedding, attention_map, same_size, unit_vectors
from edgekd.train.checkpoint import Loaded
from edgekd.train.loop import Setting
from edgekd.train.step import StepInputs

QUERY = 128
"""q: the length of keys and queries."""


class OstConfig(Config):
    """One-to-one self-teaching with stochastic switches (GHOST, 2023)."""

    name: Literal["ost"]
    weight: float = Field(25.0, ge=0, le=10_000)
    """Weight of the distillation term; 25 with task_weight 1 is the published 400 for batches of 8."""
    layers: list[str] | None = None
    """Taps that are compared; null takes every map that student and teacher share."""
    detach_gate: bool = True
    """Keep the gates' gradient from the student, which could only learn to close them."""
    train_gate: bool = False
    """Train keys and queries; they are random projections otherwise."""
    gate_rate: float = Field(0.6, gt=0, lt=1)
    """rho: with train_gate, the rate of open gates that the penalty asks for."""
    gate_weight: float = Field(1.0, ge=0, le=1000)
    """Weight of that penalty."""

    def build(self, student: Loaded, teacher: Loaded) -> OstDistiller:
        """The Distiller, with a key and a query per block."""
        return OstDistiller(self, map_channels(student, teacher, self.layers, method=self.name))


def distance(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """d: the mean over places of the squared difference of both values, per image.

    Args:
        student_BCHW: [B, C, H, W].
        teacher_BCHW: [B, C', H', W']; no gradient flows into it.

    Returns:
        [B], at least 0.
    """
    student, teacher = same_size(attention_map(student_BCHW), attention_map(teacher_BCHW.detach()))
    return (unit_vectors(student) - unit_vectors(teacher)).square().mean(1)


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the same shape: -log of exponential noise."""
    return -torch.empty_like(like).exponential_().log()


def open_gates(logits: Tensor, noise: Tensor) -> Tensor:
    """1 where logit + noise > 0, else 0; the gradient is the sigmoid's. A gate opens with probability 1 - exp(-exp(logit)).

    Args:
        logits: z, any shape.
        noise: e, the same shape.
    """
    soft = torch.sigmoid(logits + noise)
    hard = (logits + noise > 0).to(soft.dtype)
    return hard - soft.detach() + soft


def one_to_one(distances_LB: Sequence[Tensor], gates_LB: Sequence[Tensor]) -> Tensor:
    """The sum over blocks of the batch means of gate times distance.

    Args:
        distances_LB: d, [B] for each block.
        gates_LB: gamma, [B] for each block.
    """
    return torch.stack([(gate * far).mean() for far, gate in zip(distances_LB, gates_LB, strict=True)]).sum()


class OstDistiller(Distiller):
    """The term ``ost``, and with ``train_gate`` the term ``gate_rate``."""

    def __init__(self, config: OstConfig, channels: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.config = config
        self.student_taps = self.teacher_taps = tuple(channels)
        self.keys = nn.ModuleDict({role: Embedding(ours, QUERY, relu=True) for role, (ours, _) in channels.items()})
        self.queries = nn.ModuleDict({role: Embedding(theirs, QUERY, relu=False) for role, (_, theirs) in channels.items()})
        for part in (self.keys, self.queries):
            part.requires_grad_(config.train_gate)
        self.opened = dict.fromkeys(channels, 0.0)
        self.seen = 0

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The terms.

        Raises:
            TrainingError: The batch has one image, over which keys and queries cannot be normalised.
        """
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        if len(step.images) < 2:
            raise TrainingError(
                "ost needs at least 2 images in a batch", hint="raise train.batch_size, or lower train.accumulate"
            )
        distances, gates = [], []
        for role in self.student_taps:
            ours, theirs = step.student.taps[role], step.teacher.taps[role].detach()
            distances.append(distance(ours, theirs))
            logits = self._logits(role, ours.detach() if self.config.detach_gate else ours, theirs)
            gates.append(open_gates(logits, gumbel(logits)))
        rates = torch.stack(gates)
        for role, count in zip(self.student_taps, rates.detach().sum(1).tolist(), strict=True):
            self.opened[role] += count
        self.seen += rates.shape[1]
        terms = {"ost": self.config.weight * one_to_one(distances, gates)}
        if self.config.train_gate:
            terms["gate_rate"] = self.config.gate_weight * (rates.mean() - self.config.gate_rate).square()
        return terms

    def statistics(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> dict[str, float]:  # noqa: ARG002
        """Tap -> the rate of open gates over all images seen since the training (or its resumption) began."""
        return {f"open gates of {role}": count / max(self.seen, 1) for role, count in self.opened.items()}

    def _logits(self, role: str, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        """z, [B]: the scaled product of key and query."""
        key = self.keys[role](student_BCHW.float().mean((2, 3)))
        query = self.queries[role](teacher_BCHW.float().mean((2, 3)))
        logits: Tensor = (key * query).sum(1) / QUERY**0.5
        return logits
