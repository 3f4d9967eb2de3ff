"""Which opset files are written in."""

import onnx
import pytest
from onnx import TensorProto, helper

from edgekd.engines import BACKENDS, opsets


@pytest.mark.parametrize(
    ("library", "version", "expected"),
    [
        ("tensorrt", "8.6.1.6", 17),
        ("tensorrt", "10.3.0", 20),
        ("tensorrt", "10.14.1", 20),
        ("tensorrt", "10.15.1", 24),
        ("tensorrt", "11.4.0.12", 25),
        ("onnxruntime", "1.17.3", 20),
        ("onnxruntime", "1.20.1", 21),
        ("openvino", "2026.4.1-22982-e213a147257-releases/2026/4", 22),
        ("onnxruntime", "1.9.0", None),
        ("onnxruntime", "", None),
        ("null", "1.0", None),
    ],
)
def test_the_newest_opset_of_a_version(library, version, expected):
    assert opsets.newest(library, version) == expected


def test_versions_and_opsets_rise():
    for library, rows in opsets.READS.items():
        assert library in BACKENDS
        assert list(rows) == sorted(rows)
        assert [opset for _, opset in rows] == sorted(opset for _, opset in rows)


def test_files_are_written_for_the_oldest_reader():
    assert opsets.choose({}) == opsets.PREFERRED
    assert opsets.choose({"onnxruntime": "1.32.0", "tensorrt": "11.0.0"}) == opsets.PREFERRED
    assert opsets.choose({"onnxruntime": "1.32.0", "tensorrt": "9.1.0"}) == 19
    assert opsets.choose({"onnxruntime": "1.14.1", "tensorrt": "unknown"}) == 18


def test_an_opset_beyond_a_reader_is_told():
    assert opsets.beyond(22, {"onnxruntime": "1.32.0", "tensorrt": "10.3.0"}) == [
        "opset 22: tensorrt 10.3.0 is known to read up to 20"
    ]
    assert opsets.beyond(20, {"onnxruntime": "1.32.0", "tensorrt": "10.3.0"}) == []


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_library_here_reads_what_the_table_says(name, tmp_path):
    found = BACKENDS[name].available()
    if not found.ok:
        pytest.skip(found.reason)
    opset = min(opsets.newest(name, found.version), onnx.defs.onnx_opset_version())
    value, out = (helper.make_tensor_value_info(key, TensorProto.FLOAT, [1, 4]) for key in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", [value], [out])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    if name == "onnxruntime":
        import onnxruntime

        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    else:
        import openvino

        openvino.Core().compile_model(str(path), "CPU")
