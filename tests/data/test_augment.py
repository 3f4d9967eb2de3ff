import numpy as np
import pytest
import torch
from pydantic import ValidationError

from edgekd.data.augment import AugmentConfig, apply, draw, transform


def batch(count=40, height=9, width=7, channels=3):
    return torch.randint(0, 256, (count, height, width, channels), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slowly(image, flip, shift, centre, config):
    """One image with NumPy, step by step from the documentation: pad, crop, flip, cut out."""
    height, width, channels = image.shape
    pad = config.crop_padding_px
    padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[pad : pad + height, pad : pad + width] = image
    result = padded[shift[0] : shift[0] + height, shift[1] : shift[1] + width].copy()
    if flip:
        result = result[:, ::-1].copy()
    half = config.cutout_px // 2
    for row in range(centre[0] - half, centre[0] - half + config.cutout_px):
        for column in range(centre[1] - half, centre[1] - half + config.cutout_px):
            if 0 <= row < height and 0 <= column < width:
                result[row, column] = 0
    return result


CONFIGS = [
    AugmentConfig(flip=flip, crop_padding_px=padding, cutout_px=side)
    for flip in (False, True)
    for padding in (0, 1, 4)
    for side in (0, 3, 4)
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_a_slow_loop(config, channels):
    images = batch(channels=channels)
    choice = draw(40, 9, 7, config, generator())
    found = transform(images, config, choice)
    assert found.dtype == torch.uint8
    for index in range(40):
        expected = slowly(images[index].numpy(), bool(choice.flip[index]), choice.shift[index], choice.centre[index], config)
        assert (found[index].numpy() == expected).all(), index


def test_choices_cover_their_ranges_evenly():
    choice = draw(20_000, 5, 8, AugmentConfig(flip=True, crop_padding_px=2), generator())
    assert float(choice.flip.float().mean()) == pytest.approx(0.5, abs=0.02)
    for axis, size in ((0, 5), (1, 8)):
        for values, count in ((choice.shift[:, axis], 5), (choice.centre[:, axis], size)):
            shares = np.bincount(values.numpy(), minlength=count) / 20_000
            assert len(shares) == count
            assert np.abs(shares - 1 / count).max() < 0.02


def test_only_the_generator_decides():
    config = AugmentConfig(flip=True, crop_padding_px=2, cutout_px=3)
    torch.manual_seed(1)
    first = apply(batch(), config, generator(5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(apply(batch(), config, generator(5)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(apply(batch(), config, generator(6)), first)


def test_off_changes_nothing_and_switching_one_off_keeps_the_others():
    assert torch.equal(apply(batch(), AugmentConfig(), generator()), batch())
    both = draw(40, 9, 7, AugmentConfig(flip=True, crop_padding_px=2), generator())
    crop = draw(40, 9, 7, AugmentConfig(crop_padding_px=2), generator())
    assert torch.equal(both.shift, crop.shift)
    assert both.flip.any()
    assert not crop.flip.any()


def test_a_part_of_the_batch_gets_the_part_of_the_result():
    config = AugmentConfig(flip=True, crop_padding_px=2, cutout_px=3)
    choice = draw(40, 9, 7, config, generator())
    whole = transform(batch(), config, choice)
    assert torch.equal(transform(batch()[10:25], config, choice.part(10, 25)), whole[10:25])
    assert transform(batch()[:0], config, choice.part(0, 0)).shape == (0, 9, 7, 3)


@pytest.mark.parametrize("bad", [{"crop_padding_px": -1}, {"crop_padding_px": 65}, {"cutout_px": -1}, {"rotate": True}])
def test_bounds(bad):
    with pytest.raises(ValidationError):
        AugmentConfig(**bad)
