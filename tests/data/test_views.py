"""Views of images and masks."""

import torch

from edgekd.data.base import IGNORE
from edgekd.data.views import geometric, make_views, photometric

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])


def drawn(batch=3, side=32):
    """A disc per image, somewhere, brighter than what is around it; and the mask of it."""
    torch.manual_seed(1)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centres = torch.randint(12, 20, (batch, 2))
    labels = (((rows - centres[:, :1, None]) ** 2 + (columns - centres[:, 1:, None]) ** 2) < 36).to(torch.uint8)
    pixels = (0.2 + 0.5 * labels[:, None]).expand(batch, 3, side, side)
    return (pixels - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1), labels


def test_shapes_and_which_ones_move():
    images, labels = drawn()
    views = make_views(images, labels, 5, MEAN, STD)
    assert views.images.shape == (5, *images.shape)
    assert views.labels.shape == (5, *labels.shape)
    assert views.labels.dtype == torch.uint8
    assert views.moved == (False, True, False, True, False)
    for view, moved in zip(views.labels, views.moved, strict=True):
        assert torch.equal(view, labels) != moved
    assert not any(torch.equal(view, images) for view in views.images)


def test_colours_stay_in_range_and_differ_per_image():
    pixels = torch.rand(1, 3, 16, 16).expand(4, 3, 16, 16)
    changed = photometric(pixels)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (changed[0] - changed[1]).abs().mean() > 0.01


def test_masks_move_with_their_images():
    """Where the moved mask says disc, the moved image is bright; the border of a pixel's width aside."""
    torch.manual_seed(2)
    images, labels = drawn(batch=8)
    moved, classes = geometric(images, labels)
    assert set(classes.unique().tolist()) <= {0, 1, IGNORE}
    assert not torch.equal(classes, labels)
    inside = moved[:, 0] > 0.25  # dark is -1, bright 1.5, outside 0
    disc = classes == 1
    assert (inside & disc).sum() / (inside | disc).sum() > 0.8
    assert 0.6 < disc.sum() / (labels == 1).sum() < 1.6


def test_a_turn_keeps_right_angles_on_wide_images():
    """Two points one above the other at a distance stay at that distance, whatever the ratio of the sides."""
    labels = torch.zeros(16, 32, 96, dtype=torch.uint8)
    labels[:, 6:9, 47:50], labels[:, 23:26, 47:50] = 1, 2
    torch.manual_seed(0)
    _, classes = geometric(torch.zeros(16, 1, 32, 96), labels)
    for mask in classes:
        one, two = ((mask == value).nonzero().double().mean(0) for value in (1, 2))
        assert 17 * 0.8 - 1 < (one - two).norm() < 17 * 1.2 + 1


def test_one_seed_gives_one_result():
    images, labels = drawn()
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(make_views(images, labels, 2, MEAN, STD))
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].labels, results[1].labels)


def test_mixed_precision_makes_the_same_views():
    """They are made inside of a step that is autocast."""
    images, labels = drawn()
    torch.manual_seed(5)
    exact = make_views(images, labels, 2, MEAN, STD)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        found = make_views(images, labels, 2, MEAN, STD)
    assert found.images.dtype == torch.float32
    assert torch.equal(found.images, exact.images)
    assert torch.equal(found.labels, exact.labels)
