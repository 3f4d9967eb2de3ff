"""An engine that computes something else than its file fails its cell, with the numbers and the layer."""

import json
import re

import onnx
import pytest
from onnx import numpy_helper

from edgekd.jobs import BuildJob, JobResult
from edgekd.targets.local import Local


def spoil(path, weight, change):
    """Change a weight in an engine of ONNX Runtime, which is an ONNX file; False where it has no such weight."""
    if not str(path).endswith(".onnx"):  # another backend's
        return False
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.startswith(weight):
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(change(array).astype(array.dtype), tensor.name))
            onnx.save(model, path)
            return True
    return False


@pytest.fixture
def spoiled(monkeypatch):
    """Call with a weight and a change: every engine of this machine that has the weight is built with it changed."""
    honest = Local.run

    def spoil_builds(weight, change, *, builds=None):
        count = [0]

        def run(self, job, folder, timeout_s=None):
            result = honest(self, job, folder, timeout_s)
            if isinstance(job, BuildJob) and (builds is None or count[0] < builds):
                file = next(iter(result.payload["files"]))
                if file.endswith(".onnx"):
                    count[0] += spoil(f"{job.out}/{file}", weight, change)
            return result

        monkeypatch.setattr(Local, "run", run)
        return count

    return spoil_builds


@pytest.fixture
def quick(tiny):
    tiny |= {"compare": [], "stages": [tiny["stages"][0], tiny["stages"][2]]}
    tiny["export"] = {"parity_images": 40, "max_changed": 0.2}
    tiny["deploy"] = [{"backend": {"name": "onnxruntime"}, "precision": ["int8"]}]
    return tiny


def test_both_hops_are_in_the_files_and_in_the_report(finished):
    for cell in json.loads((finished.folder / "run.json").read_text())["cells"]:
        record = json.loads((finished.folder / cell["bench"] / "record.json").read_text())
        assert record["parity"] == cell["parity"]
        (output,) = record["parity"]["outputs"]
        assert output["max_error"] <= record["parity"]["allowed"]["max_error"]
        assert output["worst"]["expected"] == pytest.approx(output["worst"]["received"], abs=1)
        assert record["parity"]["split"] == "test"
        assert output["images"] == 256 < record["metric"]["images"]
        assert abs(record["parity"]["metric"]["after"] - record["parity"]["metric"]["before"]) <= output["changed"]
        file = json.loads((finished.folder / cell["onnx"] / "parity.json").read_text())
        assert (file["split"], file["metric"]["name"]) == ("val", "accuracy")


def test_an_engine_that_goes_wrong_fails_with_the_layer_and_costs_nothing_else(quick, run, spoiled):
    # the names of ONNX Runtime's packed weights begin with the file's
    quick["deploy"].append({"backend": {"name": "openvino"}, "precision": ["int8"]})
    count = spoiled("stage2.0.conv1.codes", lambda array: array.max() - array)
    outcome, _ = run(quick)
    first, second = outcome.report["engines"]
    assert count[0] > 2  # the search met the layer again
    assert (first["status"], second["status"]) == ("failed", "measured")
    assert re.search(
        r"the onnxruntime engine disagrees with its ONNX file: output 'logits' on 40 images: max error", first["reason"]
    )
    assert "it goes wrong at stage2.0.conv1 (tensor " in first["reason"]
    assert re.search(r"what it reads is right: quantizers\.stage1_0_relu2 \d\.\de-\d\d", first["reason"])
    cell = json.loads((outcome.folder / "run.json").read_text())["cells"][0]
    assert cell["parity"]["outputs"][0]["max_error"] > 0.1
    assert cell["engine"] is not None


def test_an_engine_that_is_right_when_built_again_is_damaged(quick, run, spoiled):
    spoiled("stage2.0.conv1.codes", lambda array: array.max() - array, builds=1)
    outcome, _ = run(quick)
    assert "built again from the same file is right: this one is damaged" in outcome.report["engines"][0]["reason"]


def test_a_search_that_cannot_build_says_so(quick, run, spoiled, monkeypatch):
    spoiled("stage2.0.conv1.codes", lambda array: array.max() - array, builds=1)
    honest, builds = Local.run, []

    def run_once(self, job, folder, timeout_s=None):
        if isinstance(job, BuildJob):
            builds.append(job)
            if len(builds) > 1:
                return JobResult("failed", reason="no more", error="BuildError: no more")
        return honest(self, job, folder, timeout_s)

    monkeypatch.setattr(Local, "run", run_once)
    outcome, _ = run(quick)
    assert "the layer cannot be found: a graph that ends at " in outcome.report["engines"][0]["reason"]
    assert "does not build: no more" in outcome.report["engines"][0]["reason"]


def test_the_null_backend_has_nothing_to_compare(quick, run):
    quick["deploy"] = [{"backend": {"name": "null"}, "precision": ["float32"]}]
    outcome, _ = run(quick)
    (cell,) = json.loads((outcome.folder / "run.json").read_text())["cells"]
    assert cell["parity"] == {"reason": "the null backend computes nothing"}
