"""What every backend must do; each test runs over the whole table."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from edgekd.engines import (
    BACKENDS,
    OPTIONS,
    WrongMachineError,
    build_engine,
    open_engine,
    options_dict,
    options_from,
    read_engine,
)
from edgekd.errors import BuildError

NAMES = [
    pytest.param(
        name, marks=pytest.mark.skipif(not backend.available().ok, reason=f"{name}: {backend.available().reason or 'available'}")
    )
    for name, backend in BACKENDS.items()
]
RUNNABLE = [param for param in NAMES if param.values[0] != "tensorrt_rtx"]
COMPUTING = [param for param in RUNNABLE if param.values[0] != "null"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory, float_model, int8_model):
    """Builds an engine once per backend and precision."""
    built = {}

    def build(name, precision):
        if (name, precision) not in built:
            model = float_model if precision == "float32" else int8_model
            folder = tmp_path_factory.mktemp(f"{name}-{precision}")
            build_engine(model.path, OPTIONS[name](), precision, folder)
            built[name, precision] = folder
        return built[name, precision]

    return build


def random_inputs(batch):
    return np.random.default_rng(batch).normal(size=(batch, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_build_writes_a_complete_engine(name, engines, float_model):
    folder = engines(name, "float32")
    record = json.loads((folder / "engine.json").read_text())
    assert record["backend"]["name"] == name
    assert record["backend"] == options_dict(OPTIONS[name]())
    assert record["precision"] == "float32"
    assert record["fingerprint"]["library"] == name
    assert record["fingerprint"]["version"]
    assert record["size_bytes"] == sum((folder / file).stat().st_size for file in record["files"])
    assert (folder / "io.json").read_bytes() == float_model.path.with_name("io.json").read_bytes()
    assert (folder / "build.log").is_file()


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_session_declares_its_tensors(name, precision, engines):
    with open_engine(engines(name, precision)) as session:
        (images,), (logits,) = session.inputs, session.outputs
    assert (images.name, images.dtype, images.shape) == ("images", "float32", (-1, 3, 8, 8))
    assert (logits.name, logits.dtype, logits.shape) == ("logits", "float32", (-1, 5))


@pytest.mark.parametrize("name", COMPUTING)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_outputs_agree_with_the_onnx_reference(name, precision, engines, float_model, int8_model):
    model = float_model if precision == "float32" else int8_model
    reference = ReferenceEvaluator(str(model.path))
    with open_engine(engines(name, precision)) as session:
        for batch in (1, 3):
            feeds = {"images": random_inputs(batch)}
            (expected,) = reference.run(None, feeds)
            outputs = session.infer(feeds)
            assert list(outputs) == ["logits"]
            assert outputs["logits"].shape == (batch, 5)
            assert np.abs(expected).max() > 10 * model.tolerance  # otherwise zeros would pass
            np.testing.assert_allclose(outputs["logits"], expected, atol=model.tolerance)


@pytest.mark.parametrize("name", RUNNABLE)
def test_outputs_are_the_callers_to_keep(name, engines):
    with open_engine(engines(name, "float32")) as session:
        first = session.infer({"images": random_inputs(1)})["logits"]
        kept = first.copy()
        session.infer({"images": -random_inputs(1)})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize(
    ("feeds", "received"),
    [
        ({"image": np.zeros((1, 3, 8, 8), np.float32)}, r"image: float32 \[1, 3, 8, 8\]"),
        ({"images": np.zeros((1, 3, 8, 8), np.float64)}, r"images: float64 \[1, 3, 8, 8\]"),
        ({"images": np.zeros((1, 8, 8, 3), np.float32)}, r"images: float32 \[1, 8, 8, 3\]"),
        ({"images": np.zeros((3, 8, 8), np.float32)}, r"images: float32 \[3, 8, 8\]"),
        ({}, "nothing"),
        ({"images": np.zeros((1, 3, 8, 8), np.float32), "more": np.zeros(1)}, r"more: float64 \[1\]"),
    ],
    ids=["name", "dtype", "shape", "rank", "none", "surplus"],
)
def test_wrong_feeds_are_refused(name, feeds, received, engines):
    with (
        open_engine(engines(name, "float32")) as session,
        pytest.raises(BuildError, match=rf"images: float32 \[-1, 3, 8, 8\].*received.*{received}"),
    ):
        session.infer(feeds)


@pytest.mark.parametrize("name", [param for param in NAMES if param.values[0] != "null"])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_truncated_model_is_a_build_error(name, keep, tmp_path, float_model):
    data = float_model.path.read_bytes()
    (tmp_path / "model.onnx").write_bytes(data[: int(len(data) * keep)])
    shutil.copy(float_model.path.with_name("io.json"), tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(BuildError, match=r"model\.onnx") as caught:
        build_engine(tmp_path / "model.onnx", OPTIONS[name](), "float32", tmp_path / "out")
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", COMPUTING)
def test_a_truncated_engine_is_a_build_error(name, tmp_path, engines):
    folder = tmp_path / "engine"
    shutil.copytree(engines(name, "float32"), folder)
    (file,) = read_engine(folder).files
    (folder / file).write_bytes((folder / file).read_bytes()[:1000])
    with pytest.raises(BuildError, match=file):
        open_engine(folder)


@pytest.mark.parametrize("name", NAMES)
def test_another_version_of_the_library_is_refused(name, tmp_path, engines):
    folder = tmp_path / "engine"
    shutil.copytree(engines(name, "float32"), folder)
    record = json.loads((folder / "engine.json").read_text())
    record["fingerprint"]["version"] = "0.0.1"
    (folder / "engine.json").write_text(json.dumps(record))
    with pytest.raises(WrongMachineError, match=r"built with version 0\.0\.1; here it is") as caught:
        open_engine(folder)
    assert "build the engine again" in caught.value.hint


@pytest.mark.parametrize("name", COMPUTING)
def test_another_instruction_set_is_refused_and_another_model_name_is_not(name, tmp_path, engines):
    folder = tmp_path / "engine"
    shutil.copytree(engines(name, "float32"), folder)
    record = json.loads((folder / "engine.json").read_text())
    record["fingerprint"]["cpu"] = "another model of the same family"
    (folder / "engine.json").write_text(json.dumps(record))
    with open_engine(folder):
        pass
    record["fingerprint"]["cpu_flags"].append("avx10")
    (folder / "engine.json").write_text(json.dumps(record))
    more = record["fingerprint"]["cpu_flags"].pop(0)
    (folder / "engine.json").write_text(json.dumps(record))
    expected = rf"built with cpu_flags avx10, which this machine lacks, and without cpu_flags {more}, which this machine has$"
    with pytest.raises(WrongMachineError, match=expected):
        open_engine(folder)


@pytest.mark.parametrize("name", NAMES)
def test_precisions_are_explained(name):
    options = OPTIONS[name]()
    assert all(options.unsupported(precision) is None for precision in options.precisions)
    assert "'int4'" in options.unsupported("int4")


@pytest.mark.parametrize("name", NAMES)
def test_options_survive_json(name):
    options = OPTIONS[name]()
    assert options_from(json.loads(json.dumps(options_dict(options)))) == options


def test_onnxruntime_runs_the_int8_net_in_integers(engines):
    ops = [node.op_type for node in onnx.load(engines("onnxruntime", "int8") / "model.onnx").graph.node]
    assert ops.count("QLinearConv") == 2
    assert "Conv" not in ops


@pytest.mark.skipif(not BACKENDS["openvino"].available().ok, reason="openvino is not installed")
def test_openvino_runs_the_int8_net_in_integers(engines):
    import openvino

    blob = (engines("openvino", "int8") / "model.blob").read_bytes()
    runtime = openvino.Core().import_model(blob, "CPU", {}).get_runtime_model()
    infos = [op.get_rt_info() for op in runtime.get_ops()]
    convolutions = [info["runtimePrecision"].astype(str) for info in infos if info["layerType"].astype(str) == "Convolution"]
    assert len(convolutions) == 2
    assert all(precision in ("u8", "i8") for precision in convolutions)


@pytest.mark.parametrize("name", ["onnxruntime", pytest.param("openvino", marks=NAMES[1].marks)])
def test_the_saved_form_equals_the_library_used_directly(name, engines, float_model):
    images = random_inputs(3)
    if name == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(float_model.path), providers=["CPUExecutionProvider"])
        (direct,) = session.run(None, {"images": images})
    else:
        import openvino

        direct = openvino.Core().compile_model(str(float_model.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]
    with open_engine(engines(name, "float32")) as session:
        np.testing.assert_allclose(session.infer({"images": images})["logits"], direct, rtol=1e-6, atol=1e-6)


def test_tensorrt_rtx_says_that_it_does_not_run_here(engines):
    if not BACKENDS["tensorrt_rtx"].available().ok:
        pytest.skip(BACKENDS["tensorrt_rtx"].available().reason)
    with pytest.raises(WrongMachineError, match="built, not run"):
        open_engine(build_signed(engines))


def build_signed(engines):
    return engines("tensorrt_rtx", "float32")
