"""SCFNet: the published counts, its equations, and that it becomes engines in float and in int8."""

import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from edgekd import models
from edgekd.engines import BACKENDS, OPTIONS, audit, build_engine, encoding_for, hardware, onnx_layers, open_engine
from edgekd.errors import RecipeError
from edgekd.export import onnx as exporting
from edgekd.export.qdq import encode
from edgekd.models import ModelConfig
from edgekd.models.mobilenet_v3 import SqueezeExcitation, divisible
from edgekd.nn.flops import macs
from edgekd.nn.taps import capture
from edgekd.prune.importance import prune
from edgekd.quantize import qat

TEACHER = {"backbone": "resnet50", "width": 1.0, "channels": 64}
SMALL = {"backbone": "resnet18", "width": 0.125, "channels": 4}


def build(seed=0, **arguments):
    torch.manual_seed(seed)
    return models.build(ModelConfig(name="scfnet", arguments=arguments), num_classes=2, in_channels=3)


def seen(module, sides=(64, 96)):
    """With batch norms that have seen images, in evaluation mode."""
    with torch.no_grad():
        for _ in range(10):
            module.train()(torch.randn(4, 3, *sides))
    return module.eval()


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_the_published_student():
    module = build()
    assert count(module) == 788_298
    assert count(module.backbone) == 738_662
    assert module.backbone.channels == (16, 24, 56, 80)
    statistics = sum(value.numel() for name, value in module.named_buffers() if "num_batches" not in name)
    assert count(module) + statistics == pytest.approx(800_154, abs=0), "the 0.80 million of the paper's table"
    assert macs(module.eval(), (3, 352, 352)) / 1e9 == pytest.approx(0.24, abs=0.005)


def test_the_published_teacher():
    """26.15 million with the statistics of batch norms, 13.15 billion operations."""
    module = build(**TEACHER)
    statistics = sum(value.numel() for name, value in module.named_buffers() if "num_batches" not in name)
    assert module.backbone.channels == (256, 512, 1024, 2048)
    assert (count(module) + statistics) / 1e6 == pytest.approx(26.15, abs=0.005)
    assert macs(module.eval(), (3, 352, 352)) / 1e9 == pytest.approx(13.15, rel=0.01)


def test_the_units_of_the_backbone():
    """(expanded, out) as the specification lists them for half the width."""
    units = [unit for stage in (1, 2, 3, 4) for unit in getattr(build().backbone, f"stage{stage}")]
    found = [(unit.expand.conv.out_channels, unit.project.conv.out_channels) for unit in units]
    assert found == [
        *((8, 8), (32, 16), (40, 16), (40, 24), (64, 24), (64, 24), (120, 40), (104, 40)),
        *((96, 40), (96, 40), (240, 56), (336, 56), (336, 80), (480, 80), (480, 80)),
    ]
    assert [unit.residual for unit in units] == [
        True,
        False,
        True,
        *[False, True, True],
        *[False, True, True, True],
        *[False, True] * 2,
        True,
    ]
    assert [divisible(value) for value in (3, 8, 12, 60, 20, 100)] == [8, 8, 16, 64, 24, 104]


def test_the_gate_has_the_slope_of_one_fifth():
    torch.manual_seed(0)
    layer, maps = SqueezeExcitation(8).double(), torch.randn(2, 8, 3, 3, dtype=torch.float64) * 9
    means = maps.mean((2, 3))
    inner = (means @ layer.squeeze.weight[:, :, 0, 0].T + layer.squeeze.bias).clamp_min(0)
    logits = inner @ layer.excite.weight[:, :, 0, 0].T + layer.excite.bias
    expected = maps * (0.2 * logits + 0.5).clamp(0, 1)[:, :, None, None]
    assert torch.allclose(layer(maps), expected)


def slow(module, images, deep):
    """The decoder from its equations; only the backbone and single blocks are the network's own."""
    x2, x3, x4, x5 = module.backbone(images)

    def up(one, other):
        return F.interpolate(one, other.shape[2:], mode="bilinear", align_corners=False)

    f2, f3, f4, f5 = (module.adapters[index](maps) for index, maps in enumerate((x2, x3, x4, x5)))
    conv, norm = module.context.conv, module.context.norm
    f5 = F.conv2d(f5, conv.weight, conv.bias, padding=5, dilation=5)
    f5 = F.batch_norm(f5, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()

    def fuse(part, low, high):
        a = part.coarse(high + high * up(f5, high))
        b = part.fine(low + low * up(f5 if deep else high, low))
        return part.both(b + up(a, low))

    g5 = f5
    g4 = fuse(module.fusions[0], f4, g5)
    g3 = fuse(module.fusions[1], f3, g4)
    g2 = fuse(module.fusions[2], f2, g3)
    return [up(head(maps), images) for head, maps in zip(module.heads, (g2, g3, g4, g5), strict=True)]


@pytest.mark.parametrize("guide", ["previous", "deep"])
def test_the_decoder_agrees_with_its_equations(guide):
    module, images = seen(build(low_guide=guide)), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = slow(module, images, guide == "deep")
        torch.testing.assert_close(module(images), expected[0])
        module.training = True  # all four maps; the batch norms stay as they are
        torch.testing.assert_close(module(images), torch.cat(expected, 1))


@pytest.mark.parametrize("sides", [(64, 96), (50, 70)])
@pytest.mark.parametrize("arguments", [{}, SMALL])
def test_four_maps_in_training_and_one_afterwards(sides, arguments):
    module, images = build(**arguments), torch.randn(2, 3, *sides)
    logits = module.train()(images)
    assert logits.shape == (2, 4, *sides)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module.eval()(images).shape == (2, 1, *sides)


@pytest.mark.parametrize("arguments", [{}, SMALL])
def test_taps(arguments):
    config = ModelConfig(name="scfnet", arguments=arguments)
    module = build(**arguments).eval()
    with torch.no_grad(), capture(module, models.taps(config, module)) as found:
        module(torch.randn(1, 3, 64, 96))
    shapes = {role: tuple(maps.shape[2:]) for role, maps in found.items()}
    assert shapes["stage1"] == shapes["fused1"] == shapes["head"] == (16, 24)
    assert shapes["stage2"] == shapes["fused2"] == (8, 12)
    assert shapes["stage3"] == shapes["fused3"] == (4, 6)
    assert shapes["stage4"] == shapes["context"] == (2, 3)


def test_what_is_pruned_still_trains():
    """Side outputs are not seen while pruning, so what they read keeps its channels."""
    module = seen(build())
    small = prune(module, torch.randn(2, 3, 64, 96), ratio=0.4, round_to=8, scope="layer")
    assert count(small) < 0.8 * count(module)
    assert small.train()(torch.randn(2, 3, 64, 96)).shape == (2, 4, 64, 96)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet20"}, "backbone must be one of mobilenet_v3, resnet18, resnet34, resnet50"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"low_guide": "none"}, "low_guide previous or deep"),
        ({"width": 0}, "width must be above 0"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(RecipeError, match=message):
        build(**arguments)


# -- engines


@pytest.fixture(scope="module")
def int8():
    """The published net on integers, statistics and ranges from noise: images, what it gives for them, and its ONNX files."""
    module, images = seen(build()), torch.randn(4, 3, 64, 96)
    quantized = qat.prepare(module, {}, qat.QuantizerConfig(), images)
    qat.calibrate(quantized, [images])
    with torch.no_grad():
        expected = quantized.eval()(images).numpy()
    files = {}

    def export(encoding):
        if encoding not in files:
            model = encode(quantized, encoding)
            files[encoding] = exporting.export(
                model, (images,), input_names=["images"], output_names=["logits"], opset=20, batch=None
            )
        return files[encoding]

    return images.numpy(), expected, export


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_becomes_an_engine_on_integers(backend, int8, tmp_path):
    """Float engines are built by the smoke run of its recipe."""
    if not BACKENDS[backend].available().ok:
        pytest.skip(BACKENDS[backend].available().reason)
    (images, expected, export), options = int8, OPTIONS[backend]()
    proto = export(encoding_for(options, hardware.cpu()))
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 62 + 4 + 1 + 9 + 1, "backbone, adapters, context, fusions, and one head of four"
    source, engine = tmp_path / "source", tmp_path / "engine"
    source.mkdir()
    engine.mkdir()
    onnx.save(proto, source / "model.onnx")
    (source / "io.json").write_text(json.dumps(exporting.describe(proto, {}, "int8")))
    (source / "layers.json").write_text(json.dumps(onnx_layers.layers(proto)))
    record = build_engine(source / "model.onnx", options, "int8", engine)
    assert [row["path"] for row in record["audit"]["layers"] if row["got"] != row["asked"]] == []
    assert audit.refusal(record["audit"]) is None
    with open_engine(engine) as session:
        (found,) = session.infer({"images": images}).values()
    assert found.shape == (4, 1, 64, 96)
    assert np.abs(found - expected).max() / np.abs(expected).max() < 0.2
    assert ((found > 0) != (expected > 0)).mean() < 0.05
