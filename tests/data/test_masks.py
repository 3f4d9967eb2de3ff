"""Images with masks: from files to splits, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from edgekd.data import augment_masks, load
from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.data.base import IGNORE, Split
from edgekd.data.batches import epoch_batches, eval_batches
from edgekd.data.masks import MasksConfig
from edgekd.errors import DataError

HEIGHT, WIDTH = 32, 48


def write(root, *, classes=3, sides=(HEIGHT, WIDTH)):
    """Grey pictures whose left part is class 1 and right part class 2, on class 0; a stripe of 255."""
    random = np.random.default_rng(0)
    for split, count in {"train": 24, "val": 4, "test": 4}.items():
        for kind in ("images", "masks", "valid"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            mask = np.zeros(sides, np.uint8)
            mask[4:20, :10], mask[4:20, 20:30], mask[-2:] = 1, min(2, classes - 1), IGNORE
            pixels = np.where(mask == IGNORE, 0, mask)[..., None] * 80 + random.integers(0, 40, (*sides, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
            valid = np.full(sides, 255, np.uint8)
            valid[:, -4:] = 0
            Image.fromarray(valid).save(root / split / "valid" / f"{index}.png")
    return root


def config(root, **options):
    return MasksConfig(kind="masks", root=str(root), **{"size_px": (HEIGHT, WIDTH), "cache": "memory", **options})


def test_images_and_masks_stay_together(tmp_path):
    data = load(config(write(tmp_path)), search=())
    assert data.classes == ("0", "1", "2")
    assert data.train.images.shape == (22, HEIGHT, WIDTH, 3), "calib is a tenth of train"
    assert data.train.labels.shape == (22, HEIGHT, WIDTH)
    assert data.train.labels.dtype == np.uint8
    for split in data.splits:
        for image, labels in zip(split.images, split.labels, strict=True):
            found = image.astype(int).mean(2) // 80
            assert (found[labels == 1] == 1).all()
            assert (found[labels == 2] == 2).all()
            assert (labels[-2:] == IGNORE).all()


def test_a_part_of_the_training_images_has_labels(tmp_path):
    root = write(tmp_path)
    whole, part, less = (load(config(root, labelled=share), search=()) for share in (1.0, 0.5, 0.01))
    known = [(split.train.labels != IGNORE).any((1, 2)) for split in (part, less)]
    assert [int(images.sum()) for images in known] == [11, 1], "half of 22, and at least one"
    assert (known[0] | ~known[1]).all(), "a larger share has all labels of a smaller one"
    assert np.array_equal(part.train.labels[known[0]], whole.train.labels[known[0]])
    assert np.array_equal(part.train.images, whole.train.images)
    for name in ("val", "test", "calib"):
        assert np.array_equal(getattr(part, name).labels, getattr(whole, name).labels), name
    assert part.fingerprint != whole.fingerprint


def test_the_cache_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path / "cache"))
    root = write(tmp_path / "data")
    first, again = (load(config(root, cache="disk"), search=()) for _ in range(2))
    memory = load(config(root), search=())
    assert first.fingerprint == again.fingerprint == memory.fingerprint
    assert np.array_equal(again.train.labels, memory.train.labels)
    mask = root / "train" / "masks" / "0.png"
    changed = np.array(Image.open(mask))
    changed[0, 0] = 2
    Image.fromarray(changed).save(mask)
    assert load(config(root), search=()).fingerprint != first.fingerprint, "a mask is data too"


def test_other_sizes_and_what_is_not_valid(tmp_path):
    root = write(tmp_path)
    data = load(config(root, size_px=(16, 96), valid="{split}/valid", classes=["ground", "one", "two"]), search=())
    assert data.classes == ("ground", "one", "two")
    assert data.test.images.shape[1:] == (16, 96, 3)
    assert set(np.unique(data.test.labels)) == {0, 1, 2, IGNORE}, "nearest: no class is made up"
    assert (data.test.labels[:, :, -8:] == IGNORE).all()


def test_classes_have_names(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    assert load(config(write(tmp_path)), search=()).classes == ("sky", "road", "car")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "train/masks/3.png").unlink(), r"3\.png of train has no mask in .*masks"),
        (lambda root: (root / "val/masks/1.png").write_bytes(b"x"), r"1\.png cannot be read as a mask"),
        (
            lambda root: Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(root / "val/masks/1.png"),
            r"it has colours \(mode RGB\); a mask has one value a pixel",
        ),
        (
            lambda root: Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "val/masks/1.png"),
            "has other sides than its image: 8 x 8 instead of 48 x 32",
        ),
        (
            lambda root: Image.fromarray(np.full((HEIGHT, WIDTH), 7, np.uint8)).save(root / "test/masks/1.png"),
            "has the value 7; with 3 classes 0 to 2 are allowed, and 255 where a pixel does not count",
        ),
        (lambda root: (root / "test").rename(root / "tset"), "a folder of test is missing"),
        (
            lambda root: (
                (root / "val/images/1.png").unlink(),
                (root / "val/images/1.png").symlink_to(root / "train/images/1.png"),
            ),
            "val and train share the image",
        ),
    ],
)
def test_what_is_refused(tmp_path, damage, message):
    root = write(tmp_path)
    damage(root)
    with pytest.raises(DataError, match=message):
        load(config(root), search=())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_px": (30, 48)}, "both sides must be multiples of 16"),
        ({"masks": "masks"}, "must contain {split}"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def split():
    """One image whose pixels say which class they are: 100 times it."""
    labels = np.random.default_rng(1).integers(0, 3, (1, HEIGHT // 8, WIDTH // 8)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    return Split("train", (labels[..., None] * 100).repeat(3, 3), labels)


@pytest.mark.parametrize("options", [{"flip": True}, {"flip_vertical": True}, {"scale": 0.5}, {"scale": 0.5, "flip": True}])
def test_a_mask_goes_where_its_pixels_go(options):
    data, chosen = split(), MaskAugmentConfig(**options)
    choice = augment_masks.draw(16, torch.Generator().manual_seed(0))
    images, labels = augment_masks.transform(data, np.zeros(16, np.int64), chosen, choice)
    assert images.shape == (16, HEIGHT, WIDTH, 3)
    counted = labels != IGNORE
    near = (images[..., 0].float() / 100 - labels.float()).abs()[counted] < 0.1
    assert near.float().mean() > 0.85, "all but the edges, which are smooth in the image"
    different = [image for image in images if not np.array_equal(image, data.images[0])]
    assert len(different) > 4
    if "scale" in options:
        assert (~counted).any()
        assert (images[~counted] == augment_masks.GREY).all()


def test_batches_have_sides_of_their_own():
    """Of 352 pixels the published 224, 256, 288, 320 and 352, equally often; images and masks alike."""
    config = MaskAugmentConfig(shrink=1 - 224 / 352)
    shares = np.linspace(0, 1, 500, endpoint=False)
    found = [config.sides(352, 352, share) for share in shares]
    assert {side: found.count((side, side)) for side in (224, 256, 288, 320, 352)} == dict.fromkeys(
        (224, 256, 288, 320, 352), 100
    )
    assert {MaskAugmentConfig(shrink=0.5).sides(176, 240, share) for share in shares} == {(96, 128), (128, 160), (160, 224)}
    assert MaskAugmentConfig().sides(176, 240, 0.5) == (176, 240)
    assert MaskAugmentConfig(shrink=0.5).sides(16, 48, 0.5) == (16, 48), "nothing smaller is allowed"
    large = np.random.default_rng(1).integers(0, 3, (1, 6, 8)).repeat(16, 1).repeat(16, 2).astype(np.uint8)
    data = Split("train", (large[..., None] * 100).repeat(3, 3), large)
    sizes = set()
    for seed in range(12):
        choice = augment_masks.draw(2, torch.Generator().manual_seed(seed))
        images, labels = augment_masks.transform(data, np.zeros(2, np.int64), MaskAugmentConfig(shrink=0.7), choice)
        assert images.shape == (2, *labels.shape[1:], 3)
        near = (images[..., 0].float() / 100 - labels.float()).abs() < 0.1
        assert near.float().mean() > 0.6, "all but the edges, which are smooth in the image"
        sizes.add(tuple(labels.shape[1:]))
    assert sizes == {(32, 32), (64, 96), (96, 128)}


def test_colours_leave_masks_alone():
    data = split()
    choice = augment_masks.draw(4, torch.Generator().manual_seed(0))
    images, labels = augment_masks.transform(data, np.zeros(4, np.int64), MaskAugmentConfig(value=0.5), choice)
    assert not np.array_equal(images[0], data.images[0])
    assert np.array_equal(labels[0], data.labels[0])


def test_two_processes_share_the_batch_of_one():
    data = split()
    data = Split("train", data.images.repeat(8, 0).repeat(2, 1), data.labels.repeat(8, 0).repeat(2, 1))

    def batches(rank, world_size):
        return epoch_batches(
            data,
            4,
            generator=torch.Generator().manual_seed(3),
            augment=MaskAugmentConfig(scale=0.5, flip=True, shrink=0.5),
            mean=(0.5,) * 3,
            std=(0.2,) * 3,
            drop_last=True,
            rank=rank,
            world_size=world_size,
        )

    for whole, one, other in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        for index in (0, 1):
            assert torch.equal(whole[index], torch.cat([one[index], other[index]]))
    images, labels = next(iter(eval_batches(data, 3, mean=(0.5,) * 3, std=(0.2,) * 3)))
    assert images.shape == (3, 3, 2 * HEIGHT, WIDTH)
    assert labels.shape == (3, 2 * HEIGHT, WIDTH)


def test_masks_that_are_pictures(tmp_path):
    """0 and 255, with greys along the edges: classes 0 and 1, and what is not valid is ignored."""
    root = write(tmp_path)
    for path in root.glob("*/masks/*.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.choose(np.where(mask == IGNORE, 0, mask), [0, 127, 255]).astype(np.uint8)).save(path)
    data = load(config(root, threshold=128, valid="{split}/valid"), search=())
    assert data.classes == ("0", "1")
    for labels in data.train.labels:
        assert (labels[4:20, 20:30] == 1).all()
        assert (labels[4:20, :10] == 0).all()
        assert (labels[:, -4:] == IGNORE).all()
