"""How far one distribution is from another, where maps or logits are made into distributions by a softmax.

Shape letters: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from edgekd.nn.precision import exact

PixelReduction = Literal["mean_pixel", "sum_over_batch", "mean_element"]
"""What the sum over all places is divided by: B H W, H W, or B C H W."""


def channel_divergence(student_BCHW: Tensor, teacher_BCHW: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 / (B C) times the sum of KL(teacher || student) over the channels, each a softmax over its places: a scalar.

    Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction. ICCV 2021, arXiv 2011.13256, eq. 2 and 3.

    Args:
        student_BCHW: [B, C, H, W].
        teacher_BCHW: The same shape; no gradient flows into it.
        temperature: T, above 0: values are divided by it.
    """
    ours, theirs = (exact(maps).flatten(2) / temperature for maps in (student_BCHW, teacher_BCHW.detach()))
    far = F.kl_div(ours.log_softmax(2), theirs.log_softmax(2), reduction="sum", log_target=True)
    return far * temperature**2 / (ours.shape[0] * ours.shape[1])


def pixel_divergence(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    temperature: float = 1.0,
    *,
    reduction: PixelReduction = "mean_pixel",
    form: Literal["kl", "ce"] = "kl",
) -> Tensor:
    """T^2 times the divergence of the student's distributions from the teacher's, a softmax over the channels of each place.

    Args:
        student_BCHW: [B, C, H, W], before softmax.
        teacher_BCHW: The same shape; no gradient flows into it.
        temperature: T, above 0: values are divided by it.
        reduction: How the places are averaged.
        form: KL(teacher || student), 0 for equal maps; or the cross-entropy, larger by the teacher's entropy, whose gradient is
            the same.

    Returns:
        A scalar, at least 0.
    """
    batch, channels, height, width = student_BCHW.shape
    ours, theirs = (F.log_softmax(exact(maps) / temperature, 1) for maps in (student_BCHW, teacher_BCHW.detach()))
    far = F.kl_div(ours, theirs, reduction="sum", log_target=True) if form == "kl" else -(theirs.exp() * ours).sum()
    counts = {"mean_pixel": batch, "sum_over_batch": 1, "mean_element": batch * channels}
    return far * temperature**2 / (counts[reduction] * height * width)
