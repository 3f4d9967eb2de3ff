"""The search for bits: against an exact k-means by dynamic programming, and the invariants of the specification."""

import math

import numpy as np
import pytest

from edgekd.errors import TrainingError
from edgekd.quantize import bit_search
from edgekd.quantize.bit_search import Distortions, distortion, meet_budget


def exact(values, centres):
    """The least mean squared distance that any placement of centres gives, by dynamic programming."""
    values = sorted(values)
    count = len(values)
    sums, squares = [0.0], [0.0]
    for value in values:
        sums.append(sums[-1] + value)
        squares.append(squares[-1] + value**2)

    def cost(start, stop):
        return squares[stop] - squares[start] - (sums[stop] - sums[start]) ** 2 / (stop - start)

    best = [0.0] + [math.inf] * count
    for _ in range(centres):
        best = [0.0 if stop == 0 else min(best[start] + cost(start, stop) for start in range(stop)) for stop in range(count + 1)]
    return best[count] / count


def gaussian(count, scale=0.02, seed=0):
    return np.random.default_rng(seed).normal(0, scale, count).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("centres", [1, 2, 4, 8])
def test_close_to_the_best_there_is(centres, seed):
    """A Lloyd iteration ends where no single step helps, which need not be the best place of all."""
    values = gaussian(150, scale=1, seed=seed)
    best, found = exact(values.tolist(), centres), distortion(values, centres)
    assert best - 1e-9 <= found <= 1.35 * best + 1e-9


def test_exact_cases():
    assert distortion(np.array([1.0, 1.0, 5.0, 5.0]), 2) == 0
    assert distortion(np.array([0.0, 1.0]), 1) == pytest.approx(0.25)
    assert distortion(np.array([0.0, 0.1, 10.0, 10.1, 20.0]), 3) == pytest.approx(4 * 0.05**2 / 5)
    assert distortion(gaussian(16), 16) == 0, "as many centres as values"
    assert distortion(np.full(100, 3.0), 4) == 0


def test_values_far_from_zero_lose_nothing():
    values = gaussian(500, scale=1e-3).astype(np.float64)
    assert distortion(values + 100, 8) == pytest.approx(distortion(values, 8), rel=1e-6)


def test_the_law_of_gaussian_weights():
    """k is about ceil(log2(5215 s)) at the published threshold."""
    for scale in (0.002, 0.005, 0.011, 0.02, 0.045):
        found = Distortions({"a": gaussian(50_000, scale)}).bits(0.1, k_min=2, k_max=8, clip_fallback=False)["a"]
        assert abs(found - math.ceil(math.log2(5215 * scale))) <= 1


def test_twice_the_weights_are_four_times_the_distortion_and_at_most_two_bits_more():
    for seed in range(5):
        weights = gaussian(3000, 0.01, seed)
        one, two = Distortions({"a": weights}), Distortions({"a": 2 * weights})
        np.testing.assert_allclose(two.table["a"], 4 * np.array(one.table["a"]), rtol=1e-6)
        k1, k2 = (each.bits(0.1, k_min=2, k_max=8, clip_fallback=False)["a"] for each in (one, two))
        assert k1 <= k2 <= k1 + 2


def test_bits_fall_as_the_threshold_rises():
    layers = Distortions({str(scale): gaussian(2000, scale) for scale in (0.003, 0.01, 0.03, 0.1)})
    before = None
    for threshold in np.geomspace(1e-3, 1e4, 30):
        bits = layers.bits(threshold, k_min=2, k_max=8, clip_fallback=True)
        assert before is None or all(bits[path] <= before[path] for path in bits)
        before = bits
    assert set(before.values()) == {2}


def test_limits_and_the_fallback():
    layers = Distortions({"small": gaussian(2000, 1e-5), "middle": gaussian(2000, 0.01), "large": gaussian(2000, 10)})
    assert layers.bits(0.1, k_min=3, k_max=5, clip_fallback=True) == {"small": 3, "middle": 5, "large": 5}
    assert layers.bits(0.1, k_min=3, k_max=5, clip_fallback=False)["large"] == 8, "the published fallback ignores k_max"


def test_normalised_weights_count_by_shape_alone():
    weights = gaussian(2000, 0.01)
    table = Distortions({"a": weights, "b": 7 * weights}, space="normalised").table
    np.testing.assert_allclose(table["a"], table["b"], rtol=1e-5)
    assert Distortions({"zero": np.zeros(9)}, space="normalised").table["zero"] == (0.0,) * 7


def test_it_is_deterministic_and_order_does_not_matter():
    weights = gaussian(5000)
    shuffled = np.random.default_rng(3).permutation(weights)
    assert Distortions({"a": weights}).table == Distortions({"a": shuffled}).table


def test_weights_that_are_not_finite():
    with pytest.raises(TrainingError, match="weights of 'a' are not finite"):
        Distortions({"a": np.array([1.0, np.nan])})


LAYERS = Distortions({str(index): gaussian(1000, 0.004 * 1.5**index, index) for index in range(8)})


def size(bits):
    return sum(LAYERS.sizes[path] * width for path, width in bits.items())


@pytest.mark.parametrize("limit", [16_000, 20_000, 30_000, 37_500, 50_000, 55_999, 56_000, 1e9])
def test_a_budget_is_met_by_the_smallest_threshold_that_does(limit):
    found = meet_budget(LAYERS, size, limit, k_min=2, k_max=7, name="budget")
    assert size(found) <= limit
    thresholds = sorted({value for row in LAYERS.table.values() for value in row})
    plans = [LAYERS.bits(np.nextafter(value, np.inf), k_min=2, k_max=7, clip_fallback=True) for value in [0, *thresholds]]
    within = [plan for plan in plans if size(plan) <= limit]
    assert size(found) == max(map(size, within))


def test_a_budget_that_cannot_be_met():
    with pytest.raises(
        TrainingError, match=r"quantizer.budget.size_mb: 15999 cannot be met: 2 bits in every layer cost 1.6e\+04"
    ):
        meet_budget(LAYERS, size, 15_999, k_min=2, k_max=7, name="quantizer.budget.size_mb")


def test_widths():
    assert list(bit_search.WIDTHS) == [2, 3, 4, 5, 6, 7, 8]
