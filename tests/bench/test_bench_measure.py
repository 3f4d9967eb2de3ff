"""Measuring, with the null backend: it needs nothing, and its time is that of the measuring itself."""

import json
import time

import numpy as np
import pytest

from edgekd.bench import compare as compare_module
from edgekd.bench.compare import compare
from edgekd.bench.measure import bench, input_pool, load_images, load_inputs, predict
from edgekd.engines import build_engine, null, options_from, read_io
from edgekd.errors import BuildError, DataError
from edgekd.jobs import BenchJob, CompareJob

IO = {
    "inputs": [{"name": "images", "dtype": "float32", "shape": [-1, 3, 4, 4]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": [-1, 2]}],
    "preprocessing": {"layout": "NCHW", "color": "RGB", "scale": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3},
}


@pytest.fixture
def engine(tmp_path):
    return make_engine(tmp_path, IO)


def make_engine(tmp_path, io):
    (tmp_path / "model.onnx").touch()
    (tmp_path / "io.json").write_text(json.dumps(io))
    folder = tmp_path / "engine"
    folder.mkdir()
    build_engine(tmp_path / "model.onnx", options_from({"name": "null"}), "float32", folder)
    return folder


@pytest.fixture
def inputs(tmp_path):
    """Image i is filled with i."""
    path = tmp_path / "images.npy"
    np.save(path, np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8))
    return path


@pytest.fixture
def slow(monkeypatch):
    """The null session takes a known time: this many milliseconds."""

    def set_delay(delay_ms):
        infer = null.NullSession.infer

        def delayed(self, feeds):
            end = time.perf_counter_ns() + delay_ms * 1_000_000
            while time.perf_counter_ns() < end:
                pass
            return infer(self, feeds)

        monkeypatch.setattr(null.NullSession, "infer", delayed)

    return set_delay


def test_bench_record(engine, inputs, slow):
    slow(2)
    record = bench(BenchJob(str(engine), str(inputs), batch=2, warmup_s=0.02, duration_s=0.05, min_samples=5))
    assert list(record) == [
        *("backend", "precision", "batch", "threads", "load_ms", "first_ms", "warmup", "samples_ns", "latency_ms"),
        *(
            "device_samples_ns",
            "device_ms",
            "peak_memory_mib",
            "engine_memory_mib",
            "size_bytes",
            "sensors",
            "energy",
            "energy_reason",
            "warnings",
            "valid",
            "host",
        ),
    ]
    assert (record["device_samples_ns"], record["device_ms"]) == ([], None)  # this library does not tell
    assert (record["backend"], record["precision"], record["batch"], record["threads"]) == ("null", "float32", 2, 1)
    assert min(record["samples_ns"]) >= 2_000_000
    assert record["latency_ms"]["p50"] == sorted(record["samples_ns"])[(len(record["samples_ns"]) + 1) // 2 - 1] / 1e6
    assert record["first_ms"] >= 2
    assert record["warmup"]["runs"] >= 2
    assert record["warmup"]["seconds"] >= 0.02
    assert record["energy"] is not None or record["energy_reason"]
    assert record["host"]["backends"].keys() == {"null"}
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({"duration_s": 0.0, "min_samples": 7}, 7),
        ({"duration_s": 9.0, "max_samples": 11}, 11),
        ({"min_samples": 50, "max_samples": 3}, 3),
    ],
)
def test_sample_limits(limits, count, engine, inputs):
    assert len(bench(BenchJob(str(engine), str(inputs), warmup_s=0.0, **limits))["samples_ns"]) == count


def test_steady_state_lasts_as_long_as_asked(engine, inputs, slow):
    slow(1)
    record = bench(BenchJob(str(engine), str(inputs), warmup_s=0.0, duration_s=0.1, min_samples=1))
    assert sum(record["samples_ns"]) <= 0.15e9
    assert 10 <= len(record["samples_ns"]) <= 100


def test_the_pool_cycles_through_real_images(engine, inputs):
    pool = input_pool(load_images(inputs), read_io(engine / "io.json"), batch=2)
    assert [feeds["images"][:, 0, 0, 0].tolist() for feeds in pool] == [[0, 1], [2, 3]]


def test_a_short_file_is_repeated(engine, inputs):
    (feeds,) = input_pool(load_images(inputs), read_io(engine / "io.json"), batch=7)
    assert feeds["images"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_predict_keeps_every_image_in_order(engine, inputs, tmp_path, monkeypatch):
    def first_pixel(self, feeds):
        images = feeds["images"]
        return {"logits": np.stack([images[:, 0, 0, 0], -images[:, 0, 0, 0]], axis=1)}

    monkeypatch.setattr(null.NullSession, "infer", first_pixel)
    payload = predict(engine, inputs, tmp_path / "out.npz", batch=2)
    with np.load(tmp_path / "out.npz") as outputs:
        assert outputs["logits"].tolist() == [[0, 0], [1, -1], [2, -2], [3, -3], [4, -4]]
    assert payload["images"] == 5
    assert payload["outputs"] == {"logits": [5, 2]}


def test_predict_fills_up_a_fixed_batch(tmp_path, inputs):
    fixed = json.loads(json.dumps(IO).replace("[-1,", "[2,"))
    payload = predict(make_engine(tmp_path, fixed), inputs, tmp_path / "out.npz", batch=2)
    assert payload["outputs"] == {"logits": [5, 2]}


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), r"expected uint8 \[N, H, W, C\] with N > 0; received float32 \[2, 4, 4, 3\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"received uint8 \[0, 4, 4, 3\]"),
        (np.array([{}]), "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_other_inputs_are_refused(array, message, tmp_path):
    path = tmp_path / "x.npy"
    if array is not None:
        np.save(path, array)
    with pytest.raises(DataError, match=message):
        load_images(path)


SEVERAL = {
    "inputs": [
        {"name": "left", "dtype": "float32", "shape": [-1, 3]},
        {"name": "ids", "dtype": "int64", "shape": [-1, 2]},
    ],
    "outputs": [{"name": "scores", "dtype": "float32", "shape": [-1, 4]}],
    "preprocessing": {},
}


@pytest.fixture
def arrays(tmp_path):
    path = tmp_path / "inputs.npz"
    np.savez(path, left=np.arange(15, dtype=np.float32).reshape(5, 3), ids=np.arange(10).reshape(5, 2))
    return path


def test_a_model_with_several_inputs_is_measured_on_arrays(tmp_path, arrays):
    engine = make_engine(tmp_path, SEVERAL)
    pool = input_pool(load_inputs(arrays), read_io(engine / "io.json"), batch=2)
    assert [feeds["ids"].tolist() for feeds in pool] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    record = bench(BenchJob(str(engine), str(arrays), batch=2, warmup_s=0.0, duration_s=0.0))
    assert len(record["samples_ns"]) == 50
    assert predict(engine, arrays, tmp_path / "out.npz", batch=2)["outputs"] == {"scores": [5, 4]}
    assert compare(CompareJob([str(engine)] * 2, str(arrays), warmup_s=0.0, duration_s=0.0))["engines"]


def test_images_are_refused_where_a_model_takes_none(tmp_path, inputs):
    engine = make_engine(tmp_path, SEVERAL)
    with pytest.raises(DataError, match="has no preprocessing: it does not take images"):
        bench(BenchJob(str(engine), str(inputs)))


def test_arrays_that_are_not_the_models_are_refused(tmp_path, arrays):
    np.savez(arrays, left=np.zeros((5, 3), np.float32), ids=np.zeros((5, 2), np.int32))
    with pytest.raises(BuildError, match=r"ids: int64 \[-1, 2\].*received.*ids: int32 \[1, 2\]"):
        bench(BenchJob(str(make_engine(tmp_path, SEVERAL)), str(arrays)))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"a": np.zeros((2, 3)), "b": np.zeros((3, 3))}, r"one length above 0; received a: \[2, 3\], b: \[3, 3\]"),
        ({"a": np.zeros((0, 3))}, r"received a: \[0, 3\]"),
        ({"a": np.float32(1)}, r"received a: \[\]"),
        ({}, "received no array"),
        (None, "cannot be read"),
    ],
)
def test_arrays_that_are_no_inputs_are_refused(contents, message, tmp_path):
    path = tmp_path / "x.npz"
    if contents is None:
        path.write_bytes(b"no archive")
    else:
        np.savez(path, **contents)
    with pytest.raises(DataError, match=message):
        load_inputs(path)


def test_compare_record(engine, inputs, slow):
    slow(1)
    job = CompareJob([str(engine), str(engine)], str(inputs), warmup_s=0.0, duration_s=0.0, min_rounds=12)
    record = compare(job)
    assert list(record) == [
        *("batch", "threads", "engines", "noise_floor", "ratios", "warnings", "valid", "sensors", "host"),
    ]
    assert [len(entry["samples_ns"]) for entry in record["engines"]] == [12, 12]
    (ratio,) = record["ratios"]
    assert (ratio["engine"], ratio["reference"]) == (1, 0)
    assert ratio["interval"][0] <= ratio["speedup"] <= ratio["interval"][1]
    assert record["noise_floor"]["ratio"] == pytest.approx(1, abs=0.5)
    json.dumps(record, allow_nan=False)


def test_compare_finds_the_faster_engine(engine, inputs, monkeypatch):
    """Three sessions, opened in the order engine 0, engine 1, engine 0 again; engine 1 takes a third of the time."""
    opened = []

    def timed(session, feeds):
        if session not in opened:
            opened.append(session)
        return 1000 + len(feeds) if session is sessions[1] else 3000

    sessions = []
    open_engine = compare_module.open_engine
    monkeypatch.setattr(compare_module, "open_engine", lambda folder: sessions.append(open_engine(folder)) or sessions[-1])
    monkeypatch.setattr(compare_module, "timed", timed)
    record = compare(CompareJob([str(engine)] * 2, str(inputs), warmup_s=0.0, duration_s=0.0, max_rounds=40))
    assert len(sessions) == 3
    assert record["ratios"][0]["speedup"] == pytest.approx(3000 / 1001)
    assert record["ratios"][0]["verdict"] == "faster"
    assert record["noise_floor"] == {"ratio": 1.0, "interval": [1.0, 1.0]}


def test_rounds_take_every_arm_once_in_changing_order(monkeypatch):
    calls = []
    settled = []
    monkeypatch.setattr(compare_module, "timed", lambda session, feeds: calls.append(session) or 1)
    monkeypatch.setattr(compare_module, "_settle", lambda session, pool: settled.append(session))
    job = CompareJob([], "", duration_s=0.0, min_rounds=30)
    samples = compare_module._rounds([("a", [{}]), ("b", [{}]), ("c", [{}])], job)
    assert [len(arm) for arm in samples] == [30, 30, 30]
    rounds = [tuple(calls[index : index + 3]) for index in range(0, 90, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6
    assert settled == calls  # before each turn


@pytest.mark.parametrize(("seconds", "expected"), [(0.001, range(2, 25)), (0.05, range(1, 2))])
def test_an_arm_settles_before_its_turn_is_timed(monkeypatch, seconds, expected):
    """A short one runs many times, a long one once."""
    calls = []
    monkeypatch.setattr(compare_module, "timed", lambda session, feeds: calls.append(feeds) or time.sleep(seconds))
    compare_module._settle(None, ["one", "two"])
    assert len(calls) in expected
    assert set(calls) <= {"one", "two"}


def test_compare_needs_an_engine(inputs):
    with pytest.raises(DataError, match="at least one engine"):
        compare(CompareJob([], str(inputs)))
