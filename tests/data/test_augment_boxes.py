"""Random changes of images with boxes: the boxes follow the pixels."""

import numpy as np
import pytest
import torch

from edgekd.data.augment_boxes import BoxAugmentConfig, BoxDraw, draw, transform
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


def gradients(count=8, seed=0):
    """Images whose pixels tell where they come from: 40 + column, 40 + row, 130 + 10 * image; one box each, of that class."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    images = np.stack([np.stack([40 + columns, 40 + rows, np.full_like(rows, 130 + 10 * i)], -1) for i in range(count)])
    corners = random.integers(0, SIZE - 12, (count, 2))
    sides = random.integers(6, 40, (count, 2))
    boxes = [
        np.array([[i, *a, *np.minimum(a + b, SIZE), i % 3 == 0]], dtype=float)
        for i, (a, b) in enumerate(zip(corners, sides, strict=True))
    ]
    return Split("train", images.astype(np.uint8), padded(boxes))


def place_of_box(image, index, box):
    """Where a box of image `index` must be, from the pixels alone: lines fitted to a tile's columns and rows tell.

    Returns:
        None where too little of the tile is seen to tell; else x1, y1, x2, y2 in the window, and the share of the area there.
    """
    tile = image[..., 2] == 130 + 10 * index
    # resized images are constant beyond the centres of their outermost pixels
    tile &= (np.abs(image[..., :2].astype(float) - 40 - SIZE / 2) < SIZE / 2 - 5).all(-1)
    places = np.nonzero(tile)[::-1]
    if not tile.any() or min(np.ptp(place) for place in places) < 12:
        return None
    edges = []
    for axis in (0, 1):
        slope, offset = np.polyfit(places[axis] + 0.5, image[..., axis][tile].astype(float) - 40 + 0.5, 1)
        edges.append(sorted((box[[axis, 2 + axis]] - offset) / slope))
    (x1, x2), (y1, y2) = edges
    whole = (x2 - x1) * (y2 - y1)
    x1, x2, y1, y2 = np.clip([x1, x2, y1, y2], 0, SIZE)
    return np.array([x1, y1, x2, y2]), (x2 - x1) * (y2 - y1) / whole


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.5, "translate": 0.3, "flip": True, "flip_vertical": True},
        {"mosaic": 1.0},
        {"mosaic": 1.0, "scale": 0.5, "translate": 0.2, "flip": True, "flip_vertical": True},
    ],
)
def test_boxes_are_where_the_pixels_say(options):
    data, kept, dropped = gradients(), 0, 0
    for seed in range(12):
        choice = draw(len(data), len(data), torch.Generator().manual_seed(seed))
        images, labels = transform(data, np.arange(len(data)), BoxAugmentConfig(**options), choice)
        for index, (image, rows) in enumerate(zip(images.numpy(), labels.numpy(), strict=True)):
            tiles = [index, *choice.others[index].tolist()] if "mosaic" in options else [index]
            assert set(rows[:, 0]) <= {-1, *tiles}
            for tile in tiles:
                expected = place_of_box(image, tile, data.labels[tile, 0, 1:5])
                if tiles.count(tile) > 1 or expected is None:
                    continue
                box, share = expected
                found = rows[rows[:, 0] == tile]
                side = (box[2:] - box[:2]).min()
                if len(found):
                    np.testing.assert_allclose(found[0, 1:5], box, atol=0.75)
                    assert found[0, 5] == data.labels[tile, 0, 5]
                    assert len(found) == 1
                    assert share > 0.05
                    assert side > 1
                    kept += 1
                else:
                    assert share < 0.15 or side < 3
                    dropped += 1
    assert kept > 40
    assert dropped > 10


def test_what_is_left_of_a_box_decides_whether_it_is_kept():
    """A square of 20 px at the left edge, shifted out to the left: a tenth of it is 2 px."""
    data = Split("train", np.zeros((1, SIZE, SIZE, 3), np.uint8), padded([np.array([[0, 0, 10, 20, 30, 0.0]])]))
    config = BoxAugmentConfig(translate=0.5)

    def left(shift_px):
        numbers = torch.full((1, 11), 0.5, dtype=torch.float64)
        numbers[0, 4] = (shift_px / (config.translate * SIZE) + 1) / 2
        _, labels = transform(data, np.arange(1), config, BoxDraw(numbers, torch.zeros(1, 3, dtype=torch.int64)))
        return labels[0, 0].tolist()

    assert left(-16) == [0, 0, 10, 4, 30, 0]
    assert left(-18.5) == [-1, 0, 0, 0, 0, 0]
    assert left(10) == [0, 10, 10, 30, 30, 0]


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
