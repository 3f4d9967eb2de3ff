"""``edgekd bench`` on ONNX files and engine folders."""

import json

import onnx
import pytest
import torch
from torch import nn

from edgekd import standalone
from edgekd.errors import BuildError, EdgekdError
from edgekd.export.onnx import export


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A foreign ONNX file: no io.json beside it."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    onnx.save(export(net, torch.zeros(2, 3, 10, 10), output_names=["logits"], opset=20), path)
    return path


def bench(*models, backend="onnxruntime", **options):
    return standalone.bench(list(models), backend=backend, **{"threads": 1, "batch": 2, "seconds": 0.05, **options})


def test_one_file(model):
    result = bench(model)
    (engine,) = result["engines"]
    assert engine["model"] == str(model)
    assert engine["batch"] == 2
    assert len(engine["samples_ns"]) >= 50
    assert result["comparison"] is None
    (line,) = [line for line in standalone.lines(result) if "warning" not in line]
    assert f"p50 {engine['latency_ms']['p50']:.3f} ms" in line


def test_two_files_are_compared_in_turns(model):
    result = bench(model, model)
    (ratio,) = result["comparison"]["ratios"]
    assert 0.3 < ratio["speedup"] < 3
    assert any("interleaved" in line for line in standalone.lines(result))


def test_an_engine_of_another_machine_is_skipped_and_the_others_are_measured(model, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from edgekd.engines import build_engine, options_from

    source = tmp_path / "source"
    source.mkdir()
    (source / "model.onnx").write_bytes(model.read_bytes())
    (source / "io.json").write_text(json.dumps(standalone._describe(model)))
    engine = tmp_path / "engine"
    engine.mkdir()
    build_engine(source / "model.onnx", options_from({"name": "tensorrt_rtx"}), "float32", engine)
    result = bench(model, engine)
    assert len(result["engines"]) == 1
    (skipped,) = result["skipped"]
    assert skipped["model"] == str(engine)
    assert "no NVIDIA GPU" in skipped["reason"]
    with pytest.raises(EdgekdError, match="no NVIDIA GPU"):
        bench(engine)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.onnx", "does not exist"),
        (lambda folder: folder, "is not an engine folder"),
        (lambda folder: (folder / "text.onnx").write_text("no model") and folder / "text.onnx", "cannot be read as ONNX"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, make, message):
    with pytest.raises(BuildError, match=message):
        bench(make(tmp_path))


def test_an_unknown_backend_is_refused(model):
    with pytest.raises(BuildError, match=r"unknown backend 'openvina'.*did you mean 'openvino'"):
        bench(model, backend="openvina")
