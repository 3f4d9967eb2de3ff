import json

import pytest

from edgekd.jobs import BenchJob, BuildJob, CompareJob, JobResult, PredictJob, read_job, read_result, write_job, write_result

JOBS = [
    BuildJob("/m/model.onnx", {"name": "onnxruntime", "threads": 2}, "int8", "/out"),
    BenchJob("/e", "/x.npy", batch=4),
    CompareJob(["/a", "/b"], "/x.npy"),
    PredictJob("/e", "/x.npy", "/out.npz"),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.kind)
def test_jobs_survive_the_file(job, tmp_path):
    write_job(job, tmp_path / "job.json")
    assert read_job(tmp_path / "job.json") == job
    assert json.loads((tmp_path / "job.json").read_text())["kind"] == job.kind


def test_results_survive_the_file(tmp_path):
    result = JobResult("failed", reason="why", error="BuildError: why", hint="do this", log_tail="last line")
    write_result(result, tmp_path / "result.json")
    assert read_result(tmp_path / "result.json") == result
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"schema": 2, "kind": "bench"}, "job schema 2; this worker reads schema 1"),
        ({"schema": 1, "kind": "bake"}, "job kind 'bake'; allowed: build, bench, compare, predict"),
        ({"schema": 1, "kind": "bench", "engine": "/e"}, "inputs"),
        ({"schema": 1, "kind": "predict", "engine": "/e", "inputs": "/x", "out": "/o", "color": 1}, "color"),
    ],
)
def test_bad_jobs_are_named(data, message, tmp_path):
    (tmp_path / "job.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        read_job(tmp_path / "job.json")
