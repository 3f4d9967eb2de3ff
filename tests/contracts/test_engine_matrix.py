"""Every family of models through every backend in every precision that it has: export, build, audit, run, compare.

A new backend or precision is covered the moment it is in the tables; a new family is one line in ``families.FAMILIES``.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from families import FAMILIES

from edgekd.data.batches import normalise
from edgekd.data.digits import DigitsConfig, load
from edgekd.engines import (
    BACKENDS,
    OPTIONS,
    WrongMachineError,
    audit,
    build_engine,
    encoding_for,
    hardware,
    model_check,
    onnx_layers,
    open_engine,
)
from edgekd.export import onnx as exporting
from edgekd.export import parity
from edgekd.export.float16 import to_float16
from edgekd.export.qdq import ENCODINGS, coarsened, encode
from edgekd.export.segments import cut, differences, summary, trained_tensors
from edgekd.export.stage import preprocessing
from edgekd.quantize import qat

IMAGES = 8
OPSET = 20
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "int8": 0.1}
"""Largest difference from ONNX Runtime running the same file unoptimized, as a share of the largest value. On integers a value on
the edge between two codes may round either way, and every layer behind it adds to the difference."""
DIFFERING = 1e-3
"""Largest share of quantized values that may differ from the trained ones by a step, on equal inputs; none may by more."""
REQUANTIZED = {("decoder", "onnxruntime", "u7"): 1e-2}
"""Where more may: ONNX Runtime quantizes the weights of a float layer between two integer ones by itself (lint's rule
requantized-layer). In u8 that shows as half a trained step, which is not counted."""
GPU = hardware.has_nvidia_driver()
RUN_ELSEWHERE = set() if GPU else {"tensorrt_rtx"}
"""Builds here and runs on a GPU: its tests ask for that very answer."""

CPU = hardware.cpu()
COMPUTING = [name for name in OPTIONS if name not in (*RUN_ELSEWHERE, "null")]
CELLS = [
    pytest.param(name, precision, id=f"{name}-{precision}")
    for name, options in OPTIONS.items()
    for precision in options().precisions
]


@dataclass(frozen=True)
class Made:
    module: Any
    quantized: Any
    inputs: tuple
    """Real images where the family takes any, [IMAGES, ...] each."""


@pytest.fixture(scope="session")
def digits():
    return load(DigitsConfig(size_px=32, channels=3))


@pytest.fixture(scope="session")
def made(digits):
    """Call with a family: the float model with batch norms that have seen data, its quantized copy, and inputs."""
    images = normalise(torch.from_numpy(np.array(digits.val.images[:IMAGES])), digits.mean, digits.std).contiguous()
    cache = {}

    def make(name):
        if name not in cache:
            torch.manual_seed(0)
            family = FAMILIES[name]
            module = family.make()
            inputs = tuple(
                images[:, :, :: 32 // shape[1], :: 32 // shape[2]].contiguous()
                if len(shape) == 3
                else torch.randn(IMAGES, *shape)
                for shape in family.inputs.values()
            )
            with torch.no_grad():
                for _ in range(10):
                    module.train()(*inputs)
            quantized = qat.prepare(module.eval(), {}, qat.QuantizerConfig(), inputs)
            qat.calibrate(quantized, [inputs])
            cache[name] = Made(module, quantized.eval(), inputs)
        return cache[name]

    return make


@pytest.fixture(scope="session")
def exported(made, digits, tmp_path_factory):
    """Call with a family and a form (float32, float16 or an encoding): the folder of model.onnx, io.json and layers.json."""
    cache = {}

    def make(name, form):
        if (name, form) not in cache:
            family, one = FAMILIES[name], made(name)
            if form == "float16":
                images = one.inputs[0].numpy() if len(one.inputs) == 1 else None
                proto, _ = to_float16(onnx.load(make(name, "float32") / "model.onnx"), images, parity.run_once)
            else:
                proto = exporting.export(
                    one.module if form == "float32" else encode(one.quantized, form),
                    one.inputs,
                    input_names=list(family.inputs),
                    output_names=list(family.outputs),
                    opset=OPSET,
                    batch=family.batch,
                )
            folder = tmp_path_factory.mktemp(f"{name}-{form}")
            onnx.save(proto, folder / "model.onnx")
            precision = form if form.startswith("float") else "int8"
            (folder / "io.json").write_text(json.dumps(exporting.describe(proto, preprocessing(digits), precision)))
            (folder / "layers.json").write_text(json.dumps(onnx_layers.layers(proto)))
            cache[name, form] = folder
        return cache[name, form]

    return make


def reference(path, feeds):
    """ONNX Runtime on the file as it is written, without a single rewrite."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_the_tables_name_the_same_backends():
    assert list(BACKENDS) == list(OPTIONS)
    assert set(BACKENDS) >= RUN_ELSEWHERE


def skip_unless_here(backend):
    """A machine without the library, or without the GPU that TensorRT builds on."""
    if not BACKENDS[backend].available().ok:
        pytest.skip(BACKENDS[backend].available().reason)
    if backend == "tensorrt" and not GPU:
        pytest.skip("TensorRT builds on a GPU")


@pytest.mark.parametrize(("backend", "precision"), CELLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_everywhere(name, backend, precision, exported, made, tmp_path):
    skip_unless_here(backend)
    family, options = FAMILIES[name], OPTIONS[backend]()
    source = exported(name, encoding_for(options, CPU) if precision == "int8" else precision)
    record = build_engine(source / "model.onnx", options, precision, tmp_path)
    found = record["audit"]
    expected = list(family.float_on_onnxruntime) if (backend, precision) == ("onnxruntime", "int8") else []
    if not expected:  # else the refusal depends on the time that these layers happen to take
        assert audit.refusal(found) is None
    if found["layers"]:
        assert [row["path"] for row in found["layers"] if row["got"] != row["asked"]] == expected
    if backend in RUN_ELSEWHERE:
        assert found == {"layers": [], "reason": "built, not inspected: TensorRT-RTX reads an engine only on its GPU"}
        with pytest.raises(WrongMachineError, match="built, not run"):
            open_engine(tmp_path)
        return
    with open_engine(tmp_path) as session:
        assert [spec.name for spec in session.inputs] == list(family.inputs)
        assert [spec.name for spec in session.outputs] == list(family.outputs)
        for batch in (1, 3) if family.batch is None else (family.batch,):
            feeds = {key: value[:batch].numpy() for key, value in zip(family.inputs, made(name).inputs, strict=True)}
            expected, received = reference(source / "model.onnx", feeds), session.infer(feeds)
            assert {key: value.shape for key, value in received.items()} == {key: value.shape for key, value in expected.items()}
            for output, value in expected.items():
                if backend == "null":
                    assert not received[output].any()
                    continue
                error = np.abs(received[output] - value).max() / np.abs(value).max()
                assert error <= TOLERANCE[precision], f"{output}: {error}"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_on_codes_of_7_bits(name, backend, exported, made, tmp_path):
    """As on a CPU without VNNI, whatever this one is: on integers, without a sum that such a CPU could not hold."""
    skip_unless_here(backend)
    family, source = FAMILIES[name], exported(name, "u7")
    assert model_check.overflows(source / "model.onnx") == []
    found = build_engine(source / "model.onnx", OPTIONS[backend](), "int8", tmp_path)["audit"]
    expected = list(family.float_on_onnxruntime) if backend == "onnxruntime" else []
    assert [row["path"] for row in found["layers"] if row["got"] != row["asked"]] == expected
    with open_engine(tmp_path) as session:
        batch = family.batch or 3
        feeds = {key: value[:batch].numpy() for key, value in zip(family.inputs, made(name).inputs, strict=True)}
        expected, received = reference(source / "model.onnx", feeds), session.infer(feeds)
    for output, value in expected.items():
        assert np.abs(received[output] - value).max() / np.abs(value).max() <= 2 * TOLERANCE["int8"], (
            output
        )  # of steps twice as large


def segments_of(name, encoding, made, exported):
    """The cut file, its feeds, and what is needed to compare."""
    one = made(name)
    batch = FAMILIES[name].batch or 4
    inputs = tuple(value[:batch] for value in one.inputs)
    tensors = trained_tensors(coarsened(one.quantized, encoding), inputs)
    parts = cut(onnx.load(exported(name, encoding) / "model.onnx"), tensors)
    onnx.checker.check_model(parts.model)
    parts.feeds.update({key: value.numpy() for key, value in zip(FAMILIES[name].inputs, inputs, strict=True)})
    return parts, tensors


def check_segments(tensors, parts, outputs, record_property, differing=DIFFERING):
    found = summary(differences(parts, outputs), parts.modules)  # fails where a value is two steps away
    assert found["count"] == len(tensors) > 0
    record_property("differing", found["differing"])
    assert found["differing"] <= differing


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_the_file_is_the_trained_one(name, encoding, made, exported, tmp_path, record_property):
    parts, tensors = segments_of(name, encoding, made, exported)
    onnx.save(parts.model, tmp_path / "model.onnx")
    check_segments(tensors, parts, reference(tmp_path / "model.onnx", parts.feeds), record_property)


INTEGERS = [
    *((name, encoding_for(OPTIONS[name](), CPU)) for name in COMPUTING if "int8" in OPTIONS[name]().precisions),
    *((name, "u7") for name in ("onnxruntime", "openvino")),
]


@pytest.mark.parametrize(("backend", "encoding"), sorted(set(INTEGERS)))
@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_the_engine_is_the_trained_one(
    name, backend, encoding, made, exported, digits, tmp_path, record_property
):
    skip_unless_here(backend)
    parts, tensors = segments_of(name, encoding, made, exported)
    onnx.save(parts.model, tmp_path / "model.onnx")
    (tmp_path / "io.json").write_text(json.dumps(exporting.describe(parts.model, preprocessing(digits), "int8")))
    out = tmp_path / "engine"
    out.mkdir()
    build_engine(tmp_path / "model.onnx", OPTIONS[backend](), "int8", out)
    with open_engine(out) as session:
        given = {spec.name: parts.feeds[spec.name] for spec in session.inputs}
        differing = REQUANTIZED.get((name, backend, encoding), DIFFERING)
        check_segments(tensors, parts, session.infer(given), record_property, differing)
