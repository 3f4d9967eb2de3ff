"""One segmentation network at several widths: every width is taught by the next wider one, and harder at borders.

Xue, Yang, Wang, Herranz, Sun, Zhu, Zhang: SlimSeg: Slimmable Semantic Segmentation with Boundary Supervision. ACM MM 2022, arXiv
2207.06242. No official code was found. The authors' is, by the abstract: one network of many widths, stepwise downward
distillation, and a loss that is guided by boundaries, because there the widths differ most. How widths share weights follows
Slimmable Neural Networks (edgekd.nn.slimmable). All else is our reading: the formulas below, their weights, and that every width
learns from the labels too.

A step runs every width on the same images, the widest first, adds the gradients up, and moves once. Each width has the task's own
loss; from the second one on the divergence from what the next wider one just gave; and the cross-entropy of the pixels near a
border. ``boundary: head`` adds a slimmable head that learns where borders are, as PIDNet (Xu et al., CVPR 2023) and Gated-SCNN
(Takikawa et al., ICCV 2019) do; the pixels of which it is sure then take the place of those near a border. It is gone afterwards.

Differs from slimmable networks' code: narrow widths keep the labels (``narrow_labels: false`` leaves them the wider one alone),
and their teacher is the next wider one and not the widest. Running statistics are averaged with the weights where the recipe has
``ema_decay``, and not counted again: tried once (CamVid at 96 x 128, 8 epochs), that moved no width by 0.15 points of test mIoU.

Shape letters: B images, C channels, K classes, H rows, W columns.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from edgekd._config import Config
from edgekd.data.base import IGNORE
from edgekd.distill.base import Distiller
from edgekd.errors import RecipeError
from edgekd.nn.slimmable import SlimConv2d, SwitchableBatchNorm2d, at_width, widths_of
from edgekd.nn.taps import resolve, tap_shapes
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import Outputs, StepInputs, TrainState, average_gradients, finite, forward, no_sync, task_loss

HEAD_WEIGHT = 20.0
"""Of the head's own loss, in the code of PIDNet and of Gated-SCNN."""
SURE = 0.8
"""A pixel is a border to the head where its probability is above this, in the same code."""


class SlimsegConfig(Config):
    """One network at several widths, each taught by the next wider one, and harder at borders (SlimSeg, 2022); no teacher."""

    needs_teacher: ClassVar[bool] = False
    name: Literal["slimseg"]
    downward_weight: float = Field(1.0, ge=0, le=10_000)
    """lambda_kd: weight of the divergence from the next wider width; 0 leaves it out."""
    temperature: float = Field(1.0, gt=0, le=100)
    """T: both logits of that term are divided by it, and the term is multiplied by its square."""
    narrow_labels: bool = True
    """Train narrow widths on the labels and the borders too; false leaves them the next wider width alone."""
    boundary_weight: float = Field(1.0, ge=0, le=10_000)
    """lambda_bg: weight of the cross-entropy of the pixels at borders; 0 leaves it out."""
    boundary_radius_px: int = Field(2, ge=1, le=64)
    """r: how near another class a pixel must be to be at a border, pixels of the label."""
    boundary: Literal["band", "head"] = "band"
    """Whose borders: the labels', or those of which a head is sure that is trained to find the labels'."""
    boundary_layer: str = "stage2"
    """With `boundary: head`, the student's tap that the head reads."""

    def build(self, student: Loaded, teacher: Loaded | None = None) -> SlimsegDistiller:  # noqa: ARG002
        """The Distiller, with a head where one is asked for.

        Raises:
            RecipeError: The student has one width only, or its output is no score map.
        """
        widths = widths_of(student.module)
        if len(widths) < 2:
            raise RecipeError(
                "slimseg trains a network at several widths, and the student has one",
                hint="use a model like slim_unet with two widths at least, or one made of the layers in edgekd.nn.slimmable",
            )
        example = student.architecture.example()
        if len(shape := tap_shapes(student.module, {"output": ""}, example)["output"]) != 4:
            raise RecipeError(
                f"slimseg needs score maps [B, K, H, W]; the student's output is {list(shape)}",
                hint="it is a method for the task segmentation",
            )
        if self.boundary == "band":
            return SlimsegDistiller(self, widths, None)
        place = resolve([self.boundary_layer], student.taps)
        layer = tap_shapes(student.module, place, example)[self.boundary_layer]
        if len(layer) != 4:
            raise RecipeError(
                f"slimseg.boundary_layer: {self.boundary_layer!r} is no map [B, C, H, W]: {list(layer)}",
                hint="choose another tap",
            )
        return SlimsegDistiller(self, widths, layer[1])


def at_labels(maps_BCHW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Maps in the labels' size: bilinear, corners not aligned, at least float32."""
    exact = maps_BCHW.to(torch.promote_types(maps_BCHW.dtype, torch.float32))
    if exact.shape[2:] == labels_BHW.shape[1:]:
        return exact
    return F.interpolate(exact, size=labels_BHW.shape[1:], mode="bilinear", align_corners=False)


def downward(narrow_BKHW: Tensor, wide_BKHW: Tensor, labels_BHW: Tensor, temperature: float = 1.0) -> Tensor:
    """L_kd: T^2 times the mean of KL(wide || narrow) over the pixels that count, of the whole batch.

    Args:
        narrow_BKHW: Logits of a width, of any size.
        wide_BKHW: Those of the next wider width; no gradient flows into them.
        labels_BHW: Tell which pixels count: those that are not 255. Logits are enlarged to their size.
        temperature: T.

    Returns:
        A scalar, at least 0; 0 where no pixel counts.
    """
    counted_BHW = labels_BHW != IGNORE
    ours, theirs = (F.log_softmax(at_labels(maps, labels_BHW) / temperature, 1) for maps in (narrow_BKHW, wide_BKHW.detach()))
    far_BHW = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    return temperature**2 * _mean(far_BHW, counted_BHW)


def boundary_band(labels_BHW: Tensor, radius_px: int = 2) -> Tensor:
    """Bd_r: which pixels have a pixel of another class in the window of 2 r + 1 pixels around them.

    Pixels of label 255 are in no band and make no border.

    Args:
        labels_BHW: Classes, 0 to 254; 255 does not count.
        radius_px: r.

    Returns:
        bool [B, H, W].
    """
    counted = labels_BHW != IGNORE
    labels = labels_BHW.float()[:, None]
    side = 2 * radius_px + 1
    # a window has another class where its largest and its smallest differ; what does not count is neither
    largest, smallest = (
        F.max_pool2d(torch.where(counted[:, None], sign * labels, -torch.inf), side, 1, radius_px)[:, 0] for sign in (1, -1)
    )
    return counted & (largest != -smallest)


def boundary_loss(logits_BKHW: Tensor, labels_BHW: Tensor, band_BHW: Tensor) -> Tensor:
    """L_bg: the mean cross-entropy of the band's pixels, of the whole batch; 0 where there are none.

    Args:
        logits_BKHW: Before softmax, of any size: enlarged to the labels'.
        labels_BHW: Classes; 255 does not count.
        band_BHW: bool, the pixels at borders.
    """
    chosen_BHW = band_BHW & (labels_BHW != IGNORE)
    if not chosen_BHW.any():
        return (0 * logits_BKHW).sum()  # not 0 times the sum: of a map in 16 bits that is infinite
    # a band is a small part of an image: its pixels alone are looked at
    logits_NK = at_labels(logits_BKHW, labels_BHW).permute(0, 2, 3, 1)[chosen_BHW]
    return F.cross_entropy(logits_NK, labels_BHW[chosen_BHW].long())


def head_loss(edges_B1HW: Tensor, band_BHW: Tensor) -> Tensor:
    """L_bd: 20 times the mean over all pixels of the batch of the balanced binary cross-entropy.

    Borders weigh as the share of the other pixels, and these as the share of borders; ignored pixels are no borders.

    Args:
        edges_B1HW: Logits of being a border, of any size: enlarged to the band's.
        band_BHW: bool, the borders.
    """
    edges = at_labels(edges_B1HW, band_BHW)[:, 0]
    borders = band_BHW.to(edges.dtype)
    share = borders.mean()
    weight = torch.where(band_BHW, 1 - share, share)
    return HEAD_WEIGHT * F.binary_cross_entropy_with_logits(edges, borders, weight)


def sure_borders(edges_B1HW: Tensor, labels_BHW: Tensor) -> Tensor:
    """Which pixels the head takes for borders with more than 0.8, bool [B, H, W]; no gradient flows through them."""
    return torch.sigmoid(at_labels(edges_B1HW.detach(), labels_BHW))[:, 0] > SURE


def _mean(values_BHW: Tensor, chosen_BHW: Tensor) -> Tensor:
    """The mean of the chosen values; 0 where none is."""
    return torch.where(chosen_BHW, values_BHW, 0).sum() / chosen_BHW.sum().clamp_min(1)


class BoundaryHead(nn.Sequential):
    """Where borders are: a 3x3 convolution, batch norm, ReLU, and a 1x1 convolution: [B, C(w), H, W] to logits [B, 1, H, W]."""

    def __init__(self, channels: int, widths: tuple[float, ...]) -> None:
        super().__init__(
            SlimConv2d([channels], channels, 3, widths),
            SwitchableBatchNorm2d(channels, widths),
            nn.ReLU(),
            SlimConv2d([channels], 1, 1, widths, bias=True, fixed_outputs=True),
        )


class SlimsegDistiller(Distiller):
    """The terms ``downward``, ``boundary`` and, with a head, ``head``, each summed over widths.

    Args:
        config: The method's section.
        widths: The student's, the widest first.
        channels: Of the tap that the head reads; None without a head.
    """

    def __init__(self, config: SlimsegConfig, widths: tuple[float, ...], channels: int | None) -> None:
        super().__init__()
        self.config, self.widths = config, widths
        self.student_taps = () if channels is None else (config.boundary_layer,)
        self.head = None if channels is None else BoundaryHead(channels, widths)
        self._band: tuple[Tensor, Tensor] | None = None

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The terms of the width at which the student ran; ``step.teacher`` is the next wider one, None for the widest."""
        config, terms = self.config, {}
        logits = step.student.logits
        with torch.autocast(step.images.device.type, enabled=False):
            if step.teacher is not None and config.downward_weight:
                far = downward(logits, step.teacher.logits, step.labels, config.temperature)
                terms["downward"] = config.downward_weight * far
            if step.teacher is not None and not config.narrow_labels:
                return terms
            band = self._band_of(step.labels)
            if self.head is not None:
                edges = self.head(step.student.taps[config.boundary_layer].float())
                terms["head"] = head_loss(edges, band)
                band = sure_borders(edges, step.labels)
            if config.boundary_weight:
                terms["boundary"] = config.boundary_weight * boundary_loss(logits, step.labels, band)
        return terms

    def _band_of(self, labels: Tensor) -> Tensor:
        """The labels' band; all widths of a step share it."""
        if self._band is None or self._band[0] is not labels:
            self._band = (labels, boundary_band(labels, self.config.boundary_radius_px))
        return self._band[1]

    def train_step(self, state: TrainState, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Every width forward and backward, the widest first, each against the logits of the one before; then one move."""
        state.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for part_images, part_labels in zip(images.chunk(state.accumulate), labels.chunk(state.accumulate), strict=True):
            share, wider = len(part_images) / len(images), None
            for width in self.widths:
                # a width leaves the other ones' batch norms without gradients, for which DistributedDataParallel would wait
                with ExitStack() as stack:
                    stack.enter_context(no_sync(state))
                    for module in (state.inner, self.head):
                        if module is not None:
                            stack.enter_context(at_width(module, width))
                    inputs = replace(forward(state, part_images, part_labels), teacher=wider)
                    with state.fabric.autocast():
                        terms = self._terms(state, inputs)
                    for name, value in finite(terms, state).items():
                        sums[name] = sums.get(name, 0.0) + share * value
                    state.fabric.backward(share * torch.stack([term.float() for term in terms.values()]).sum())
                wider = Outputs(inputs.student.logits.detach())
        for module in (state.inner, self):
            average_gradients(state, module)
        if state.clip_norm is not None:
            state.fabric.clip_gradients(state.student, state.optimizer, max_norm=state.clip_norm, error_if_nonfinite=False)
        state.optimizer.step()
        return sums

    def _terms(self, state: TrainState, inputs: StepInputs) -> dict[str, Tensor]:
        """The task's term and the method's own, of one width."""
        terms = self.losses(inputs)
        if inputs.teacher is None or self.config.narrow_labels:
            logits = at_labels(inputs.student.logits, inputs.labels)
            terms["task"] = task_loss(state, replace(inputs, student=replace(inputs.student, logits=logits)))
        # a width that nothing teaches: the sum needs a term
        return terms or {"task": (0 * inputs.student.logits).sum()}
