"""Decoding and suppression against numbers by hand and slow loops."""

import math

import numpy as np
import pytest

from edgekd.engines.detections import Heads, detect, heads_from, overlaps, suppress, unmatched
from edgekd.engines.postprocess import Detected, postprocess
from edgekd.errors import DataError

HEADS = Heads(32, (8, 16), (((10.0, 20.0), (4.0, 4.0)), ((30.0, 12.0), (8.0, 9.0))))
CLASSES = 3


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def by_hand(predictions, confidence, iou, most):
    """The equations and the greedy suppression, one prediction at a time."""
    found, place = [], 0
    for stride, anchors in zip(HEADS.strides, HEADS.anchors, strict=True):
        cells = HEADS.size_px // stride
        for width, height in anchors:
            for row in range(cells):
                for column in range(cells):
                    x, y, w, h, objectness, *classes = predictions[place].tolist()
                    place += 1
                    cx, cy = (2 * sigmoid(x) - 0.5 + column) * stride, (2 * sigmoid(y) - 0.5 + row) * stride
                    bw, bh = (2 * sigmoid(w)) ** 2 * width, (2 * sigmoid(h)) ** 2 * height
                    for label, value in enumerate(classes):
                        score = sigmoid(objectness) * (sigmoid(value) if len(classes) > 1 else 1)
                        if score > confidence:
                            found.append([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2, score, label])
    kept = []
    for box in sorted(found, key=lambda box: -box[4]):
        if len(kept) < most and all(box[5] != other[5] or one_overlap(box, other) <= iou for other in kept):
            kept.append(box)
    return np.array(kept).reshape(-1, 6)


def one_overlap(a, b):
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(wide, 0) * max(high, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_predictions_count_anchors():
    assert HEADS.predictions == 2 * 16 + 2 * 4
    assert HEADS.table.shape == (40, 5)
    assert HEADS.table[1].tolist() == [1, 0, 8, 10, 20], "columns run fastest"
    assert HEADS.table[16].tolist() == [0, 0, 8, 4, 4], "then rows, then anchors"
    assert HEADS.table[32].tolist() == [0, 0, 16, 30, 12], "then heads"


def test_one_box_by_hand():
    raw = np.full((1, 40, 6), -20.0, np.float32)
    raw[0, 5] = [0, 0, 0, 0, 3.0, -9.0]  # column 1, row 1, stride 8, anchor 10 x 20; one class: its value does not count
    (boxes,) = detect(raw, HEADS, confidence=0.5, iou=0.5, most=10)
    np.testing.assert_allclose(boxes, [[7, 2, 17, 22, sigmoid(3), 0]], rtol=1e-5)


@pytest.mark.parametrize("classes", [1, CLASSES])
@pytest.mark.parametrize(("confidence", "iou", "most"), [(0.3, 0.5, 300), (0.05, 0.3, 300), (0.05, 0.9, 7), (0.999, 0.5, 9)])
def test_agrees_with_loops(classes, confidence, iou, most):
    raw = np.random.default_rng(0).normal(0, 1.5, (3, 40, 5 + classes)).astype(np.float32)
    for each, boxes in zip(raw, detect(raw, HEADS, confidence=confidence, iou=iou, most=most), strict=True):
        np.testing.assert_allclose(boxes, by_hand(each, confidence, iou, most), rtol=1e-4, atol=1e-3)


def test_large_values_do_not_overflow():
    raw = np.full((1, 40, 6), 1e4, np.float32)
    (boxes,) = detect(raw, HEADS, confidence=0.5, iou=1.0, most=1000)
    assert np.isfinite(boxes).all()
    assert len(boxes) == 40


def test_only_the_best_candidates_are_looked_at(monkeypatch):
    monkeypatch.setattr("edgekd.engines.detections.CANDIDATES", 5)
    raw = np.random.default_rng(0).normal(0, 1, (1, 40, 6)).astype(np.float32)
    (boxes,) = detect(raw, HEADS, confidence=0.001, iou=1.0, most=300)
    np.testing.assert_allclose(
        boxes[:, 4], [sigmoid(value) for value in sorted(raw[0, :, 4].tolist(), reverse=True)[:5]], rtol=1e-5
    )


@pytest.mark.parametrize("shape", [(40, 8), (1, 39, 8), (1, 40, 5)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(DataError, match=r"expected \[N, 40, 5 \+ classes\]"):
        detect(np.zeros(shape, np.float32), HEADS, confidence=0.5, iou=0.5, most=1)


def test_overlaps_and_suppression():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [5, 5, 15, 15], [20, 20, 30, 30], [0, 0, 0, 0]], float)
    np.testing.assert_allclose(overlaps(boxes[:1], boxes)[0], [1, 0.5, 25 / 175, 0, 0])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    assert suppress(boxes, scores, np.zeros(5), iou=0.4, most=9) == [0, 2, 3, 4]
    assert suppress(boxes, scores, np.arange(5), iou=0.4, most=9) == [0, 1, 2, 3, 4], "classes do not suppress each other"
    assert suppress(boxes, scores, np.arange(5), iou=0.4, most=2) == [0, 1]


def test_unmatched_boxes():
    one = np.array([[0, 0, 10, 10, 0.9, 0], [20, 20, 30, 30, 0.8, 1]])
    assert unmatched(one, one) == 0
    assert unmatched(one, one + np.array([1, 1, 1, 1, 0, 0])) == 0
    assert unmatched(one, one[:1]) == 1
    assert unmatched(one, one[:, [0, 1, 2, 3, 4, 4]] * [1, 1, 1, 1, 1, 0]) == 1, "another class"
    assert unmatched(one[:0], one) == 2
    assert unmatched(np.concatenate([one[:1], one[:1]]), one[:1]) == 1, "a partner serves once"


def described():
    return {
        "kind": "detection",
        "output": "predictions",
        "classes": ["a", "b", "c"],
        "size_px": 32,
        "strides": [8, 16],
        "anchors": [[[10, 20], [4, 4]], [[30, 12], [8, 9]]],
        "confidence": 0.25,
        "iou": 0.6,
        "most": 300,
    }


def test_io_json_is_enough():
    assert heads_from(described()) == HEADS
    raw = np.random.default_rng(1).normal(0, 1, (2, 40, 8)).astype(np.float32)
    found = postprocess({"predictions": raw}, described())
    assert isinstance(found, Detected)
    assert found.classes == ("a", "b", "c")
    for one, two in zip(found.boxes, detect(raw, HEADS, confidence=0.25, iou=0.6, most=300), strict=True):
        assert np.array_equal(one, two)
    assert found.changed(found) == 0
    other = raw.copy()
    other[1, :, 4] = -20
    assert found.changed(postprocess({"predictions": other}, described())) == 1
    assert (found.margins() > 0).all()
    with pytest.raises(DataError, match="expected an output 'predictions'"):
        postprocess({"logits": raw}, described())
