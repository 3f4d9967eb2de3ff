import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgekd
from edgekd import worker
from edgekd.jobs import BenchJob, BuildJob, CompareJob, PredictJob, read_result, write_job

IO = {
    "inputs": [{"name": "images", "dtype": "float32", "shape": [-1, 3, 4, 4]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, 2]}],
    "preprocessing": {"layout": "NCHW", "color": "RGB", "scale": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3},
}


@pytest.fixture
def place(tmp_path):
    """A model for the null backend, images, and a folder for an engine."""
    (tmp_path / "model.onnx").touch()
    (tmp_path / "io.json").write_text(json.dumps(IO))
    (tmp_path / "engine").mkdir()
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 4, 3), np.uint8))
    return tmp_path


def do(job, place):
    write_job(job, place / "job.json")
    assert worker.main([str(place / "job.json")]) == 0
    return read_result(place / "result.json")


def build(place, backend="null", precision="float32"):
    return do(BuildJob(str(place / "model.onnx"), {"name": backend}, precision, str(place / "engine")), place)


def test_the_four_jobs(place):
    assert build(place).payload["backend"] == {"name": "null"}
    engine, inputs = str(place / "engine"), str(place / "x.npy")
    result = do(BenchJob(engine, inputs, warmup_s=0.0, duration_s=0.0, min_samples=4), place)
    assert result.status == "ok"
    assert len(result.payload["samples_ns"]) == 4
    result = do(CompareJob([engine, engine], inputs, warmup_s=0.0, duration_s=0.0, min_rounds=3), place)
    assert len(result.payload["engines"]) == 2
    result = do(PredictJob(engine, inputs, str(place / "out.npz"), batch=2), place)
    assert result.payload["outputs"] == {"logits": [3, 2]}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": 1, "kind": "bake"}', '{"schema": 1, "kind": "bench", "speed": 1}', "\udcff"]
)
def test_a_bad_job_is_a_result(text, tmp_path):
    (tmp_path / "job.json").write_bytes(text.encode(errors="surrogateescape"))
    assert worker.main([str(tmp_path / "job.json")]) == 0
    result = read_result(tmp_path / "result.json")
    assert result.status == "failed"
    assert "job.json cannot be read" in result.reason
    assert result.error.endswith(result.reason)


def test_a_missing_job_is_a_result(tmp_path):
    assert worker.main([str(tmp_path / "job.json")]) == 0
    assert "FileNotFoundError" in read_result(tmp_path / "result.json").error


def test_no_place_for_the_result(tmp_path, capsys):
    assert worker.main([str(tmp_path / "gone" / "job.json")]) == 1
    assert "the result cannot be written" in capsys.readouterr().err
    assert worker.main([]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        (lambda p: BuildJob(str(p / "gone.onnx"), {"name": "null"}, "float32", str(p / "engine")), "BuildError", "gone.onnx"),
        (
            lambda p: BuildJob(str(p / "model.onnx"), {"name": "nul"}, "float32", str(p / "engine")),
            "BuildError",
            "did you mean 'null'",
        ),
        (lambda p: BuildJob(str(p / "model.onnx"), {"name": "null"}, "int4", str(p / "engine")), "BuildError", "'int4'"),
        (lambda p: BenchJob(str(p / "gone"), str(p / "x.npy")), "BuildError", "holds no engine"),
        (lambda p: CompareJob([], str(p / "x.npy")), "DataError", "at least one engine"),
        (
            lambda p: BenchJob(str(p), str(p / "x.npy"), batch=0),
            "DataError",
            "batch must be an integer of at least 1; received 0",
        ),
        (lambda p: BenchJob(str(p), str(p / "x.npy"), max_samples=0), "DataError", "max_samples"),
        (lambda p: CompareJob([str(p)], str(p / "x.npy"), max_rounds=0), "DataError", "max_rounds"),
    ],
)
def test_refused_jobs(job, error, message, place):
    result = do(job(place), place)
    assert result.status == "failed"
    assert result.error == f"{error}: {result.reason}"
    assert message in result.reason


def test_missing_images_and_wrong_images(place):
    build(place)
    result = do(BenchJob(str(place / "engine"), str(place / "gone.npy")), place)
    assert "gone.npy cannot be read" in result.reason
    np.save(place / "gray.npy", np.zeros((3, 4, 4, 1), np.uint8))
    result = do(BenchJob(str(place / "engine"), str(place / "gray.npy")), place)
    assert result.error.startswith("DataError: expected images as uint8 [N, H, W, 3]; received uint8 [3, 4, 4, 1]")
    np.save(place / "large.npy", np.zeros((3, 5, 5, 3), np.uint8))
    result = do(BenchJob(str(place / "engine"), str(place / "large.npy")), place)
    assert result.error.startswith("BuildError: the engine's inputs are images: float32 [-1, 3, 4, 4]")
    assert "[1, 3, 5, 5]" in result.reason


def test_a_missing_library_is_skipped_with_the_install_command(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    result = build(place, "openvino")
    assert result.status == "skipped"
    assert result.hint == "run: pip install 'edgekd[openvino]'"


def test_a_bug_is_a_result_with_its_traceback(place, monkeypatch):
    def broken(*_arguments):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(worker, "build_engine", broken)
    (place / "engine" / "build.log").write_text("what the library said\n")
    result = build(place)
    assert result.error == "ZeroDivisionError: oops"
    assert "bug in edgekd" in result.hint
    assert "what the library said" in result.log_tail
    assert "in broken" in result.log_tail


def test_the_deployment_half_needs_neither_torch_nor_pydantic():
    """And importing it loads no engine library: the worker's memory would count them all."""
    code = """
import sys
for name in ("torch", "pydantic"):
    sys.modules[name] = None
import edgekd.worker, edgekd.targets, edgekd.doctor, edgekd.bench.compare, edgekd.bundle.check
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"onnxruntime", "openvino", "tensorrt", "pycuda", "tensorrt_rtx", "onnx", "psutil", "pynvml"}, loaded
assert "numpy" in loaded
"""
    root = str(Path(edgekd.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
