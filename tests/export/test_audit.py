"""The precision audit on real engines: what was asked, what the library says that it runs."""

import json

import onnx
import pytest
from onnx import TensorProto, helper
from torch import nn

from edgekd.engines import audit, build_engine, onnx_layers, options_from
from edgekd.engines.base import Executed
from edgekd.export import onnx as exporting
from edgekd.export.qdq import encode
from edgekd.export.stage import preprocessing
from edgekd.nn.flops import macs


@pytest.fixture(scope="session")
def audited(twin, digits, tmp_path_factory):
    """Call with model, form (float32, u8, s8) and backend: the audit of the engine."""

    def make(name, form, backend, **options):
        made, folder = twin(name), tmp_path_factory.mktemp("audit")
        module = made.module if form == "float32" else encode(made.quantized, form)
        model = exporting.export(module, made.images[:2], output_names=["logits"], opset=20)
        precision = "float32" if form == "float32" else "int8"
        onnx.save(model, folder / "model.onnx")
        (folder / "layers.json").write_text(json.dumps(onnx_layers.layers(model)))
        (folder / "io.json").write_text(json.dumps(exporting.describe(model, preprocessing(digits), precision)))
        out = folder / "engine"
        out.mkdir()
        record = build_engine(folder / "model.onnx", options_from({"name": backend, **options}), precision, out)
        assert record["audit"] == json.loads((out / "engine.json").read_text())["audit"]
        return record["audit"]

    return make


def paths(module):
    return [path for path, part in module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2", "shufflenetv2", "vgg8"])
@pytest.mark.parametrize("form", ["float32", "u8"])
def test_layers_are_the_modules_and_their_macs_are_torchs(twin, name, form):
    made = twin(name)
    module = made.module if form == "float32" else encode(made.quantized, form)
    rows = onnx_layers.layers(exporting.export(module, made.images[:2], output_names=["logits"], opset=20))
    assert sorted(row["path"] for row in rows) == sorted(paths(made.module))
    if form == "u8":
        rows[0]["macs"] = rows[0]["macs"] * 3 // 4  # the file's image has a fourth channel, of zeros
    assert sum(row["macs"] for row in rows) == macs(made.module, (3, 32, 32))
    assert {row["asked"] for row in rows} == {"float32" if form == "float32" else "int8"}


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2", "shufflenetv2"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_both_cpu_engines_run_on_integers(audited, name, backend):
    pytest.importorskip(backend)
    result = audited(name, "u8", backend)
    assert {(row["asked"], row["got"]) for row in result["layers"]} == {("int8", "int8")}  # the last matrix product too
    assert audit.summary(result) == "int8: 100% of the multiply-accumulates asked in it run in it"
    assert all(row["time_us"] is not None and row["time_us"] >= 0 for row in result["layers"])
    assert 0 <= result["other_time"] < 1
    assert audit.refusal(result) is None


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_float_engine_is_all_float(audited, backend):
    pytest.importorskip(backend)
    result = audited("resnet8", "float32", backend)
    assert {row["got"] for row in result["layers"]} == {"float32"}  # none is unknown: every layer was found by its name
    assert audit.refusal(result) is None
    assert audit.summary(result) is None


def test_an_encoding_that_does_not_fit_the_engine_is_refused_by_name(audited):
    """With signed activations ONNX Runtime keeps ReLUs, and so convolutions, in float, and does not say so."""
    result = audited("mobilenetv2", "s8", "onnxruntime")
    refusal = audit.refusal(result)
    assert refusal is not None
    assert "asked for int8, but only" in refusal
    assert "(float32)" in refusal
    assert any(path in refusal for path in ("head.0", "stem.0", "stage"))


def test_what_cannot_be_inspected_here_says_so(audited):
    pytest.importorskip("tensorrt_rtx")
    result = audited("resnet8", "s8", "tensorrt_rtx")
    assert result["layers"] == []
    assert "not inspected" in result["reason"]
    assert audit.refusal(result) is None
    assert audit.summary(result) is None


def row(node, macs_, asked="int8", outputs=()):
    return {"node": node, "outputs": list(outputs), "path": f"path.{node}", "op": "Conv", "macs": macs_, "asked": asked}


def test_the_shares_by_hand():
    asked = {"a": row("a", 60), "b": row("b", 30, outputs=["relu_b"]), "c": row("c", 10, asked="float32")}
    executed = [
        Executed(("a",), "QLinearConv", "int8", 5.0),
        Executed(("relu_b",), "Conv", "float32", 2.0),
        Executed(("a", "other"), "Reorder", "float32", 1.0),  # shorter than the convolution: not the layer
        Executed(("pool",), "Pool", "float32", 2.0),
    ]
    result = audit.compare(asked, executed)
    assert [(each["path"], each["got"]) for each in result["layers"]] == [
        ("path.a", "int8"),
        ("path.b", "float32"),
        ("path.c", "unknown"),
    ]
    assert audit.summary(result) == "int8: 67% of the multiply-accumulates asked in it run in it"
    assert result["other_time"] == pytest.approx(0.3)
    assert audit.refusal(result) is None  # two thirds of what was asked, and five sevenths of its time


def test_a_refusal_names_the_heaviest_first_and_counts_unknown_ones():
    asked = {name: row(name, count) for name, count in (("a", 10), ("b", 70), ("c", 20))}
    result = audit.compare(asked, [Executed(("c",), "QLinearConv", "int8", 1.0), Executed(("b",), "Conv", "float32", 1.0)])
    refusal = audit.refusal(result)
    assert "asked for int8, but only 20% of the multiply-accumulates of the layers asked so is in it" in refusal
    assert refusal.endswith("path.b (float32), path.a (unknown)")


def test_few_macs_that_take_most_of_the_time_are_refused_too():
    """A fast int8 engine whose one float layer eats the gain."""
    asked = {"a": row("a", 90), "b": row("b", 10), "c": row("c", 500, asked="float32")}
    executed = [
        Executed(("a",), "QLinearConv", "int8", 3.0),
        Executed(("b",), "Conv", "float32", 7.0),
        Executed(("c",), "Conv", "float32", 90.0),  # asked so: neither its MACs nor its time count
    ]
    refusal = audit.refusal(audit.compare(asked, executed))
    assert refusal == "asked for int8, but only 30% of the time of the layers asked so is in it; others: path.b (float32)"
    executed[1] = Executed(("b",), "Conv", "float32", 2.9)
    assert audit.refusal(audit.compare(asked, executed)) is None
    silent = [Executed(("a",), "QLinearConv", "int8"), Executed(("b",), "Conv", "float32")]
    assert audit.refusal(audit.compare(asked, silent)) is None  # a library that tells no times is held to the MACs alone


def test_float16_is_held_to_what_was_asked_as_int8_is():
    asked = {"a": row("a", 60, asked="float16"), "b": row("b", 40, asked="float16"), "c": row("c", 900, asked="float32")}
    executed = [Executed((name,), "Conv", "float32", 1.0) for name in asked]
    refusal = audit.refusal(audit.compare(asked, executed))
    assert refusal.startswith("asked for float16, but only 0% of the multiply-accumulates")
    halves = [Executed((name,), "Conv", "float16", 1.0) for name in asked]
    assert audit.refusal(audit.compare(asked, halves)) is None
    lower = [Executed((name,), "Conv", "bfloat16", 1.0) for name in asked]
    assert audit.refusal(audit.compare(asked, lower)) is not None  # another half is not what was asked


def test_layers_that_run_elsewhere_are_refused_in_every_precision():
    asked = {"a": row("a", 60, asked="float32"), "b": row("b", 40, asked="float32")}
    executed = [Executed(("a",), "Conv", "float32", 1.0, "CPU"), Executed(("b",), "Conv", "float32", 1.0)]
    result = audit.compare(asked, executed)
    refusal = audit.refusal(result)
    assert refusal == "60% of the multiply-accumulates is not where it was asked, but on the CPU: path.a (float32 on the CPU)"
    asked["b"]["macs"] = 90
    assert audit.refusal(audit.compare(asked, executed)) is None


def test_the_audit_of_an_earlier_version_is_judged_the_same_way():
    """engine.json once held shares of int8 beside its rows; the rows are what counts."""
    rows = [{"path": "a", "op": "Conv", "macs": 10, "asked": "int8", "got": "float32", "kind": "Conv", "time_us": 1.0}]
    old = {"layers": rows, "asked_int8": 1.0, "got_int8": 0.0, "other_time": 0.0, "reason": ""}
    assert audit.refusal(old).startswith("asked for int8, but only 0%")
    assert audit.summary(old) == "int8: 0% of the multiply-accumulates asked in it run in it"


def test_weights_that_are_quantized_in_the_graph_are_a_layer_too():
    """As nvidia-modelopt writes them: float weights, QuantizeLinear, DequantizeLinear."""
    scalars = [helper.make_tensor(name, TensorProto.FLOAT, [], [0.1]) for name in ("s", "ws")]
    zeros = [helper.make_tensor(name, TensorProto.INT8, [], [0]) for name in ("z", "wz")]
    weight = helper.make_tensor("stem.weight", TensorProto.FLOAT, [4, 3, 3, 3], [0.5] * 108)
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"], name="dq"),
        helper.make_node("QuantizeLinear", ["stem.weight", "ws", "wz"], ["wq"], name="wq"),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wdq"], name="wdq"),
        helper.make_node("Conv", ["dq", "wdq"], ["y"], name="conv", pads=[1] * 4),
    ]
    images, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, c, 8, 8]) for name, c in (("images", 3), ("y", 4)))
    graph = helper.make_graph(nodes, "net", [images], [y], [*scalars, *zeros, weight])
    (row,) = onnx_layers.layers(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    assert (row["node"], row["path"], row["asked"], row["macs"]) == ("conv", "stem", "int8", 8 * 8 * 108)
