"""float16 files hold what the float32 file computes: what leaves the range stays in float32, with its reason."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from edgekd.engines import backend, build_engine, graph
from edgekd.engines.tensorrt_rtx import TensorRtRtxOptions
from edgekd.export import onnx as export_onnx
from edgekd.export import parity
from edgekd.export.float16 import to_float16
from edgekd.export.onnx import describe, export


class Range(nn.Module):
    """The second convolution's results are multiplied, and divided again: the same values by a way through a large range."""

    def __init__(self, gain):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 10)
        with torch.no_grad():
            self.conv2.weight *= gain
            self.conv3.weight /= gain

    def forward(self, x):
        return self.fc(torch.relu(self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x)))))).mean((2, 3)))


class HandmadeNorm(nn.Module):
    """A layer norm of single operations, and attention: the squares leave the range, and so does the small epsilon."""

    def __init__(self, size):
        super().__init__()
        self.embed, self.norm, self.attend = nn.Conv2d(3, size, 4, 4), nn.LayerNorm(size), nn.Linear(size, 3 * size)
        self.fc = nn.Linear(size, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2) * 1000
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-12).sqrt()
        query, key, value = self.attend(self.norm(x)).chunk(3, -1)
        weights = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
        return self.fc((x + weights @ value).mean(1))


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(0).normal(size=(24, 3, 16, 16)).astype(np.float32))


def pair(module, images):
    torch.manual_seed(0)
    model = export(module.eval(), images[:2], output_names=["logits"], opset=20)
    with torch.no_grad():
        return model, module(images).numpy()


def logits(model, images):
    """By ONNX's own reference: ONNX Runtime on the CPU has few float16 kernels, and keeps float32 from one layer to the next."""
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, {"images": images.numpy()})[0]


def error(expected, received):
    return np.abs(expected - received).max() / np.abs(expected).max()


@pytest.mark.parametrize("gain", [2e5, 1e6])  # at the first only activations leave the range, at the second weights too
def test_huge_activations_stay_in_float32(images, gain):
    torch.manual_seed(1)
    model, expected = pair(Range(gain), images)
    naive = convert_float_to_float16(type(model).FromString(model.SerializeToString()), keep_io_types=True)
    graph.sort(naive.graph)
    assert not np.isfinite(logits(naive, images)).all()
    converted, kept = to_float16(model, images[:8].numpy(), parity.run_once)
    onnx.checker.check_model(converted, full_check=True)
    assert error(expected, logits(converted, images)) < 0.01
    assert {"conv2", "conv3"} <= {entry.path for entry in kept}
    assert "conv1" not in {entry.path for entry in kept}
    assert any("float16 ends at 65504" in entry.reason for entry in kept)


def test_tiny_weights_and_activations_stay_in_float32(images):
    torch.manual_seed(1)
    model, expected = pair(Range(1e-7), images)
    converted, kept = to_float16(model, images[:8].numpy(), parity.run_once)
    assert error(expected, logits(converted, images)) < 0.01
    assert any("of its norm" in entry.reason for entry in kept)


def test_nothing_is_kept_without_need(images):
    torch.manual_seed(1)
    model, expected = pair(Range(1.0), images)
    converted, kept = to_float16(model, images.numpy(), parity.run_once)
    assert kept == []
    assert 1e-6 < error(expected, logits(converted, images)) < 0.01


def test_a_norm_of_single_operations_and_attention(images):
    torch.manual_seed(1)
    model, expected = pair(HandmadeNorm(16), images)
    converted, kept = to_float16(model, images.numpy(), parity.run_once)
    assert error(expected, logits(converted, images)) < 0.01
    assert {"Pow", "Mul"} & {entry.op for entry in kept}  # the squares
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in converted.graph.initializer}


@pytest.mark.skipif(not backend("tensorrt_rtx").available().ok, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("capability", ["SM89", "SM75"])
def test_tensorrt_rtx_builds_it(images, tmp_path, capability):
    torch.manual_seed(1)
    for name, module in (("plain", Range(1.0)), ("norm", HandmadeNorm(16)), ("range", Range(1e6))):
        model, _ = pair(module, images)
        converted, _ = to_float16(model, images.numpy(), parity.run_once)
        folder = tmp_path / name
        (folder / "engine").mkdir(parents=True)
        export_onnx.save(converted, folder / "model.onnx")
        (folder / "io.json").write_text(json.dumps(describe(converted, {}, "float16")))
        options = TensorRtRtxOptions(compute_capabilities=(capability,))
        assert build_engine(folder / "model.onnx", options, "float16", folder / "engine")["size_bytes"] > 10_000
