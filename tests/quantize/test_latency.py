"""The search for layers that stay in float within a latency, on an engine whose time is known."""

import pytest

from edgekd.errors import TrainingError
from edgekd.quantize import latency
from edgekd.train.stage import EngineTime

FLOAT = {"a": 10.0, "b": 40.0, "c": 30.0, "d": 20.0}
INT8 = {"a": 12.0, "b": 10.0, "c": 10.0, "d": 10.0}
ERRORS = {"a": 1.0, "b": 90.0, "c": 20.0, "d": 50.0}
"""Float pays most for a (it is faster), then d (5 a microsecond), b (3), c (1)."""


def find(limit_us, float_us=FLOAT):
    """A search over an engine whose layers' times add up."""
    said = []

    def engine_time(kept):
        layers = float_us if kept is None else {path: float_us[path] if path in kept else INT8[path] for path in float_us}
        return EngineTime(sum(layers.values()) / 1000, layers)

    return latency.search(limit_us / 1000, ERRORS, None, lambda kept: kept, engine_time, said.append), said


def test_the_order_by_hand():
    assert latency.ranked(ERRORS, FLOAT, INT8) == ["a", "d", "b", "c"]
    assert latency.ranked(ERRORS, {**FLOAT, "a": 12.0}, INT8)[0] == "a", "no slower is as good as faster"
    assert latency.ranked(ERRORS, {key: FLOAT[key] for key in "abc"}, INT8)[-1] == "d", "a layer without a time goes last"


@pytest.mark.parametrize(
    ("limit", "kept"),
    # all on integers: 42, then 40, 50, 80, and 100 in float
    [(42, ["a"]), (45, ["a"]), (50, ["a", "d"]), (79.9, ["a", "d"]), (80, ["a", "d", "b"]), (99.9, ["a", "d", "b"])],
)
def test_as_many_stay_in_float_as_fit(limit, kept):
    found, said = find(limit)
    assert found["kept"] == kept
    assert found["float_ms"] == pytest.approx(0.1)
    assert found["steps"][0] == {"kept": [], "latency_ms": pytest.approx(0.042)}
    assert len(said) == len(found["steps"]) <= 3, "four layers take two halvings"
    assert [row["path"] for row in found["layers"]] == ["a", "d", "b", "c"]
    assert found["layers"][1] == {"path": "d", "error": 50.0, "float_us": 20.0, "int8_us": 10.0}


def test_what_cannot_be_met_and_what_needs_no_search():
    with pytest.raises(TrainingError, match=r"0.03 ms cannot be met: .* on integers takes 0.042 ms, and in float 0.1 ms"):
        find(30)
    with pytest.raises(TrainingError, match=r"the float engine takes 0.1 ms, which is within 0.1 ms already"):
        find(100)


def test_a_search_is_made_once(tmp_path):
    first = latency.remembered(tmp_path / "work", lambda: {"kept": ["a"]})
    assert latency.remembered(tmp_path / "work", lambda: pytest.fail("measured again")) == first == {"kept": ["a"]}
