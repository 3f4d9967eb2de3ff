"""The raw outputs of both models are compared: the plainest teaching there is, and the baseline of all others.

Ba, Caruana: Do Deep Nets Really Need to be Deep? NIPS 2014, arXiv 1312.6184 (squared differences of logits); the divergence is
the baseline "KL on raw heads" of GHOST (Zhang et al., IEEE TGRS 2023, arXiv 2301.00131; official code: icey-zhang/GHOST).

Differs from GHOST's code: its divergence takes a softmax over the anchors and passes student and teacher in the wrong order; here
it is a softmax over the classes of one prediction where a model gives logits [B, K], and independent probabilities of objectness
and classes where it gives predictions [B, P, 5 + K]. Heads are one tensor here, so the mean is over all of their values.

Shape letters: B images, K classes, P predictions of an image.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from edgekd._config import Config
from edgekd.distill.base import Distiller, output_shapes
from edgekd.errors import RecipeError
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import StepInputs

BOX = 4
"""Leading values of a prediction that are no logits of probabilities."""


class RawOutputConfig(Config):
    """Raw outputs (Ba and Caruana 2014; GHOST's baselines)."""

    name: Literal["raw_output"]
    divergence: Literal["mse", "kl"] = "mse"
    """Squared differences, or the divergence of the probabilities that the outputs stand for."""
    weight: float = Field(0.1, ge=0, le=10_000)
    """Weight of the distillation term."""

    def build(self, student: Loaded, teacher: Loaded) -> RawOutputDistiller:
        """The Distiller.

        Raises:
            RecipeError: The models answer in different shapes, or with maps, which have no divergence here.
        """
        ours, theirs = output_shapes(student, teacher)
        if ours != theirs:
            raise RecipeError(
                f"{self.name} compares outputs of one shape; the student's is {list(ours)}, the teacher's {list(theirs)}",
                hint="give both models the same task and outputs",
            )
        if self.divergence == "kl" and len(ours) > 3:
            raise RecipeError(
                f"{self.name}.divergence: kl is for scores of classes and for boxes; the models answer with {list(ours)}",
                hint="take mse, or for masks the method structured_kd",
            )
        return RawOutputDistiller(self)


def squared_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over all values of the squared difference, a scalar; no gradient flows into the teacher."""
    return F.mse_loss(student, teacher.detach())


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), summed over an image and averaged over the batch.

    Args:
        student: Logits [B, K], or predictions [B, P, 5 + K], before softmax or sigmoid.
        teacher: The same shape; no gradient flows into it.
    """
    teacher = teacher.detach()
    if student.ndim == 2:
        return F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), reduction="batchmean", log_target=True)
    ours, theirs = student[..., BOX:], teacher[..., BOX:]
    share = torch.sigmoid(theirs)
    # p (log p - log q) + (1 - p) (log (1 - p) - log (1 - q)), each logarithm from the logits
    each = share * (F.logsigmoid(theirs) - F.logsigmoid(ours)) + (1 - share) * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))
    return each.sum() / len(student)


class RawOutputDistiller(Distiller):
    """The term ``raw_output``."""

    def __init__(self, config: RawOutputConfig) -> None:
        super().__init__()
        self.config = config

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The term."""
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        term = squared_difference if self.config.divergence == "mse" else divergence
        return {"raw_output": self.config.weight * term(step.student.logits.float(), step.teacher.logits.float())}
