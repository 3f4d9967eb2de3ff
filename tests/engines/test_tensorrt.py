"""The tensorrt backend on a recorded fake of its libraries, as TensorRT 10.3 and as 11."""

import dataclasses
import inspect
import json
import re
import sys
import types

import fake_tensorrt
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from edgekd.bench.measure import bench
from edgekd.engines import WrongMachineError, _cuda, audit, backend, build_engine, hardware, open_engine
from edgekd.engines.base import Executed
from edgekd.engines.tensorrt import TensorRtOptions, _layer
from edgekd.errors import BuildError, MissingDependency
from edgekd.jobs import BenchJob

VERSIONS = ["10.3.0", "11.4.0.106"]


@dataclasses.dataclass
class Machine:
    trt: types.ModuleType
    cuda: fake_tensorrt.Cuda


def install(monkeypatch, version, **gpu):
    cuda = fake_tensorrt.Cuda(**gpu)
    machine = Machine(fake_tensorrt.make(version, cuda), cuda)
    package = types.ModuleType("pycuda")
    package.driver = cuda.driver
    for name, module in (("tensorrt", machine.trt), ("pycuda", package), ("pycuda.driver", cuda.driver)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(hardware, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(_cuda.ctypes, "CDLL", cuda.loader)
    return machine


@pytest.fixture(params=VERSIONS)
def machine(request, monkeypatch):
    machine = install(monkeypatch, request.param)
    yield machine
    assert machine.cuda.contexts == []  # every context that was made current is left again
    assert machine.cuda.memory == {}  # and all device memory is freed


def inputs(batch):
    return np.random.default_rng(batch).normal(size=(batch, 3, 8, 8)).astype(np.float32)


def with_layers(model, folder, rows):
    for name in ("model.onnx", "io.json"):
        (folder / name).write_bytes(model.path.with_name(name).read_bytes())
    (folder / "layers.json").write_text(json.dumps(rows))
    (folder / "out").mkdir()
    return folder / "model.onnx", folder / "out"


def layer(node, asked="int8", path=None):
    return {"node": node, "outputs": [node], "path": path or f"module.{node}", "op": "Conv", "macs": 10, "asked": asked}


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_outputs_are_those_of_the_model(machine, precision, tmp_path, float_model, signed_int8_model):
    model = float_model if precision == "float32" else signed_int8_model
    record = build_engine(model.path, TensorRtOptions(), precision, tmp_path)
    version = machine.trt.__version__
    assert record["fingerprint"] == {
        "library": "tensorrt",
        "version": version,
        "compute_capability": "SM87",
        "gpu": "NVIDIA Orin",
    }
    assert list(record["files"]) == ["engine.trt"]
    reference = ReferenceEvaluator(str(model.path))
    with open_engine(tmp_path) as session:
        assert [(spec.name, spec.dtype, spec.shape) for spec in session.inputs] == [("images", "float32", (-1, 3, 8, 8))]
        assert [(spec.name, spec.dtype, spec.shape) for spec in session.outputs] == [("logits", "float32", (-1, 5))]
        assert session.device_ns is None
        kept = session.infer({"images": inputs(1)})["logits"]
        first = kept.copy()
        for batch in (2, 2, 64, 1):  # the shapes change, stay, and go back
            feeds = {"images": inputs(batch)}
            np.testing.assert_allclose(session.infer(feeds)["logits"], reference.run(None, feeds)[0], atol=1e-5)
        assert session.device_ns == 1_000_000  # the fake's clock ticks once a millisecond
    np.testing.assert_array_equal(kept, first)  # the caller's to keep


def test_a_cuda_graph_gives_the_same_and_is_launched_every_time(machine, tmp_path, float_model):
    build_engine(float_model.path, TensorRtOptions(cuda_graph=True), "float32", tmp_path)
    reference = ReferenceEvaluator(str(float_model.path))
    with open_engine(tmp_path) as session:
        for batch in (1, 1, 3, 1):
            feeds = {"images": inputs(batch)}
            np.testing.assert_allclose(session.infer(feeds)["logits"], reference.run(None, feeds)[0], atol=1e-5)
    assert machine.cuda.launched_graphs == 4


def test_a_graph_that_cannot_be_recorded_says_so(machine, monkeypatch, tmp_path, float_model):
    build_engine(float_model.path, TensorRtOptions(cuda_graph=True), "float32", tmp_path)

    def library(name):
        library = machine.cuda.loader(name)
        end = library.cuStreamEndCapture
        library.cuStreamEndCapture = lambda stream, graph: end(stream, graph) or 901
        return library

    monkeypatch.setattr(_cuda.ctypes, "CDLL", library)
    with (
        open_engine(tmp_path) as session,
        pytest.raises(BuildError, match=r"as a CUDA graph: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED") as caught,
    ):
        session.infer({"images": inputs(1)})
    assert "cuda_graph: false" in caught.value.hint


def test_feeds_and_batches_that_do_not_fit_are_refused(machine, tmp_path, float_model):
    build_engine(float_model.path, TensorRtOptions(max_batch=4), "float32", tmp_path)
    with open_engine(tmp_path) as session:
        with pytest.raises(BuildError, match=r"images: float32 \[-1, 3, 8, 8\].*received.*float64"):
            session.infer({"images": inputs(1).astype(np.float64)})
        with pytest.raises(BuildError, match=r"from \[1, 3, 8, 8\] to \[4, 3, 8, 8\]; received \[5, 3, 8, 8\]") as caught:
            session.infer({"images": inputs(5)})
        assert "max_batch" in caught.value.hint
        assert session.infer({"images": inputs(4)})["logits"].shape == (4, 5)  # the session goes on


def test_the_builder_gets_the_options(machine, tmp_path, float_model):
    options = TensorRtOptions(workspace_mib=100, opt_batch=2, max_batch=8)
    build_engine(float_model.path, options, "float32", tmp_path)
    seen = machine.trt.seen
    assert seen["limits"] == {"WORKSPACE": 100 << 20}
    assert seen["profile"] == {"images": [(1, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8)]}
    assert seen["flags"] == set()  # TF32, which the library would use by itself, is off
    assert seen["verbosity"].name == "DETAILED"
    build_engine(float_model.path, dataclasses.replace(options, tf32=True), "float32", tmp_path)
    assert seen["flags"] == {"TF32"}


@pytest.mark.parametrize(("integrated", "share"), [(0, 2), (1, 4)])
def test_the_workspace_follows_from_the_free_memory(monkeypatch, integrated, share, tmp_path, float_model):
    machine = install(monkeypatch, "10.3.0", integrated=integrated, free=1 << 30)
    build_engine(float_model.path, TensorRtOptions(), "float32", tmp_path)
    assert machine.trt.seen["limits"] == {"WORKSPACE": (1 << 30) // share}
    assert f"workspace: {1024 // share} MiB, of 1024 MiB free" in (tmp_path / "build.log").read_text()


def test_too_little_memory_is_explained(monkeypatch, tmp_path, float_model):
    machine = install(monkeypatch, "10.3.0")
    build_engine(float_model.path, TensorRtOptions(), "float32", tmp_path)
    small = fake_tensorrt.Cuda(free=1000)
    monkeypatch.setitem(sys.modules, "pycuda.driver", small.driver)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.make(machine.trt.__version__, small))
    with open_engine(tmp_path) as session, pytest.raises(BuildError, match=r"memory does not suffice.*engine\.trt") as caught:
        session.infer({"images": inputs(64)})
    assert "smaller batch" in caught.value.hint


def test_the_timing_cache_is_shared_by_builds(machine, tmp_path, float_model):
    path, folders = tmp_path / "shared" / "orin.cache", [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    build_engine(float_model.path, TensorRtOptions(timing_cache=str(path)), "float32", folders[0])
    assert path.read_bytes() == (folders[0] / "timing.cache").read_bytes() == b"NVIDIA Orin tactics"
    path.write_bytes(b"NVIDIA Orin tactics and more")
    build_engine(float_model.path, TensorRtOptions(timing_cache=str(path)), "float32", folders[1])
    assert (folders[1] / "timing.cache").read_bytes() == b"NVIDIA Orin tactics and more"
    build_engine(float_model.path, TensorRtOptions(), "float32", folders[2])  # not asked for: nothing is shared
    assert (folders[2] / "timing.cache").read_bytes() == b"NVIDIA Orin tactics"
    assert [file.name for file in path.parent.iterdir()] == ["orin.cache"]


@pytest.mark.parametrize("content", [b"garbage", b"NVIDIA RTX 4090 tactics"])
def test_a_timing_cache_that_does_not_fit_is_left_aside_and_replaced(machine, content, tmp_path, float_model):
    path = tmp_path / "timing"
    path.write_bytes(content)
    build_engine(float_model.path, TensorRtOptions(timing_cache=str(path)), "float32", tmp_path)
    assert path.read_bytes() == b"NVIDIA Orin tactics"
    assert "is damaged, or of another GPU or version" in (tmp_path / "build.log").read_text()


def test_the_audit_finds_int8_layers_and_their_times(machine, tmp_path, signed_int8_model):
    rows = [layer("conv0"), layer("conv1"), layer("head", asked="float32")]
    model, out = with_layers(signed_int8_model, tmp_path, rows)
    result = build_engine(model, TensorRtOptions(cuda_graph=True), "int8", out)["audit"]
    assert [(row["got"], row["kind"], row["time_us"]) for row in result["layers"]] == [
        ("int8", "CaskConvolution", pytest.approx(2)),
        ("int8", "CaskConvolution", pytest.approx(2)),
        ("float32", "CaskConvolution", pytest.approx(1)),
    ]
    assert result["other_time"] == pytest.approx(5 / 10)  # the reformats
    assert audit.refusal(result) is None
    assert machine.cuda.launched_graphs == 0  # a graph has no times of layers


def test_the_audit_refuses_an_engine_that_runs_in_float(machine, tmp_path, float_model):
    model, out = with_layers(float_model, tmp_path, [layer("conv0"), layer("conv1")])
    result = build_engine(model, TensorRtOptions(), "int8", out)["audit"]
    assert "module.conv0 (float32)" in audit.refusal(result)


@pytest.mark.parametrize(
    ("tensor", "weights", "expected"),
    [
        ({"Format/Datatype": "Channel major INT8 format where channel % 16 == 0"}, "Int8", "int8"),
        ({"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}, "Half", "float16"),
        ({"Format/Datatype": "Row major linear BFloat16 format"}, None, "bfloat16"),
        ({"Format/Datatype": "Row major linear UInt8 format"}, None, "uint8"),
        ({"Format/Datatype": "Half"}, None, "float16"),
        ({"Format/Datatype": "Row major linear FP32"}, "Int8", "float32"),  # only the weights are stored in int8
        ({"Format/Datatype": "Channel major Int8 format"}, "Half", "float16"),
        ({"Format": "Row major linear", "DataType": "Int8"}, None, "int8"),
        ({"Format/Datatype": "N/A due to dynamic shapes"}, None, "unknown"),
    ],
)
def test_precisions_from_the_inspectors_words(tensor, weights, expected):
    row = {"Name": "a + b", "LayerType": "kgen", "Inputs": [{"Name": "x", **tensor}], "Outputs": [{"Name": "y"}]}
    if weights:
        row["Weights"] = {"Type": weights, "Count": 1}
    assert _layer(row, {"a + b": 3.0}) == Executed(("a", "b", "y"), "kgen", expected, 3.0)


def test_a_refusal_of_the_builder_names_layer_module_and_way_out(machine, tmp_path, float_model):
    model, out = with_layers(float_model, tmp_path, [layer("relu0", path="stem.norm"), layer("conv0")])
    graph = onnx.load(model)
    node = next(node for node in graph.graph.node if node.name == "relu0")
    node.op_type = "LRN"
    node.attribute.append(onnx.helper.make_attribute("size", 3))
    onnx.save(graph, model)
    with pytest.raises(BuildError) as caught:
        build_engine(model, TensorRtOptions(), "float32", out)
    message = caught.value.message
    assert re.search(r"for NVIDIA Orin \(SM87\) at 'relu0' \(module stem\.norm\): ", message)
    assert message.endswith("Could not find any implementation for node relu0.")  # without the places in the library's source
    assert caught.value.hint == ("try another precision, or keep stem.norm in float through quantizer.skip; see build.log")
    assert "/_src/optimizer" in (out / "build.log").read_text()  # which the log keeps


def test_a_refusal_of_the_parser_names_node_operator_and_way_out(machine, tmp_path, int8_model):
    with pytest.raises(BuildError, match=r"cannot read .*node 'input/quantize' \(QuantizeLinear\): the zero point") as caught:
        build_engine(int8_model.path, TensorRtOptions(), "int8", tmp_path)
    assert "quantizer.skip" in caught.value.hint


@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_truncated_model_is_a_build_error(machine, keep, tmp_path, float_model):
    """Here without the check of the file before, which a device without the onnx package cannot make."""
    model, out = with_layers(float_model, tmp_path, [])
    model.write_bytes(model.read_bytes()[: int(model.stat().st_size * keep)])
    with pytest.raises(BuildError, match=r"tensorrt cannot read .*model\.onnx") as caught:
        backend("tensorrt").build(model, TensorRtOptions(), out)
    assert "whole ONNX model" in caught.value.hint


def test_a_truncated_engine_is_a_build_error(machine, tmp_path, float_model):
    build_engine(float_model.path, TensorRtOptions(), "float32", tmp_path)
    path = tmp_path / "engine.trt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BuildError, match=r"cannot open .*engine\.trt: .*kSERIALIZATION_VERSION"):
        open_engine(tmp_path)
    path.unlink()
    with pytest.raises(BuildError, match=r"cannot open .*engine\.trt"):
        open_engine(tmp_path)


@pytest.mark.parametrize(
    ("version", "gpu", "message"),
    [
        ("10.7.0", {}, r"built with version 10\.3\.0; here it is 10\.7\.0"),
        ("10.3.0", {"name": "NVIDIA RTX 4090", "capability": (8, 9)}, "built with compute_capability SM87; here it is SM89"),
        ("10.3.0", {"name": "NVIDIA Orin Nano"}, "built with gpu NVIDIA Orin; here it is NVIDIA Orin Nano"),
    ],
)
def test_an_engine_of_another_machine_is_refused(monkeypatch, version, gpu, message, tmp_path, float_model):
    install(monkeypatch, "10.3.0")
    build_engine(float_model.path, TensorRtOptions(), "float32", tmp_path)
    install(monkeypatch, version, **gpu)
    with pytest.raises(BuildError, match=message) as caught:
        open_engine(tmp_path)
    assert "build the engine again" in caught.value.hint


def test_without_a_gpu_the_answer_is_another_machine(machine, monkeypatch, tmp_path, float_model):
    build_engine(float_model.path, TensorRtOptions(), "float32", tmp_path)
    monkeypatch.setattr(hardware, "has_nvidia_driver", lambda: False)
    with pytest.raises(WrongMachineError, match="own GPU: no NVIDIA GPU here"):
        open_engine(tmp_path)
    with pytest.raises(WrongMachineError, match="own GPU: no NVIDIA GPU here"):
        build_engine(float_model.path, TensorRtOptions(), "float32", tmp_path)
    answer = backend("tensorrt").available()
    assert (answer.ok, answer.reason) == (False, "no NVIDIA driver is loaded")


def test_a_driver_that_does_not_start_is_another_machine(monkeypatch, tmp_path, float_model):
    machine = install(monkeypatch, "10.3.0")

    def init(flags=0):
        raise machine.cuda.driver.LogicError("cuInit failed: unknown error")

    machine.cuda.driver.init = init
    with pytest.raises(WrongMachineError, match="CUDA does not start here: cuInit failed"):
        build_engine(float_model.path, TensorRtOptions(), "float32", tmp_path)


def test_an_old_or_missing_library_is_an_answer(monkeypatch, tmp_path, float_model):
    install(monkeypatch, "8.6.1")
    answer = backend("tensorrt").available()
    assert (answer.ok, answer.reason) == (False, "tensorrt 8.6.1 is installed; 10.3 or later is needed")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    answer = backend("tensorrt").available()
    assert (answer.ok, answer.hint) == (False, "run: pip install 'edgekd[tensorrt]'")
    with pytest.raises(MissingDependency, match="'tensorrt' cannot be imported"):
        build_engine(float_model.path, TensorRtOptions(), "float32", tmp_path)


def test_available(machine):
    answer = backend("tensorrt").available()
    assert (answer.ok, answer.version) == (True, machine.trt.__version__)


def test_the_bench_reports_the_devices_time(machine, tmp_path, float_model, images):
    (tmp_path / "engine").mkdir()
    build_engine(float_model.path, TensorRtOptions(), "float32", tmp_path / "engine")
    np.save(tmp_path / "images.npy", images)
    job = BenchJob(str(tmp_path / "engine"), str(tmp_path / "images.npy"), warmup_s=0, duration_s=0, min_samples=3, max_samples=3)
    record = bench(job)
    assert record["device_samples_ns"] == [1_000_000] * 3
    assert record["device_ms"]["p50"] == 1.0
    assert len(record["samples_ns"]) == 3


@pytest.mark.parametrize("version", VERSIONS)
def test_the_fake_has_the_signatures_of_the_library(version):
    """tensorrt_rtx has the interface of tensorrt, and can be imported without a GPU; its docstrings tell the arguments."""
    library = pytest.importorskip("tensorrt_rtx")
    fake, compared = fake_tensorrt.make(version, fake_tensorrt.Cuda()), 0
    for name, kind in vars(fake).items():
        if not inspect.isclass(kind) or not issubclass(kind, fake_tensorrt.Strict):
            continue
        for attribute, member in {**vars(kind), **dict.fromkeys(kind._settable)}.items():
            if attribute.startswith("_"):
                continue
            real = getattr(getattr(library, name), attribute)  # the library has it
            if inspect.isfunction(member):
                ours = [f"{each}" for each in list(inspect.signature(member).parameters)[1:]]
                forms = re.findall(rf"{attribute}\(self: [\w.]+(?:, )?(.*)\) ->", real.__doc__)
                assert ours in [re.findall(r"(?:^|, )(\w+): ", form) for form in forms], (name, attribute, forms)
                compared += 1
    assert compared >= 28
