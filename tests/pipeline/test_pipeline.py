"""A whole run on real digits: what it leaves, what it reuses, what it computes again, and how it fails."""

import json
import re
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from edgekd import deployment
from edgekd.artifacts import read_artifact
from edgekd.errors import ArtifactError, BudgetExceeded, EdgekdError, TrainingError
from edgekd.models.config import ModelConfig
from edgekd.pipeline import _locked, code_of


def names(folder):
    return [path.name.split("-")[1] for path in sorted(folder.glob("[0-9]*"))]


def mark(folder, *, valid):
    """Say of every measurement of a run that it was disturbed, or that it was not."""
    for manifest in folder.glob("*/artifact.json"):
        data = json.loads(manifest.read_text())
        if "valid" in data["metrics"]:
            data["metrics"]["valid"] = valid
            manifest.write_text(json.dumps(data))


def cells(outcome):
    return {(engine["backend"], engine["role"], engine["precision"]): engine for engine in outcome.report["engines"]}


def test_a_run_leaves_its_artifacts(finished):
    assert names(finished.folder)[:5] == ["teacher", "student_alone", "distill", "prune", "quantize"]
    assert names(finished.folder).count("export") == 3
    assert names(finished.folder).count("engine") == 3
    assert names(finished.folder).count("compare") == 1
    assert not list((finished.folder / "work").glob("*/state.pt"))
    for folder in finished.folder.glob("[0-9]*"):
        artifact = read_artifact(folder)
        assert all((folder / name).is_file() for name in artifact.files)


def test_every_number_of_an_engine_comes_from_its_record(finished):
    measured = [engine for engine in finished.report["engines"] if engine["status"] == "measured"]
    assert len(measured) == 3
    records = {path.parent.name: json.loads(path.read_text()) for path in finished.folder.glob("*-bench-*/record.json")}
    for engine in measured:
        assert any(
            engine["latency_ms"]["p50"] == record["latency_ms"]["p50"] and engine["metric"]["value"] == record["metric"]["value"]
            for record in records.values()
        )
        assert engine["metric"]["value"] > 0.3  # the engine sees digits, not noise
        assert len(next(iter(records.values()))["samples_ns"]) >= 50


def test_the_student_is_smaller_at_every_step(finished):
    models = {model["stage"]: model for model in finished.report["models"]}
    assert models["prune"]["macs"] <= 0.7 * models["distill"]["macs"]
    assert models["quantize"]["params"] <= models["prune"]["params"] + 20  # and a scale per quantizer
    sizes = {precision: engine["size_bytes"] for (_, role, precision), engine in cells(finished).items() if role == "student"}
    assert sizes["int8"] < sizes["float32"]


def test_student_alone_starts_from_the_same_weights_and_has_the_same_budget(finished):
    folders = {
        model["stage"]: finished.folder / model["folder"]
        for model in json.loads((finished.folder / "run.json").read_text())["models"]
    }
    alone, distilled = (read_artifact(folders[name]) for name in ("student_alone", "distill"))
    assert alone.config["train"] == distilled.config["train"]
    assert alone.metrics["epochs"] == distilled.metrics["epochs"] == 2


def test_a_second_run_computes_nothing(tiny, run):
    first, _ = run(tiny)
    mark(first.folder, valid=True)  # whatever else this machine does: a disturbed measurement would be made again
    before = {path: path.stat().st_mtime_ns for path in first.folder.glob("[0-9]*/*")}
    start = time.monotonic()
    second, recorder = run(tiny)
    assert time.monotonic() - start < 10
    assert recorder.stages == []
    assert {path: path.stat().st_mtime_ns for path in second.folder.glob("[0-9]*/*")} == before
    assert all(step["status"] == "reused" for step in json.loads((second.folder / "run.json").read_text())["steps"])
    assert second.report["engines"] == first.report["engines"]


def test_a_changed_later_stage_recomputes_from_there(tiny, run):
    tiny["deploy"] = []
    run(tiny)
    tiny["stages"][1]["train"]["lr"] = 0.03
    _, recorder = run(tiny)
    assert recorder.stages == ["prune", "quantize"]
    tiny["seed"] = 1
    _, recorder = run(tiny)
    assert recorder.stages == ["teacher", "student_alone", "distill", "prune", "quantize"]


def test_a_change_that_training_does_not_see_trains_nothing(tiny, run):
    tiny["stages"] = tiny["stages"][:1]
    tiny["deploy"] = [{"backend": {"name": "null"}, "precision": ["float32"]}]
    run(tiny)
    tiny["deploy"][0]["batch"] = 4
    tiny["measure"]["duration_s"] = 0.06
    outcome, recorder = run(tiny)
    assert recorder.stages == []
    assert outcome.report["engines"][0]["batch"] == 4


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "manifest"])
def test_a_damaged_artifact_is_named_and_computed_again(tiny, run, damage):
    tiny["stages"], tiny["deploy"] = tiny["stages"][:1], []
    outcome, _ = run(tiny)
    (folder,) = outcome.folder.glob("*-distill-*")
    weights = folder / "model.safetensors"
    expected = load_file(weights)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "changed":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
    elif damage == "missing":
        weights.unlink()
    else:
        (folder / "artifact.json").write_text('{"schema": 1')
    _, recorder = run(tiny)
    assert recorder.stages == ["distill"]
    assert any("distill" in line and "damaged" in line for line in recorder.warnings)
    again = load_file(weights)
    assert all((expected[name] == again[name]).all() for name in expected)  # the same inputs give the same bits


def test_engine_accuracy_is_of_the_whole_test_split(finished, tiny):
    record = json.loads(next(finished.folder.glob("*-bench-*/record.json")).read_text())
    assert record["metric"]["images"] == 500


def test_what_cannot_run_here_is_built_and_says_why(tiny, run):
    pytest.importorskip("tensorrt_rtx")
    tiny["stages"] = tiny["stages"][:1]
    tiny["deploy"] = [{"backend": {"name": "tensorrt_rtx", "compute_capabilities": ["SM89"]}, "precision": ["float32"]}]
    outcome, _ = run(tiny)
    (engine,) = outcome.report["engines"]
    assert engine["status"] == "built"
    assert "no NVIDIA GPU" in engine["reason"]
    assert engine["size_bytes"] > 0
    assert engine["latency_ms"] is None
    assert outcome.failures == []


def test_one_failing_engine_does_not_cost_the_others(tiny, run, monkeypatch):
    from edgekd.engines.onnxruntime import OnnxRuntime

    tiny["stages"] = tiny["stages"][:1]
    tiny["deploy"] = [
        {"backend": {"name": "onnxruntime"}, "precision": ["float32"]},
        {"backend": {"name": "null"}, "precision": ["float32"]},
    ]
    monkeypatch.setattr(OnnxRuntime, "fingerprint", lambda self, options: (_ for _ in ()).throw(EdgekdError("out of order")))
    outcome, _ = run(tiny)
    assert [engine["status"] for engine in outcome.report["engines"]] == ["failed", "measured"]
    assert "out of order" in outcome.report["engines"][0]["reason"]
    assert outcome.failures == ["onnxruntime float32: out of order"]


def test_an_engine_that_is_not_what_was_asked_fails_and_allow_fallback_measures_it(tiny, run, monkeypatch):
    """And --allow-fallback changes no artifact: what was built is found again."""
    del tiny["teacher"], tiny["compare"]
    tiny["stages"] = [{"kind": "finetune", "train": {"epochs": 1, "batch_size": 100, "lr": 0.1}}]
    tiny["deploy"] = [{"backend": {"name": "onnxruntime"}, "precision": ["float32"]}]
    monkeypatch.setattr(deployment.audit, "refusal", lambda _: "asked for int8, but it runs otherwise")
    outcome, _ = run(tiny)
    (engine,) = outcome.report["engines"]
    assert engine["status"] == "failed"
    assert engine["reason"].startswith("asked for int8, but it runs otherwise")
    assert "allow_fallback: true" in engine["reason"]
    assert "--allow-fallback" in engine["reason"]
    again, _ = run(tiny, allow_fallback=True)
    (engine,) = again.report["engines"]
    assert engine["status"] == "measured"
    steps = {step["stage"]: step["status"] for step in json.loads((again.folder / "run.json").read_text())["steps"]}
    assert steps.pop("bench") == "done"
    assert set(steps) >= {"finetune", "export", "engine"}
    assert set(steps.values()) == {"reused"}


def test_what_keeps_layers_from_integers_is_a_warning_with_their_paths(tiny, run):
    tiny.pop("compare")
    tiny["stages"] = [tiny["stages"][0], {**tiny["stages"][2], "quantizer": {"kind": "int8", "skip": ["stage2.*"]}}]
    tiny["deploy"] = [{"backend": {"name": "onnxruntime"}, "precision": ["int8"]}]
    outcome, recorder = run(tiny, smoke=True)
    expected = (
        r"onnxruntime: float-layers: stage2\.0\.\w+[.0-9]* \(Conv\), .*: these run in float32, \d+% of the MACs; take them out"
    )
    assert [line for line in recorder.warnings if re.match(expected, line)]
    assert [line for line in outcome.report["warnings"] if re.match(f"student, u8: {expected}", line)]


def test_parity_that_fails_stops_the_engines_that_need_the_file(tiny, run):
    tiny["stages"] = tiny["stages"][:1]
    tiny["export"] = {"max_error": 1e-12}
    tiny["deploy"] = [{"backend": {"name": "null"}, "precision": ["float32"]}]
    outcome, _ = run(tiny)
    assert outcome.report["engines"][0]["status"] == "failed"
    assert "disagrees with torch" in outcome.report["engines"][0]["reason"]
    assert not list(outcome.folder.glob("*-export-*"))


def test_a_missed_budget_leaves_a_report(tiny, run, tmp_path):
    tiny["stages"] = tiny["stages"][:1]
    tiny["deploy"] = [{"backend": {"name": "onnxruntime"}, "precision": ["float32"]}]
    tiny["budget"] = {"accuracy_drop": 0.0, "memory_mib": 0.5}
    with pytest.raises(BudgetExceeded, match="memory_mib"):
        run(tiny)
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["budget"]["ok"] is False
    assert (tmp_path / "run" / "report" / "report.html").exists()


def test_a_term_that_is_not_finite_stops_the_run_and_keeps_what_is_done(tiny, run, tmp_path):
    tiny["stages"] = tiny["stages"][:1]
    tiny["stages"][0]["train"].update(lr=10.0, epochs=30)
    tiny["stages"][0]["method"]["weight"] = 1000
    tiny["deploy"] = []
    with pytest.raises(TrainingError, match=r"term '(task|kd)' is (nan|inf)"):
        run(tiny)
    assert names(tmp_path / "run") == ["teacher", "student_alone"] or names(tmp_path / "run") == ["teacher"]
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert "is" in json.dumps(report["skipped"]) or report["warnings"]


def test_two_runs_in_one_directory_are_refused(tiny, run, tmp_path):
    with _locked(tmp_path / "run"), pytest.raises(ArtifactError, match="in use by another run"):
        run(tiny)


def test_a_run_directory_may_be_relative(tiny, run, tmp_path, monkeypatch):
    """The default is, and every job of the first quickstart named files that its worker did not find."""
    monkeypatch.chdir(tmp_path)
    tiny |= {
        "compare": [],
        "stages": tiny["stages"][:1],
        "deploy": [{"backend": {"name": "onnxruntime"}, "precision": ["float32"]}],
    }
    outcome, _ = run(tiny, out=Path("runs/tiny"))
    assert outcome.failures == []
    assert [engine["status"] for engine in outcome.report["engines"]] == ["measured"]


def test_smoke_is_quick_and_marks_its_report(tiny, run):
    outcome, _ = run(tiny, smoke=True)
    run_record = json.loads((outcome.folder / "run.json").read_text())
    assert run_record["smoke"] is True
    assert run_record["data"]["counts"]["train"] <= 32
    assert any("smoke" in line for line in outcome.report["warnings"])


def test_a_users_own_model_and_data(tmp_path, run, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom torch import nn\n\n"
        "def data(count):\n"
        "    rng = np.random.default_rng(0)\n"
        "    labels = np.arange(count) % 3\n"
        "    images = (rng.integers(0, 60, (count, 16, 16, 3)) + 60 * labels[:, None, None, None]).astype(np.uint8)\n"
        "    return {'train': (images, labels), 'test': (images[:30].copy(), labels[:30])}\n\n"
        "def model(num_classes, in_channels, width=8):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(),"
        " nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    outcome, _ = run(
        {
            "name": "mine",
            "task": {"kind": "classification"},
            "data": {"kind": "callable", "call": "mine:data", "arguments": {"count": 300}},
            "student": {
                "model": {"name": "callable", "call": "mine:model", "arguments": {"width": 12}, "taps": {"features": "2"}}
            },
            "stages": [
                {"kind": "finetune", "train": {"epochs": 3, "batch_size": 32, "lr": 0.1}},
                {"kind": "quantize", "train": {"epochs": 1, "batch_size": 32, "lr": 0.01}, "method": {"name": "logits"}},
            ],
            "deploy": [{"backend": {"name": "onnxruntime"}, "precision": ["float32", "int8"]}],
            "measure": {"warmup_s": 0.01, "duration_s": 0.05, "compare_s": 0.1},
        }
    )
    assert [engine["status"] for engine in outcome.report["engines"]] == ["measured", "measured"]
    assert min(engine["metric"]["value"] for engine in outcome.report["engines"]) > 0.9


def test_a_student_with_weights_has_its_float_twin_without_training(tiny, run, tmp_path):
    """The float engine that the recipe asks for is the weights' own."""
    tiny["stages"] = tiny["stages"][:1]
    tiny["deploy"] = []
    first, _ = run(tiny)
    weights = next(first.folder.glob("*-distill-*")) / "model.safetensors"
    del tiny["teacher"], tiny["compare"]
    tiny["student"]["model"]["weights"] = str(weights)
    tiny["stages"] = [{"kind": "quantize", "train": {"epochs": 1, "batch_size": 100, "lr": 0.01}}]
    tiny["deploy"] = [{"backend": {"name": "null"}, "precision": ["float32", "int8"]}]
    outcome, _ = run(tiny, out=tmp_path / "given")
    assert [engine["precision"] for engine in outcome.report["engines"]] == ["float32", "int8"]
    kept = load_file(next(outcome.folder.glob("*-weights-*")) / "model.safetensors")
    assert all((kept[name] == value).all() for name, value in load_file(weights).items())


def test_changed_code_of_a_users_model_is_another_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "net_one.py").write_text("def build(**_): ...\n")
    package = tmp_path / "net_pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("A = 1\n")
    one = ModelConfig(name="callable", call="net_one:build")
    pack = ModelConfig(name="callable", call="net_pack.models:build")
    before = code_of(one), code_of(pack)
    assert None not in before
    assert (code_of(one), code_of(pack)) == before
    (tmp_path / "net_one.py").write_text("def build(**_): pass\n")
    (package / "parts.py").write_text("A = 2\n")
    assert code_of(one) != before[0]
    assert code_of(pack) != before[1]
    assert code_of(ModelConfig(name="resnet8")) is None


def test_a_disturbed_measurement_is_made_again(tiny, run):
    tiny["stages"] = tiny["stages"][:1]
    tiny["deploy"] = [{"backend": {"name": "null"}, "precision": ["float32"]}]
    first, _ = run(tiny)
    mark(first.folder, valid=False)
    (before,) = (path.read_text() for path in first.folder.glob("*-bench-*/record.json"))
    second, _ = run(tiny)
    (after,) = (path.read_text() for path in second.folder.glob("*-bench-*/record.json"))
    assert after != before


def test_images_for_engines_are_written_again_where_they_are_damaged(tiny, run):
    tiny["stages"] = tiny["stages"][:1]
    tiny["deploy"] = [{"backend": {"name": "null"}, "precision": ["float32"]}]
    first, _ = run(tiny)
    (images,) = first.folder.glob("inputs/predict-*.npy")
    whole = images.read_bytes()
    images.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    tiny["deploy"][0]["batch"] = 2
    run(tiny)
    assert images.read_bytes() == whole


def test_a_fixed_batch_goes_through_the_whole_run(run, tiny):
    tiny["export"] = {"batch": 3, "max_changed": 0.2}
    tiny["deploy"][0].update(batch=3, models=["student"])
    outcome, _ = run(tiny, smoke=True)
    engines = outcome.report["engines"]
    assert [engine["status"] for engine in engines] == ["measured"] * 2, [engine["reason"] for engine in engines]
