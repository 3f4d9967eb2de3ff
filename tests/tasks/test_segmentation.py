"""Losses and figures of segmentation against numbers by hand and slow loops."""

import numpy as np
import pytest
import torch

from edgekd.data.base import IGNORE
from edgekd.data.windows import Windows
from edgekd.engines.postprocess import Segmented, postprocess
from edgekd.errors import DataError
from edgekd.tasks.segmentation import Segmentation, WindowsConfig, balanced_weights, dice_loss

K = 3


def batch(seed=0, size=(2, 5, 6)):
    random = np.random.default_rng(seed)
    labels = random.integers(0, K, size).astype(np.uint8)
    labels[:, 0] = IGNORE
    return torch.from_numpy(random.normal(size=(size[0], K, *size[1:])).astype(np.float32)), torch.from_numpy(labels)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0)])
@pytest.mark.parametrize("hard", [1.0, 0.3])
def test_cross_entropy_agrees_with_a_loop(weights, hard):
    logits, labels = batch()
    found = []
    for image in range(2):
        for row in range(5):
            for column in range(6):
                label = int(labels[image, row, column])
                if label != IGNORE:
                    shares = logits[image, :, row, column].double().softmax(0)
                    weight = 1.0 if weights is None else weights[label]
                    found.append((-weight * shares[label].log().item(), weight))
    found = sorted(found, reverse=True)[: max(1, round(hard * len(found)))]
    expected = sum(value for value, _ in found) / sum(weight for _, weight in found)
    task = Segmentation(K, weights, hard_pixels=hard)
    assert task.loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_classes_that_weigh_nothing_costs_nothing():
    logits, labels = batch()
    logits.requires_grad_()
    loss = Segmentation(K, (0.0, 1.0, 1.0)).loss(logits, torch.zeros_like(labels))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_dice_agrees_with_a_loop():
    logits, labels = batch(1)
    labels[labels == 2] = 0  # a class that no pixel has
    shares = logits.double().softmax(1)
    found = []
    for label in range(K):
        both = sizes = there = 0.0
        for image, row, column in np.ndindex(2, 5, 6):
            if labels[image, row, column] != IGNORE:
                true = float(labels[image, row, column] == label)
                share = shares[image, label, row, column].item()
                both, sizes, there = both + share * true, sizes + share**2 + true, there + true
        if there:
            found.append(2 * both / sizes)
    assert len(found) == 2
    expected = 1 - sum(found) / len(found)
    assert dice_loss(logits, labels.long()).item() == pytest.approx(expected, rel=1e-5)
    alone, together = (Segmentation(K, dice_weight=weight).loss(logits, labels).item() for weight in (0, 0.5))
    assert together == pytest.approx(alone + 0.5 * expected, rel=1e-5)


def test_pixels_that_do_not_count_change_nothing():
    logits, labels = batch()
    task = Segmentation(K, (1.0, 2.0, 3.0), hard_pixels=0.5, dice_weight=1.0)
    logits.requires_grad_()
    value = task.loss(logits, labels)
    value.backward()
    assert logits.grad[:, :, 0].abs().sum() == 0
    assert logits.grad[:, :, 1:].abs().sum() > 0
    other = logits.detach().clone()
    other[:, :, 0] = 50
    assert task.loss(other, labels).item() == pytest.approx(value.item())
    nothing = torch.full_like(labels, IGNORE)
    assert task.loss(logits, nothing).item() == 0


def test_figures_by_hand():
    """Four pixels of class 0, of which one is taken for 1; two of class 1, both right; class 2 nowhere."""
    labels = np.array([[[0, 0, 0, 0, 1, 1, IGNORE]]], np.uint8)
    given = np.array([[[0, 0, 0, 1, 1, 1, 2]]])
    logits = np.eye(K, dtype=np.float32)[given].transpose(0, 3, 1, 2)
    task = Segmentation(K)
    found = task.details({"logits": logits}, labels)
    assert found["mIoU"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert found["Dice"] == pytest.approx((6 / 7 + 4 / 5) / 2)
    assert found["pixel accuracy"] == pytest.approx(5 / 6)
    assert found["boundary F"] == pytest.approx(1.0), "one pixel aside"
    metric = task.new_metric()
    metric.update(torch.from_numpy(logits), torch.from_numpy(labels))
    assert metric.compute().item() == pytest.approx(found["mIoU"]), "while training as afterwards"


def test_many_images_are_counted_together():
    logits, labels = batch(2, (40, 5, 6))
    task, metric = Segmentation(K), Segmentation(K).new_metric()
    for start in range(0, 40, 7):
        metric.update(logits[start : start + 7], labels[start : start + 7])
    assert metric.compute().item() == pytest.approx(task.evaluate({"logits": logits.numpy()}, labels.numpy()))


def test_the_tolerance_of_boundaries_can_be_given():
    labels = np.zeros((1, 8, 16), np.uint8)
    labels[..., 6:] = 1
    logits = np.eye(K, dtype=np.float32)[np.roll(labels, 3, axis=2)].transpose(0, 3, 1, 2)
    scores = [Segmentation(K, boundary_px=px).details({"logits": logits}, labels)["boundary F"] for px in (None, 2, 3)]
    assert 0 == scores[0] < scores[1] < scores[2]


def test_windows_say_what_fits():
    assert WindowsConfig(size_px=(48, 96)).build() == Windows((48, 96), (32, 64))
    assert WindowsConfig(size_px=(48, 96), stride_px=(48, 16)).build().stride_px == (48, 16)
    with pytest.raises(ValueError, match="multiples of 16"):
        WindowsConfig(size_px=(40, 96))
    with pytest.raises(ValueError, match=r"within 1 and the window's \[48, 96\]; received \[49, 16\]"):
        WindowsConfig(size_px=(48, 96), stride_px=(49, 16))


def test_balanced_weights_by_hand():
    labels = np.zeros((1, 1, 100), np.uint8)
    labels[0, 0, :20] = 1
    assert balanced_weights(labels, 3) == pytest.approx((100 / 80 / 3.125, 100 / 20 / 3.125, 1.0)), "5 and 1.25 have mean 3.125"
    labels[0, 0, 1:20] = IGNORE
    assert max(balanced_weights(labels, 2)) <= 10


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"other": np.zeros(1)}, "expected an output 'logits'; the engine gave other"),
        ({"logits": np.zeros((2, K, 5, 5), np.float32)}, r"shape \[2, 3, 5, 5\]; expected \[2, 3, 5, 6\]"),
        ({"logits": np.full((2, K, 5, 6), np.nan, np.float32)}, "180 of 180 values of the output 'logits' are not finite"),
    ],
)
def test_what_engines_may_not_give(outputs, message):
    _, labels = batch()
    with pytest.raises(DataError, match=message):
        Segmentation(K).evaluate(outputs, labels.numpy())


def test_what_outputs_mean():
    logits, _ = batch()
    task = Segmentation(K)
    found = postprocess({"logits": logits.numpy()}, task.postprocessing(["a", "b", "c"]))
    assert isinstance(found, Segmented)
    assert np.array_equal(found.indices, logits.argmax(1).numpy())
    assert found.changed(found) == 0
    other = postprocess({"logits": -logits.numpy()}, task.postprocessing(["a", "b", "c"]))
    assert found.changed(other) == 2
    assert (found.margins() > 0).all()
    assert task.changed(logits.numpy(), -logits.numpy()) > 0.5
    with pytest.raises(DataError, match=r"expected \[N, 3 classes, H, W\]"):
        postprocess({"logits": logits.numpy()[:, :2]}, task.postprocessing(["a", "b", "c"]))
