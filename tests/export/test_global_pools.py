"""Means over whole maps are written as pools, which ONNX Runtime runs on integers."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgekd.export.onnx import export
from edgekd.export.qdq import encode
from edgekd.quantize import qat


class Mean(nn.Module):
    def __init__(self, dims, keepdim):
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x):
        return x.mean(self.dims, keepdim=self.keepdim)


def kinds(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(1), Mean((2, 3), True), Mean((-1, -2), True)], ids=str)
def test_a_mean_over_the_map_is_a_pool_and_gives_the_same(pool):
    images = torch.randn(4, 3, 7, 5)
    model = export(pool.eval(), images, output_names=["y"], opset=20)
    assert kinds(model) == ["GlobalAveragePool"]
    assert not model.graph.initializer
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (received,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(received, pool(images).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", [Mean((2, 3), False), Mean((1,), True), Mean((3,), True)], ids=["flat", "channels", "rows"])
def test_any_other_mean_stays(pool):
    images = torch.randn(4, 3, 7, 5)
    model = export(pool.eval(), images, output_names=["y"], opset=20)
    assert "GlobalAveragePool" not in kinds(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (received,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(received, pool(images).numpy(), rtol=1e-5, atol=1e-6)


def test_onnxruntime_leaves_neither_pool_nor_relu6_between_integer_layers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        *(nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ).eval()
    images = torch.randn(8, 3, 16, 16) * 30  # so that every ReLU6 cuts
    quantized = qat.prepare(model, {}, qat.QuantizerConfig(calibration="minmax"), images)
    qat.calibrate(quantized, [images])
    onnx.save(export(encode(quantized, "u8"), images[:2], output_names=["y"], opset=20), tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    found = kinds(onnx.load(tmp_path / "optimized.onnx"))
    assert found.count("QLinearConv") == 3
    assert "QLinearGlobalAveragePool" in found
    assert not {"Clip", "Conv", "GlobalAveragePool"} & set(found)
