import time

import numpy as np
import pytest
import torch

from edgekd.data.augment import AugmentConfig
from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.data.base import IGNORE, Split
from edgekd.data.batches import EVAL_PIXELS, draw_from, epoch_batches, epoch_length, eval_batch_size, eval_batches, normalise
from edgekd.errors import RecipeError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
ON = AugmentConfig(flip=True, crop_padding_px=2, cutout_px=3)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """53 images, memory-mapped and read-only; the label is the index."""
    path = tmp_path_factory.mktemp("split") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (53, 10, 8, 3), dtype=np.uint8))
    labels = np.arange(53)
    labels.flags.writeable = False
    return Split("train", np.load(path, mmap_mode="r"), labels)


def epoch(split, size=12, seed=0, augment=ON, drop_last=True, **options):
    generator = torch.Generator().manual_seed(seed)
    return list(
        epoch_batches(split, size, generator=generator, augment=augment, mean=MEAN, std=STD, drop_last=drop_last, **options)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_is_what_a_numpy_worker_computes(channels):
    images = np.arange(256, dtype=np.uint8).repeat(2 * 4 * channels).reshape(channels, 2, 256, 4).transpose(1, 2, 3, 0).copy()
    mean, std = MEAN[:channels], STD[:channels]
    found = normalise(torch.from_numpy(images), mean, std)
    assert found.dtype == torch.float32
    assert found.shape == (2, channels, 256, 4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    exact = ((images / 255.0 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=1e-6)
    scale = np.float32(1 / 255)
    worker = (images.astype(np.float32) * scale - np.array(mean, np.float32)) / np.array(std, np.float32)
    np.testing.assert_allclose(found.numpy(), worker.transpose(0, 3, 1, 2), rtol=0, atol=1e-6)


def test_an_epoch_holds_every_image_once_with_its_label(split):
    batches = epoch(split, augment=AugmentConfig(), drop_last=False)
    assert [len(labels) for _, labels in batches] == [12, 12, 12, 12, 5]
    labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == list(range(53))
    assert labels.tolist() != list(range(53))
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images, normalise(torch.from_numpy(np.array(split.images)), MEAN, STD)[labels])
    assert [len(labels) for _, labels in epoch(split)] == [12] * 4
    assert epoch(split, size=54) == []


def test_the_generator_decides_everything(split):
    def same(one, other):
        return all(
            torch.equal(a, b) for first, second in zip(one, other, strict=True) for a, b in zip(first, second, strict=True)
        )

    torch.manual_seed(0)
    first = epoch(split)
    torch.manual_seed(1)
    assert same(first, epoch(split))
    assert not same(first, epoch(split, seed=1))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("drop_last", [True, False])
def test_shares_of_all_processes_are_the_batches_of_one(split, world_size, drop_last):
    whole = epoch(split, drop_last=drop_last)
    shares = [epoch(split, drop_last=drop_last, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(whole)}
    for number, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([share[number][0] for share in shares]), images)
        assert torch.equal(torch.cat([share[number][1] for share in shares]), labels)
        if len(labels) == 12:
            assert {len(share[number][1]) for share in shares} == {12 // world_size}


def test_an_uneven_share_is_refused(split):
    with pytest.raises(RecipeError, match="batch_size 12 cannot be shared evenly by 5 processes") as caught:
        epoch(split, world_size=5)
    assert "10" in caught.value.hint


@pytest.fixture
def masks():
    """13 images of one number each, 5 of them with labels."""
    images = np.arange(13, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3)
    labels = np.zeros((13, 16, 16), np.uint8)
    labels[5:] = IGNORE
    labels[0, 1:] = IGNORE  # one row that counts is enough
    return Split("train", images, labels)


def numbers(batches):
    """Of the images in each batch."""
    return [(images[:, 0, 0, 0] * STD[0] + MEAN[0]).mul(255).round().int().tolist() for images, _ in batches]


@pytest.mark.parametrize("world_size", [1, 2])
def test_half_of_each_batch_has_labels(masks, world_size):
    """Of each process's share, too. Every unlabelled image is seen once; the labelled ones begin anew, in another order."""
    pools = draw_from(masks, "half labelled")
    assert epoch_length(pools) == 16
    shares = [
        numbers(epoch(masks, 4, augment=MaskAugmentConfig(), pools=pools, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert all(sum(number < 5 for number in part) == 2 // world_size for share in shares for part in share)
    found = [number for share in shares for part in share for number in part]
    assert sorted(number for number in found if number >= 5) == list(range(5, 13))
    counts = [found.count(number) for number in range(5)]
    assert sum(counts) == 8
    assert set(counts) == {1, 2}


def test_what_is_drawn_from(masks, split):
    assert [pool.tolist() for pool in draw_from(masks, "labelled")] == [list(range(5))]
    assert [len(pool) for pool in draw_from(masks, "all")] == [13]
    assert [len(pool) for pool in draw_from(split, "half labelled")] == [53], "classes are labels"
    whole = Split("train", masks.images, np.zeros_like(masks.labels))
    assert [len(pool) for pool in draw_from(whole, "half labelled")] == [13], "none is without labels"
    few = numbers(epoch(masks, 2, augment=MaskAugmentConfig(), pools=draw_from(masks, "labelled")))
    assert len(few) == 2
    assert max(map(max, few)) < 5


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_evaluation_sees_every_image_once_and_never_an_empty_batch(split, world_size):
    ranks = [list(eval_batches(split, 12, mean=MEAN, std=STD, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert all(len(labels) for batches in ranks for _, labels in batches)
    assert sorted(label for batches in ranks for _, labels in batches for label in labels.tolist()) == list(range(53))
    exact = normalise(torch.from_numpy(np.array(split.images)), MEAN, STD)
    for batches in ranks:
        for images, labels in batches:
            assert torch.equal(images, exact[labels])
    if world_size == 1:
        assert torch.cat([labels for _, labels in ranks[0]]).tolist() == list(range(53))


def test_large_images_are_evaluated_in_smaller_batches():
    def size(count, side):
        return eval_batch_size(Split("val", np.broadcast_to(np.uint8(0), (count, side, side, 3)), np.zeros(count)), 250)

    assert size(1000, 32) == 250
    assert size(40, 32) == 40
    assert size(1000, 1024) == EVAL_PIXELS // 2**20 == 8
    assert size(1000, 8192) == 1


def test_boxes_come_as_float32_with_their_images(split):
    labels = np.zeros((53, 2, 6), np.float32)
    labels[:, 0, 1] = np.arange(53)
    batches = list(eval_batches(Split("val", split.images, labels), 20, mean=MEAN, std=STD))
    assert [tuple(found.shape) for _, found in batches] == [(20, 2, 6), (20, 2, 6), (13, 2, 6)]
    assert all(found.dtype == torch.float32 for _, found in batches)
    assert torch.cat([found for _, found in batches])[:, 0, 1].tolist() == list(range(53))


def test_faster_than_training():
    """The fastest model here trains at about 1,000 images/s; 10,000 leaves room for a busy machine (it does about 50,000)."""
    images = np.random.default_rng(0).integers(0, 256, (4096, 32, 32, 3), dtype=np.uint8)
    large = Split("train", images, np.zeros(4096, np.int64))

    def seconds():
        start = time.perf_counter()
        epoch(large, size=128, augment=AugmentConfig(flip=True, crop_padding_px=4))
        return time.perf_counter() - start

    assert 4096 / min(seconds() for _ in range(3)) > 10_000
