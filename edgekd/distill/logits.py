"""Knowledge distillation from softened logits.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network. NIPS 2014 workshop, arXiv 1503.02531. Official code: none.

Differs from the paper: nothing. The paper gives the hard-label term a "considerably lower weight" without a number; the defaults
here (0.9 and 0.1, temperature 4) are those that later comparisons settled on, which is our reading.

Shape letters: B images, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from edgekd._config import Config
from edgekd.distill.base import Distiller
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import StepInputs


class LogitsConfig(Config):
    """Softened logits (Hinton et al. 2014)."""

    name: Literal["logits"]
    temperature: float = Field(4.0, gt=0, le=100)
    """T: divides the logits of both; 1 keeps the teacher's own confidence."""
    weight: float = Field(0.9, ge=0, le=1000)
    """Weight of the distillation term; the stage's task_weight is the other one."""

    def build(self, student: Loaded, teacher: Loaded) -> LogitsDistiller:  # noqa: ARG002
        """The Distiller; it looks at neither model, for it needs no adapters, and the recipe checks the task."""
        return LogitsDistiller(self)


def soft_cross_entropy(student_logits_BK: Tensor, teacher_logits_BK: Tensor, temperature: float) -> Tensor:
    """T² times the divergence of the student's softened distribution from the teacher's, averaged over the batch.

    The divergence KL(teacher || student) differs from the paper's cross-entropy by the teacher's entropy, which has no gradient.
    T² keeps the gradient's size when T changes (section 2 of the paper).

    Args:
        student_logits_BK: [B, K], before softmax.
        teacher_logits_BK: [B, K], before softmax; no gradient flows into it.
        temperature: T, above 0.

    Returns:
        A scalar, at least 0; 0 if and only if both softened distributions are equal.

    Reference:
        arXiv 1503.02531, equation 1 and section 2.
    """
    # at least float32: under autocast the exponentials lose too much in 16 bits
    dtype = torch.promote_types(student_logits_BK.dtype, torch.float32)
    student_log_BK = F.log_softmax(student_logits_BK.to(dtype) / temperature, dim=1)
    teacher_log_BK = F.log_softmax(teacher_logits_BK.detach().to(dtype) / temperature, dim=1)
    return temperature**2 * F.kl_div(student_log_BK, teacher_log_BK, reduction="batchmean", log_target=True)


class LogitsDistiller(Distiller):
    """One term, ``kd``."""

    def __init__(self, config: LogitsConfig) -> None:
        super().__init__()
        self.config = config

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The term ``kd``."""
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        divergence = soft_cross_entropy(step.student.logits, step.teacher.logits, self.config.temperature)
        return {"kd": self.config.weight * divergence}
