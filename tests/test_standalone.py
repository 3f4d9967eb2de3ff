"""``edgekd bench`` on ONNX files and engine folders."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
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


def quantized(path, dtype, named):
    """Conv and ReLU between quantizers; nodes named, or, as ONNX allows, not."""
    zero = numpy_helper.from_array(np.array(0, dtype), "zero")
    constants = [zero, numpy_helper.from_array(np.float32(0.1), "scale"), numpy_helper.from_array(np.float32(0.01), "step")]
    constants += [numpy_helper.from_array(np.ones((4, 3, 3, 3), np.int8), "codes"), numpy_helper.from_array(np.int8(0), "none")]
    nodes = [
        ("QuantizeLinear", ["images", "scale", "zero"], "a"),
        ("DequantizeLinear", ["a", "scale", "zero"], "b"),
        ("DequantizeLinear", ["codes", "step", "none"], "weight"),
        ("Conv", ["b", "weight"], "c"),
        ("Relu", ["c"], "d"),
        ("QuantizeLinear", ["d", "scale", "zero"], "e"),
        ("DequantizeLinear", ["e", "scale", "zero"], "logits"),
    ]
    made = [helper.make_node(kind, given, [out], name=f"the_{out}" if named else "") for kind, given, out in nodes]
    image, logits = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("images", (3, 16, 16)), ("logits", (4, 14, 14)))
    )
    graph = helper.make_graph(made, "net", [image], [logits], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
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


@pytest.mark.parametrize("named", [True, False])
def test_a_foreign_quantized_file_is_audited(named, tmp_path):
    """Signed activations: ONNX Runtime leaves the convolution behind a ReLU in float, and says nothing."""
    u8, s8 = (quantized(tmp_path / f"{name}.onnx", dtype, named) for name, dtype in (("u8", np.uint8), ("s8", np.int8)))
    result = bench(u8, s8)
    assert [engine["precision"] for engine in result["engines"]] == ["int8", "int8"]
    text = standalone.lines(result)
    assert "  int8: 100% of the multiply-accumulates asked in it run in it" in text
    (refused,) = [line for line in text if "asked for int8" in line]
    assert refused.startswith("  warning: asked for int8, but only 0%")
    assert "(float32)" in refused


def test_a_float_file_has_nothing_to_audit(model):
    result = bench(model)
    assert {row["got"] for row in result["engines"][0]["audit"]["layers"]} == {"float32"}
    assert not any("multiply-accumulates" in line for line in standalone.lines(result))


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
    (source / "io.json").write_text(json.dumps(standalone._describe(model, None)))
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


def changed(model, folder, change):
    proto = onnx.load(model)
    change(proto)
    path = folder / "changed.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda proto: setattr(proto.graph.input[0].type.tensor_type, "elem_type", 77), "no tensor of a known type"),
        (lambda proto: proto.graph.ClearField("output"), "it has no outputs"),
        (lambda proto: setattr(proto.graph.node[0], "op_type", "Frobnicate"), "No Op registered for Frobnicate"),
        (lambda proto: setattr(proto.opset_import[0], "version", 2**62), "asks for opset 4611686018427387904"),
    ],
)
def test_a_damaged_model_is_an_error(model, tmp_path, change, message):
    with pytest.raises(EdgekdError, match=message):
        bench(changed(model, tmp_path, change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as an io.json"),
        ("[]", "cannot be read as an io.json"),
        (
            '{"inputs": [{"name": "x", "dtype": "float32", "shape": [-1, 3, 10, 10]}], '
            '"outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, 4]}], "preprocessing": {}}',
            "is of another model: its inputs are x: float32",
        ),
    ],
)
def test_an_io_json_that_does_not_fit_is_an_error(model, tmp_path, text, message):
    path = changed(model, tmp_path, lambda proto: None)
    (tmp_path / "io.json").write_text(text)
    with pytest.raises(EdgekdError, match=message):
        bench(path)


def test_an_unknown_backend_is_refused(model):
    with pytest.raises(BuildError, match=r"unknown backend 'openvina'.*did you mean 'openvino'"):
        bench(model, backend="openvina")


def foreign(path, *shapes, outputs=1):
    """A file that adds up its inputs, each reduced to one number per item."""
    from onnx import TensorProto, helper

    nodes, parts, inputs = [], [], []
    for index, (kind, shape) in enumerate(shapes):
        name = f"in{index}"
        inputs.append(helper.make_tensor_value_info(name, kind, shape))
        nodes.append(helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Flatten", [f"{name}.float"], [f"{name}.flat"]))
        nodes.append(helper.make_node("ReduceMean", [f"{name}.flat", "axes"], [f"{name}.mean"]))
        parts.append(f"{name}.mean")
    nodes.append(helper.make_node("Sum", parts, ["sum"]))
    results = [helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["batch", 1])]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "net", inputs, results, [axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_file_with_several_inputs_that_are_no_images(tmp_path, backend):
    pytest.importorskip(backend)
    path = foreign(tmp_path / "net.onnx", (1, ["batch", 7]), (7, ["batch", 3]), (1, ["batch", 3, 8, 8]))
    (engine,) = bench(path, backend=backend)["engines"]
    assert len(engine["samples_ns"]) >= 50


def test_free_sizes_are_asked_for_and_then_set(tmp_path):
    path = foreign(tmp_path / "net.onnx", (1, ["batch", 3, "height", "width"]), (1, ["batch", 5]))
    with pytest.raises(BuildError, match=r"free sizes besides the batch: in0 \[-1, 3, -1, -1\]$") as caught:
        bench(path)
    assert "--shape" in caught.value.hint
    (engine,) = bench(path, shapes={"in0": (2, 3, 16, 12), "in1": (2, 5)})["engines"]
    assert engine["batch"] == 2
    with pytest.raises(BuildError, match=r"\[-1, 3, -1, -1\] \(-1: free\); \[2, 4, 16, 12\] does not fit"):
        bench(path, shapes={"in0": (2, 4, 16, 12)})
    with pytest.raises(BuildError, match=r"no input 'in2'.*did you mean"):
        bench(path, shapes={"in2": (2, 5)})


def test_shapes_are_read():
    assert standalone.parse_shapes(["a=1x3x224x224", "b=c=4"]) == {"a": (1, 3, 224, 224), "b=c": (4,)}
    for text in ("a", "a=", "a=1x", "a=0x3", "=1x3"):
        with pytest.raises(BuildError, match="is not understood"):
            standalone.parse_shapes([text])
