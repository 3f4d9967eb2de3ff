"""Calibration."""

import math

import pytest
import torch

from edgekd.quantize.observers import SAMPLES, Observer, best_scale, entropy_bins, find_scale


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


def test_what_three_in_four_images_stay_below():
    peaks = torch.tensor([1.0, 2.0, 3.0, 4.0, 90.0])
    images = torch.zeros(5, 2, 3)
    images[:, 1, 2] = -peaks
    assert seen(images[:2], images[2:]).usual == 4
    assert seen(torch.ones(7)).usual == math.inf  # not of images


def found(observer, calibration, high=127, percentile=99.9):
    return find_scale(observer, -128, high, calibration=calibration, percentile=percentile)


def test_each_way_ends_the_range_where_it_says():
    values = torch.cat([torch.arange(1, 1000) / 1000.0, torch.tensor([-50.0])])  # one outlier in a thousand
    observer = seen(values)
    assert found(observer, "minmax") * 127 == pytest.approx(50.0)
    assert found(observer, "percentile", percentile=99) * 127 == pytest.approx(
        float(torch.quantile(observer.samples.abs(), 0.99)), rel=1e-5
    )
    assert found(observer, "percentile", percentile=99) * 127 < 1.0
    assert found(observer, "mse") == best_scale(observer, -128, 127)


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "entropy", "mse"])
def test_every_way_survives_zeros_and_refuses_what_is_not_finite(calibration):
    assert found(seen(torch.zeros(10)), calibration) > 0
    assert found(seen(torch.tensor([0.0] * 5000 + [3.0])), calibration) > 0
    for bad in ("nan", "inf"):
        assert not 0 < found(seen(torch.tensor([1.0, float(bad)])), calibration) < float("inf")


def slow_entropy(histogram, levels):
    """The definition of the docstring with loops; (bins, divergence)."""
    best = (None, math.inf)
    for cut in range(levels, len(histogram) + 1):
        p = [float(count) for count in histogram[:cut]]
        p[max((index for index in range(cut) if histogram[index] > 0), default=0)] += float(sum(histogram[cut:]))
        q = [0.0] * cut
        for level in range(levels):
            group = [index for index in range(cut) if index * levels // cut == level]
            filled = [index for index in group if histogram[index] > 0]
            for index in filled:
                q[index] = sum(float(histogram[other]) for other in group) / len(filled)
        if not sum(q):
            continue
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        divergence = sum(
            math.inf if below == 0 else above * math.log(above / below) for above, below in zip(p, q, strict=True) if above > 0
        )
        if divergence < best[1] - 1e-12:
            best = (cut, divergence)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_entropy_against_loops(seed):
    draw = torch.Generator().manual_seed(seed)
    decay = torch.exp(-torch.arange(200) / (3.0 + 15 * seed))
    histogram = torch.poisson(400 * decay, generator=draw).double()
    histogram[-1] = 2  # an outlier
    assert entropy_bins(histogram, 16) == slow_entropy(histogram.tolist(), 16)[0]


def test_entropy_by_hand():
    # two levels, four bins. Cut at 2: P = (8, 4), Q = (8, 2). Cut at 3 puts bins 0 and 1 together: P = (8, 4, 0), Q = (5, 5, 0).
    # Cut at 4: P = (8, 2, 0, 2), Q = (5, 5, 0, 2).
    cut2 = 8 / 12 * math.log((8 / 12) / (8 / 10)) + 4 / 12 * math.log((4 / 12) / (2 / 10))
    cut3 = 8 / 12 * math.log((8 / 12) / (5 / 10)) + 4 / 12 * math.log((4 / 12) / (5 / 10))
    cut4 = 8 / 12 * math.log(8 / 5) + 2 / 12 * math.log(2 / 5)
    assert cut2 < cut3 < cut4
    assert entropy_bins(torch.tensor([8.0, 2.0, 0.0, 2.0], dtype=torch.float64), 2) == 2


def test_entropy_keeps_a_flat_distribution_whole_and_clips_a_lone_outlier():
    torch.manual_seed(0)
    flat = torch.rand(60_000)
    assert found(seen(flat), "entropy") * 127 > 0.98
    assert found(seen(torch.cat([flat, torch.tensor([40.0])])), "entropy") * 127 < 20


def test_zeros_do_not_move_the_entropy_threshold():
    torch.manual_seed(0)
    values = torch.randn(20_000).abs()
    assert found(seen(values), "entropy") == pytest.approx(
        found(seen(torch.cat([values, torch.zeros(20_000)])), "entropy"), rel=0.1
    )
