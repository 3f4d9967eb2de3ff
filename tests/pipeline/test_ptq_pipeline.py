"""Recipes with ``ptq``: through the command line to engines, and what becomes of a run whose ladder leads away from int8."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file

from edgekd.data import digits
from edgekd.deployment import QUANTIZED
from edgekd.engines import backend
from edgekd.pipeline import STAGES
from edgekd.report import markdown, terminal

# Nothing to train: each digit's 64 pixels and a constant that is 10,000 times as large, then a linear classifier.
HARD = """
import torch
from torch import nn


class Hard(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.first, self.last = nn.Linear(64 * in_channels, 64 * in_channels + 1), nn.Linear(64 * in_channels + 1, num_classes)

    def forward(self, x):
        return self.last(self.first(x.flatten(1)).relu())


def build(num_classes, in_channels):
    return Hard(num_classes, in_channels)
"""


def share(audit, what):
    """Of the multiply-accumulates, those in int8."""
    return sum(row["macs"] for row in audit["layers"] if row[what] == "int8") / sum(row["macs"] for row in audit["layers"])


@pytest.fixture
def hard(tmp_path, monkeypatch):
    """The student section of a recipe whose layer ``last`` cannot be int8: weights by least squares on digits."""
    (tmp_path / "hard_to_quantize.py").write_text(HARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("hard_to_quantize", None)
    data = digits.load(digits.DigitsConfig(size_px=8))
    images = torch.from_numpy(np.array(data.train.images)).permute(0, 3, 1, 2).float().div(255)
    images = ((images - data.mean[0]) / data.std[0]).flatten(1).double() + 5
    design = torch.cat([images, torch.ones(len(images), 1, dtype=torch.float64)], 1)
    wanted = torch.nn.functional.one_hot(torch.tensor(data.train.labels)).double()
    solution = torch.linalg.solve(design.T @ design + torch.eye(65), design.T @ wanted).float()
    weights = {
        "first.weight": torch.cat([torch.eye(64), torch.zeros(1, 64)]),
        "first.bias": torch.tensor([5.0] * 64 + [1e4]),
        "last.weight": torch.cat([solution[:-1], torch.zeros(1, 10)]).T.contiguous().clone(),
        "last.bias": solution[-1].clone(),
    }
    save_file(weights, tmp_path / "hard.safetensors")
    return {"model": {"name": "callable", "call": "hard_to_quantize:build", "weights": "hard.safetensors"}}


def recipe(student, fallback, deploy):
    return {
        "name": "hard",
        "task": {"kind": "classification"},
        "data": {"kind": "digits", "size_px": 8},
        "student": student,
        "stages": [{"kind": "ptq", "fallback": fallback}],
        "deploy": deploy,
        "measure": {"warmup_s": 0.01, "duration_s": 0.05, "compare_s": 0.1},
    }


def onnxruntime(*precision):
    return {"backend": {"name": "onnxruntime"}, "precision": list(precision)}


def test_from_float_to_int8_engines_on_two_backends(tmp_path):
    data = {
        "name": "quick",
        "task": {"kind": "classification"},
        "data": {"kind": "digits", "size_px": 16},
        "student": {"model": {"name": "resnet8"}},
        "stages": [
            {"kind": "finetune", "train": {"epochs": 4, "batch_size": 50, "lr": 0.1}},
            {"kind": "ptq", "quantizer": {"calibration": "entropy"}, "equalization": True},
        ],
        "deploy": [
            {"backend": {"name": name}, "precision": ["float32", "int8"]}
            for name in ("onnxruntime", "openvino")
            if backend(name).available().ok
        ],
        "measure": {"warmup_s": 0.01, "duration_s": 0.05, "compare_s": 0.1},
    }
    with (tmp_path / "quick.yaml").open("w") as stream:
        YAML().dump(data, stream)
    command = [sys.executable, "-m", "edgekd", "compress", str(tmp_path / "quick.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=False, env={**os.environ})
    # so small a network may be no faster in int8, which a run says with exit code 1
    assert done.returncode == 0 or "slower than its float32 twin" in done.stderr, done.stderr
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert [engine["status"] for engine in report["engines"]] == ["measured"] * 2 * len(data["deploy"])
    for engine in report["engines"]:
        if engine["precision"] == "int8":
            twin = next(e for e in report["engines"] if (e["backend"], e["precision"]) == (engine["backend"], "float32"))
            assert engine["metric"]["value"] >= twin["metric"]["value"] - 0.01
            assert share(engine["audit"], "got") > 0.9
    assert [model["stage"] for model in report["models"]] == ["finetune", "ptq"]
    assert report["models"][1]["epochs"] == 0
    assert report["ladders"] == []


def test_the_hard_layer_stays_in_float_and_the_rest_is_deployed_in_int8(hard, run):
    outcome, recorder = run(recipe(hard, {"max_drop": 1}, [onnxruntime("float32", "int8")]))
    (ladder,) = outcome.report["ladders"]
    assert [(step["name"], step["kept"], step["within"]) for step in ladder["steps"]] == [
        ("int8", [], False),
        ("keep in float", ["last"], True),
    ]
    assert not [line for line in outcome.failures if "ladder" in line]
    plain, int8 = outcome.report["engines"]
    assert int8["metric"]["value"] >= plain["metric"]["value"] - 0.02
    assert 0.8 < share(int8["audit"], "asked") < 1
    assert {row["path"]: row["weight_bits"] for row in outcome.report["layers"]} == {"first": 8, "last": 32}
    for text in (markdown.render(outcome.report), "\n".join(terminal.lines(outcome.report))):
        assert "recision ladder" in text or "precision ladder" in text
        assert "keep in float" in text
    # the same again: nothing is made twice, and the ladder is still told
    again, recorder = run(recipe(hard, {"max_drop": 1}, [onnxruntime("float32", "int8")]))
    assert recorder.stages == []
    assert again.report["ladders"] == outcome.report["ladders"]


def test_a_ladder_that_reaches_nothing_fails_the_run_and_loses_nothing(hard, run):
    fallback = {"max_drop": 1, "max_float": 0, "float16": False}
    outcome, _ = run(recipe(hard, fallback, [onnxruntime("float32", "int8")]))
    assert [line for line in outcome.failures if line.startswith("precision ladder: no step is within 1 points")]
    assert any("precision ladder: no step" in line for line in outcome.report["warnings"])
    assert [engine["status"] for engine in outcome.report["engines"]] == ["measured", "measured"]
    assert (outcome.folder / "report" / "report.html").exists()


def test_float16_takes_the_place_of_int8(hard, run):
    if not backend("tensorrt_rtx").available().ok:
        pytest.skip(backend("tensorrt_rtx").available().reason)
    deploy = [{"backend": {"name": "tensorrt_rtx", "compute_capabilities": ["SM89"]}, "precision": ["float32", "int8"]}]
    outcome, _ = run(recipe(hard, {"max_drop": 1, "max_float": 0}, deploy))
    cells = {engine["precision"]: engine for engine in outcome.report["engines"]}
    assert cells["int8"]["status"] == "skipped"
    assert cells["int8"]["reason"].endswith("float16 is")
    assert cells["float16"]["status"] in ("built", "measured")
    assert outcome.failures == []


def test_a_backend_without_float16_fails_where_int8_is_not_good_enough(hard, run):
    outcome, _ = run(recipe(hard, {"max_drop": 1, "max_float": 0}, [onnxruntime("float32", "int8")]))
    cells = {engine["precision"]: engine for engine in outcome.report["engines"]}
    assert cells["float32"]["status"] == "measured"
    assert cells["int8"]["status"] == "failed"
    assert "no int8 model is within 1 points" in cells["int8"]["reason"]
    assert "not 'float16'" in cells["int8"]["reason"]
    assert len(outcome.failures) == 1


def test_every_stage_that_quantizes_is_known_to_the_deployment():
    kinds = {config.model_fields["kind"].annotation.__args__[0]: config for config in STAGES}
    assert set(QUANTIZED) == {kind for kind, config in kinds.items() if "quantizer" in config.model_fields}
