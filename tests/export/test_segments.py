"""Every quantized tensor of a file, compared on equal inputs."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgekd.errors import ParityError
from edgekd.export import parity, segments
from edgekd.export.onnx import export
from edgekd.export.qdq import ENCODINGS, coarsened, encode


@pytest.fixture
def file(twin):
    """Call with an encoding: the file, its trained tensors, and images."""

    def make(encoding):
        made = twin("resnet8")
        images = made.images[:4]
        model = export(encode(made.quantized, encoding), images, output_names=["logits"], opset=20)
        return model, segments.trained_tensors(coarsened(made.quantized, encoding), [images]), images.numpy()

    return make


def measured(model, tensors, images):
    parts = segments.cut(model, tensors)
    outputs = parity.run_once(parts.model, {"images": images} | parts.feeds)
    return segments.summary(segments.differences(parts, outputs), parts.modules)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_right_file_is_at_most_a_step_away(file, encoding):
    model, tensors, images = file(encoding)
    found = measured(model, tensors, images)
    assert found["count"] == len(tensors) == sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    assert found["values"] >= sum(tensor.values.size for tensor in tensors)  # and a fourth channel of the image
    assert found["max_steps"] <= 1
    assert found["differing"] < 1e-3
    json.dumps(found)


def test_the_module_whose_weights_are_wrong_is_named(file):
    model, tensors, images = file("s8")
    weights = next(each for each in model.graph.initializer if each.name.endswith("codes") and "stage2" in each.name)
    weights.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weights), weights.name))
    with pytest.raises(ParityError, match=r"what stage2[.\w]* makes is [\d.]+ steps away") as caught:
        measured(model, tensors, images)
    assert "equal inputs" in caught.value.message


def test_another_grid_is_refused(file):
    model, tensors, _ = file("s8")
    scale = next(node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear")
    weight = next(each for each in model.graph.initializer if each.name == scale)
    weight.CopyFrom(numpy_helper.from_array(np.float32(numpy_helper.to_array(weight) * 1.3), scale))
    with pytest.raises(ParityError, match="on another grid"):
        segments.cut(model, tensors)
    with pytest.raises(ParityError, match=f"{len(tensors)} quantizers and the trained model {len(tensors) - 1}"):
        segments.cut(model, tensors[1:])


def test_the_file_itself_is_left_alone(file):
    model, tensors, _ = file("u8")
    before = model.SerializeToString()
    parts = segments.cut(model, tensors)
    assert model.SerializeToString() == before
    onnx.checker.check_model(parts.model)
