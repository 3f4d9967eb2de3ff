"""The segmenters of the model table become engines, in float and on integers; U-Net is in the tests of shipped recipes."""

import json
import typing

import numpy as np
import onnx
import pytest
import torch

from edgekd import models
from edgekd.distill.fakd import FakdConfig
from edgekd.distill.idd import IddConfig
from edgekd.distill.structured_kd import StructuredKdConfig
from edgekd.engines import BACKENDS, OPTIONS, audit, build_engine, encoding_for, hardware, onnx_layers, open_engine
from edgekd.export import onnx as exporting
from edgekd.export.qdq import encode
from edgekd.models import ModelConfig
from edgekd.quantize import qat
from edgekd.train.checkpoint import Architecture, Loaded

SIDES = (64, 96)
SMALL = {
    "segformer_b0": {"width": 8, "depths": [1, 1, 1, 1], "decoder": 16},
    "pspnet": {"width": 0.125, "decoder": 16},
    "deeplabv3plus": {"backbone": "mobilenet_v2", "width": 0.25, "decoder": 16},
}
"""Name -> arguments that make it quick."""
TOLERANCE = {"float32": 1e-4, "int8": 0.25}
"""Largest difference from torch as a share of the largest logit; on integers every layer adds to it."""


@pytest.fixture(scope="module", params=SMALL)
def made(request):
    """Images, and for each precision what torch gives for them and a function from encodings to ONNX files."""
    torch.manual_seed(0)
    config = ModelConfig(name=request.param, arguments=SMALL[request.param])
    module, images = models.build(config, num_classes=5, in_channels=3), torch.randn(4, 3, *SIDES)
    with torch.no_grad():
        for _ in range(10):
            module.train()(images)
    quantized = qat.prepare(module.eval(), models.taps(config, module), qat.QuantizerConfig(), images)
    qat.calibrate(quantized, [images])
    files = {}

    def export(form):
        if form not in files:
            model = module if form == "float32" else encode(quantized, form)
            files[form] = exporting.export(
                model, (images,), input_names=["images"], output_names=["logits"], opset=20, batch=None
            )
        return files[form]

    with torch.no_grad():
        return images, {"float32": module(images), "int8": quantized.eval()(images)}, export


@pytest.mark.parametrize("method", [StructuredKdConfig, IddConfig, FakdConfig], ids=lambda method: method.__name__)
@pytest.mark.parametrize("name", SMALL)
def test_methods_find_what_they_read(name, method):
    """The last map before the classifier, as it is multiplied by the classifier's weights."""
    config = ModelConfig(name=name, arguments=SMALL[name])
    module = models.build(config, num_classes=5, in_channels=3)
    loaded = Loaded(module, models.taps(config, module), Architecture(config.model_dump(mode="json"), 5, 3, *SIDES))
    (label,) = typing.get_args(method.model_fields["name"].annotation)
    assert method(name=label).build(loaded, loaded).student_taps == ("top",)
    assert loaded.taps["top"] == "head@input"


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_becomes_an_engine(backend, precision, made, tmp_path):
    if not BACKENDS[backend].available().ok:
        pytest.skip(BACKENDS[backend].available().reason)
    (images, expected, export), options = made, OPTIONS[backend]()
    proto = export("float32" if precision == "float32" else encoding_for(options, hardware.cpu()))
    source, engine = tmp_path / "source", tmp_path / "engine"
    source.mkdir()
    engine.mkdir()
    onnx.save(proto, source / "model.onnx")
    (source / "io.json").write_text(json.dumps(exporting.describe(proto, {}, precision)))
    (source / "layers.json").write_text(json.dumps(onnx_layers.layers(proto)))
    record = build_engine(source / "model.onnx", options, precision, engine)
    assert audit.refusal(record["audit"]) is None
    assert [row["path"] for row in record["audit"]["layers"] if row["got"] != row["asked"]] == []
    with open_engine(engine) as session:
        for batch in (1, 3):
            (found,) = session.infer({"images": images[:batch].numpy()}).values()
            wanted = expected[precision][:batch].numpy()
            assert found.shape == (batch, 5, *SIDES)
            assert np.abs(found - wanted).max() / np.abs(wanted).max() < TOLERANCE[precision]
            assert (found.argmax(1) != wanted.argmax(1)).mean() < (1e-3 if precision == "float32" else 0.1)
