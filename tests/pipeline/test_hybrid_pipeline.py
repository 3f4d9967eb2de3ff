"""Hybrid bits from a recipe to engines and their report."""

import json
import re

import pytest

from edgekd import recipe as recipes
from edgekd.errors import RecipeError

TRAIN = {"epochs": 2, "batch_size": 50, "lr": 0.05}


def hybrid(precision, quantizer=None, **stage):
    return {
        "name": "hybrid",
        "task": {"kind": "classification"},
        "data": {"kind": "digits", "size_px": 16},
        "student": {"model": {"name": "resnet8"}},
        "stages": [
            {"kind": "finetune", "train": TRAIN},
            {
                "kind": "quantize",
                "quantizer": {"kind": "hybrid", "budget": {"size_mb": 0.05}, "recalibration_batches": 5, **(quantizer or {})},
                "train": {**TRAIN, "epochs": 1, "lr": 0.01},
                **stage,
            },
        ],
        "deploy": [
            {"backend": {"name": name, "threads": 1}, "precision": list(precision), "allow_fallback": True}
            for name in ("onnxruntime", "openvino")
        ],
        "measure": {"warmup_s": 0.01, "duration_s": 0.05, "compare_s": 0.1},
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One run with everything: GHOST's stage, deployed in three precisions."""
    from conftest_hybrid import run_once

    return run_once(
        hybrid(["float32", "int8", "hybrid"], method={"name": "ost"}, task_weight=1), tmp_path_factory.mktemp("hybrid")
    )


def test_it_runs_on_integers_and_is_the_trained_model(done):
    outcome, folder = done
    engines = {(engine["backend"], engine["precision"]): engine for engine in outcome.report["engines"]}
    assert {engine["status"] for engine in engines.values()} == {"measured"}
    for backend in ("onnxruntime", "openvino"):
        rows = engines[backend, "int8"]["audit"]["layers"]
        asked = [row for row in rows if row["asked"] == "int8"]
        assert len(asked) == 9
        assert all(row["got"] == "int8" for row in asked), backend
    (file,) = [path for path in folder.glob("*-export-*/parity.json") if "tensors" in json.loads(path.read_text())]
    tensors = json.loads(file.read_text())["tensors"]
    assert tensors["max_steps"] <= 1.001, "every quantized tensor within one step, on equal inputs"
    assert tensors["differing"] < 0.02


def test_the_report_says_trained_stored_and_executed(done):
    outcome, folder = done
    found = outcome.report["bits"]
    bits = {row["path"]: row for row in found["layers"]}
    assert bits["fc"]["trained"] == 32, "the head stays in float"
    trained = [row["trained"] for path, row in bits.items() if path != "fc"]
    assert len(set(trained)) > 1
    assert max(trained) <= 7
    assert all(row["stored"] == 8 for path, row in bits.items() if path != "fc")
    assert set(bits["stem.0"]["executed"].values()) == {"int8"}
    assert found["account"]["size_mb"] <= 0.05
    text = (folder / "report" / "report.md").read_text()
    assert "## Hybrid bits" in text
    assert "convolutions execute as int8 at best" in text
    assert "Hybrid bits" in (folder / "report" / "report.html").read_text()


def test_gates_are_recorded(done):
    outcome, folder = done
    last = outcome.report["training"][-1]["epochs"][-1]
    rates = last["statistics"]
    assert rates
    assert all(0 <= rate <= 1 for rate in rates.values())
    for report in ("report.md", "report.html"):
        assert next(iter(rates)) in (folder / "report" / report).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["stages"].pop(), "hybrid needs a student with hybrid bits"),
        (lambda data: data["stages"][1].update(quantizer={"kind": "int8"}), "hybrid needs a student with hybrid bits"),
        (lambda data: data["stages"][1]["quantizer"].update(budget={"size": 1}), r"unknown key"),
        (lambda data: data["stages"][1]["quantizer"].update(kind="hybrd"), "hybrid"),
    ],
)
def test_recipes_that_cannot_be(write, change, message):
    data = hybrid(["hybrid"])
    change(data)
    with pytest.raises(RecipeError, match=message):
        recipes.load_recipe(write(data))


def test_a_budget_that_cannot_be_met_is_found_before_any_training(run):
    from edgekd.errors import TrainingError

    with pytest.raises(TrainingError, match=r"quantizer\.budget\.size_mb: 0.001 cannot be met"):
        run(hybrid(["int8"], {"budget": {"size_mb": 0.001}}))


def test_a_latency_decides_which_layers_stay_in_float(run, tmp_path):
    """The bounds that the error tells are met by the second run, whose float training is the first one's."""
    from edgekd.errors import TrainingError

    def recipe(limit):
        data = hybrid(["float32", "int8"], {"budget": {"latency_ms": limit}})
        data["student"] = {"model": {"name": "vgg8"}}
        data["stages"][0]["train"] = {**TRAIN, "epochs": 1}
        data["deploy"] = data["deploy"][:1]
        data["measure"]["duration_s"] = 0.2
        return data

    with pytest.raises(TrainingError, match="cannot be met") as told:
        run(recipe(1e-6))
    numbers = re.findall(r"takes ([\d.]+) ms, and in float ([\d.]+) ms", told.value.message)
    integer, in_float = (float(number) for number in numbers[0])
    limit = (integer + in_float) / 2
    outcome, recorder = run(recipe(limit))
    assert recorder.stages == ["quantize"], "the float training was there"
    found = outcome.report["bits"]["latency"]
    assert found["limit_ms"] == limit
    steps = {len(step["kept"]): step["latency_ms"] for step in found["steps"]}
    assert steps[len(found["kept"])] <= limit, "what was chosen was measured"
    rows = {row["path"]: row["trained"] for row in outcome.report["bits"]["layers"]}
    assert all(rows[path] == 32 for path in found["kept"])
    assert any(bits < 32 for bits in rows.values())
    assert "layers that stay in float" in (outcome.folder / "report" / "report.md").read_text()


def test_a_latency_needs_an_engine_to_measure(write):
    data = hybrid(["float32"], {"budget": {"latency_ms": 1.0}})
    with pytest.raises(RecipeError, match="no engine in int8 is deployed whose latency could be measured"):
        recipes.load_recipe(write(data))
