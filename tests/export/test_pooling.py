"""Adaptive average pooling in a file: torch's numbers, in operators that every engine has."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from edgekd.export import onnx as exporting
from edgekd.export.pooling import averages


@pytest.mark.parametrize(("cells", "side"), [(1, 5), (2, 5), (3, 7), (6, 22), (6, 4), (4, 4)])
def test_shares_are_torchs(cells, side):
    values = torch.randn(1, 1, side, dtype=torch.float64)
    expected = torch.nn.functional.adaptive_avg_pool1d(values, cells)[0, 0]
    np.testing.assert_allclose(averages(cells, side) @ values[0, 0].numpy(), expected.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "operators"), [(6, ["MatMul", "MatMul"]), ((2, 4), ["AveragePool"]), (1, ["GlobalAveragePool"])]
)
def test_files_compute_the_same(grid, operators):
    module, images = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(grid)).eval(), torch.randn(2, 3, 22, 32)
    model = exporting.export(module, images, output_names=["grid"], opset=20)
    assert [node.op_type for node in model.graph.node if node.op_type not in ("Relu", "Constant")] == operators
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images[:1].numpy()})
    np.testing.assert_allclose(found, module(images[:1]).numpy(), rtol=1e-5, atol=1e-6)
