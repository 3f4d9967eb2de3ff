"""The detection task: its loss against slow loops, anchors, mAP by hand, and what the pipeline asks of a task."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from edgekd.engines.detections import Heads
from edgekd.errors import DataError
from edgekd.tasks.anchors import fit_anchors
from edgekd.tasks.average_precision import average_precisions
from edgekd.tasks.detection import Detection, DetectionConfig
from edgekd.tasks.yolo_loss import Gains, assign, ciou, detection_loss

HEADS = Heads(64, (4, 8, 16), (((5, 6), (8, 12), (14, 9)), ((16, 30), (33, 23), (20, 20)), ((30, 61), (62, 45), (50, 50))))
ONE = Heads(64, (8,), (((10, 13), (16, 30), (33, 23)),))


def labels(*images, most=4):
    found = torch.zeros(len(images), most, 6)
    found[:, :, 0] = -1
    for index, rows in enumerate(images):
        for place, row in enumerate(rows):
            found[index, place] = torch.tensor([*row, 0.0] if len(row) == 5 else row)
    return found


EXAMPLE = labels(
    [(0, 3, 4, 11, 17), (2, 30.5, 20.2, 58.1, 50.9)],
    [],
    [(1, 10, 10, 40, 33), (1, 11, 12, 41, 33), (0, 50, 50, 64, 64)],
)


def one_ciou(a, b):
    """Centre and size, one pair at a time, from the paper's equations."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    wide = min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2)
    high = min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2)
    shared = max(wide, 0) * max(high, 0)
    iou = shared / (aw * ah + bw * bh - shared)
    hull_w = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    hull_h = max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    rho = ((ax - bx) ** 2 + (ay - by) ** 2) / (hull_w**2 + hull_h**2)
    v = 4 / math.pi**2 * (math.atan(bw / bh) - math.atan(aw / ah)) ** 2
    return iou - rho - (v / (1 - iou + v) * v if v else 0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bce(logit, target):
    return -(target * math.log(sigmoid(logit)) + (1 - target) * math.log(1 - sigmoid(logit)))


def places_of(cx, cy, cells):
    """The cell of a centre, and the nearest one beside it and above or below, inside the map."""
    places = [(int(cx), int(cy))]
    if cx % 1 < 0.5 and cx > 1:
        places.append((int(cx) - 1, int(cy)))
    if cy % 1 < 0.5 and cy > 1:
        places.append((int(cx), int(cy) - 1))
    if (cells - cx) % 1 < 0.5 and cells - cx > 1:
        places.append((int(cx) + 1, int(cy)))
    if (cells - cy) % 1 < 0.5 and cells - cy > 1:
        places.append((int(cx), int(cy) + 1))
    return places


def slow_loss(predictions, truth, heads, gains):
    """The specification, box by box and cell by cell."""
    batch, _, width = predictions.shape
    classes, count, start, total = width - 5, len(heads.strides), 0, [0.0, 0.0, 0.0]
    balance = {1: [4.0], 3: [4.0, 1.0, 0.4]}[count]
    for stride, anchors, weight in zip(heads.strides, heads.anchors, balance, strict=True):
        cells = heads.size_px // stride
        target, boxes, class_terms = {}, [], []
        for image in range(batch):
            for row in truth[image].tolist():
                if row[0] < 0 or row[5] > 0:
                    continue
                cx, cy = (row[1] + row[3]) / 2 / stride, (row[2] + row[4]) / 2 / stride
                bw, bh = (row[3] - row[1]) / stride, (row[4] - row[2]) / stride
                for index, (aw, ah) in enumerate(anchors):
                    aw, ah = aw / stride, ah / stride
                    if max(bw / aw, aw / bw, bh / ah, ah / bh) >= gains.anchor_ratio:
                        continue
                    for column, line in places_of(cx, cy, cells):
                        place = (index * cells + line) * cells + column
                        x, y, w, h, _, *logits = predictions[image, start + place].tolist()
                        given = (
                            2 * sigmoid(x) - 0.5 + column,
                            2 * sigmoid(y) - 0.5 + line,
                            (2 * sigmoid(w)) ** 2 * aw,
                            (2 * sigmoid(h)) ** 2 * ah,
                        )
                        overlap = one_ciou(given, (cx, cy, bw, bh))
                        boxes.append(1 - overlap)
                        target[image, place] = max(target.get((image, place), 0), overlap, 0)
                        class_terms += [bce(value, float(k == int(row[0]))) for k, value in enumerate(logits)]
        length = len(anchors) * cells * cells
        terms = [
            bce(predictions[image, start + place, 4].item(), target.get((image, place), 0.0))
            for image in range(batch)
            for place in range(length)
        ]
        total[0] += sum(boxes) / len(boxes) if boxes else 0
        total[1] += weight * sum(terms) / len(terms)
        if classes > 1 and class_terms:
            total[2] += sum(class_terms) / len(class_terms)
        start += length
    return (3 / count) * (
        gains.box * total[0] + gains.objectness * (heads.size_px / 640) ** 2 * total[1] + gains.classes * classes / 80 * total[2]
    )


def drawn(heads, classes, batch=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads.predictions, 5 + classes, generator=draw, dtype=torch.float32)


@pytest.mark.parametrize("heads", [HEADS, ONE], ids=["three heads", "one head"])
@pytest.mark.parametrize("classes", [1, 3])
def test_the_loss_agrees_with_loops(heads, classes):
    predictions = drawn(heads, classes)
    truth = EXAMPLE.clone()
    truth[..., 0] = truth[..., 0].clamp(max=classes - 1)
    actual = detection_loss(predictions, truth, heads, Gains())
    assert actual.item() == pytest.approx(slow_loss(predictions, truth, heads, Gains()), rel=1e-4)


def test_every_part_has_a_gradient_and_no_label_none():
    predictions = drawn(HEADS, 3).requires_grad_()
    detection_loss(predictions, EXAMPLE, HEADS, Gains()).backward()
    assert (predictions.grad[..., 4] != 0).all(), "the objectness of every prediction"
    moved = (predictions.grad[..., :4] != 0).any(-1)
    assert 0 < moved.sum() < 0.1 * moved.numel()
    assert not moved[1].any(), "the image without a box has background only"


def test_images_without_any_box():
    predictions = drawn(HEADS, 3, batch=2).requires_grad_()
    loss = detection_loss(predictions, labels([], []), HEADS, Gains())
    loss.backward()
    assert loss.isfinite()
    assert predictions.grad[..., :4].abs().sum() == 0


def test_ignored_boxes_are_neither_trained_on_nor_background():
    predictions = drawn(ONE, 1, batch=1).requires_grad_()
    detection_loss(predictions, labels([(0, 16, 16, 40, 40, 1.0)]), ONE, Gains()).backward()
    cells = predictions.grad[0, :, 4].view(3, 8, 8)
    assert (cells[:, 2:5, 2:5] == 0).all(), "cells whose centres are inside"
    assert (cells != 0).sum() == 3 * (64 - 9)
    assert predictions.grad[..., :4].abs().sum() == 0


def test_a_perfect_prediction_costs_nearly_nothing():
    truth = labels([(0, 20, 20, 30, 33)])
    found = assign(truth, ONE.anchors[0], 8, 8, 4.0)
    predictions = torch.zeros(1, ONE.predictions, 6)
    predictions[..., 4] = -12
    wanted = ((found.box[:, :2] - found.cell + 0.5) / 2).clamp(1e-4, 1 - 1e-4)
    size = ((found.box[:, 2:] / found.anchor).sqrt() / 2).clamp(1e-4, 1 - 1e-4)
    predictions[0, found.prediction, :4] = torch.logit(torch.cat([wanted, size], 1))
    predictions[0, found.prediction, 4] = 12
    assert detection_loss(predictions, truth, ONE, Gains()) < 1e-3


def test_assignment_by_hand():
    """A box of 16 x 24 px at (20, 21): anchors within a factor of 4, and the cells beside and above its own."""
    found = assign(labels([(2, 12, 9, 28, 33)]), ONE.anchors[0], 8, 8, 4.0)
    # centre (2.5, 2.625): nothing to the left (2.5 % 1 is not under 0.5), the next row below (8 - 2.625) % 1 = 0.375
    assert sorted(set(map(tuple, found.cell.tolist()))) == [(2, 2), (2, 3)]
    assert len(found.image) == 3 * 2, "all three anchors"
    assert found.label.tolist() == [2] * 6
    few = assign(labels([(2, 12, 9, 28, 33)]), ((3.0, 3.0), (16.0, 24.0)), 8, 8, 4.0)
    assert few.anchor.tolist() == [[2.0, 3.0]] * 2, "16 is more than 4 times 3"


def test_ciou_by_hand():
    boxes = [((5, 5, 2, 2), (5, 5, 2, 2)), ((5, 5, 4, 2), (6, 5.5, 2, 3)), ((0, 0, 1, 1), (10, 0, 1, 4))]
    for one, other in boxes:
        given = [torch.tensor([box], dtype=torch.float64) for box in (one, other)]
        assert ciou(*given).item() == pytest.approx(one_ciou(one, other), abs=1e-5)
    assert ciou(*[torch.tensor([[5.0, 5, 2, 2]])] * 2).item() == pytest.approx(1, abs=1e-5)


def test_ciou_gradient():
    one = torch.tensor([[5.0, 5, 4, 2], [1, 2, 3, 4]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[5.5, 5.2, 3, 3], [1.5, 1, 2, 5]], dtype=torch.float64)
    ciou(one, other).sum().backward()
    # numerically, with the weight of the shape term held fixed as the paper does: only where proportions are equal
    square = torch.tensor([[5.0, 5, 2, 2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda box: ciou(torch.cat([box[:, :2], box[:, 2:3], box[:, 2:3]], 1), torch.tensor([[5.4, 5.3, 3, 3]]).double()), square
    )
    assert one.grad.isfinite().all()


def test_anchors_find_the_groups_of_sizes():
    rows = [(0, 0, 0, side, 2 * side) for side in (5, 10, 40) for _ in range(20)]
    found = fit_anchors(labels(rows, most=60).numpy(), 1, 3)
    assert found == (((5.0, 10.0), (10.0, 20.0), (40.0, 80.0)),)
    three = fit_anchors(labels(rows, most=60).numpy(), 3, 3)
    assert [len(head) for head in three] == [3, 3, 3]
    areas = [width * height for head in three for width, height in head]
    assert areas == sorted(areas), "the smallest for the finest head"
    assert fit_anchors(labels(rows, most=60).numpy(), 3, 3) == three
    with pytest.raises(DataError, match="no box, so no anchors"):
        fit_anchors(labels([]).numpy(), 1, 3)


def test_average_precision_by_hand():
    truth = labels([(0, 0, 0, 10, 10), (0, 20, 20, 30, 30)], [(1, 0, 0, 10, 10)]).numpy()
    perfect = [np.array([[0, 0, 10, 10, 0.9, 0], [20, 20, 30, 30, 0.8, 0]]), np.array([[0, 0, 10, 10, 0.7, 1]])]
    assert average_precisions(perfect, truth, 2) == (pytest.approx(1), pytest.approx(1))
    # class 0: right, wrong, right: precisions 1 and 2/3 at recalls 0.5 and 1 (51 and 50 of 101 points); class 1: missed
    some = [np.array([[0, 0, 10, 10, 0.9, 0], [50, 50, 60, 60, 0.85, 0], [20, 20, 30, 30, 0.8, 0]]), np.zeros((0, 6))]
    half, _ = average_precisions(some, truth, 2)
    assert half == pytest.approx((51 + 50 * 2 / 3) / 101 / 2, abs=1e-4)
    # an overlap of 0.6 counts at 0.5, 0.55 and 0.6, of ten
    loose = [np.array([[0, 0, 10, 6.01, 0.9, 0]]), np.zeros((0, 6))]
    half, whole = average_precisions(loose, labels([(0, 0, 0, 10, 10)], []).numpy(), 1)
    assert (half, whole) == (pytest.approx(1, abs=1e-4), pytest.approx(0.3, abs=1e-3))
    assert average_precisions([np.zeros((0, 6))] * 2, truth, 2) == (0, 0)


def test_ignored_boxes_do_not_count():
    truth = labels([(0, 0, 0, 10, 10), (0, 20, 20, 30, 30, 1.0)]).numpy()
    found = [np.array([[20, 20, 30, 30, 0.9, 0], [0, 0, 10, 10, 0.8, 0]])]
    assert average_precisions(found, truth, 1)[0] == pytest.approx(1), "neither found nor missed nor wrong"


def task(**options):
    return Detection(ONE, 2, **options)


def test_evaluate_and_the_metric_agree():
    predictions = drawn(ONE, 2, batch=4).numpy()
    truth = labels([(0, 3, 4, 11, 17)], [(1, 30, 20, 58, 50)], [], [(0, 8, 8, 30, 30)])
    found = task().details({"predictions": predictions}, truth.numpy())
    assert set(found) == {"mAP50", "mAP50_95"}
    assert found["mAP50_95"] <= found["mAP50"]
    assert task().evaluate({"predictions": predictions}, truth.numpy()) == found["mAP50"]
    metric = task().new_metric()
    for start in (0, 2):
        metric.update(torch.from_numpy(predictions[start : start + 2]), truth[start : start + 2])
    assert metric.compute().item() == pytest.approx(found["mAP50"])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"logits": np.zeros((1, 192, 7))}, "expected an output 'predictions'; the engine gave logits"),
        ({"predictions": np.zeros((1, 191, 7))}, r"has shape \[1, 191, 7\]; expected \[1, 192, 7\]"),
        ({"predictions": np.full((1, 192, 7), np.nan)}, "1344 of 1344 values of the output 'predictions' are not finite"),
    ],
)
def test_outputs_that_cannot_be(outputs, message):
    with pytest.raises(DataError, match=message):
        task().evaluate(outputs, labels([(0, 0, 0, 9, 9)]).numpy())


def test_changed_decisions():
    predictions = drawn(ONE, 2, batch=2).numpy()
    assert task().changed(predictions, predictions) == 0
    assert task().changed(predictions, predictions + 1e-4) < 0.01
    assert task().changed(predictions, np.full_like(predictions, -20)) == 1, "all boxes are gone"
    assert task().changed(predictions, np.full_like(predictions, np.nan)) == 1
    nothing = np.full_like(predictions, -20)
    assert task().changed(nothing, nothing) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": [[[1, 2], [3, 4], [5, 6]]]}, "anchors has 1 heads, and strides 3"),
        ({"anchors": [[[1, 2]]], "strides": [4]}, "each head has 3 pairs"),
        ({"anchors": [[[1, 2], [3, 0], [5, 6]]], "strides": [4]}, "above 0"),
        ({"confidence": 1}, "less than 1"),
        ({"strides": []}, "at least 1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValidationError, match=message):
        DetectionConfig(kind="detection", **options)
