"""Calibration."""

import pytest
import torch

from edgekd.quantize.observers import SAMPLES, Observer, best_scale


def mean_squared_error(values, scale, low, high):
    return float(((values / scale).round().clamp(low, high) * scale - values).square().mean())


def seen(*tensors):
    observer = Observer()
    for tensor in tensors:
        observer(tensor)
    return observer


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (0, 127), (-8, 7)])
def test_no_other_scale_is_clearly_better(low, high):
    torch.manual_seed(0)
    values = torch.randn(4000)
    values = values if low else values.relu()
    best = best_scale(seen(values), low, high)
    error = mean_squared_error(values, best, low, high)
    others = [mean_squared_error(values, best * factor, low, high) for factor in torch.linspace(0.3, 3, 200).tolist()]
    assert error <= 1.03 * min(others)


def test_an_outlier_is_clipped_where_codes_are_few():
    values = torch.cat([torch.randn(4000), torch.tensor([30.0])])
    assert best_scale(seen(values), -8, 7) * 7 < 15


def test_values_on_a_grid_of_full_range_are_kept_exactly():
    values = torch.arange(-127, 128).float()
    scale = best_scale(seen(values), -128, 127)
    assert mean_squared_error(values, scale, -128, 127) < 1e-9


def test_zeros():
    assert best_scale(seen(torch.zeros(10)), 0, 127) > 0


def test_the_sample_is_bounded_and_even():
    torch.manual_seed(0)
    observer = seen(*(torch.full((50_000,), float(index)) for index in range(40)))
    assert len(observer.samples) <= SAMPLES
    assert observer.largest == 39
    assert len(observer.samples.unique()) >= 20  # early and late batches are both in it


def test_a_nonfinite_tensor_gives_no_usable_scale():
    assert not 0 < best_scale(seen(torch.tensor([1.0, float("inf")])), 0, 127) < float("inf")
