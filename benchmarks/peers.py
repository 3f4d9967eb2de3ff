"""Side by side: edgekd's quantization against the peers', from one float model, with one calibration set, on one machine.

    python benchmarks/peers.py runs/matrix/resnet18-0 [more runs] [--threads 1]

Each argument is a finished run with a quantize stage. From its float32 ONNX file and its calibration images come: NNCF
``quantize`` and ONNX Runtime ``quantize_static`` (each with what its documentation recommends for CPUs), nvidia-modelopt's ONNX
PTQ, and edgekd without training (PTQ: calibrated only) and with it (QAT: the run's own). Every file becomes an engine of ONNX
Runtime and of OpenVINO, is evaluated on the test split, and is measured interleaved with all the others. A peer
that is not installed or refuses is a row with its reason. Needs: pip install nncf nvidia-modelopt onnx-graphsurgeon.

Writes results/peers.json with all raw samples in nanoseconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from int8_width import answer
from run_recipe import RESULTS, ROOT

from edgekd import __version__, data, recipe
from edgekd.artifacts import read_artifact
from edgekd.bench.host import describe
from edgekd.data.batches import eval_batches
from edgekd.engines.preprocess import normalize
from edgekd.export import onnx
from edgekd.export.qdq import encode
from edgekd.jobs import BuildJob, CompareJob, PredictJob
from edgekd.quantize import qat
from edgekd.quantize import stage as quantize_stage
from edgekd.targets.local import Local
from edgekd.tasks import build as build_task

RESULT = RESULTS / "peers.json"
BACKENDS = ("onnxruntime", "openvino")
Feeds = Callable[[], Iterator[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    rows = [row for run in given.runs for row in compare_run(run, given.threads)]
    libraries = {name: _version(name) for name in ("nncf", "onnxruntime", "openvino", "nvidia-modelopt", "torch")}
    RESULT.write_text(json.dumps({"schema": 1, "edgekd": __version__, "libraries": libraries, "host": describe(), "rows": rows}))
    print(f"wrote {RESULT.relative_to(ROOT)}")


def compare_run(run: Path, threads: int) -> list[dict[str, Any]]:
    """One row per backend: what every contender scored and how long it took."""
    exports = {encoding: folder for folder in sorted(run.glob("*-export-*")) for encoding in [_encoding(folder)]}
    if not {"float32", "u8"} <= set(exports):
        raise SystemExit(f"{run} has no float32 and int8 export of a student; give a finished run with a quantize stage")
    loaded = recipe.load_recipe(ROOT / json.loads((run / "run.json").read_text())["recipe_path"])
    dataset = data.load(loaded.recipe.data, search=loaded.search)
    task = build_task(loaded.recipe.task)
    io = json.loads((exports["float32"] / "io.json").read_text())
    name = io["inputs"][0]["name"]

    def feeds() -> Iterator[dict[str, Any]]:
        for image in dataset.calib.images:
            yield {name: normalize(np.asarray(image)[None], io["preprocessing"])}

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        files = quantized_files(Path(scratch), exports, feeds, dataset)
        np.save(Path(scratch) / "test.npy", np.asarray(dataset.test.images))
        np.save(Path(scratch) / "bench.npy", np.asarray(dataset.test.images[:64]))
        for backend in BACKENDS:
            options = {"name": backend, "threads": threads}
            contenders = [
                evaluate(Path(scratch), contender, found, io, options, task, dataset) for contender, found in files.items()
            ]
            built = [contender for contender in contenders if contender["reason"] is None]
            engines = [str(Path(scratch) / f"{backend}-{contender['name']}") for contender in built]
            job = CompareJob(engines, str(Path(scratch) / "bench.npy"), warmup_s=0.5, duration_s=4.0 * len(engines))
            record = answer(Local().run(job, Path(scratch)))
            for ratio in record["ratios"]:
                built[ratio["engine"]] |= {"speedup": ratio["speedup"], "interval": ratio["interval"]}
            for contender, engine in zip(built, record["engines"], strict=True):
                contender |= {"latency_ms": engine["latency_ms"], "samples_ns": engine["samples_ns"]}
            rows.append({"run": run.name, "backend": backend, "threads": threads, "valid": record["valid"]})
            rows[-1] |= {"warnings": record["warnings"], "noise_floor": record["noise_floor"], "contenders": contenders}
            for contender in contenders:
                text = contender["reason"] or f"{contender['metric']:.2%}, {contender.get('speedup', 1):.2f}x float32"
                print(f"{run.name} {backend} {contender['name']}: {text}", flush=True)
    return rows


def quantized_files(scratch: Path, exports: dict[str, Path], feeds: Feeds, dataset: Any) -> dict[str, Path | str]:
    """Name -> ONNX file, or why there is none."""
    source = exports["float32"] / "model.onnx"
    makers: dict[str, Callable[[Path], None]] = {
        "edgekd PTQ": lambda out: _edgekd_ptq(exports["float32"], dataset, out),
        "NNCF quantize": lambda out: _nncf(source, feeds, out),
        "ONNX Runtime quantize_static": lambda out: _onnxruntime(source, feeds, out),
        "modelopt ONNX PTQ": lambda out: _modelopt(source, feeds, out),
    }
    files: dict[str, Path | str] = {"float32": source, "edgekd QAT": exports["u8"] / "model.onnx"}
    for name, make_file in makers.items():
        out = scratch / f"{name}.onnx"
        try:
            make_file(out)
            files[name] = out
        except Exception as error:  # a peer may raise anything, and then that is its result
            files[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return files


def evaluate(
    scratch: Path, name: str, file: Path | str, io: dict[str, Any], options: dict[str, Any], task: Any, dataset: Any
) -> dict[str, Any]:
    """Build the engine and compute the task's metric of what it predicts."""
    row: dict[str, Any] = {"name": name, "reason": file if isinstance(file, str) else None, "metric": None}
    if isinstance(file, str):
        return row
    source, engine = scratch / f"source-{name}", scratch / f"{options['name']}-{name}"
    source.mkdir(exist_ok=True)
    engine.mkdir()
    shutil.copyfile(file, source / "model.onnx")
    precision = "float32" if name == "float32" else "int8"
    (source / "io.json").write_text(json.dumps({**io, "precision": precision}))
    built = Local().run(BuildJob(str(source / "model.onnx"), options, precision, str(engine)), scratch)
    if built.status != "ok":
        row["reason"] = built.error or built.reason
        return row
    outputs = scratch / "outputs.npz"
    answer(Local().run(PredictJob(str(engine), str(scratch / "test.npy"), str(outputs), 32), scratch))
    with np.load(outputs, allow_pickle=False) as arrays:
        row["metric"] = task.evaluate(dict(arrays), dataset.test.labels)
    return row


def _edgekd_ptq(folder: Path, dataset: Any, out: Path) -> None:
    """The float checkpoint with calibrated ranges and no training."""
    parent = next(path for path in folder.parent.iterdir() if path.name.endswith(read_artifact(folder).parents[0][:12]))
    loaded = quantize_stage.load(read_artifact(parent))
    example = loaded.architecture.example()
    quantized = qat.prepare(loaded.module, loaded.taps, qat.QuantizerConfig(), example)
    batches = eval_batches(dataset.calib, min(128, len(dataset.calib.labels)), mean=dataset.mean, std=dataset.std)
    qat.calibrate(quantized, (images for images, _ in batches))
    onnx.save(onnx.export(encode(quantized, "u8"), example, output_names=["logits"], opset=20), out)


def _nncf(source: Path, feeds: Feeds, out: Path) -> None:
    import nncf
    import onnx as onnx_library

    model = onnx_library.load(str(source))
    quantized = nncf.quantize(model, nncf.Dataset(list(feeds())), preset=nncf.QuantizationPreset.MIXED)
    onnx_library.save(quantized, str(out))


def _onnxruntime(source: Path, feeds: Feeds, out: Path) -> None:
    from onnxruntime import quantization as library
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(library.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = feeds()

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    library.quantize_static(
        str(prepared),
        str(out),
        Reader(),
        quant_format=library.QuantFormat.QDQ,
        per_channel=True,
        activation_type=library.QuantType.QUInt8,
        weight_type=library.QuantType.QInt8,
    )


def _modelopt(source: Path, feeds: Feeds, out: Path) -> None:
    from modelopt.onnx.quantization import quantize

    batches = list(feeds())
    name = next(iter(batches[0]))
    quantize(
        str(source),
        quantize_mode="int8",
        calibration_data={name: np.concatenate([batch[name] for batch in batches])},
        calibration_eps=["cpu"],
        output_path=str(out),
    )


def _encoding(folder: Path) -> str:
    artifact = read_artifact(folder)
    return artifact.config["encoding"] if artifact.role == "student" else f"{artifact.role} {artifact.config['encoding']}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
