import hashlib

import numpy as np
import pytest

from edgekd.data.base import Part, assemble, carve, image_digests, stratified_order
from edgekd.errors import DataError

SIZES = {"train": 12, "val": 4, "test": 6, "calib": 4}


def make(classes=("a", "b"), **changes):
    """Four parts of distinct random images; ``changes`` replaces (images, labels) of a split."""
    rng = np.random.default_rng(0)
    parts = {}
    for name, count in SIZES.items():
        images, labels = rng.integers(0, 256, (count, 4, 5, 3), dtype=np.uint8), np.arange(count) % 2
        images, labels = changes.get(name, lambda i, n: (i, n))(images, labels)
        parts[name] = Part(images, labels.astype(np.int64), image_digests(images))
    return assemble(parts, classes)


def test_digest_is_sha256_of_each_image():
    images = np.arange(2 * 3 * 3 * 1, dtype=np.uint8).reshape(2, 3, 3, 1)
    assert [row.tobytes() for row in image_digests(images)] == [hashlib.sha256(image.tobytes()).digest() for image in images]


def test_statistics_per_channel_and_properties():
    data = make()
    values = data.train.images / 255.0
    assert data.mean == pytest.approx(values.mean(axis=(0, 1, 2)).tolist(), abs=1e-12)
    assert data.std == pytest.approx(values.std(axis=(0, 1, 2)).tolist(), abs=1e-12)
    assert (data.height, data.width, data.channels, data.num_classes) == (4, 5, 3, 2)


def test_a_constant_channel_does_not_divide_by_zero():
    def grey(images, labels):
        images = images.copy()
        images[..., 1] = 51
        return images, labels

    data = make(train=grey)
    assert data.mean[1] == pytest.approx(0.2)
    assert data.std[1] == 1.0


def test_fingerprint_sees_pixels_labels_classes_and_splits():
    def pixel(images, labels):
        images = images.copy()
        images[3, 2, 1, 0] ^= 1
        return images, labels

    def label(images, labels):
        labels = labels.copy()
        labels[3] ^= 1
        return images, labels

    prints = [make().fingerprint, make(classes=("a", "c")).fingerprint]
    for split in SIZES:
        prints += [make(**{split: change}).fingerprint for change in (pixel, label)]
    assert len(set(prints)) == len(prints)
    assert make().fingerprint == prints[0]
    # the same images and labels, but one of them in another split
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (26, 4, 5, 3), dtype=np.uint8), np.arange(26) % 2
    whole = Part(images, labels, image_digests(images))

    def divided(bound):
        bounds = {"train": (0, bound), "val": (bound, 16), "test": (16, 22), "calib": (22, 26)}
        return assemble({name: whole.cut(*pair, given=True) for name, pair in bounds.items()}, ["a", "b"]).fingerprint

    assert divided(12) != divided(11)


@pytest.mark.parametrize(
    ("classes", "change", "expected"),
    [
        (("a",), {}, "there are 1 classes (a); at least 2 are needed"),
        (("a", "b"), {"val": lambda i, n: (i[:0], n[:0])}, "the split val has no images"),
        (
            ("a", "b"),
            {"test": lambda i, n: (i[:, :3], n)},
            "images of test are 3 x 5 with 3 channels, those of train 4 x 5 with 3 channels",
        ),
        (("a", "b"), {"calib": lambda i, n: (i, n + 1)}, "labels of calib range from 1 to 2; with 2 classes 0 to 1 are allowed"),
        (("a", "b"), {"train": lambda i, n: (i, n - 1)}, "labels of train range from -1 to 0"),
        (("a", "b", "c"), {}, "no training image of 1 of 3 classes: c"),
    ],
)
def test_errors(classes, change, expected):
    with pytest.raises(DataError) as caught:
        make(classes=classes, **change)
    assert expected in caught.value.message


def test_repeated_images_warn_and_a_copied_split_is_refused():
    base = make()

    def borrow(count):
        def change(images, labels):
            images = images.copy()
            images[:count] = base.test.images[:count]
            return images, labels

        return change

    assert base.warnings == ()
    data = make(train=borrow(2), calib=borrow(3))
    assert data.warnings == (
        "2 of 6 images of test are in train too, byte for byte",
        "3 of 6 images of test are in calib too, byte for byte",
    )
    for split in ("calib", "val"):
        with pytest.raises(DataError, match=f"every image of {split} is also in test"):
            make(**{split: borrow(4)})


def test_stratified_order_is_a_fair_permutation_that_ignores_the_input_order():
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    keys = [f"image {number}" for number in range(100)]
    order = stratified_order(labels, keys)
    assert sorted(order) == list(range(100))
    for count in (10, 37, 50, 90):
        counts = np.bincount(labels[order[:count]], minlength=3)
        assert np.abs(counts - np.array([0.6, 0.3, 0.1]) * count).max() <= 1
    shuffled = np.random.default_rng(0).permutation(100)
    again = stratified_order(labels[shuffled], [keys[index] for index in shuffled])
    assert [keys[shuffled[index]] for index in again] == [keys[index] for index in order]


def test_carve_takes_from_the_front_without_copying_and_at_most_a_tenth():
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    train = Part(images, np.arange(100) % 2, image_digests(images))
    parts, warnings = carve(train, {"calib": 4, "val": 50})
    assert [int(x) for x in parts["calib"].images.ravel()] == [0, 1, 2, 3]
    assert [int(x) for x in parts["val"].images.ravel()] == list(range(4, 14))
    assert [int(x) for x in parts["train"].images.ravel()] == list(range(14, 100))
    assert np.shares_memory(parts["train"].images, images)
    assert warnings == ["val has 10 images instead of 50: at most a tenth of the 100 training images"]
    assert (parts["calib"].given, parts["val"].given, parts["train"].given) == (False, False, True)
