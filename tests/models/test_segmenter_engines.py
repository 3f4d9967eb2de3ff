"""Mobile U-Net, FANet and the parts of sk_unet become engines on integers that say what the trained model says."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgekd.engines import BACKENDS, OPTIONS, audit, build_engine, encoding_for, hardware, onnx_layers, open_engine
from edgekd.export import onnx as exporting
from edgekd.export.qdq import encode
from edgekd.models.fanet import fanet
from edgekd.models.mobile_unet import mobile_unet
from edgekd.models.sk_unet import Block, StripAttention
from edgekd.quantize import qat

MODELS = {
    "mobile_unet": lambda: mobile_unet(num_classes=3, in_channels=3, width=0.25),
    "fanet": lambda: fanet(num_classes=3, in_channels=3, width=4, keys=4),
    "sk_unet": lambda: nn.Sequential(
        *(Block(3, 4), StripAttention(4, (2, 4), gated=True)),
        *(nn.MaxPool2d(2), Block(4, 8), StripAttention(8, (3, 6), gated=False)),
        *(nn.Conv2d(8, 3, 1), nn.Upsample(scale_factor=2, mode="bilinear")),
    ),
}
"""Small; of sk_unet the parts, which it repeats."""


@pytest.fixture(scope="module")
def quantized():
    """Name -> images, what the quantized model gives for them, and its ONNX file in an encoding."""
    cache = {}

    def make(name, encoding):
        if name not in cache:
            torch.manual_seed(0)
            module, images = MODELS[name](), torch.randn(4, 3, 48, 80)  # sides whose coarsest map is rounded up
            with torch.no_grad():
                for _ in range(10):
                    module.train()(torch.randn(4, 3, 48, 80))
            model = qat.prepare(module.eval(), {}, qat.QuantizerConfig(), images)
            qat.calibrate(model, [images])
            with torch.no_grad():
                cache[name] = model, images, model.eval()(images).numpy(), {}
        model, images, expected, files = cache[name]
        if encoding not in files:
            files[encoding] = exporting.export(
                encode(model, encoding), (images,), input_names=["images"], output_names=["logits"], opset=20, batch=None
            )
        return images.numpy(), expected, files[encoding]

    return make


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", MODELS)
def test_it_becomes_an_engine_on_integers(name, backend, quantized, tmp_path):
    if not BACKENDS[backend].available().ok:
        pytest.skip(BACKENDS[backend].available().reason)
    options = OPTIONS[backend]()
    images, expected, proto = quantized(name, encoding_for(options, hardware.cpu()))
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
    assert found.shape == (4, 3, 48, 80)
    assert np.abs(found - expected).max() / np.abs(expected).max() < 0.2
    assert (found.argmax(1) != expected.argmax(1)).mean() < 0.05
