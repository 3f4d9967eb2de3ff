"""The detector against the published numbers, and through training and export."""

import pytest
import torch

from edgekd import models
from edgekd.engines.detections import Heads
from edgekd.errors import RecipeError
from edgekd.export import onnx, parity
from edgekd.models import ModelConfig
from edgekd.models.superyolo import STRIDES, superyolo, superyolo_small
from edgekd.nn.flops import parameters
from edgekd.nn.shapes import shapes_only
from edgekd.nn.taps import tap_shapes

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


@pytest.mark.parametrize("name", list(STRIDES))
def test_trains_and_exports(name, tmp_path):
    torch.manual_seed(0)
    model = models.build(ModelConfig(name=name, arguments={"width": 0.125}), num_classes=1, in_channels=4)
    images = torch.randn(2, 4, 64, 64)
    model(images).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    onnx.save(onnx.export(model, images, output_names=["predictions"], opset=20), tmp_path / "model.onnx")
    more = torch.randn(3, 4, 64, 64)
    found = parity.file_outputs(tmp_path / "model.onnx", more.numpy())["predictions"]
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
