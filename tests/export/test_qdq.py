"""One trained quantization, three encodings: equal to the trained model, and run on integers by the engines."""

import collections

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgekd.errors import ExportError
from edgekd.export.lint import lint
from edgekd.export.onnx import export
from edgekd.export.qdq import ENCODINGS, EncodedConv2d, EncodedLinear, coarsened, dequantize, encode
from edgekd.quantize import qat
from edgekd.quantize.fake_quant import Quantizer, quantized_weight

MODELS = ["resnet8", "mobilenetv2", "shufflenetv2", "vgg8"]


def quantizers(module):
    return {path: part for path, part in module.named_modules() if isinstance(part, Quantizer)}


def inputs_of(module, images):
    """What each quantizer is given: path -> tensor."""
    seen = {}
    hooks = [
        part.register_forward_pre_hook(lambda _, args, path=path: seen.__setitem__(path, args[0]))
        for path, part in quantizers(module).items()
    ]
    with torch.no_grad():
        module(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_quantizer_is_at_most_one_code_apart_on_real_images(twin, name, encoding):
    """On equal inputs. s8 is the trained grid itself; u8 has a finer one where values are not negative, u7 a coarser one else."""
    made = twin(name)
    encoded = quantizers(encode(made.quantized, encoding))
    trained = quantizers(made.quantized)
    shares = []
    for path, values in inputs_of(made.quantized, made.images).items():
        with torch.no_grad():
            step = trained[path].scale()
            apart = (trained[path](values) - encoded[path](values)).abs() / step
        coarser = encoding == "u7" and trained[path].signed
        assert float(apart.max()) <= (1 if coarser else 0.5) + 1e-3, path
        shares.append(float((apart > 1e-3).float().mean()))
        if encoding == "s8" or trained[path].signed == (encoding == "u8"):
            assert shares[-1] == 0, path
    assert (max(shares) > 0) == (encoding != "s8")


@pytest.mark.parametrize("name", MODELS)
def test_the_trained_encoding_gives_the_trained_outputs(twin, name):
    """Folding a batch norm changes the order of float operations, and so, rarely, a code."""
    made = twin(name)
    with torch.no_grad():
        expected, received = made.quantized(made.images), encode(made.quantized, "s8")(made.images)
    assert float((expected - received).norm() / expected.norm()) < 0.02
    assert (expected.argmax(1) == received.argmax(1)).float().mean() > 0.95


def convolution_with_norm(gain):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=True), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(gain))
        model[1].bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
        model[1].running_mean.copy_(torch.tensor([0.5, -1.0, 0.2]))
        model[1].running_var.copy_(torch.tensor([0.7, 2.0, 1.3]))
    return model.eval()


@pytest.mark.parametrize("gain", [[1.0, 0.5, 2.0], [-1.0, 0.5, -2.0], [0.0, 1.0, -0.0]])
def test_a_batch_norm_is_folded_whatever_its_sign(gain):
    torch.manual_seed(0)
    images = torch.randn(4, 2, 8, 8)
    quantized = qat.prepare(convolution_with_norm(gain), {}, qat.QuantizerConfig(), images)
    qat.calibrate(quantized, [images])
    encoded = encode(quantized, "s8")
    assert not any(isinstance(part, nn.BatchNorm2d) for part in encoded.modules())
    values = quantized.quantizers["input_1"](images)
    with torch.no_grad():
        layer, norm = quantized.get_submodule("0"), quantized.get_submodule("1")
        expected = norm(nn.functional.conv2d(values, quantized_weight(layer.weight), layer.bias, padding=1))
        torch.testing.assert_close(encoded.get_submodule("0")(values), expected, atol=1e-5, rtol=1e-5)


class Shared(nn.Module):
    """One convolution called twice, its results normed by one batch norm or by two."""

    def __init__(self, norms):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(norms))
        self.head = nn.Conv2d(3, 4, 1)
        for index, norm in enumerate(self.norms):
            nn.init.uniform_(norm.weight, 0.2 + index, 0.5 + index)
            nn.init.uniform_(norm.running_mean, -1, 1)

    def forward(self, x):
        for call in range(2):
            x = self.relu(self.norms[call % len(self.norms)](self.conv(x)))
        return self.head(x)


@pytest.mark.parametrize(
    "model",
    [
        Shared(norms=1),
        Shared(norms=2),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm2d(3), nn.ReLU(), nn.Linear(8, 4)),
    ],
    ids=["conv and norm called twice", "two norms", "a norm behind a linear layer"],
)
def test_a_layer_that_is_called_twice_keeps_its_values(model):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    quantized = qat.prepare(model.eval(), {}, qat.QuantizerConfig(), images)
    qat.calibrate(quantized, [images])
    with torch.no_grad():
        expected, received = quantized.eval()(images), encode(quantized, "s8")(images)
    assert float((expected - received).abs().max() / expected.abs().max()) < 0.02


def test_a_tap_between_a_convolution_and_its_norm_does_not_keep_them_apart():
    torch.manual_seed(0)
    images = torch.randn(4, 2, 8, 8)
    quantized = qat.prepare(convolution_with_norm([1.0, 0.5, 2.0]), {"raw": "0"}, qat.QuantizerConfig(), images)
    qat.calibrate(quantized, [images])
    assert not any(isinstance(part, nn.BatchNorm2d) for part in encode(quantized, "s8").modules())


def test_the_model_itself_is_left_alone(twin):
    made = twin("resnet8")
    before = {name: value.clone() for name, value in made.quantized.state_dict().items()}
    encode(made.quantized, "u8")
    after = made.quantized.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(part.high == 127 for part in quantizers(made.quantized).values())


def test_weights_are_codes(twin):
    encoded = encode(twin("resnet8").quantized, "u8")
    layers = [part for part in encoded.modules() if isinstance(part, EncodedConv2d | EncodedLinear)]
    assert len(layers) == 10
    for layer in layers:
        assert layer.codes.dtype == torch.int8
        assert -127 <= int(layer.codes.min()) <= int(layer.codes.max()) <= 127
        assert (layer.scale > 0).all()


def test_dequantize_along_each_axis():
    codes = torch.randint(-127, 128, (3, 4), dtype=torch.int8)
    rows, columns = torch.rand(3), torch.rand(4)
    torch.testing.assert_close(dequantize(codes, rows, 0), codes.float() * rows[:, None])
    torch.testing.assert_close(dequantize(codes, columns, 1), codes.float() * columns)


def test_a_padding_mode_survives():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    quantized = qat.prepare(model, {}, qat.QuantizerConfig(), images)
    qat.calibrate(quantized, [images])
    with torch.no_grad():
        torch.testing.assert_close(encode(quantized, "s8")(images), quantized.eval()(images), atol=1e-5, rtol=1e-5)


def test_a_float_model_is_refused():
    with pytest.raises(ExportError, match="is not quantized"):
        encode(nn.Linear(2, 2), "u8")


def exported(twin, name, encoding, folder):
    """The file, written."""
    made = twin(name)
    model = export(encode(made.quantized, encoding), made.images[:2], output_names=["logits"], opset=20)
    path = folder / "model.onnx"
    onnx.save(model, path)
    return model, path


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_file_holds_int8_and_float_biases(twin, encoding, tmp_path):
    model, path = exported(twin, "resnet8", encoding, tmp_path)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    makers = {name: node for node in model.graph.node for name in node.output}
    assert len(layers) == 10
    for node in layers:
        weight = makers[node.input[1]]
        assert weight.op_type == "DequantizeLinear"
        assert kinds[weight.input[0]] == onnx.TensorProto.INT8
        assert makers[node.input[0]].op_type == "DequantizeLinear"
    assert not any(kind == onnx.TensorProto.INT32 for kind in kinds.values())  # TensorRT refuses int32 biases
    zeros = {
        int(onnx.numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and not tensor.dims
    }
    # in u7 the shortcuts, which are only added, keep all codes
    assert zeros == {"s8": {0}, "u8": {0, 128}, "u7": {0, 64, 128, 127}}[encoding]  # and the largest code
    parameters = sum(part.numel() for part in twin("resnet8").module.parameters())
    assert path.stat().st_size < 2 * parameters  # about a byte per weight, and the graph


@pytest.mark.parametrize("encoding", ["u8", "u7"])
@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_runs_every_convolution_on_integers(twin, name, encoding, tmp_path):
    """Read in the graph that it saves after its own rewriting: a float Conv would be the whole point missed."""
    import onnxruntime

    _, path = exported(twin, name, encoding, tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that the saved file is for this kind of machine
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    convolutions = sum(isinstance(part, nn.Conv2d) for part in twin(name).module.modules())
    assert kinds["QLinearConv"] == convolutions
    assert not kinds["Conv"]
    assert not kinds["FusedConv"]
    assert not kinds["Add"]  # every residual addition is QLinearAdd
    assert bool(kinds["Clip"]) == (encoding == "u7")  # of codes, between two integer kernels


@pytest.mark.parametrize("encoding", ["u8", "u7"])
@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
def test_openvino_runs_every_convolution_on_integers(twin, name, encoding, tmp_path):
    openvino = pytest.importorskip("openvino")
    _, path = exported(twin, name, encoding, tmp_path)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    precisions = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
        if facts["layerType"] == "Convolution":
            precisions.append(facts["runtimePrecision"])
    assert len(precisions) == sum(isinstance(part, nn.Conv2d) for part in twin(name).module.modules())
    assert set(precisions) <= {"u8", "i8"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_onnxruntime_gives_what_torch_gives(twin, encoding, tmp_path):
    import onnxruntime

    made = twin("resnet8")
    _, path = exported(twin, "resnet8", encoding, tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    received = session.run(None, {"images": made.images.numpy()})[0]
    with torch.no_grad():
        expected = encode(made.quantized, encoding)(made.images).numpy()
    assert np.abs(received - expected).max() / np.abs(expected).max() < 0.06
    assert (received.argmax(1) == expected.argmax(1)).mean() > 0.95


@pytest.mark.parametrize("name", MODELS)
def test_no_layer_of_u7_reads_a_code_above_127(twin, name, tmp_path):
    """Also of images far beyond what was calibrated; then two products fit in 16 bits, whichever two are added."""
    import onnxruntime

    model, _ = exported(twin, name, "u7", tmp_path)
    makers = {output: node for node in model.graph.node for output in node.output}
    read = {makers[node.input[0]].input[0] for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")}
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(each, onnx.TensorProto.UINT8, None) for each in sorted(read))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    codes = session.run(None, {"images": twin(name).images[:2].numpy() * 50})
    assert max(int(each.max()) for each in codes) == 127
    assert 2 * 127 * 127 <= np.iinfo(np.int16).max < 2 * 255 * 127


@pytest.mark.parametrize(
    ("options", "codes", "wider"),
    [
        ({"signed": False}, (0, 127), 1),
        ({"signed": True}, (0, 127), 2),
        ({"signed": False, "bits": 4}, (0, 15), 1),
        ({"signed": True, "bits": 4}, (0, 15), 1),
        ({"signed": True, "bits": 7}, (0, 127), 1),
        ({"signed": False, "end": 1.0, "whole": True}, (0, 127), 2),
    ],
)
def test_codes_of_u7(options, codes, wider):
    """What has at most 128 codes keeps its step."""
    model = nn.Sequential(Quantizer(learned=False, **options), nn.Conv2d(1, 1, 1))
    traced = torch.fx.GraphModule(model, Leaves().trace(model))
    (encoded,) = quantizers(encode(traced, "u7")).values()
    assert (encoded.low + encoded.zero_point, encoded.high + encoded.zero_point) == codes
    assert float(encoded.scale().detach() / model[0].scale().detach()) == pytest.approx(wider)
    values = torch.linspace(model[0].low, model[0].high, 1001) * model[0].scale().detach()
    apart = (encoded(values) - model[0](values)).abs().max() / model[0].scale()
    assert float(apart) <= wider - 1 + 1e-3


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, Quantizer) or super().is_leaf_module(module, name)


@pytest.mark.parametrize("relu6", [nn.ReLU6(), nn.functional.relu6], ids=["module", "function"])
def test_a_relu6_is_left_to_the_clip_of_codes(relu6, tmp_path):
    """Behind a plain ReLU6, QuantizeLinear to all of 0..255 reaches beyond 6, and the convolution would run in float."""
    import onnxruntime

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
            self.relu6 = relu6

        def forward(self, x):
            return self.last(self.relu6(self.other(self.relu6(self.one(x)))))

    torch.manual_seed(0)
    images = 20 * torch.randn(4, 3, 8, 8)
    quantized = qat.prepare(Net().eval(), {}, qat.QuantizerConfig(), images)
    qat.calibrate(quantized, [images])
    with torch.no_grad():
        expected, received = quantized.eval()(images), encode(quantized, "u7")(images)
    assert float((expected - received).abs().max() / expected.abs().max()) < 0.05
    path = tmp_path / "model.onnx"
    onnx.save(export(encode(quantized, "u7"), images, output_names=["logits"], opset=20), path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] == 2  # the last one's result is float
    assert np.abs(session.run(None, {"images": images.numpy()})[0] - received.numpy()).max() < 0.02 * float(received.abs().max())


def test_only_u7_has_coarser_grids(twin):
    made = twin("resnet8")
    assert coarsened(made.quantized, "u8") is coarsened(made.quantized, "s8") is made.quantized
    trained, coarse = quantizers(made.quantized), quantizers(coarsened(made.quantized, "u7"))
    encoded = quantizers(encode(made.quantized, "u7"))
    ratios = {path: float(coarse[path].scale().detach() / part.scale().detach()) for path, part in trained.items()}
    assert {round(ratio, 4) for ratio in ratios.values()} == {1, 2}
    assert all(trained[path].signed for path, ratio in ratios.items() if ratio > 1.5)
    for path, part in encoded.items():
        assert float(part.scale().detach()) in (
            pytest.approx(float(coarse[path].scale().detach())),
            pytest.approx(float(coarse[path].scale().detach()) / 2),  # only added: in u8
        )


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
def test_the_linter_finds_as_little_in_u7_as_in_u8(twin, name, tmp_path):
    found = {encoding: lint(exported(twin, name, encoding, tmp_path)[0], encoding) for encoding in ("u8", "u7")}
    assert found["u7"] == found["u8"]


def test_what_is_moved_is_clipped_once(twin, tmp_path):
    """vgg8 quantizes what comes out of max pooling and flattening again, with the quantizer of what went in."""
    model, _ = exported(twin, "vgg8", "u7", tmp_path)
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    assert kinds["MaxPool"] > 0
    assert kinds["Clip"] == kinds["QuantizeLinear"] - kinds["MaxPool"] - 1


def test_a_three_channel_image_gets_a_fourth_of_zeros(twin):
    """In u8, where one convolution alone reads it; ONNX Runtime is faster so. Nothing else changes."""
    made = twin("resnet8")
    wide, plain = encode(made.quantized, "u8"), encode(made.quantized, "s8")
    stem = wide.get_submodule("stem.0").codes
    assert stem.shape[1] == 4
    assert torch.equal(stem[:, :3], plain.get_submodule("stem.0").codes)
    assert not stem[:, 3].any()
    assert plain.get_submodule("stem.0").codes.shape[1] == 3


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_widths_stay_as_they_are(channels):
    images = torch.randn(4, channels, 8, 8)
    model = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    quantized = qat.prepare(model, {}, qat.QuantizerConfig(), images)
    qat.calibrate(quantized, [images])
    assert encode(quantized, "u8").get_submodule("0").codes.shape[1] == channels


def test_an_image_that_two_read_stays_as_it_is():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.one(x) + self.other(x)

    images = torch.randn(4, 3, 8, 8)
    quantized = qat.prepare(Two().eval(), {}, qat.QuantizerConfig(), images)
    qat.calibrate(quantized, [images])
    encoded = encode(quantized.eval(), "u8")
    assert encoded.get_submodule("one").codes.shape[1] == 3
    with torch.no_grad():
        torch.testing.assert_close(encoded(images), quantized(images), atol=0.1, rtol=0.1)
