"""The worker in its own process, and every way in which it can die."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

import edgekd
from edgekd.engines import build_engine, options_from
from edgekd.errors import TargetError
from edgekd.jobs import BenchJob, BuildJob, CompareJob, read_result, write_job
from edgekd.targets import Local, target

IO = {
    "inputs": [{"name": "images", "dtype": "float32", "shape": [-1, 3, 4, 4]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, 2]}],
    "preprocessing": {"layout": "NCHW", "color": "RGB", "scale": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3},
}
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")


@pytest.fixture
def engine(tmp_path):
    (tmp_path / "model.onnx").touch()
    (tmp_path / "io.json").write_text(json.dumps(IO))
    (tmp_path / "engine").mkdir()
    build_engine(tmp_path / "model.onnx", options_from({"name": "null"}), "float32", tmp_path / "engine")
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 4, 3), np.uint8))
    return tmp_path / "engine"


def quick(engine, **changes):
    return BenchJob(
        str(engine), str(engine.with_name("x.npy")), **{"warmup_s": 0.0, "duration_s": 0.0, "min_samples": 3, **changes}
    )


def endless(engine):
    return quick(engine, warmup_s=600.0)


def test_a_job_in_its_own_process(engine, tmp_path):
    result = Local().run(quick(engine), tmp_path / "new" / "folder")
    assert result.status == "ok", result
    assert len(result.payload["samples_ns"]) == 3
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"job.json", "result.json", "worker.log"}


def test_the_parents_memory_is_not_counted(engine, tmp_path):
    ballast = np.ones(400 * 2**20 // 8)
    result = Local().run(quick(engine), tmp_path / "job")
    assert ballast[0] == 1
    assert 5 < result.payload["peak_memory_mib"] < 200
    assert result.payload["engine_memory_mib"] < 50


def test_thread_pools_are_not_left_to_chance(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    seen = {}
    popen = subprocess.Popen

    def spy(*arguments, **keywords):
        seen.update(keywords["env"])
        return popen(*arguments, **keywords)

    monkeypatch.setattr(subprocess, "Popen", spy)
    Local().run(quick(engine), tmp_path / "job")
    assert [seen[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")] == ["1", "1", "1"]


def test_a_failing_job_is_a_result(engine, tmp_path):
    result = Local().run(BenchJob(str(tmp_path / "gone"), str(tmp_path / "x.npy")), tmp_path / "job")
    assert result.status == "failed"
    assert result.error.startswith("BuildError: ")


def worker_process():
    """The child of this process that is the worker, once there is one."""
    for _attempt in range(400):
        for child in psutil.Process().children():
            if "edgekd.worker" in child.cmdline():
                return child
        time.sleep(0.01)
    raise AssertionError("no worker was started")


@pytest.mark.parametrize(
    ("number", "hint"),
    [(signal.SIGKILL, "memory"), (signal.SIGSEGV, "crash inside the engine library")],
    ids=["kill", "segfault"],
)
def test_a_killed_worker_is_a_result(number, hint, engine, tmp_path):
    killer = threading.Thread(target=lambda: worker_process().send_signal(number))
    killer.start()
    result = Local().run(endless(engine), tmp_path / "job")
    killer.join()
    assert result.status == "failed"
    assert result.reason == f"the worker was killed by {number.name} during its bench job"
    assert result.error == f"TargetError: {result.reason}"
    assert hint in result.hint


@pytest.mark.parametrize(
    ("crash", "signal_name", "log"),
    [
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV", "Fatal Python error: Segmentation fault"),
        ("import os; os.write(2, b'terminate called'); os.abort()", "SIGABRT", "terminate called"),
    ],
    ids=["segfault", "abort"],
)
def test_a_library_that_crashes_while_building_is_a_result(crash, signal_name, log, engine, tmp_path, monkeypatch):
    """With what it wrote before, and the line of Python that called it."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "openvino.py").write_text(f"__version__ = '1'\n\ndef Core():\n    {crash}\n")
    monkeypatch.setenv("PYTHONPATH", str(library))
    node = onnx.helper.make_node("Reshape", ["images", "shape"], ["logits"], name="reshape")
    values = [
        onnx.helper.make_tensor_value_info("images", 1, [None, 3, 4, 4]),
        onnx.helper.make_tensor_value_info("logits", 1, [None, 2]),
    ]
    shape = onnx.numpy_helper.from_array(np.array([-1, 2]), "shape")
    graph = onnx.helper.make_graph([node], "net", values[:1], values[1:], [shape])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx"
    )
    (tmp_path / "out").mkdir()
    result = Local().run(
        BuildJob(str(tmp_path / "model.onnx"), {"name": "openvino"}, "float32", str(tmp_path / "out")), tmp_path / "job"
    )
    assert result.status == "failed"
    assert result.reason == f"the worker was killed by {signal_name} during its build job"
    assert log in result.log_tail
    assert "openvino.py" in result.log_tail
    assert "crash inside the engine library" in result.hint


def test_memory_that_runs_out_in_python_is_a_result(engine, tmp_path):
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (3, 4, 4, 3))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))"
    job = BenchJob(str(engine), str(tmp_path / "x.npy"), batch=2**40)
    write_job(job, tmp_path / "job.json")
    code = f"{limit}; import sys; from edgekd.worker import main; sys.exit(main([{str(tmp_path / 'job.json')!r}]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(edgekd.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    result = read_result(tmp_path / "result.json")
    assert (result.status, result.reason) == ("failed", "out of memory during the bench job")


def test_an_old_result_is_not_taken_for_a_new_one(engine, tmp_path):
    assert Local().run(quick(engine), tmp_path / "job").status == "ok"
    assert Local().run(endless(engine), tmp_path / "job", timeout_s=0.6).status == "failed"


def test_a_timeout_is_a_result(engine, tmp_path):
    start = time.monotonic()
    result = Local().run(endless(engine), tmp_path / "job", timeout_s=0.6)
    assert time.monotonic() - start < 5
    assert result.reason == "the worker was stopped: its bench job took more than 0.6 s"


def test_a_worker_that_cannot_start_is_a_result(engine, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('a numpy that is none')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(edgekd, "__file__", str(tmp_path / "site-packages" / "edgekd" / "__init__.py"))
    result = Local().run(quick(engine), tmp_path / "job")
    assert result.status == "failed"
    assert "exit code 1 and wrote no result" in result.reason
    assert result.log_tail


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_a_worker_dies_with_its_parent(engine, tmp_path):
    """Otherwise the worker of a killed run would go on writing into folders of the next one."""
    code = f"""
from pathlib import Path
from edgekd.jobs import BenchJob
from edgekd.targets import Local
Local().run(BenchJob({str(engine)!r}, {str(engine.with_name("x.npy"))!r}, warmup_s=600.0), Path({str(tmp_path / "job")!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(edgekd.__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    children = []
    for _attempt in range(500):
        children = psutil.Process(parent.pid).children()
        if children and (tmp_path / "job" / "job.json").exists():
            break
        time.sleep(0.01)
    (worker,) = children
    time.sleep(0.3)  # into the job
    parent.kill()
    parent.wait()
    assert psutil.wait_procs([worker], timeout=5)[1] == []


def test_real_engines_through_the_worker(engine, tmp_path):
    """A build that fails comes back as a result with its reason."""
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x12 no model")
    (tmp_path / "out").mkdir()
    job = BuildJob(str(tmp_path / "model.onnx"), {"name": "onnxruntime"}, "float32", str(tmp_path / "out"))
    result = Local().run(job, tmp_path / "job")
    assert result.status == "failed"
    assert "model.onnx cannot be read as ONNX" in result.error


def test_compare_through_the_worker(engine, tmp_path):
    job = CompareJob([str(engine)] * 2, str(tmp_path / "x.npy"), warmup_s=0.0, duration_s=0.0, min_rounds=3)
    assert len(Local().run(job, tmp_path / "job").payload["ratios"]) == 1


def test_unknown_targets_are_named():
    assert isinstance(target("local"), Local)
    with pytest.raises(TargetError, match=r"unknown target 'locl' \(did you mean 'local'\?\); there are local"):
        target("locl")


def test_describe_names_every_backend():
    facts = Local().describe()
    assert set(facts["backends"]) == {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "null"}
    assert all(state["available"] or state["hint"].startswith("run: pip install") for state in facts["backends"].values())
