"""Loss and figures of saliency against numbers by hand and slow loops."""

import math

import numpy as np
import pytest
import torch

from edgekd.data.base import IGNORE
from edgekd.engines.postprocess import Salient, postprocess
from edgekd.errors import DataError
from edgekd.nn.overlap import boundary_dice_each, soft_dice
from edgekd.tasks import SaliencyConfig, build, saliency_measures
from edgekd.tasks.saliency import Saliency, boundary_px


def batch(seed=0, count=3, sides=(9, 11), maps=4):
    random = np.random.default_rng(seed)
    labels = np.zeros((count, *sides), np.uint8)
    for image in range(count):
        top, left = random.integers(1, 4, 2)
        labels[image, top : top + 4, left : left + 5] = 1
    logits = random.normal(size=(count, maps, *sides)) * 2 + (labels[:, None] * 2.0 - 1)
    return torch.from_numpy(logits.astype(np.float32)), torch.from_numpy(labels)


# -- loss


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_every_map_has_half_the_weight_of_the_one_before(weight, progress):
    logits, labels = batch()
    truth = (labels == 1)[:, None].float()
    expected = 0.0
    for index, share in enumerate([1, 1 / 2, 1 / 4, 1 / 8]):
        ours = logits[:, index : index + 1].sigmoid()
        edges = boundary_dice_each(ours, truth, boundary_px(progress)).mean()
        expected += share * (soft_dice(ours, truth) + weight * edges)
    assert Saliency(weight).loss(logits, labels, progress).item() == pytest.approx(expected.item(), rel=1e-5)


def test_boundaries_become_narrower_as_published():
    """Epoch e of 69 has max(1, 13 - 2 floor((e + 1) / 10)) pixels."""
    found = [boundary_px((epoch + 0.5) / 69) for epoch in range(69)]
    assert found == [13] * 9 + [11] * 10 + [9] * 10 + [7] * 10 + [5] * 10 + [3] * 10 + [1] * 10
    assert boundary_px(1.0) == 1


def test_what_does_not_count_changes_nothing():
    logits, labels = batch()
    labels[:, :2] = IGNORE
    logits.requires_grad_()
    value = Saliency().loss(logits, labels, 0.5)
    value.backward()
    assert logits.grad[:, :, :2].abs().sum() == 0
    assert logits.grad[:, :, 2:].abs().sum() > 0
    assert torch.allclose(value, Saliency().loss(logits[:, :, 2:], labels[:, 2:], 0.5))


def test_images_without_labels_are_left_out():
    logits, labels = batch()
    labels[1] = IGNORE
    known = Saliency().loss(logits[[0, 2]], labels[[0, 2]])
    assert Saliency().loss(logits, labels).item() == pytest.approx(known.item())
    assert Saliency().loss(logits, torch.full_like(labels, IGNORE)).item() == 0
    large = torch.ones(1, 1, 300, 300, dtype=torch.float16)
    assert Saliency().loss(large, torch.full((1, 300, 300), IGNORE)).item() == 0


def test_it_learns():
    logits, labels = batch()
    values = torch.zeros_like(logits).requires_grad_()
    optimizer, task = torch.optim.Adam([values], 0.3), Saliency()
    for step in range(60):
        optimizer.zero_grad()
        task.loss(values, labels, step / 60).backward()
        optimizer.step()
    assert task.evaluate({"logits": values[:, :1].detach().numpy()}, labels.numpy()) > 0.99


# -- figures, by loops


def slow_f(maps, truths):
    """The largest of 256 thresholds, pixel by pixel."""
    found = []
    for level in range(256):
        precision, recall = [], []
        for shares, truth in zip(maps, truths, strict=True):
            right = given = 0
            for share, true in zip(shares.flat, truth.flat, strict=True):
                if round(255 * share) >= level:
                    given, right = given + 1, right + int(true)
            precision.append(right / given if given else 0.0)
            recall.append(right / truth.sum() if truth.any() else 0.0)
        p, r = sum(precision) / len(precision), sum(recall) / len(recall)
        found.append(1.3 * p * r / (0.3 * p + r) if p and r else 0.0)
    return max(found)


def slow_e(shares, truth):
    threshold = min(1, 2 * sum(shares.flat) / shares.size)
    cut = [float(share >= threshold) for share in shares.flat]
    true = [float(value) for value in truth.flat]
    mean, other, total = sum(cut) / len(cut), sum(true) / len(true), 0.0
    for ours, theirs in zip(cut, true, strict=True):
        if other in (0, 1):
            total += float(ours == theirs)
        else:
            a, b = ours - mean, theirs - other
            total += (2 * a * b / (a**2 + b**2) + 1) ** 2 / 4
    return total / (len(cut) - 1)


def slow_s(shares, truth):
    height, width = truth.shape

    def likeness(values):
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        return 2 * mean / (mean**2 + 1 + spread)

    inside = [shares[place] for place in np.ndindex(height, width) if truth[place]]
    beyond = [1 - shares[place] for place in np.ndindex(height, width) if not truth[place]]
    share = len(inside) / truth.size
    objects = share * likeness(inside) + (1 - share) * likeness(beyond)
    places = [place for place in np.ndindex(height, width) if truth[place]]
    row = round(sum(place[0] for place in places) / len(places)) + 1
    column = round(sum(place[1] for place in places) / len(places)) + 1
    regions = 0.0
    for rows in (range(row), range(row, height)):
        for columns in (range(column), range(column, width)):
            ours = [float(shares[r, c]) for r in rows for c in columns]
            theirs = [float(truth[r, c]) for r in rows for c in columns]
            count = len(ours)
            if not count:
                continue
            x, y = sum(ours) / count, sum(theirs) / count
            xx = sum((a - x) ** 2 for a in ours) / (count - 1)
            yy = sum((b - y) ** 2 for b in theirs) / (count - 1)
            xy = sum((a - x) * (b - y) for a, b in zip(ours, theirs, strict=True)) / (count - 1)
            above, below = 4 * x * y * xy, (x * x + y * y) * (xx + yy)
            value = above / below if above != 0 else float(below == 0)
            regions += count / truth.size * value
    return max(0.0, (objects + regions) / 2)


def slow_weighted_f(shares, truth):
    """For an object without ties: of every place only one place of the object is the nearest."""
    height, width = truth.shape
    error = np.abs(shares - truth)
    inside = [place for place in np.ndindex(height, width) if truth[place]]
    moved, distance = error.copy(), np.zeros_like(error)
    for r, c in np.ndindex(height, width):
        if not truth[r, c]:
            away = {place: math.hypot(place[0] - r, place[1] - c) for place in inside}
            least = min(away.values())
            (nearest,) = [place for place, far in away.items() if far == least]
            moved[r, c], distance[r, c] = error[nearest], least
    weights = {(i, j): math.exp(-(i * i + j * j) / 50) for i in range(-3, 4) for j in range(-3, 4)}
    weights = {place: value / sum(weights.values()) for place, value in weights.items()}
    final = error.copy()
    for r, c in inside:
        smooth = sum(
            value * moved[r + i, c + j] for (i, j), value in weights.items() if 0 <= r + i < height and 0 <= c + j < width
        )
        final[r, c] = min(error[r, c], smooth)
    right = sum(1 - final[place] for place in inside)
    recall = 1 - sum(final[place] for place in inside) / len(inside)
    wrong = sum(
        final[place] * (2 - math.exp(math.log(0.5) / 5 * distance[place]))
        for place in np.ndindex(height, width)
        if not truth[place]
    )
    precision = right / (right + wrong)
    return 2 * recall * precision / (recall + precision)


def test_figures_agree_with_loops():
    logits, labels = batch(1)
    shares, truth = logits[:, 0].double().sigmoid().numpy(), labels.numpy() == 1
    found = Saliency().details({"logits": logits[:, :1].numpy()}, labels.numpy())
    pairs = list(zip(shares, truth, strict=True))
    assert found["max F"] == pytest.approx(slow_f(shares, truth))
    assert found["E-measure"] == pytest.approx(np.mean([slow_e(*pair) for pair in pairs]))
    assert found["S-measure"] == pytest.approx(np.mean([slow_s(*pair) for pair in pairs]))
    assert found["weighted F"] == pytest.approx(np.mean([slow_weighted_f(*pair) for pair in pairs]))
    assert found["MAE"] == pytest.approx(np.abs(shares - truth).mean())


def test_a_perfect_map():
    _, labels = batch()
    logits = (labels.numpy()[:, None] * 2.0 - 1) * 40
    found = Saliency().details({"logits": logits}, labels.numpy())
    assert found == pytest.approx({"max F": 1, "weighted F": 1, "S-measure": 1, "E-measure": 1, "MAE": 0}, abs=0.02)


def test_f_by_hand():
    """Two of four pixels stand out; one of them is found with certainty, one wrong pixel at one half."""
    logits = np.array([[[[40.0, -40.0, 0.1, -40.0]]]])
    labels = np.array([[[1, 1, 0, 0]]], np.uint8)
    ((precision, recall),) = saliency_measures.precision_and_recall(logits[:, 0], labels)
    assert precision.shape == recall.shape == (256,)
    assert (precision[200], recall[200]) == (1, 0.5)
    assert (precision[100], recall[100]) == (0.5, 0.5)
    assert (precision[0], recall[0]) == (0.5, 1)
    assert Saliency().evaluate({"logits": logits}, labels) == pytest.approx(1.3 * 0.5 / (0.3 + 0.5))


def test_images_in_which_nothing_or_all_stands_out():
    shares = np.full((4, 4), 0.2)
    nothing, all_ = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert saliency_measures.s_measure(shares, nothing) == pytest.approx(0.8)
    assert saliency_measures.s_measure(shares, all_) == pytest.approx(0.2)
    assert saliency_measures.weighted_f(shares, nothing) == 0
    for truth in (nothing, all_):
        assert saliency_measures.e_measure(shares.ravel(), truth.ravel()) == pytest.approx(slow_e(shares, truth))
    assert Saliency().evaluate({"logits": np.zeros((1, 1, 4, 4))}, nothing[None].astype(np.uint8)) == 0
    corner = np.zeros((4, 4), bool)
    corner[3, 3] = True
    assert 0 < saliency_measures.s_measure(shares, corner) < 1, "parts without a pixel weigh nothing"


def test_pixels_that_do_not_count_are_not_looked_at():
    logits, labels = (part.numpy() for part in batch(2, maps=1))
    labels[:, :, -2:] = IGNORE
    changed = logits.copy()
    changed[..., -2:] = 30
    one, two = (Saliency().details({"logits": values}, labels) for values in (logits, changed))
    assert one == two
    nothing = np.full_like(labels, IGNORE)
    assert set(Saliency().details({"logits": logits}, nothing).values()) == {0.0}


def test_while_training_as_afterwards():
    logits, labels = batch(3, count=7)
    task, metric = Saliency(), Saliency().new_metric()
    for start in range(0, 7, 3):
        metric.update(logits[start : start + 3], labels[start : start + 3])
    expected = task.evaluate({"logits": logits[:, :1].numpy()}, labels.numpy())
    assert metric.compute().item() == pytest.approx(expected), "side outputs are not looked at"


# -- engines, recipes


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"other": np.zeros(1)}, "expected an output 'logits'; the engine gave other"),
        ({"logits": np.zeros((3, 4, 9, 11), np.float32)}, r"shape \[3, 4, 9, 11\]; expected \[3, 1, 9, 11\]"),
        ({"logits": np.full((3, 1, 9, 11), np.inf, np.float32)}, "297 of 297 values of the output 'logits' are not finite"),
    ],
)
def test_what_engines_may_not_give(outputs, message):
    _, labels = batch()
    for figures in (Saliency().evaluate, Saliency().details):
        with pytest.raises(DataError, match=message):
            figures(outputs, labels.numpy())


def test_what_outputs_mean():
    logits = batch(maps=1)[0].numpy()
    about = Saliency().postprocessing(["background", "salient"])
    found, other = (postprocess({"logits": sign * logits}, about) for sign in (1, -1))
    assert isinstance(found, Salient)
    np.testing.assert_allclose(found.maps, 1 / (1 + np.exp(-logits[:, 0].astype(np.float64))), atol=1e-6)
    assert (found.changed(found), found.changed(other)) == (0, 3)
    assert ((found.margins() > 0) & (found.margins() < 0.5)).all()
    assert Saliency().changed(logits, -logits) == 1
    with pytest.raises(DataError, match=r"expected \[N, 1, H, W\]"):
        postprocess({"logits": logits[:, 0]}, about)


def test_data_of_two_classes():
    class Data:
        num_classes = 2

    config = SaliencyConfig(kind="saliency", boundary_weight=0.5)
    assert build(config, Data()) == Saliency(0.5)
    Data.num_classes = 255
    with pytest.raises(DataError, match="the data has 255") as caught:
        build(config, Data())
    assert "data.threshold" in caught.value.hint
