"""Windows over images."""

import numpy as np
import pytest
import torch
import toy
from torch import nn

from edgekd.data.windows import Windows, windowed


@pytest.mark.parametrize(
    ("length", "size", "stride", "expected"),
    [(10, 10, 5, [0]), (10, 4, 4, [0, 4, 6]), (12, 4, 4, [0, 4, 8]), (10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 7])],
)
def test_places(length, size, stride, expected):
    windows = Windows((size, 2), (stride, 2))
    assert windows.places(length, 4) == [(top, left) for top in expected for left in (0, 2)]


def images(count=3, height=7, width=9):
    return torch.randn(count, 2, height, width, generator=torch.Generator().manual_seed(0))


def test_a_model_of_single_pixels_sees_no_difference():
    torch.manual_seed(0)
    model = nn.Conv2d(2, 4, 1).requires_grad_(False)
    torch.testing.assert_close(Windows((4, 4), (3, 2)).average(model, images()), model(images()))


def test_one_window_is_the_whole_image():
    torch.manual_seed(0)
    model = nn.Conv2d(2, 4, 3, padding=1).requires_grad_(False)
    assert torch.equal(Windows((7, 9), (7, 9)).average(model, images()), model(images()))


def test_averages_agree_with_a_loop_over_pixels():
    """The model numbers the places of a window, so that every pixel's mean follows from where it stands in each."""
    windows, numbers = Windows((4, 5), (2, 3)), torch.arange(20.0).view(1, 1, 4, 5)
    found = windows.average(lambda parts: numbers.expand(len(parts), 1, 4, 5), images())
    for y in range(7):
        for x in range(9):
            seen = [
                float(numbers[0, 0, y - top, x - left])
                for top, left in windows.places(7, 9)
                if 0 <= y - top < 4 and 0 <= x - left < 5
            ]
            assert found[0, 0, y, x].item() == pytest.approx(sum(seen) / len(seen))


def test_cut_and_stitched_is_what_the_model_averages():
    """The way of engines against the way of the model."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    windows, split = Windows((16, 32), (16, 16)), toy.scenes().test
    whole = torch.from_numpy(split.images.copy()).permute(0, 3, 1, 2).float()
    parts = windows.cut(split)
    assert len(parts) == len(split) * 2
    assert parts.labels.dtype == np.uint8
    logits = model(torch.from_numpy(parts.images.copy()).permute(0, 3, 1, 2).float()).numpy()
    torch.testing.assert_close(torch.from_numpy(windows.stitch(logits, 32, 32)), windows.average(model, whole))
    labels = np.eye(256, dtype=np.float32)[parts.labels].transpose(0, 3, 1, 2)
    assert np.array_equal(windows.stitch(labels, 32, 32).argmax(1), split.labels), "labels move with their images"


def test_a_windowed_data_set_is_another_one():
    data = toy.scenes()
    found = windowed(data, Windows((16, 16), (16, 16)))
    assert found.fingerprint != data.fingerprint
    assert found.fingerprint != windowed(data, Windows((16, 16), (8, 16))).fingerprint
    assert [len(split) for split in (found.val, found.test, found.calib)] == [24, 24, 16]
    assert found.train is data.train
