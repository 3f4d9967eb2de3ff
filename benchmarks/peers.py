"""Side by side: edgekd's quantization against the peers', from one float model, with one calibration set, on one machine.

    PYTHONPATH=.:benchmarks python benchmarks/peers.py runs/matrix/resnet18-0 [more runs] [--threads 1 2] [--again]

Each argument is a finished run whose last stage is quantize. From its float32 ONNX file and its calibration images come the files
of ``CONTENDERS``: NNCF, ONNX Runtime's quantizer and nvidia-modelopt, each as its own documentation recommends it for a CNN in
int8, and edgekd without training (the stage ptq) and with it (the run's own: only this one had the labels and the epochs). Each
file becomes an engine of ONNX Runtime and of OpenVINO, is evaluated on the test split, and is measured in turns with all others.
A peer that is not installed, refuses or crashes is a row with its reason.

Runs whose names differ only in the number at the end are one family, and are summed up together. What results/peers.json holds
already for the same run, backend and threads is kept, so that results can come run by run; --again measures it once more.

Needs, beside edgekd: pip install nncf onnx-graphsurgeon lief nvidia-ml-py; pip install --no-deps nvidia-modelopt. What modelopt
asks for besides is CUDA and an older ONNX Runtime, and it quantizes on a CPU without. Tried with NNCF 3.4.0 and modelopt 0.47.0.

Writes results/peers.json with all raw samples in nanoseconds.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from run_recipe import RESULTS, ROOT

from edgekd import __version__, data, recipe
from edgekd.artifacts import Checkpoint, read_artifact
from edgekd.data.base import Dataset
from edgekd.deployment import opset
from edgekd.engines import hardware
from edgekd.engines.audit import LAYERS
from edgekd.engines.onnx_layers import layers
from edgekd.engines.preprocess import normalize
from edgekd.export import onnx
from edgekd.export.qdq import encode
from edgekd.jobs import BuildJob, CompareJob, PredictJob
from edgekd.quantize import stage as quantize_stage
from edgekd.quantize.stage import QuantizeConfig
from edgekd.targets.local import Local
from edgekd.tasks import build as build_task
from edgekd.tasks.base import Task
from edgekd.train.stage import Context

RESULT = RESULTS / "peers.json"
SCHEMA = 2
BACKENDS = ("onnxruntime", "openvino")
LIBRARIES = ("torch", "onnx", "onnxruntime", "openvino", "nncf", "nvidia-modelopt")
AT_ONCE = 32
"""Calibration images whose activations ONNX Runtime's histograms hold in memory together; all at once would be gigabytes."""
MAX_ROUNDS = 1000


@dataclass(frozen=True)
class Inputs:
    """What every quantizer starts from; goes to a process of its own."""

    run: Path
    exported: Path
    """Folder of the float32 export in the run."""
    model: Path
    """A copy of its model.onnx: peers write their own files beside it."""
    calibration: Path
    """An .npy file of all calibration images as the model takes them, float32 [N, C, H, W]."""

    def feeds(self) -> list[dict[str, Any]]:
        """The calibration images one by one, as ONNX Runtime takes them."""
        io = json.loads((self.exported / "io.json").read_text())
        images = np.load(self.calibration, mmap_mode="r", allow_pickle=False)
        return [{io["inputs"][0]["name"]: np.array(image[None])} for image in images]


Settings = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring, per engine")
    parser.add_argument("--again", action="store_true", help="also what the result file holds already")
    given = parser.parse_args()
    rows = _read_rows()
    for run in given.runs:
        for row in compare_run(run.resolve(), given.threads, given.seconds, [] if given.again else rows):
            rows = sorted([*(old for old in rows if _key(old) != _key(row)), row], key=_key)
            _write(rows)
    _write(rows)
    for line in _lines(summarize(rows)):
        print(line)
    print(f"wrote {RESULT.relative_to(ROOT)}: {len(rows)} rows")


def compare_run(run: Path, threads: list[int], seconds: float, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per backend and number of threads that is not known: what every contender scored and how long it took."""
    exports = {encoding: folder for folder in sorted(run.glob("*-export-*")) for encoding in [_encoding(folder)]}
    loaded = _recipe(run)
    if not {"float32", "u8"} <= set(exports) or not isinstance(loaded.recipe.stages[-1], QuantizeConfig):
        raise SystemExit(f"{run} has no float32 and int8 export of a student; give a finished run whose last stage is quantize")
    models = {name: read_artifact(exports[name]).id for name in ("float32", "u8")}  # a run made anew is another run
    wanted = []
    for backend in BACKENDS:
        for count in threads:
            key = {"run": run.name, "backend": backend, "threads": count, "models": models}
            if any(all(row[name] == value for name, value in key.items()) for row in known):
                print(f"{run.name} {backend} {count}: kept", flush=True)
            else:
                wanted.append(key)
    if not wanted:
        return
    dataset = data.load(loaded.recipe.data, search=loaded.search)
    task = build_task(loaded.recipe.task, dataset)
    io = json.loads((exports["float32"] / "io.json").read_text())
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        np.save(scratch / "calibration.npy", normalize(np.asarray(dataset.calib.images), io["preprocessing"]))
        np.save(scratch / "test.npy", np.asarray(dataset.test.images))
        np.save(scratch / "bench.npy", np.asarray(dataset.test.images[:64]))
        files: dict[str, Path | str] = {"float32": exports["float32"] / "model.onnx", "edgekd QAT": exports["u8"] / "model.onnx"}
        files |= quantized_files(scratch, run, exports["float32"])
        for key in wanted:
            options = {"name": key["backend"], "threads": key["threads"]}
            contenders = [evaluate(scratch, name, file, io, options, task, dataset) for name, file in files.items()]
            row: dict[str, Any] = {
                **key,
                "family": re.sub(r"-\d+$", "", run.name),
                "edgekd": __version__,
                "metric": task.metric_name,
            }
            row |= {"libraries": {name: _version(name) for name in LIBRARIES}, "calibration_images": len(dataset.calib)}
            row |= {"higher_is_better": task.higher_is_better, **measure(scratch, options, contenders, seconds)}
            for contender in contenders:
                print(f"{run.name} {key['backend']} {key['threads']} {_line(contender, contenders[0])}", flush=True)
            if not row["valid"]:
                print(
                    f"{run.name} {key['backend']} {key['threads']}: times are invalid: {'; '.join(row['warnings'])}", flush=True
                )
            yield json.loads(json.dumps({**row, "contenders": contenders}).replace(f"{scratch}/", "").replace(f"{ROOT}/", ""))


def quantized_files(scratch: Path, run: Path, exported: Path) -> dict[str, Path | str]:
    """Name -> ONNX file, or why there is none.

    Each is made in a process of its own: modelopt patches ONNX Runtime's quantizer for all that comes after it.
    """
    files: dict[str, Path | str] = {}
    for name, (make_file, settings) in CONTENDERS.items():
        folder = scratch / f"made-{name}"
        folder.mkdir()
        shutil.copyfile(exported / "model.onnx", folder / "float32.onnx")
        inputs = Inputs(run, exported, folder / "float32.onnx", scratch / "calibration.npy")
        log, out = folder / "log.txt", folder / "model.onnx"
        spawn = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(1, mp_context=spawn, initializer=_quiet, initargs=(log,)) as pool:
                pool.submit(make_file, inputs, settings, out).result()
            files[name] = out
        except BrokenProcessPool:
            last = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
            files[name] = " ".join(["its process crashed:", *last])[:300]
        except Exception as error:  # a peer may raise anything, and then that is its result
            files[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return files


def evaluate(
    scratch: Path, name: str, file: Path | str, io: dict[str, Any], options: dict[str, Any], task: Task, dataset: Dataset
) -> dict[str, Any]:
    """Build the engine, see what runs in int8, and compute the task's metric of what it predicts."""
    row: dict[str, Any] = {"name": name, "reason": file if isinstance(file, str) else None}
    if isinstance(file, str):
        return row
    source, engine = scratch / f"source-{name}", _engine(scratch, options, name)
    engine.mkdir()
    precision = "float32" if name == "float32" else "int8"
    _prepare(file, source, {**io, "precision": precision})
    built = Local().run(BuildJob(str(source / "model.onnx"), options, precision, str(engine)), scratch)
    if built.status != "ok":
        return row | {"reason": built.error or built.reason}
    outputs = scratch / "outputs.npz"
    predicted = Local().run(PredictJob(str(engine), str(scratch / "test.npy"), str(outputs), 32), scratch)
    if predicted.status != "ok":
        return row | {"reason": predicted.error or predicted.reason}
    with np.load(outputs, allow_pickle=False) as arrays:
        metric = task.evaluate(dict(arrays), dataset.test.labels)
    return row | {"metric": metric, "size_bytes": file.stat().st_size, "int8_macs": _int8_share(built.payload.get("audit"))}


def measure(scratch: Path, options: dict[str, Any], contenders: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Measure all engines in turns; the times go into the contenders' rows, what holds for all is returned."""
    built = [contender for contender in contenders if contender["reason"] is None]
    if not built or built[0]["name"] != "float32":
        return {"valid": False, "warnings": ["nothing was measured: there is no float32 engine to compare with"]}
    engines = [str(_engine(scratch, options, contender["name"])) for contender in built]
    images = str(scratch / "bench.npy")
    job = CompareJob(engines, images, warmup_s=0.5, duration_s=seconds * len(engines), max_rounds=MAX_ROUNDS)
    result = Local().run(job, scratch)
    if result.status != "ok":
        return {"valid": False, "warnings": [f"nothing was measured: {result.error or result.reason}"]}
    record = result.payload
    for ratio in record["ratios"]:
        built[ratio["engine"]] |= {key: ratio[key] for key in ("speedup", "interval", "verdict")}
    for contender, engine in zip(built, record["engines"], strict=True):
        contender |= {"latency_ms": engine["latency_ms"], "samples_ns": engine["samples_ns"]}
    return {key: record[key] for key in ("valid", "warnings", "noise_floor", "sensors", "host")}


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per family, backend, threads and contender: how far the metric falls below the float model's, and the speed-ups.

    The drop of a run is against the same float model on the same backend. Speed-ups are of valid measurements only, and their
    mean is the geometric one: they are ratios.
    """
    groups: dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for row in rows:
        for contender in row["contenders"]:
            groups.setdefault((row["family"], row["backend"], row["threads"], contender["name"]), []).append((row, contender))
    result = []
    for (family, backend, threads, name), members in groups.items():
        drops, speedups = [], []
        for row, contender in members:
            reference = row["contenders"][0]
            if contender["reason"] is None and reference["reason"] is None:
                drops.append((reference["metric"] - contender["metric"]) * (1 if row["higher_is_better"] else -1))
            if row["valid"] and "speedup" in contender:
                speedups.append(contender["speedup"])
        entry = {"family": family, "backend": backend, "threads": threads, "name": name}
        entry["runs"] = [row["run"] for row, _ in members]
        entry["reasons"] = [contender["reason"] for _, contender in members if contender["reason"] is not None]
        entry["drop"] = {"mean": sum(drops) / len(drops), "each": drops} if drops else None
        mean = math.exp(sum(map(math.log, speedups)) / len(speedups)) if speedups else None
        entry["speedup"] = {"mean": mean, "each": speedups} if speedups else None
        result.append(entry)
    return result


def _edgekd_ptq(inputs: Inputs, settings: Settings, out: Path) -> None:
    """The stage ptq on the float checkpoint, without its fallback, which may train."""
    from edgekd.quantize import ptq

    loaded = _recipe(inputs.run)
    given = loaded.recipe
    dataset = data.load(given.data, search=loaded.search)
    task = build_task(given.task, dataset)
    context = Context(
        compute=given.compute,
        task=task,
        dataset=dataset,
        augment=given.data.augment,
        seed=given.seed,
        search=loaded.search,
        logs=out.parent,
    )
    parent = read_artifact(inputs.exported).parents[0]
    checkpoint = next(found for found in map(read_artifact, inputs.run.glob(f"*-{parent[:12]}")) if found.id == parent)
    assert isinstance(checkpoint, Checkpoint)
    source = quantize_stage.load(checkpoint)
    config = ptq.PtqConfig.model_validate({"kind": "ptq", **settings})
    quantized = ptq.run(config, source, context, title="ptq", work=out.parent).loaded
    example = quantized.architecture.example()
    model = onnx.export(encode(quantized.module, "u8"), example, output_names=task.output_names, opset=opset(given))
    onnx.save(model, out)


def _nncf(inputs: Inputs, settings: Settings, out: Path) -> None:
    import nncf  # type: ignore[import-not-found, unused-ignore]
    import onnx as onnx_library

    feeds = inputs.feeds()
    chosen = {**settings, "preset": nncf.QuantizationPreset(settings["preset"])}
    if "disable_bias_correction" in chosen:
        off = chosen.pop("disable_bias_correction")
        chosen["advanced_parameters"] = nncf.AdvancedQuantizationParameters(disable_bias_correction=off)
    model = nncf.quantize(onnx_library.load(str(inputs.model)), nncf.Dataset(feeds), subset_size=len(feeds), **chosen)
    onnx_library.save(model, str(out))


def _onnxruntime(inputs: Inputs, settings: Settings, out: Path) -> None:
    from onnxruntime import quantization as library
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(library.CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self, feeds: list[dict[str, Any]]) -> None:
            self.feeds = feeds
            self.set_range(0, len(feeds))

        def __len__(self) -> int:
            return len(self.feeds)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(self.feeds[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    prepared = out.with_name("prepared.onnx")
    quant_pre_process(str(inputs.model), str(prepared))
    reader, extra = Reader(inputs.feeds()), {}
    if settings["calibrate_method"] != "MinMax":  # whatever its name says, the option holds for the histograms too
        extra["CalibStridedMinMax"] = max(size for size in range(1, AT_ONCE + 1) if len(reader) % size == 0)
    cpu = hardware.cpu()
    arm = cpu["arch"] in ("aarch64", "arm64")
    library.quantize_static(
        str(prepared),
        str(out),
        reader,
        quant_format=library.QuantFormat.QDQ,
        activation_type=library.QuantType.QInt8 if arm else library.QuantType.QUInt8,
        weight_type=library.QuantType.QInt8,
        # weights of 7 bits, where products of 8 would saturate
        reduce_range=not arm and not {"avx512_vnni", "avx_vnni"} & set(cpu["flags"]),
        **{**settings, "calibrate_method": library.CalibrationMethod[settings["calibrate_method"]]},
        extra_options=extra,
    )


def _modelopt(inputs: Inputs, settings: Settings, out: Path) -> None:
    from modelopt.onnx.quantization import quantize  # type: ignore[import-not-found, unused-ignore]

    feeds = inputs.feeds()
    calibration = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    quantize(str(inputs.model), calibration_data=calibration, calibration_eps=["cpu"], output_path=str(out), **settings)


# NNCF's default for a CNN is symmetric with fast bias correction; against a loss of accuracy its documentation names asymmetric
# activations (mixed) and the slow correction. The row without a correction was added after the fast one was seen to cost accuracy
# on a ResNet-8 (in NNCF's OpenVINO backend too) and the slow one to fail in its ONNX backend. ONNX Runtime's quantizer recommends
# weights per channel for CNNs, and leaves it to a try which ranges are best. modelopt's default is entropy with all the rest in
# float16, which is for GPUs.
CONTENDERS: dict[str, tuple[Callable[[Inputs, Settings, Path], None], Settings]] = {
    "edgekd PTQ": (_edgekd_ptq, {"quantizer": {"calibration": "mse"}, "equalization": True, "bias_correction": True}),
    "NNCF": (_nncf, {"preset": "performance", "fast_bias_correction": True}),
    "NNCF mixed": (_nncf, {"preset": "mixed", "fast_bias_correction": True}),
    "NNCF uncorrected": (_nncf, {"preset": "mixed", "disable_bias_correction": True}),
    "NNCF accurate": (_nncf, {"preset": "mixed", "fast_bias_correction": False}),
    "ONNX Runtime minmax": (_onnxruntime, {"calibrate_method": "MinMax", "per_channel": True}),
    "ONNX Runtime entropy": (_onnxruntime, {"calibrate_method": "Entropy", "per_channel": True}),
    "ONNX Runtime percentile": (_onnxruntime, {"calibrate_method": "Percentile", "per_channel": True}),
    "modelopt entropy": (
        _modelopt,
        {"quantize_mode": "int8", "calibration_method": "entropy", "high_precision_dtype": "fp32"},
    ),
    "modelopt max": (_modelopt, {"quantize_mode": "int8", "calibration_method": "max", "high_precision_dtype": "fp32"}),
}


def _quiet(log: Path) -> None:
    """What a peer prints goes to a file, what native code prints too."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _prepare(file: Path, source: Path, io: dict[str, Any]) -> None:
    """A folder with model.onnx, io.json and layers.json, from which an engine is built and audited."""
    import onnx as onnx_library

    if source.exists():
        return
    source.mkdir()
    model = onnx_library.load(str(file))
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"unnamed.{number}"  # by their names libraries tell what became of them
    onnx_library.save(model, str(source / "model.onnx"))
    (source / LAYERS).write_text(json.dumps(layers(_with_folded_weights(model))))
    (source / "io.json").write_text(json.dumps(io))


def _with_folded_weights(model: Any) -> Any:
    """The model with weights that stand in float before a QuantizeLinear (modelopt's) as if they were integers.

    Only for the table of layers, which knows no other quantized weights.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    quantized = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and quantized.get(node.input[0]) in constants:
            node.input[0] = quantized[node.input[0]]
    return model


def _engine(scratch: Path, options: dict[str, Any], name: str) -> Path:
    return scratch / f"{options['name']}-{options['threads']}-{name}"


def _int8_share(audit: dict[str, Any] | None) -> float | None:
    """The share of all multiply-accumulates that run in int8, whatever was asked: a peer may leave layers out."""
    rows = audit["layers"] if audit is not None else []
    total = sum(row["macs"] for row in rows)
    return sum(row["macs"] for row in rows if row["got"] == "int8") / total if total else None


def _recipe(run: Path) -> recipe.Loaded:
    return recipe.load_recipe(ROOT / json.loads((run / "run.json").read_text())["recipe_path"])


def _encoding(folder: Path) -> str:
    artifact = read_artifact(folder)
    return artifact.config["encoding"] if artifact.role == "student" else f"{artifact.role} {artifact.config['encoding']}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["run"], row["backend"], row["threads"]


def _read_rows() -> list[dict[str, Any]]:
    """The rows of an earlier call; none where there was none, or one that wrote something else."""
    kept = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    return kept["rows"] if kept.get("schema") == SCHEMA else []


def _write(rows: list[dict[str, Any]]) -> None:
    """Whole or not at all: a call that is interrupted keeps what was there."""
    settings = {name: chosen for name, (_, chosen) in CONTENDERS.items()}
    result = {"schema": SCHEMA, "settings": settings, "summary": summarize(rows), "rows": rows}
    partial = RESULT.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.replace(RESULT)


def _line(contender: dict[str, Any], reference: dict[str, Any]) -> str:
    """One contender in one row, for the terminal."""
    if contender["reason"] is not None:
        return f"{contender['name']}: {contender['reason']}"
    parts = [f"{contender['metric']:.2%}"]
    if reference["reason"] is None and contender is not reference:
        parts.append(f"{100 * (contender['metric'] - reference['metric']):+.2f} points")
    if "speedup" in contender:
        parts.append(f"{contender['speedup']:.2f}x float32 ({contender['verdict']})")
    if contender["int8_macs"] is not None:
        parts.append(f"{contender['int8_macs']:.0%} of the MACs in int8")
    return f"{contender['name']}: {', '.join(parts)}"


def _lines(summary: list[dict[str, Any]]) -> Iterator[str]:
    for entry in summary:
        parts = [f"{len(entry['runs'])} runs"]
        if entry["drop"] is not None:
            parts.append(f"drop {100 * entry['drop']['mean']:.2f} points")
        if entry["speedup"] is not None:
            parts.append(f"{entry['speedup']['mean']:.2f}x float32")
        if entry["reasons"]:
            parts.append(f"{len(entry['reasons'])} failed")
        yield f"{entry['family']} {entry['backend']} {entry['threads']} {entry['name']}: {', '.join(parts)}"


if __name__ == "__main__":
    main()
