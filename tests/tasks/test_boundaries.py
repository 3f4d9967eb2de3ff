"""The F-measure of outlines."""

import math

import pytest
import torch

from edgekd.data.base import IGNORE
from edgekd.tasks.boundaries import boundary_f, boundary_scores, outlines, tolerance_px, widened


def drawn(seed, classes=3, shape=(2, 9, 11)):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, classes, (shape[0], 3, 4), generator=generator)
    return coarse.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, : shape[1], : shape[2]]


def outline_by_hand(classes, wanted):
    rows, columns = len(classes), len(classes[0])
    found = set()
    for y in range(rows):
        for x in range(columns):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            others = [classes[b][a] for b, a in around if 0 <= b < rows and 0 <= a < columns]
            if classes[y][x] == wanted and any(other not in (wanted, IGNORE) for other in others):
                found.add((y, x))
    return found


def score_by_hand(given, labels, wanted, radius):
    given = [[g if v != IGNORE else IGNORE for g, v in zip(a, b, strict=True)] for a, b in zip(given, labels, strict=True)]
    ours, true = outline_by_hand(given, wanted), outline_by_hand(labels, wanted)
    if not ours and not true:
        return math.nan

    def share(some, others):
        near = [any(math.dist(place, other) <= radius for other in others) for place in some]
        return sum(near) / len(near) if near else 0.0

    precision, recall = share(ours, true), share(true, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("radius", [1, 2, 3, 20])
def test_agrees_with_loops(radius):
    given, labels = drawn(0), drawn(1)
    labels[0, :4, 2:5] = IGNORE
    found = boundary_scores(given, labels.to(torch.uint8), 4, radius)
    for image in range(2):
        expected = [score_by_hand(given[image].tolist(), labels[image].tolist(), wanted, radius) for wanted in range(4)]
        assert found[image].tolist() == pytest.approx(expected, nan_ok=True)
    assert found[:, 3].isnan().all(), "a class that nobody has"


def test_a_line_beside_the_true_one():
    """Moved by two pixels: right with a tolerance of two, wrong with one."""
    labels, given = torch.zeros(1, 8, 16, dtype=torch.long), torch.zeros(1, 8, 16, dtype=torch.long)
    labels[:, :, 6:], given[:, :, 8:] = 1, 1
    assert boundary_scores(given, labels, 2, 2).tolist() == [[1.0, 1.0]]
    assert boundary_scores(given, labels, 2, 1).tolist() == [[0.0, 0.0]]


def test_a_class_that_only_one_has_scores_nothing():
    labels, given = torch.zeros(1, 6, 6, dtype=torch.long), torch.zeros(1, 6, 6, dtype=torch.long)
    given[:, 2:4, 2:4] = 1
    assert boundary_scores(given, labels, 2, 1).tolist() == [[0.0, 0.0]]
    assert boundary_scores(labels, labels, 2, 1).isnan().all()


def test_the_border_of_the_image_and_ignored_pixels_are_no_outline():
    classes = torch.ones(1, 4, 4, dtype=torch.long)
    classes[:, :, 2:] = IGNORE
    assert not outlines(classes, 2).any()


def test_widened_is_a_disc():
    edges = torch.zeros(1, 1, 7, 7, dtype=torch.bool)
    edges[0, 0, 3, 3] = True
    expected = [[math.hypot(y - 3, x - 3) <= 2 for x in range(7)] for y in range(7)]
    assert widened(edges, 2)[0, 0].tolist() == expected


def test_the_mean_is_over_images_first():
    scores = torch.tensor([[1.0, math.nan, math.nan], [0.5, 0.25, math.nan]])
    assert boundary_f(scores) == pytest.approx((0.75 + 0.25) / 2)
    assert boundary_f(torch.full((2, 2), math.nan)) == 0
    assert [tolerance_px(*size) for size in ((180, 240), (512, 1024), (16, 16))] == [2, 9, 1]
