"""Suppression in the graph finds what NumPy finds in the same raw predictions, on every engine."""

import json

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper

from edgekd.engines import BACKENDS, OPTIONS, build_engine, detections, open_engine
from edgekd.engines.postprocess import postprocess
from edgekd.errors import BuildError, DataError
from edgekd.export import nms
from edgekd.export import onnx as files
from edgekd.tasks.average_precision import MOST
from edgekd.tasks.detection import Detection

SIZE = 32


def described(classes, most=50):
    anchors = [[[6.0, 9.0], [12.0, 7.0]], [[20.0, 16.0], [9.0, 30.0]]]
    return {
        "kind": "detection",
        "output": "predictions",
        "classes": [f"class {index}" for index in range(classes)],
        "size_px": SIZE,
        "strides": [4, 8],
        "anchors": anchors,
        "confidence": 0.25,
        "iou": 0.5,
        "most": most,
        "nms": "graph",
    }


def model(classes, batch="batch", most=50):
    """Raw predictions, as they are, and the boxes in them."""
    about = described(classes, most)
    shape = [batch, detections.heads_from(about).predictions, detections.BOX + classes]
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "predictions")]
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["predictions"])], "raw", [sides[0]], [sides[1]])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    nms.attach(made, about)
    onnx.checker.check_model(made, full_check=True)
    return made


def raw(classes, images=3, seed=0):
    """Predictions of which some hundred are likely, and many overlap."""
    heads = detections.heads_from(described(classes))
    values = np.random.default_rng(seed).normal(0, 1.5, (images, heads.predictions, detections.BOX + classes))
    values[-1, :, 4] = -20  # an image without a box
    return values.astype(np.float32)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", ["batch", 3])
def test_engines_find_the_same_boxes(tmp_path, classes, backend, batch):
    if not BACKENDS[backend].available().ok:
        pytest.skip(f"{backend}: {BACKENDS[backend].available().reason}")
    made, folder = model(classes, batch), tmp_path / "model"
    folder.mkdir()
    files.save(made, folder / "model.onnx")
    (folder / "io.json").write_text(json.dumps({**files.describe(made, {}, "float32"), "postprocessing": described(classes)}))
    (tmp_path / "engine").mkdir()
    build_engine(folder / "model.onnx", OPTIONS[backend](threads=1), "float32", tmp_path / "engine")
    values = raw(classes)
    with open_engine(tmp_path / "engine") as session:
        outputs = session.infer({"images": values})
    assert np.array_equal(outputs["predictions"], values)
    about = described(classes)
    outside = postprocess(outputs, {**about, "nms": "outside"})
    inside = postprocess(outputs, about)
    assert sum(len(boxes) for boxes in outside.boxes) > 40, "else nothing is tested"
    for expected, received in zip(outside.boxes, inside.boxes, strict=True):
        assert received.shape == expected.shape
        np.testing.assert_allclose(received[:, 4], expected[:, 4], rtol=1e-5)
        np.testing.assert_array_equal(received[:, 5], expected[:, 5])
        np.testing.assert_allclose(received[:, :4], expected[:, :4], atol=1e-3)
    assert len(inside.boxes[-1]) == 0


@pytest.mark.skipif(
    not BACKENDS["tensorrt_rtx"].available().ok, reason=f"tensorrt_rtx: {BACKENDS['tensorrt_rtx'].available().reason}"
)
def test_tensorrt_rtx_refuses_and_names_the_way_out(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    made = model(3)
    files.save(made, folder / "model.onnx")
    (folder / "io.json").write_text(json.dumps({**files.describe(made, {}, "float32"), "postprocessing": described(3)}))
    (tmp_path / "engine").mkdir()
    options = OPTIONS["tensorrt_rtx"](compute_capabilities=["SM89"])
    with pytest.raises(BuildError, match="at 'nms/NonMaxSuppression") as refused:
        build_engine(folder / "model.onnx", options, "float32", tmp_path / "engine")
    assert "task.nms: outside" in refused.value.hint


def test_the_task_refuses_an_engine_that_finds_other_boxes():
    about = described(3)
    task = Detection(detections.heads_from(about), 3, iou=0.5, confidence=0.25, nms="graph")
    values = raw(3)
    (found,) = onnx.reference.ReferenceEvaluator(model(3, most=MOST)).run(["detections"], {"images": values})
    labels = np.full((3, 1, 6), -1, np.float32)
    task.details({"predictions": values, "detections": found}, labels)
    with pytest.raises(DataError, match=r"\d+ of \d+ boxes of the output 'detections' are not those of the raw predictions"):
        task.details({"predictions": values, "detections": found + 8 * (found > 0)}, labels)
    with pytest.raises(DataError, match=r"has shape \[3, 300, 5\]; expected \[N, boxes, 6\]"):
        task.details({"predictions": values, "detections": found[..., :5]}, labels)
