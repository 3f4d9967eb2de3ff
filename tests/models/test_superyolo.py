"""The detector against the published numbers, and through training and export."""

import math

import pytest
import torch
from torch import fx

from edgekd import models
from edgekd.engines.detections import Heads
from edgekd.errors import RecipeError
from edgekd.export import onnx, parity
from edgekd.models import ModelConfig
from edgekd.models.superyolo import C3, STRIDES, Conv, superyolo, superyolo_small
from edgekd.nn.flops import parameters
from edgekd.nn.shapes import shapes_only
from edgekd.nn.taps import tap_shapes
from edgekd.tasks.detection import Detection

SHAPES = [
    *("32x512", "64x256", "64x256", "128x128", "128x128", "256x64", "256x64", "512x32", "512x32", "512x32", "256x32", "256x64"),
    *("512x64", "256x64", "128x64", "128x128", "256x128", "128x128"),
    *("128x64", "256x64", "256x64", "256x32", "512x32", "512x32"),
]
"""Channels x size of every block at 512 px."""


@pytest.mark.parametrize(
    ("build", "classes", "channels", "millions"),
    [(superyolo, 10, 3, 7.0852), (superyolo, 15, 3, 7.0987), (superyolo, 20, 3, 7.1122), (superyolo_small, 8, 4, 4.8329)],
)
def test_published_parameters(build, classes, channels, millions):
    with shapes_only():
        model = build(num_classes=classes, in_channels=channels)
    assert round(parameters(model) / 1e6, 4) == millions


@pytest.mark.parametrize("name", list(STRIDES))
def test_published_maps(name):
    config = ModelConfig(name=name)
    with shapes_only():
        model = models.build(config, num_classes=10, in_channels=3)
    taps = {role: place for role, place in models.taps(config, model).items() if not role.startswith("stage")}
    found = tap_shapes(model, taps, torch.empty(1, 3, 512, 512, device="meta"))
    blocks = 24 if name == "superyolo" else 18
    assert [f"{shape[1]}x{shape[2]}" for role, shape in found.items() if role.startswith("block")] == SHAPES[:blocks]
    heads = [shape for role, shape in found.items() if role.startswith("head")]
    assert heads == [(1, 45, 512 // stride, 512 // stride) for stride in STRIDES[name]]


@pytest.mark.parametrize("name", list(STRIDES))
def test_predictions_stand_where_the_task_looks(name):
    """A head's map at one cell and anchor is the prediction that the table of the decoder names."""
    torch.manual_seed(0)
    model = models.build(ModelConfig(name=name, arguments={"width": 0.125}), num_classes=2, in_channels=3).eval()
    raw = []
    for head in model.heads:
        head.register_forward_hook(lambda _, __, out: raw.append(out))
    with torch.no_grad():
        predictions = model(torch.randn(1, 3, 64, 64))
    heads = Heads(64, STRIDES[name], tuple(((float(s), 1.0), (float(s), 2.0), (float(s), 3.0)) for s in STRIDES[name]))
    assert predictions.shape == (1, heads.predictions, 7)
    for place, (column, row, stride, _, anchor) in enumerate(heads.table.astype(int).tolist()):
        level = STRIDES[name].index(stride)
        expected = raw[level][0, (anchor - 1) * 7 : anchor * 7, row, column]
        assert torch.equal(predictions[0, place], expected)


@pytest.mark.parametrize(("name", "width"), [("superyolo", 0.125), ("superyolo_small", 0.25)])
def test_a_step_of_the_tasks_loss_lowers_it_and_the_result_exports(name, width, tmp_path):
    torch.manual_seed(0)
    model = models.build(ModelConfig(name=name, arguments={"width": width}), num_classes=2, in_channels=4)
    task = Detection(
        Heads(64, STRIDES[name], tuple(((2.0 * s, 2.0 * s), (4.0 * s, 4.0 * s), (6.0 * s, 6.0 * s)) for s in STRIDES[name])), 2
    )
    images = torch.randn(2, 4, 64, 64)
    labels = torch.tensor([[[0, 8, 8, 20, 22, 0], [1, 30, 40, 46, 54, 0]], [[1, 5, 30, 30, 50, 0], [-1, 0, 0, 0, 0, 0]]]).float()
    # fresh batch norms over two images of noise make gradients of norm 40: only a short step follows the slope
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    before = task.loss(model(images), labels)
    before.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    optimizer.step()
    with torch.no_grad():
        assert task.loss(model(images), labels) < before
    model.eval()
    onnx.save(onnx.export(model, images, output_names=["predictions"], opset=20), tmp_path / "model.onnx")
    for batch in (1, 3):
        more = torch.randn(batch, 4, 64, 64)
        found = parity.file_outputs(tmp_path / "model.onnx", more.numpy())["predictions"]
        assert found.shape == (batch, sum(3 * (64 // stride) ** 2 for stride in STRIDES[name]), 7)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(more), rtol=1e-3, atol=1e-4)


def test_objects_are_rare_at_first():
    torch.manual_seed(0)
    model = superyolo(num_classes=3, width=0.125).eval()
    with torch.no_grad():
        likely = torch.sigmoid(model(torch.zeros(1, 3, 64, 64))[..., 4])
    assert likely.mean() < 0.02


def test_width_and_depth():
    assert parameters(superyolo_small(num_classes=1, width=0.25)) < parameters(superyolo_small(num_classes=1)) / 10
    assert parameters(superyolo_small(num_classes=1, depth=0.34)) < parameters(superyolo_small(num_classes=1))
    with pytest.raises(RecipeError, match="width and depth must be above 0"):
        models.build(ModelConfig(name="superyolo", arguments={"width": 0}), num_classes=1, in_channels=3)


@pytest.mark.parametrize(("depth", "inner"), [(0.34, (1, 1, 1)), (1.0, (1, 3, 3)), (2.0, (2, 6, 6))])
def test_depth_scales_every_c3(depth, inner):
    with shapes_only():
        model = superyolo(num_classes=1, depth=depth)
    found = [len(block.m) for block in model.blocks if isinstance(block, C3)]
    assert found == [*inner, *[inner[0]] * 5]


@pytest.mark.parametrize(
    ("width", "channels"), [(1.0, (32, 64)), (0.25, (8, 16)), (0.3, (16, 24)), (0.01, (8, 8)), (1.5, (48, 96))]
)
def test_width_rounds_channels_up_to_multiples_of_eight(width, channels):
    with shapes_only():
        model = superyolo_small(num_classes=1, width=width)
    assert (model.blocks[0].conv.out_channels, model.blocks[1].conv.out_channels) == channels
    # inside a C3 or an SPP there are half as many
    made = [getattr(block, "conv", None) or block.cv3.conv for block in model.blocks if isinstance(block, C3 | Conv)]
    assert all(conv.out_channels % 8 == 0 for conv in made)


@pytest.mark.parametrize(("classes", "counted"), [(1, 2), (2, 2), (15, 15)])
def test_biases_begin_as_yolov5s_do(classes, counted):
    """The formulas are added to what nn.Conv2d draws: uniform within 1 / sqrt(channels)."""
    torch.manual_seed(0)
    model = superyolo(num_classes=classes, width=0.25)
    for stride, head in zip((4, 8, 16), model.heads, strict=True):
        drawn = 1 / math.sqrt(head.in_channels)
        for anchor in range(3):
            bias = head.bias.detach()[anchor * (5 + classes) : (anchor + 1) * (5 + classes)]
            assert bias[:4].abs().max() <= drawn
            assert abs(float(bias[4]) - math.log(8 / (640 / stride) ** 2)) <= drawn + 1e-5
            assert (bias[5:] - math.log(0.6 / (counted - 0.99))).abs().max() <= drawn + 1e-5


@pytest.mark.parametrize("name", list(STRIDES))
def test_fx_traces_to_the_same_function_at_any_batch(name):
    torch.manual_seed(0)
    model = models.build(ModelConfig(name=name, arguments={"width": 0.125}), num_classes=3, in_channels=1).eval()
    traced = fx.symbolic_trace(model)
    for batch in (1, 3):
        images = torch.randn(batch, 1, 32, 32)
        with torch.no_grad():
            assert torch.equal(traced(images), model(images))
    used = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(used) == len(set(used)), "a module is used twice; a quantizer belongs to one place"
