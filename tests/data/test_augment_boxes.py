"""Random changes of images with boxes: the boxes follow the pixels."""

import numpy as np
import pytest
import torch

from edgekd.data.augment_boxes import BoxAugmentConfig, draw, transform
from edgekd.data.base import Split
from edgekd.data.batches import epoch_batches
from edgekd.data.boxes import padded

SIZE = 64


def split(count=8, channels=3, seed=0):
    """Dark images, each with two bright rectangles exactly where its boxes are."""
    random = np.random.default_rng(seed)
    images = np.full((count, SIZE, SIZE, channels), 10, np.uint8)
    boxes = []
    for image in images:
        rows = []
        for label, top in ((0, 4), (1, 36)):
            x, y, wide, high = (
                random.integers(2, 30),
                top + random.integers(0, 6),
                random.integers(12, 26),
                random.integers(12, 18),
            )
            image[y : y + high, x : x + wide] = 100 + 100 * label
            rows.append([label, x, y, x + wide, y + high, 0])
        boxes.append(np.array(rows, dtype=float))
    return Split("train", images, padded(boxes))


def changed(config, data=None, seed=0):
    data = data or split()
    choice = draw(len(data), len(data), torch.Generator().manual_seed(seed))
    return transform(data, np.arange(len(data)), config, choice)


def is_on_its_pixels(image, row):
    """The box's inside is bright, and a frame around it is not, where it does not touch the border or another box."""
    label, x1, y1, x2, y2 = (float(value) for value in row[:5])
    inside = image[round(y1) + 2 : round(y2) - 2, round(x1) + 2 : round(x2) - 2]
    return inside.size == 0 or bool((np.abs(inside.astype(int) - (100 + 100 * label)) < 30).mean() > 0.9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flip": True},
        {"flip_vertical": True},
        {"scale": 0.5},
        {"translate": 0.3},
        {"mosaic": 1.0},
        {"mosaic": 1.0, "scale": 0.5, "translate": 0.2, "flip": True, "flip_vertical": True},
        {"mosaic": 0.5, "scale": 0.4},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_boxes_follow_the_pixels(options, seed):
    images, labels = changed(BoxAugmentConfig(**options), seed=seed)
    assert images.dtype == torch.uint8
    assert images.shape == (8, SIZE, SIZE, 3)
    assert labels.dtype == torch.float32
    count = 0
    for image, rows in zip(images.numpy(), labels.numpy(), strict=True):
        for row in rows[rows[:, 0] >= 0]:
            assert row[1:5].min() >= 0
            assert row[1:5].max() <= SIZE
            assert (row[3:5] - row[1:3] >= 2).all()
            assert is_on_its_pixels(image, row)
            count += 1
    assert count >= 6


def test_nothing_is_the_identity():
    data = split()
    images, labels = changed(BoxAugmentConfig(), data)
    assert np.array_equal(images.numpy(), data.images)
    assert np.array_equal(labels.numpy(), data.labels)


def test_bright_pixels_have_boxes():
    """The other way round: what a scaled and shifted image shows for the most part still has its box."""
    data = split()
    images, labels = changed(BoxAugmentConfig(scale=0.3, translate=0.1), data, seed=4)
    for image, rows in zip(images.numpy(), labels.numpy(), strict=True):
        bright = (image[..., 0] > 60) & (image[..., 0] != 114)
        for row in rows[rows[:, 0] >= 0]:
            x1, y1, x2, y2 = row[1:5].round().astype(int)
            bright[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = False
        assert bright.mean() < 0.03


def test_colours():
    data = split()
    bright, _ = changed(BoxAugmentConfig(value=0.5), data)
    assert not np.array_equal(bright.numpy(), data.images)
    grey = split(channels=1)
    one, _ = changed(BoxAugmentConfig(value=0.5), grey)
    np.testing.assert_array_equal(one.numpy()[..., 0], bright.numpy()[..., 0], err_msg="grey as colour: the value alone")
    coloured = split()
    coloured.images[..., 0] //= 2
    hued, _ = changed(BoxAugmentConfig(hue=0.3), coloured)
    assert not np.array_equal(hued.numpy(), coloured.images)
    np.testing.assert_allclose(hued.numpy().max(-1), coloured.images.max(-1), atol=2, err_msg="a hue changes no value")
    four = split(channels=4)
    all_, _ = changed(BoxAugmentConfig(hue=0.3, saturation=0.5, value=0.5), four)
    np.testing.assert_array_equal(all_.numpy()[..., 3], bright.numpy()[..., 0], err_msg="infrared has a value only")


def test_infrared_moves_with_the_colours():
    images, _ = changed(BoxAugmentConfig(mosaic=1.0, scale=0.5), split(channels=4))
    np.testing.assert_allclose(images[..., 3].numpy(), images[..., 0].numpy(), atol=1)


@pytest.mark.parametrize("batch", [4, 8])
def test_processes_share_the_batches_of_one(batch):
    data, config = split(), BoxAugmentConfig(mosaic=0.5, scale=0.3, flip=True, value=0.3)

    def epoch(rank, world):
        generator = torch.Generator().manual_seed(3)
        options = {"augment": config, "mean": [0.0] * 3, "std": [1.0] * 3, "drop_last": True}
        return list(epoch_batches(data, batch, generator=generator, rank=rank, world_size=world, **options))

    for whole, first, second in zip(epoch(0, 1), epoch(0, 2), epoch(1, 2), strict=True):
        assert torch.equal(whole[0], torch.cat([first[0], second[0]]))
        rows = [[row for row in rows.tolist() if row[0] >= 0] for part in (first[1], second[1]) for rows in part]
        assert [[row for row in rows.tolist() if row[0] >= 0] for rows in whole[1]] == rows


def test_the_same_seed_gives_the_same_batch():
    config = BoxAugmentConfig(mosaic=0.5, scale=0.3, hue=0.1, saturation=0.3)
    assert torch.equal(changed(config, seed=5)[0], changed(config, seed=5)[0])
    assert not torch.equal(changed(config, seed=5)[0], changed(config, seed=6)[0])
