"""The export stage on stored checkpoints: files, io.json, gates."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgekd.artifacts import Store
from edgekd.engines import model_check
from edgekd.engines.base import read_io
from edgekd.engines.preprocess import normalize
from edgekd.errors import ExportError, ParityError
from edgekd.export import stage
from edgekd.export.qdq import ENCODINGS
from edgekd.export.stage import ExportConfig
from edgekd.quantize import qat
from edgekd.tasks.classification import Classification
from edgekd.train import checkpoint as checkpoints
from edgekd.train.checkpoint import Architecture


def stored(tmp_path, twin, digits, *, quantized):
    made = twin("resnet8")
    architecture = Architecture({"name": "resnet8"}, digits.num_classes, 3, 32, 32)
    module = made.module
    if quantized:
        module = made.quantized
        architecture = architecture.with_plans(quantization=qat.plan(module))
    store = Store(tmp_path / "run")
    about = {
        "order": 1,
        "stage": "quantize" if quantized else "distill",
        "role": "student",
        "parents": (),
        "config": {},
        "environment": {},
    }
    key = ("ab" if quantized else "cd") * 32
    with store.draft(id=key, kind="checkpoint", **about) as draft:
        checkpoints.save(draft.folder, module, architecture, [])
    return store.find(key)


@pytest.mark.parametrize("encoding", ["float32", "float16", "u8", "u7", "s8"])
def test_files_and_io(tmp_path, twin, digits, encoding):
    checkpoint = stored(tmp_path, twin, digits, quantized=encoding in ENCODINGS)
    out = tmp_path / "out"
    out.mkdir()
    metrics = stage.run(ExportConfig(parity_images=64, max_changed=0.1), checkpoint, encoding, digits, Classification(), out)
    assert sorted(path.name for path in out.iterdir()) == ["io.json", "layers.json", "lint.json", "model.onnx", "parity.json"]
    io = read_io(out / "io.json")
    assert [(spec.name, spec.dtype, spec.shape) for spec in io.inputs] == [("images", "float32", (-1, 3, 32, 32))]
    assert [(spec.name, spec.dtype, spec.shape) for spec in io.outputs] == [("logits", "float32", (-1, 10))]
    assert io.postprocessing == {"kind": "classification", "output": "logits", "classes": list(digits.classes)}
    precision = json.loads((out / "io.json").read_text())["precision"]
    assert precision == ("int8" if encoding in ENCODINGS else encoding)
    onnx.checker.check_model(onnx.load(out / "model.onnx"), full_check=True)
    assert model_check.check(out / "model.onnx", io) == "ok"
    assert metrics["size_bytes"] == (out / "model.onnx").stat().st_size
    assert metrics["parity"] == json.loads((out / "parity.json").read_text())
    assert ("tensors" in metrics["parity"]) == (precision == "int8")
    if precision == "int8":
        assert metrics["parity"]["tensors"]["count"] > 10
        assert metrics["parity"]["tensors"]["max_steps"] <= 1


def test_the_targets_preprocessing_is_the_trainings(tmp_path, twin, digits):
    """uint8 images through io.json on the target and through the training's own normalisation give the same logits."""
    checkpoint = stored(tmp_path, twin, digits, quantized=False)
    stage.run(ExportConfig(), checkpoint, "float32", digits, Classification(), tmp_path)
    io = read_io(tmp_path / "io.json")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    received = session.run(None, {"images": normalize(np.array(digits.val.images[:64]), io.preprocessing)})[0]
    made = twin("resnet8")
    with torch.no_grad():
        expected = made.module(made.images).numpy()
    np.testing.assert_allclose(received, expected, atol=1e-4, rtol=1e-3)


def test_a_batch_of_any_size(tmp_path, twin, digits):
    stage.run(ExportConfig(), stored(tmp_path, twin, digits, quantized=False), "float32", digits, Classification(), tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        assert session.run(None, {"images": np.zeros((batch, 3, 32, 32), np.float32)})[0].shape == (batch, 10)


@pytest.mark.parametrize("encoding", ["float32", "u8"])
def test_a_batch_of_one_size(tmp_path, twin, digits, encoding):
    checkpoint = stored(tmp_path, twin, digits, quantized=encoding == "u8")
    config = ExportConfig(batch=3, parity_images=64, max_changed=0.1)  # 64 is no multiple of 3
    metrics = stage.run(config, checkpoint, encoding, digits, Classification(), tmp_path)
    assert metrics["parity"]["outputs"][0]["images"] == 64
    io = read_io(tmp_path / "io.json")
    assert [spec.shape for spec in (*io.inputs, *io.outputs)] == [(3, 3, 32, 32), (3, 10)]


def test_the_gate_stops_a_run(tmp_path, twin, digits):
    checkpoint = stored(tmp_path, twin, digits, quantized=False)
    with pytest.raises(ParityError, match="disagrees with torch"):
        stage.run(ExportConfig(max_error=1e-12), checkpoint, "float32", digits, Classification(), tmp_path)


def test_a_file_that_no_engine_could_run_is_refused_by_its_module(tmp_path, twin, digits, monkeypatch):
    """Before any build, and before ONNX Runtime runs it for parity: it would take a scale that is none without a word."""
    encode = stage.encode

    def collapsed(module, encoding):
        encoded = encode(module, encoding)
        encoded.get_submodule("stage1.0.conv1").scale[1] = 0
        return encoded

    monkeypatch.setattr(stage, "encode", collapsed)
    checkpoint = stored(tmp_path, twin, digits, quantized=True)
    with pytest.raises(ExportError, match=r"bad-scale: stage1\.0\.conv1 \(1 of \d+ scales, for instance 0\)") as caught:
        stage.run(ExportConfig(), checkpoint, "u8", digits, Classification(), tmp_path)
    assert "look at the training" in caught.value.hint


def test_a_float_checkpoint_has_no_integers(tmp_path, twin, digits):
    checkpoint = stored(tmp_path, twin, digits, quantized=False)
    with pytest.raises(ExportError, match="is not quantized"):
        stage.run(ExportConfig(), checkpoint, "u8", digits, Classification(), tmp_path)
