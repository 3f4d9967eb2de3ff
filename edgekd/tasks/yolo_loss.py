"""YOLOv5's loss, as GHOST trains with it.

Zheng et al.: Distance-IoU Loss, AAAI 2020, arXiv 1911.08287 (CIoU); Jocher: YOLOv5 (assignment, gains, balance). Written from the
specification of GHOST (Zhang et al., IEEE TGRS 2023, arXiv 2301.00131).

A box is assigned to every anchor whose width and height are within a factor of 4 of its own, in the cell of its centre and in the
nearest cell to the side and above or below. With h heads and K classes:

    loss = (3 / h) * [gain_box * (1 - CIoU) + gain_obj * (size / 640)^2 * BCE(objectness, CIoU) + gain_cls * K / 80 *
    BCE(classes)]

each term a mean over what is assigned (over all predictions for the objectness, heads weighted 4, 1, 0.4), summed over heads.

Differs from the official code: it multiplies by the batch size, and this is a mean; where two boxes claim one prediction, its
objectness is the larger CIoU, not that of the one written last; predictions in ignored boxes do not count as background.

Shape letters: B images, P predictions, A anchors of a head, K classes, M boxes of an image, n assigned boxes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.engines.detections import BOX, Heads

BALANCE = {1: (4.0,), 2: (4.0, 1.0), 3: (4.0, 1.0, 0.4)}
"""Number of heads -> weight of each one's objectness."""
NOMINAL_PX = 640
NOMINAL_CLASSES = 80


@dataclass(frozen=True)
class Gains:
    """What the parts of the loss weigh."""

    box: float = 0.05
    objectness: float = 1.0
    classes: float = 0.5
    anchor_ratio: float = 4.0


@dataclass(frozen=True)
class Assigned:
    """Boxes and the predictions of one head that are to find them."""

    image: Tensor
    """int64 [n]."""
    prediction: Tensor
    """int64 [n]: by anchor, row and column."""
    cell: Tensor
    """int64 [n, 2]: column and row."""
    box: Tensor
    """float32 [n, 4]: centre and size, in cells."""
    anchor: Tensor
    """float32 [n, 2]: width and height, in cells."""
    label: Tensor
    """int64 [n]."""


def detection_loss(predictions_BPO: Tensor, labels_BM6: Tensor, heads: Heads, gains: Gains) -> Tensor:
    """The loss, a scalar in float32.

    Args:
        predictions_BPO: Raw, [B, P, 5 + K].
        labels_BM6: As in edgekd.data.boxes.
        heads: Where predictions stand.
        gains: What the parts weigh.
    """
    raw = predictions_BPO.float()
    classes = raw.shape[2] - BOX
    count, start = len(heads.strides), 0
    box = objectness = label = raw.new_zeros(())
    ignored = _ignored(labels_BM6, heads, raw.device)
    for stride, anchors, balance in zip(heads.strides, heads.anchors, BALANCE[count], strict=True):
        cells = heads.size_px // stride
        length = len(anchors) * cells * cells
        part = raw[:, start : start + length]
        found = assign(labels_BM6, anchors, stride, cells, gains.anchor_ratio)
        target = torch.zeros_like(part[..., 4])
        if len(found.image):
            rows = part[found.image, found.prediction]
            centre = 2 * torch.sigmoid(rows[:, :2]) - 0.5 + found.cell
            size = (2 * torch.sigmoid(rows[:, 2:4])).square() * found.anchor
            overlap = ciou(torch.cat([centre, size], 1), found.box)
            box = box + (1 - overlap).mean()
            flat = found.image * length + found.prediction
            target.view(-1).scatter_reduce_(0, flat, overlap.detach().clamp_min(0), "amax")
            if classes > 1:
                wanted = F.one_hot(found.label, classes).to(rows.dtype)
                label = label + F.binary_cross_entropy_with_logits(rows[:, BOX:], wanted)
        each = F.binary_cross_entropy_with_logits(part[..., 4], target, reduction="none")
        if ignored is not None:
            each = each * (~ignored[:, start : start + length] | (target > 0))
        objectness = objectness + balance * each.mean()
        start += length
    scale = 3 / count
    return (
        gains.box * scale * box
        + gains.objectness * (heads.size_px / NOMINAL_PX) ** 2 * scale * objectness
        + gains.classes * classes / NOMINAL_CLASSES * scale * label
    )


def assign(labels_BM6: Tensor, anchors: tuple[tuple[float, float], ...], stride: int, cells: int, ratio: float) -> Assigned:
    """Which predictions of a head are to find which boxes.

    Args:
        labels_BM6: As in edgekd.data.boxes.
        anchors: Widths and heights, pixels.
        stride: Pixels per cell.
        cells: Per side.
        ratio: Largest factor between the sides of a box and of its anchor.
    """
    image, row = torch.nonzero((labels_BM6[..., 0] >= 0) & (labels_BM6[..., 5] == 0), as_tuple=True)
    rows = labels_BM6[image, row]
    centre, size = (rows[:, 1:3] + rows[:, 3:5]) / 2 / stride, (rows[:, 3:5] - rows[:, 1:3]) / stride
    shapes = rows.new_tensor(anchors) / stride
    factor = size[None] / shapes[:, None]
    anchor, index = torch.nonzero(torch.maximum(factor, 1 / factor).amax(2) < ratio, as_tuple=True)
    centre_n, left = centre[index], cells - centre[index]
    # the cell itself, and the neighbours whose centres are nearest, inside the map
    near, far = (centre_n % 1 < 0.5) & (centre_n > 1), (left % 1 < 0.5) & (left > 1)
    choices = torch.stack([torch.ones_like(near[:, 0]), near[:, 0], near[:, 1], far[:, 0], far[:, 1]])
    offsets = centre_n.new_tensor([[0, 0], [-0.5, 0], [0, -0.5], [0.5, 0], [0, 0.5]])
    which, member = torch.nonzero(choices, as_tuple=True)
    anchor, index = anchor[member], index[member]
    cell = (centre[index] + offsets[which]).long().clamp(0, cells - 1)
    prediction = (anchor * cells + cell[:, 1]) * cells + cell[:, 0]
    boxes = torch.cat([centre[index], size[index]], 1)
    return Assigned(image[index], prediction, cell, boxes, shapes[anchor], rows[index, 0].long())


def ciou(one: Tensor, other: Tensor) -> Tensor:
    """Complete IoU: IoU - distance of the centres - difference of the proportions.

    Args:
        one: [n, 4], centre and size.
        other: [n, 4]; no gradient is needed for it.

    Returns:
        [n], above -1 and at most 1.
    """
    epsilon = 1e-7
    low, high = one[:, :2] - one[:, 2:] / 2, one[:, :2] + one[:, 2:] / 2
    low2, high2 = other[:, :2] - other[:, 2:] / 2, other[:, :2] + other[:, 2:] / 2
    shared = (torch.minimum(high, high2) - torch.maximum(low, low2)).clamp_min(0).prod(1)
    iou = shared / (one[:, 2:].prod(1) + other[:, 2:].prod(1) - shared + epsilon)
    hull = torch.maximum(high, high2) - torch.minimum(low, low2)
    distance = (one[:, :2] - other[:, :2]).square().sum(1) / (hull.square().sum(1) + epsilon)
    angle = torch.atan(other[:, 2] / (other[:, 3] + epsilon)) - torch.atan(one[:, 2] / (one[:, 3] + epsilon))
    shape = 4 / math.pi**2 * angle.square()
    with torch.no_grad():
        weight = shape / (shape - iou + 1 + epsilon)
    return iou - distance - weight * shape


def _ignored(labels_BM6: Tensor, heads: Heads, device: torch.device) -> Tensor | None:
    """Which predictions stand in an ignored box, bool [B, P]; None where there is none."""
    marked = (labels_BM6[..., 0] >= 0) & (labels_BM6[..., 5] > 0)
    if not marked.any():
        return None
    table = torch.from_numpy(heads.table).to(device)
    centre_P2 = (table[:, :2] + 0.5) * table[:, 2:3]
    edges = labels_BM6[:, :, None, 1:5]
    inside = (centre_P2 >= edges[..., :2]).all(-1) & (centre_P2 < edges[..., 2:]).all(-1)
    return (inside & marked[..., None]).any(1)
