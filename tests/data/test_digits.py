import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.datasets import load_digits

from edgekd.data import DigitsConfig, load, preflight

FIRST_TEST_LABELS = [3, 5, 1, 4, 6, 9, 7, 0, 2, 8, 3, 5]
FINGERPRINT = "f09f4d76c9adc1c949451ed71078d7e7624efa1b4824d9bd82f615584fbdf743"
"""At 8 px nothing is resized, so no version of Pillow changes it."""


@pytest.fixture(scope="module")
def digits8():
    """At 8 px nothing is resized, so pixels can be compared with scikit-learn's."""
    return load(DigitsConfig(size_px=8), search=[])


def test_sizes_types_and_read_only():
    data = load(DigitsConfig(size_px=20, channels=3), search=[])
    assert [len(split) for split in data.splits] == [1000, 197, 500, 100]
    assert [split.name for split in data.splits] == ["train", "val", "test", "calib"]
    assert (data.height, data.width, data.channels, data.num_classes) == (20, 20, 3, 10)
    assert data.classes == tuple("0123456789")
    for split in data.splits:
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert not split.images.flags.writeable
        assert not split.labels.flags.writeable
        assert (split.images[..., 0] == split.images[..., 2]).all()
    assert data.mean[0] == data.mean[2]


def test_the_splits_together_are_exactly_scikit_learns_digits(digits8):
    bundle = load_digits()
    expected = sorted(
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), label)
        for image, label in zip(bundle.images, bundle.target, strict=True)
    )
    found = sorted(
        (image.tobytes(), label) for split in digits8.splits for image, label in zip(split.images, split.labels, strict=True)
    )
    assert found == expected


def test_every_split_is_stratified(digits8):
    whole = np.bincount(load_digits().target) / 1797
    for split in digits8.splits:
        counts = np.bincount(split.labels, minlength=10)
        assert np.abs(counts - whole * len(split)).max() <= 2, split.name
    # and so is a stretch from the front
    assert np.abs(np.bincount(digits8.train.labels[:100], minlength=10) - whole * 100).max() <= 2


def test_statistics_are_those_of_train(digits8):
    values = digits8.train.images.astype(np.float64) / 255
    assert digits8.mean == pytest.approx((values.mean(),), abs=1e-12)
    assert digits8.std == pytest.approx((values.std(),), abs=1e-12)


def test_enlarged_without_new_extremes_and_same_split(digits8):
    large = load(DigitsConfig(), search=[])
    assert large.height == 32
    for small, big in zip(digits8.splits, large.splits, strict=True):
        assert (small.labels == big.labels).all()
        means = np.abs(small.images.mean(axis=(1, 2, 3)) - big.images.mean(axis=(1, 2, 3)))
        assert means.max() < 3  # bilinear enlargement keeps the mean


def test_deterministic_and_fingerprint_follows_options(digits8):
    again = load(DigitsConfig(size_px=8), search=[])
    assert again.fingerprint == digits8.fingerprint
    assert load(DigitsConfig(size_px=9), search=[]).fingerprint != digits8.fingerprint
    assert load(DigitsConfig(size_px=8, channels=3), search=[]).fingerprint != digits8.fingerprint


def test_the_split_never_changes(digits8):
    """Published numbers depend on it: a change of the order or of the bounds is a change of the benchmark."""
    assert digits8.test.labels[:12].tolist() == FIRST_TEST_LABELS
    assert digits8.fingerprint == FINGERPRINT


@pytest.mark.parametrize("bad", [{"size_px": 7}, {"size_px": 65}, {"channels": 2}, {"limit": 3}])
def test_bounds(bad):
    with pytest.raises(ValidationError):
        DigitsConfig(**bad)


def test_preflight_needs_nothing():
    preflight(DigitsConfig(), search=[])
