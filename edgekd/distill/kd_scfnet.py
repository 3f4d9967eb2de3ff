"""KD-SCFNet: the student draws what stands out as its teacher does, on images that nobody has labelled.

Zhang, Liang, Shi: KD-SCFNet: Towards More Accurate and Efficient Salient Object Detection via Knowledge Distillation. 2022, arXiv
2208.02178; official code: zhangjinCV/KD-SCFNet (PaddlePaddle). Written from a specification that holds the code's formulas; the
paper's text was not read. Its network is edgekd/models/scfnet.py, its supervised loss the task ``saliency``.

All of the student's maps, the prediction and its side outputs, are fitted to the teacher's prediction alone by the soft Dice
loss: no labels (``task_weight: 0``), no temperature, no features, no boundaries. The loss of two equal soft maps is not 0, and
its gradient makes the student's map more decided than the teacher's: that is the published form.

Differs from the official code: unlabelled images are those of the training split without a mask (``data.labelled``), not 80,000
of ImageNet; the weights go on for as many side outputs as there are. Batches of several sizes are ``data.augment.shrink``.

Shape letters: B images, S maps, H rows, W columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from edgekd._config import Config
from edgekd.distill.base import Distiller
from edgekd.errors import RecipeError
from edgekd.nn.overlap import soft_dice_each
from edgekd.nn.taps import tap_shapes
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import StepInputs


class KdScfnetConfig(Config):
    """The teacher's map of what stands out, for all of the student's maps (KD-SCFNet, 2022)."""

    name: Literal["kd_scfnet"]
    weight: float = Field(1.0, ge=0, le=10_000)
    """Weight of the distillation term."""
    side_weight: float = Field(0.5, ge=0, le=1)
    """Weight of a side output as a share of that of the map before it; 0 fits the prediction alone."""

    def build(self, student: Loaded, teacher: Loaded) -> KdScfnetDistiller:
        """The Distiller; it has no parts that learn.

        Raises:
            RecipeError: A model does not give one map, or not both maps have the same sides.
        """
        ours, theirs = (
            tap_shapes(one.module, {"output": ""}, one.architecture.example())["output"] for one in (student, teacher)
        )
        if len(ours) != 4 or ours[1] != 1 or ours != theirs:
            raise RecipeError(
                f"kd_scfnet compares maps [B, 1, H, W] of the same sides; the student's output is {list(ours)}, the teacher's "
                f"{list(theirs)}",
                hint="it is a method for the task saliency and models such as scfnet",
            )
        return KdScfnetDistiller(self)


def response_loss(student_BSHW: Tensor, teacher_B1HW: Tensor, side_weight: float = 0.5) -> Tensor:
    """The sum over the student's maps s = 0, 1 ... of side_weight^s times the soft Dice loss, averaged over images: a scalar.

    Args:
        student_BSHW: Logits of the prediction and of side outputs behind it.
        teacher_B1HW: Logits of the prediction; side outputs behind it are not looked at. No gradient flows into it.
        side_weight: Weight of a map as a share of that of the one before.
    """
    theirs = teacher_B1HW[:, :1].detach().sigmoid()
    each_BS = soft_dice_each(student_BSHW.sigmoid(), theirs)
    weights_S = each_BS.new_tensor([side_weight**index for index in range(each_BS.shape[1])])
    return (each_BS * weights_S).sum(1).mean()


class KdScfnetDistiller(Distiller):
    """The term ``kd_scfnet``."""

    def __init__(self, config: KdScfnetConfig) -> None:
        super().__init__()
        self.config = config

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The term."""
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        with torch.autocast(step.images.device.type, enabled=False):
            ours, theirs = step.student.logits.float(), step.teacher.logits.float()
            return {"kd_scfnet": self.config.weight * response_loss(ours, theirs, self.config.side_weight)}
