"""ONNX Runtime's GPU providers on a machine that has none: what is asked of the library, and what becomes of its answers.

The library here is a stand-in that takes what the real one takes (its signature is compared), runs everything on the CPU, and
says whatever a test wants it to say of where it ran.
"""

import inspect
import json
from pathlib import Path

import onnxruntime
import pytest

from edgekd.engines import WrongMachineError, build_engine, hardware, open_engine, options_from, read_engine
from edgekd.engines.onnxruntime import PROVIDERS, OnnxRuntime, OnnxRuntimeOptions
from edgekd.errors import BuildError

CUDA, TENSORRT, CPU = PROVIDERS["cuda"], PROVIDERS["tensorrt"], PROVIDERS["cpu"]
GPU = {"name": "GPU of a test", "capability": "SM89", "memory_mib": 8192.0, "driver": "600.1"}


class Library:
    """The parts of the module onnxruntime that the backend uses."""

    def __init__(self, started, left=()):
        self.calls, self.started, self.left, self.compiles = [], started, left, True
        library, real = self, onnxruntime.InferenceSession

        class InferenceSession:
            def __init__(self, path_or_bytes, sess_options=None, providers=None, provider_options=None, **kwargs):
                assert provider_options is None
                self.asked = [each if isinstance(each, tuple) else (each, {}) for each in providers]
                library.calls.append((Path(path_or_bytes), sess_options, dict(self.asked), kwargs))
                self.inner = real(path_or_bytes, sess_options, providers=[CPU], **kwargs)
                cache = dict(self.asked).get(TENSORRT, {}).get("trt_engine_cache_path")
                if cache and TENSORRT in library.started and library.compiles:
                    (Path(cache) / "TRTKernel_graph_0.engine").write_bytes(b"plan" * 100)
                    (Path(cache) / "TRTKernel_graph_0.profile").write_bytes(b"shapes")
                    library.compiles = False

            def get_providers(self):
                return [name for name, _ in self.asked if name in library.started]

            def get_provider_options(self):
                return {name: {key: str(value) for key, value in options.items()} for name, options in self.asked}

            def end_profiling(self):
                path = Path(self.inner.end_profiling())
                events = json.loads(path.read_text())
                for event in events:
                    if event.get("cat") == "Node":
                        event["args"]["provider"] = CPU if event["args"]["op_name"] in library.left else library.started[0]
                path.write_text(json.dumps(events))
                return str(path)

            def __getattr__(self, name):
                return getattr(self.inner, name)

        self.InferenceSession = InferenceSession

    def get_available_providers(self):
        return [TENSORRT, CUDA, CPU]

    def __getattr__(self, name):
        return getattr(onnxruntime, name)


@pytest.fixture
def library(monkeypatch):
    """Install a stand-in: which providers start, and which operators are left to the CPU."""

    def install(started, left=()):
        fake = Library(started, left)
        monkeypatch.setattr("edgekd.engines.onnxruntime.require", lambda _: fake)
        monkeypatch.setattr(hardware, "gpus", lambda: ([GPU], ""))
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
        return fake

    return install


@pytest.fixture
def source(tmp_path, float_model):
    """A float32 model with io.json and layers.json, of which the first convolution has most of the MACs."""

    def make(precision="float32", asked="float32"):
        folder = tmp_path / f"source-{precision}"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(float_model.path.read_bytes())
        io = json.loads(float_model.path.with_name("io.json").read_text())
        (folder / "io.json").write_text(json.dumps({**io, "precision": precision}))
        rows = [("conv0", 800, ["relu0"]), ("conv1", 150, ["relu1"]), ("head", 50, [])]
        keys = ("node", "macs", "outputs")
        layers = [{**dict(zip(keys, row, strict=True)), "path": row[0], "op": "Conv", "asked": asked} for row in rows]
        (folder / "layers.json").write_text(json.dumps(layers))
        (tmp_path / "engine").mkdir(exist_ok=True)
        return folder / "model.onnx", tmp_path / "engine"

    return make


def options(provider, **more):
    return options_from({"name": "onnxruntime", "provider": provider, **more})


def test_the_stand_in_takes_what_the_real_library_takes():
    real = inspect.signature(onnxruntime.InferenceSession.__init__)
    assert list(inspect.signature(Library([CPU]).InferenceSession.__init__).parameters) == list(real.parameters)
    assert set(PROVIDERS.values()) <= set(onnxruntime.get_all_providers())


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_installed_library_lacks_the_provider(provider, source):
    """The real library, and what preflight and a build say of it."""
    answer = OnnxRuntime().available(options(provider))
    assert not answer.ok
    assert PROVIDERS[provider] in answer.reason
    assert "CPUExecutionProvider" in answer.reason
    assert "pip install onnxruntime-gpu" in answer.hint
    model, out = source()
    with pytest.raises(WrongMachineError, match=f"not built: provider {provider} needs") as caught:
        build_engine(model, options(provider), "float32", out)
    assert "pip install onnxruntime-gpu" in caught.value.hint
    assert OnnxRuntime().available(options("cpu")).ok


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_silent_fallback_to_the_cpu_is_an_error(provider, library, source):
    fake = library([CPU])
    model, out = source()
    with pytest.raises(WrongMachineError, match=f"could not start its {PROVIDERS[provider]} and would run on {CPU}"):
        build_engine(model, options(provider), "float32", out)
    assert all(call[3]["enable_fallback"] == 0 for call in fake.calls)


def test_cuda_is_asked_for_a_float32_that_is_float32(library, source, monkeypatch):
    fake = library([CUDA, CPU])
    model, out = source()
    record = build_engine(model, options("cuda", cudnn_search="heuristic"), "float32", out)
    _, _, providers, _ = fake.calls[0]
    assert list(providers) == [CUDA, CPU]
    assert providers[CUDA] == {"device_id": 0, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
    assert record["reported"] == {
        "providers": [CUDA, CPU],
        "NVIDIA_TF32_OVERRIDE": "0",
        "device_id": "0",
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    assert record["fingerprint"]["gpu"] == GPU["name"]
    assert record["fingerprint"]["driver"] == GPU["driver"]
    assert (out / "model.onnx").read_bytes() == model.read_bytes()  # optimized on every load instead
    assert fake.calls[0][1].optimized_model_filepath == ""
    assert [row["got"] for row in record["audit"]["layers"]] == ["float32"] * 3
    assert not any("elsewhere" in row for row in record["audit"]["layers"])
    with open_engine(out) as session:
        assert session.inputs[0].name == "images"
    monkeypatch.setattr(hardware, "gpus", lambda: ([{**GPU, "name": "another"}], ""))
    with pytest.raises(BuildError, match="was built with gpu GPU of a test; here it is another"):
        open_engine(out)


def test_layers_left_to_the_cpu_are_seen(library, source):
    from edgekd.engines import audit

    library([CUDA, CPU], left=("Conv", "FusedConv"))
    model, out = source()
    record = build_engine(model, options("cuda"), "float32", out)
    assert [row.get("elsewhere") for row in record["audit"]["layers"]] == ["CPU", "CPU", None]
    assert "95% of the multiply-accumulates is not where it was asked, but on the CPU: conv0" in audit.refusal(record["audit"])


@pytest.mark.parametrize(("precision", "flags"), [("float32", (0, 0)), ("int8", (1, 0)), ("float16", (0, 1))])
def test_tensorrt_gets_the_flags_that_the_graph_needs_and_keeps_its_engine(precision, flags, library, source):
    fake = library([TENSORRT, CUDA, CPU])
    model, out = source(precision, asked=precision)
    record = build_engine(model, options("tensorrt", opt_batch=4, max_batch=8, workspace_mib=2), precision, out)
    _, _, providers, _ = fake.calls[0]
    assert list(providers) == [TENSORRT, CUDA, CPU]
    assert providers[CUDA]["use_tf32"] == 0
    assert providers[TENSORRT] == {
        "device_id": 0,
        "trt_max_workspace_size": 2 * 2**20,
        "trt_engine_cache_enable": 1,
        "trt_engine_cache_path": str(out),
        "trt_int8_enable": flags[0],
        "trt_fp16_enable": flags[1],
        "trt_profile_min_shapes": "images:1x3x8x8",
        "trt_profile_opt_shapes": "images:4x3x8x8",
        "trt_profile_max_shapes": "images:8x3x8x8",
    }
    assert set(record["files"]) == {"model.onnx", "TRTKernel_graph_0.engine", "TRTKernel_graph_0.profile"}
    assert record["audit"]["layers"] == []
    assert "ONNX Runtime does not say" in record["audit"]["reason"]
    assert read_engine(out).options == options("tensorrt", opt_batch=4, max_batch=8, workspace_mib=2)
    with open_engine(out):
        pass


def test_layers_that_tensorrt_left_make_the_audit_refuse(library, source):
    from edgekd.engines import audit

    library([TENSORRT, CUDA, CPU], left=("Gemm",))
    model, out = source("int8", asked="int8")
    result = build_engine(model, options("tensorrt"), "int8", out)["audit"]
    assert [row.get("elsewhere") for row in result["layers"]] == [None, None, "CPU"]
    assert "head (float32 on the CPU)" in audit.refusal(result)


def test_tensorrt_that_compiles_nothing_is_no_engine(library, source):
    library([TENSORRT, CUDA, CPU]).compiles = False
    model, out = source()
    with pytest.raises(BuildError, match="TensorRT compiled no part of"):
        build_engine(model, options("tensorrt"), "float32", out)


def test_an_engine_that_tensorrt_compiles_again_is_refused(library, source):
    fake = library([TENSORRT, CUDA, CPU])
    model, out = source()
    build_engine(model, options("tensorrt"), "float32", out)
    fake.compiles = True
    with pytest.raises(BuildError, match="compiled the model again"):
        open_engine(out)


def test_what_each_provider_runs_and_how_int8_is_written_for_it():
    assert OnnxRuntimeOptions().precisions == ("float32", "int8")
    assert options("cuda").precisions == ("float32", "float16")
    assert "no int8 convolutions" in options("cuda").unsupported("int8")
    assert options("cuda").unsupported("float16") is None
    assert options("tensorrt").unsupported("int8") is None
    assert [options(provider).encoding for provider in PROVIDERS] == ["u8", "u8", "s8"]


def test_a_kernel_computes_in_the_floats_that_it_reads():
    from edgekd.engines.onnxruntime import _kernels

    def event(name, kind, dtype, provider=CUDA, dur=2):
        args = {"op_name": kind, "provider": provider, "input_type_shape": [{dtype: [1]}]}
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": args}

    events = [event("a", "Conv", "float16"), event("a", "Conv", "float16", dur=4), event("b", "Conv", "float", CPU)]
    events += [
        event("c", "DequantizeLinear", "int8"),
        event("d", "QLinearConv", "uint8", CPU),
        {"cat": "Session", "name": "model_run"},
    ]
    found = {each.nodes[0]: each for each in _kernels(events, CUDA)}
    assert {name: (each.precision, each.elsewhere) for name, each in found.items()} == {
        "a": ("float16", ""),
        "b": ("float32", "CPU"),
        "c": ("float32", ""),  # it makes floats
        "d": ("int8", "CPU"),
    }
    assert found["a"].time_us == 3.0


def test_the_library_itself_is_available_without_a_provider():
    assert OnnxRuntime().available().ok
