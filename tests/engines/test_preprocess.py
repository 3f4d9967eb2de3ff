import numpy as np
import pytest

from edgekd.engines.preprocess import normalize
from edgekd.errors import DataError

PREPROCESSING = {"layout": "NCHW", "color": "RGB", "scale": 1 / 255, "mean": [0.5, 0.4, 0.0], "std": [0.25, 0.2, 2.0]}


def test_hand_computed_values():
    images = np.zeros((1, 1, 2, 3), np.uint8)
    images[0, 0, 0] = [255, 51, 0]
    images[0, 0, 1] = [0, 102, 255]
    result = normalize(images, PREPROCESSING)
    # red (1 - 0.5) / 0.25 and (0 - 0.5) / 0.25; green (0.2 - 0.4) / 0.2 and (0.4 - 0.4) / 0.2; blue 0 / 2 and 1 / 2
    np.testing.assert_allclose(result, [[[[2.0, -2.0]], [[-1.0, 0.0]], [[0.0, 0.5]]]], atol=1e-6)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous


def test_grayscale():
    result = normalize(np.full((2, 4, 5, 1), 255, np.uint8), {"scale": 1 / 255, "mean": [0.0], "std": [0.5]})
    assert result.shape == (2, 1, 4, 5)
    np.testing.assert_allclose(result, 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    "images", [np.zeros((1, 2, 2, 3), np.float32), np.zeros((2, 2, 3), np.uint8), np.zeros((1, 3, 2, 2), np.uint8)]
)
def test_other_images_are_refused(images):
    with pytest.raises(DataError, match=r"expected images as uint8 \[N, H, W, 3\]; received"):
        normalize(images, PREPROCESSING)


def test_other_layouts_are_refused():
    with pytest.raises(DataError, match="'NHWC'"):
        normalize(np.zeros((1, 2, 2, 3), np.uint8), {**PREPROCESSING, "layout": "NHWC"})
