import json
from pathlib import Path

import numpy as np
import pytest

from edgekd.bench.stats import percentile, ratio_of_medians, summarize, verdict

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "percentile.json").read_text())["cases"]


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"{case.get('range', case.get('values'))}-{case['percent']}")
def test_percentile_vectors(case):
    values = case["values"] if "values" in case else list(range(1, case["range"] + 1))
    assert percentile(values, case["percent"]) == case["expected"]


def test_percentile_meets_its_definition():
    """Compared with a search by counting, which shares no formula with the implementation."""
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 10, 37):
        values = rng.integers(0, 20, count)
        for tenths in range(1, 1001, 13):
            enough = [value for value in values if sum(values <= value) * 1000 >= tenths * count]
            assert percentile(values, tenths / 10) == min(enough)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1], -1), ([1], 100.1), ([1], 99.99)])
def test_percentile_refuses(values, percent):
    with pytest.raises(ValueError, match="percent"):
        percentile(values, percent)


def test_summary_in_milliseconds():
    summary = summarize([4_000_000, 1_000_000, 3_000_000, 2_000_000])
    assert summary == pytest.approx(
        {"p50": 2.0, "p90": 4.0, "p99": 4.0, "mean": 2.5, "min": 1.0, "max": 4.0, "std": np.sqrt(1.25)}
    )


def test_ratio_of_constant_samples_has_no_width():
    assert ratio_of_medians([30] * 50, [10] * 50) == (3.0, (3.0, 3.0))


def test_ratio_is_reproducible_and_covers_the_truth():
    rng, covered = np.random.default_rng(1), 0
    for trial in range(40):
        top, bottom = 2000 + 200 * rng.standard_normal(100), 1000 + 100 * rng.standard_normal(100)
        ratio, (low, high) = ratio_of_medians(top, bottom, resamples=200, seed=trial)
        assert low <= ratio <= high
        covered += low <= 2 <= high
    assert covered >= 34  # 38 expected; fewer than 34 has a probability of about 1 %
    assert ratio_of_medians(top, bottom) == ratio_of_medians(top, bottom)


def test_rounds_are_resampled_as_pairs():
    """A drift that multiplies both engines alike must not widen the interval of their ratio."""
    drift = np.linspace(1, 3, 101)
    _ratio, (low, high) = ratio_of_medians(2000 * drift, 1000 * drift)
    assert (low, high) == (pytest.approx(2), pytest.approx(2))


def test_ratio_refuses_unequal_lengths():
    with pytest.raises(ValueError, match=r"\[2\] and \[1\]"):
        ratio_of_medians([1, 2], [1])


@pytest.mark.parametrize(
    ("interval", "noise", "expected"),
    [
        ((1.10, 1.20), (0.98, 1.02), "faster"),
        ((0.80, 0.90), (0.98, 1.02), "slower"),
        ((0.99, 1.20), (0.98, 1.02), "no difference"),
        ((1.01, 1.03), (0.98, 1.02), "no difference"),
        ((1.03, 1.04), (0.90, 1.00), "no difference"),  # a reference that is 10 % off itself hides 4 %
        ((0.95, 0.97), (1.00, 1.10), "no difference"),
    ],
)
def test_verdict(interval, noise, expected):
    assert verdict(interval, noise) == expected
