"""The layer that an error names is the one that is wrong, in files and on the way to engines."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgekd.export import bisect, parity
from edgekd.export.float16 import to_float16
from edgekd.export.onnx import export
from edgekd.export.qdq import ENCODINGS, encode

FILES = [
    *(("resnet8", encoding) for encoding in ("float32", "float16", "u8", "u7", "s8")),  # additions
    *(("mobilenetv2", encoding) for encoding in ("float32", "u8")),  # depthwise
    *(("shufflenetv2", encoding) for encoding in ("float32", "u8")),  # concatenations and splits
]


@pytest.fixture(scope="session")
def file_of(twin):
    """Call with a model and an encoding: the exported module and its file, made once; do not change the file."""
    made = {}

    def make(name, encoding):
        if (name, encoding) not in made:
            found = twin(name)
            module = encode(found.quantized, encoding) if encoding in ENCODINGS else found.module
            model = export(module, found.images[:2], output_names=["logits"], opset=20)
            made[name, encoding] = module, to_float16(model, None, parity.run_once)[0] if encoding == "float16" else model
        return made[name, encoding]

    return make


def sabotage(model, name, change):
    """A copy in which a weight is changed; scalars that several nodes share are given to the first of them alone."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weight = next(tensor for tensor in copy.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(change(array.astype(np.float64)).astype(array.dtype), name))
    return copy


def blamed(module, model, images, encoding):
    places = bisect.local_errors(module, model, images[: parity.LOCAL_IMAGES], parity.run_once)
    return [place.path for place in places if not place.error <= parity.LOCAL_LIMIT[encoding]]


@pytest.mark.parametrize(("name", "encoding"), FILES)
def test_no_module_of_a_right_file_is_blamed(file_of, twin, name, encoding):
    module, model = file_of(name, encoding)
    places = bisect.local_errors(module, model, twin(name).images[:8], parity.run_once)
    layers = sum(isinstance(part, nn.Conv2d | nn.Linear) for part in twin(name).module.modules())
    assert len(places) >= layers  # a point per layer at least
    assert max(place.error for place in places) <= parity.LOCAL_LIMIT[encoding]


@pytest.mark.parametrize(("name", "encoding"), [file for file in FILES if file[1] != "float16"])
def test_one_changed_channel_of_one_layer_is_found(file_of, twin, name, encoding):
    """At a layer early, in the middle and late; only this one, though everything behind it is wrong too."""
    module, model = file_of(name, encoding)
    suffix = ".weight" if encoding == "float32" else ".codes"
    layers = [tensor.name for tensor in model.graph.initializer if tensor.name.endswith(suffix) and len(tensor.dims) == 4]
    for weight in (layers[0], layers[len(layers) // 2], layers[-1]):

        def negate(array):
            changed = array.copy()
            changed[np.abs(array).reshape(len(array), -1).sum(1).argmax()] *= -1
            return changed

        path = weight.removesuffix(suffix)
        assert blamed(module, sabotage(model, weight, negate), twin(name).images, encoding) == [path]


@pytest.mark.parametrize("encoding", ["u8", "s8"])
@pytest.mark.parametrize("part", ["scale", "bias"])
def test_a_changed_scale_or_bias_is_found(file_of, twin, encoding, part):
    module, model = file_of("resnet8", encoding)
    names = [tensor.name for tensor in model.graph.initializer]
    name = f"stage2.0.conv2.{part}"
    assert name in names
    broken = sabotage(model, name, lambda array: array * 1.3 + (0.3 if part == "bias" else 0))
    assert blamed(module, broken, twin("resnet8").images, encoding) == ["stage2.0.conv2"]


@pytest.mark.parametrize("which", [1, 2])
def test_a_changed_quantizer_is_found(file_of, twin, which):
    """Input 1 of its QuantizeLinear is the scale, input 2 the zero point."""
    module, model = file_of("resnet8", "u8")
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    point = next(point for point in bisect.Graph(model).points.values() if point.path == "quantizers.stage2_0_bn2")
    last = next(node for node in broken.graph.node if node.output[0] == point.tensor)
    first = next(node for node in broken.graph.node if node.output[0] == last.input[0])
    array = next(numpy_helper.to_array(tensor) for tensor in broken.graph.initializer if tensor.name == first.input[which])
    changed = array * 2 if which == 1 else array + np.array(9, array.dtype)
    broken.graph.initializer.append(numpy_helper.from_array(np.array(changed, array.dtype), "changed"))
    first.input[which] = "changed"
    assert blamed(module, broken, twin("resnet8").images, "u8") == ["quantizers.stage2_0_bn2"]


def test_the_error_names_the_layer_and_what_it_reads(file_of, twin):
    module, model = file_of("resnet8", "float32")
    broken = sabotage(model, "stage2.0.conv1.weight", lambda array: array * 1.5)
    text = parity.where_in_file(module, broken, twin("resnet8").images[:8], "float32")
    assert "it goes wrong at stage2.0.conv1 (tensor " in text
    assert "off by 5.0e-01 of its norm" in text or "off by 4." in text or "off by 6." in text
    assert "what it reads is right: stage1.0.relu2 " in text
    assert "The model itself" not in text


def test_where_no_layer_is_wrong_the_error_says_so(file_of, twin):
    module, model = file_of("resnet8", "float32")
    text = parity.where_in_file(module, model, twin("resnet8").images[:8], "float32")
    assert "no layer is to blame" in text
    assert "noise of 1e-04 in its images moves its own outputs by " in text


class Staircase(nn.Module):
    """Ten steps, each of which any change of its input may climb: what rounding does in a deep net, in one operation."""

    def forward(self, x):
        return (x * 1e5).round() % 10


def test_a_model_that_enlarges_rounding_is_known_by_noise():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    assert 1e-6 < parity.sensitivity(nn.Conv2d(3, 4, 3), images) < 1e-3
    assert parity.sensitivity(Staircase(), images) > 0.3


def test_a_layer_of_such_a_model_is_blamed_with_doubt(file_of, twin, monkeypatch):
    module, model = file_of("resnet8", "float32")
    broken = sabotage(model, "stage2.0.conv1.weight", lambda array: array * 1.5)
    monkeypatch.setattr(parity, "sensitivity", lambda *_: 0.33)
    text = parity.where_in_file(module, broken, twin("resnet8").images[:8], "float32")
    assert "it goes wrong at stage2.0.conv1 (tensor " in text
    assert "perhaps no layer is wrong. The model itself: noise of 1e-04 in its images moves its own outputs by 3.3e-01" in text
    assert text.endswith("of their norm: train it for longer, or on with quantizers")


class Shared(nn.Module):
    """One convolution called twice, an addition and a product outside of any module, and a module that returns its input."""

    def __init__(self):
        super().__init__()
        self.conv, self.skip, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.Identity(), nn.ReLU()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x):
        first = self.act(self.conv(x))
        second = self.act(self.conv(self.skip(first)) + x) * first
        return self.fc(self.norm(second.mean(1)).mean(1))


def test_shared_modules_and_functions():
    torch.manual_seed(0)
    module, images = Shared().eval(), torch.randn(8, 3, 8, 8)
    model = export(module, images[:2], output_names=["logits"], opset=20)
    places = bisect.local_errors(module, model, images, parity.run_once)
    assert [(place.point.path, place.point.call) for place in places][:4] == [("conv", 0), ("act", 0), ("conv", 1), ("act", 1)]
    assert max(place.error for place in places) < 1e-5
    product = next(node for node in model.graph.node if node.op_type == "Mul")
    product.op_type = "Add"
    (wrong,) = [place for place in places_of(module, model, images) if place.error > 1e-3]
    assert (wrong.path, wrong.reads[0][0]) == ("norm", "act")


def places_of(module, model, images):
    return bisect.local_errors(module, model, images, parity.run_once)


def test_values_that_are_not_finite_are_wrong():
    assert bisect.relative_error(np.ones(3), np.array([1, np.nan, 1])) == float("inf")
    assert bisect.relative_error(np.array([3.0, 4.0]), np.array([3.0, 3.0])) == pytest.approx(0.2)
    assert bisect.relative_error(np.zeros(2), np.zeros(2)) == 0


@pytest.mark.parametrize("encoding", ["float32", "u8"])
@pytest.mark.parametrize("name", ["resnet8", "shufflenetv2"])
def test_the_search_ends_at_the_first_wrong_point_of_any_branch(file_of, twin, name, encoding):
    """Errors that add up: of a broken file against the right one, as of an engine against its file."""
    _, model = file_of(name, encoding)
    images = twin(name).images[:8].numpy()
    suffix = ".weight" if encoding == "float32" else ".codes"
    layers = [tensor.name for tensor in model.graph.initializer if tensor.name.endswith(suffix)]
    for weight in layers[:: max(1, len(layers) // 6)]:
        broken = sabotage(model, weight, lambda array: -array)
        right, wrong = (bisect.Graph(each, integers=encoding == "u8") for each in (model, broken))
        asked = []

        def error_at(tensor, right=right, wrong=wrong, asked=asked):
            asked.append(tensor)
            expected, received = (parity.file_outputs(graph.cut(tensor).SerializeToString(), images) for graph in (right, wrong))
            return bisect.relative_error(expected[tensor], received[tensor])

        place = bisect.first_wrong(right, "logits", error_at, 0.05)
        assert weight.removesuffix(suffix) in place.layers
        assert all(error <= 0.05 for _, error in place.reads)
        assert len(asked) == len(set(asked)) <= 4 + 2 * len(right.points).bit_length()


def test_a_cut_graph_is_whole_and_holds_nothing_else(file_of, twin):
    _, model = file_of("resnet8", "u8")
    graph = bisect.Graph(model, integers=True)
    tensor = next(name for name, point in graph.points.items() if point.path == "quantizers.stage1_0_relu1")
    cut = graph.cut(tensor)
    onnx.checker.check_model(cut, full_check=True)
    assert {weight.name for weight in cut.graph.initializer if weight.name.endswith(".codes")} == {
        "stem.0.codes",
        "stage1.0.conv1.codes",
    }
    assert len(model.graph.node) > len(cut.graph.node)
