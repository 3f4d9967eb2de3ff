"""``edgekd bench``: measure ONNX files and engines outside a run, through the same jobs and the same worker."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifacts import write_json
from edgekd.engines import audit, graph, model_check, options_from, read_io
from edgekd.engines.onnx_layers import layers
from edgekd.errors import BuildError, EdgekdError
from edgekd.jobs import BenchJob, BuildJob, CompareJob, JobResult
from edgekd.targets.local import Local

LOG_LINES = 10
"""Lines of a failed worker's log that a message ends with."""
# The preprocessing of a model that says nothing about it: plain 0..1 images.
PLAIN = {"layout": "NCHW", "color": "RGB", "scale": 1 / 255, "mean": [0.0], "std": [1.0]}


def bench(models: list[Path], *, backend: str, threads: int, batch: int, seconds: float) -> dict[str, Any]:
    """Build what is not built yet, measure each engine alone, and several interleaved.

    Args:
        models: ONNX files or engine folders.
        backend: Builds and runs the ONNX files.
        threads: CPU threads for the ONNX files' engines.
        batch: Images per inference.
        seconds: Steady state per engine.

    Returns:
        {"engines": [bench payloads with "model" and "audit" (the precision audit, or None)], "skipped": [{"model", "reason"}] for
        those that this machine cannot run, "comparison": compare payload or None}; raw samples included.

    Raises:
        EdgekdError: A file is missing, a build or a measurement failed, or nothing can be measured here.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-bench-") as scratch:
        folder = Path(scratch)
        engines = [_engine(model, backend, threads, folder / f"engine{number}") for number, model in enumerate(models)]
        inputs = folder / "images.npy"
        np.save(inputs, _images(engines[0], batch))
        results, skipped, names = [], [], []
        for model, engine in zip(models, engines, strict=True):
            job = BenchJob(engine=str(engine), inputs=str(inputs), batch=batch, duration_s=seconds)
            result = Local().run(job, folder)
            if result.status == "skipped":
                skipped.append({"model": str(model), "reason": result.reason})
                continue
            found = json.loads((engine / "engine.json").read_text()).get("audit")
            results.append({"model": str(model), **_payload(result), "audit": found})
            names.append(str(engine))
        if not results:
            raise EdgekdError("\n".join(f"{each['model']}: {each['reason']}" for each in skipped), hint="run edgekd doctor")
        comparison = None
        if len(names) > 1:
            comparison = _run(CompareJob(engines=names, inputs=str(inputs), batch=batch, duration_s=seconds * len(names)), folder)
    return {"engines": results, "skipped": skipped, "comparison": comparison}


def lines(result: dict[str, Any]) -> list[str]:
    """The result as text."""
    out = []
    for engine in result["engines"]:
        latency = engine["latency_ms"]
        memory = "unknown" if engine["peak_memory_mib"] is None else f"{engine['peak_memory_mib']:.0f} MiB"
        out.append(
            f"{engine['model']} on {engine['backend']}: "
            f"p50 {latency['p50']:.3f} ms, p90 {latency['p90']:.3f}, p99 {latency['p99']:.3f}; "
            f"first {engine['first_ms']:.2f} ms; peak memory {memory}; {engine['size_bytes'] / 1024:.0f} KiB"
        )
        if engine["audit"] is not None:
            refused, summary = audit.refusal(engine["audit"]), audit.summary(engine["audit"])
            if engine["precision"] != "float32":
                summary = summary or engine["audit"]["reason"]
            out += [f"  warning: {refused}"] if refused else [f"  {summary}"] if summary else []
        out += [f"  warning: {warning}" for warning in engine["warnings"]]
    out += [f"{each['model']}: skipped: {each['reason']}" for each in result["skipped"]]
    if result["comparison"] is not None:
        for ratio in result["comparison"]["ratios"]:
            low, high = ratio["interval"]
            name = result["engines"][ratio["engine"]]["model"]
            out.append(f"{name}: {ratio['speedup']:.2f}x the first [{low:.2f}, {high:.2f}], interleaved: {ratio['verdict']}")
    return out


def _engine(model: Path, backend: str, threads: int, folder: Path) -> Path:
    if model.is_dir():
        if not (model / "engine.json").exists():
            raise BuildError(
                f"{model} is not an engine folder: it has no engine.json", hint="give an .onnx file or an engine folder of a run"
            )
        return model.resolve()
    if not model.is_file():
        raise BuildError(f"{model} does not exist", hint="give an .onnx file or an engine folder of a run")
    folder.mkdir()
    source = folder / "source"
    source.mkdir()
    io = model.with_name("io.json")
    if io.exists():
        read_io(io)  # refuse a damaged one
        description = json.loads(io.read_text())
    else:
        description = _describe(model)
    (source / "io.json").write_text(json.dumps(description))
    asked = _prepare(model, source)
    options: dict[str, Any] = {"name": backend}
    if backend in ("onnxruntime", "openvino"):
        options["threads"] = threads
    runs = options_from(options).precisions
    engine = folder / "engine"
    engine.mkdir()
    # of a foreign file the layers say it, where the backend has it at all: the audit then tells what became of it
    precision = description.get("precision")
    precision = precision or next((name for name in ("int8", "float16") if name in asked and name in runs), "float32")
    _run(BuildJob(model=str(source / "model.onnx"), backend=options, precision=precision, out=str(engine)), folder)
    return engine


def _prepare(model: Path, source: Path) -> set[str]:
    """Put the model and its layers.json where an engine is built from them.

    Returns:
        The precisions that its layers are asked to run in.
    """
    import onnx

    (source / "model.onnx").symlink_to(model.resolve())
    try:
        proto = onnx.load(str(model), load_external_data=False)
        unnamed = [node for node in proto.graph.node if not node.name]
        for number, node in enumerate(unnamed):
            node.name = f"edgekd.unnamed.{number}"  # by their names libraries tell what became of them
        if unnamed and not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
            (source / "model.onnx").unlink()
            onnx.save(proto, str(source / "model.onnx"))
        rows = layers(proto)
    except Exception:  # protobuf's, shape inference's: what the backend makes of such a file is for the backend to say
        return set()
    write_json(source / audit.LAYERS, rows)
    return {row["asked"] for row in rows}


def _describe(model: Path) -> dict[str, Any]:
    """The io.json of a foreign ONNX file with one image input."""
    proto = model_check.load(model).graph
    inputs, outputs = ([asdict(spec) for spec in find(proto, model)] for find in (graph.inputs, graph.outputs))
    if len(inputs) != 1 or len(inputs[0]["shape"]) != 4 or inputs[0]["dtype"] != "float32" or -1 in inputs[0]["shape"][1:]:
        raise BuildError(
            f"{model} has the inputs {inputs}; one float32 image batch [N, C, H, W] with fixed C, H and W is expected",
            hint="put an io.json beside the model (docs/architecture.md shows one)",
        )
    channels = inputs[0]["shape"][1]
    preprocessing = {**PLAIN, "mean": [0.0] * channels, "std": [1.0] * channels}
    return {"inputs": inputs, "outputs": outputs, "preprocessing": preprocessing}


def _images(engine: Path, batch: int) -> np.ndarray[Any, Any]:
    """The run's own images where the engine belongs to one, else random ones of the right size."""
    shape = read_io(engine / "io.json").inputs[0].shape
    if len(shape) != 4 or min(shape[1:]) < 1:
        raise BuildError(f"{engine} takes {list(shape)}; one image batch [N, C, H, W] with fixed C, H and W is expected")
    channels, height, width = shape[1:]
    for path in sorted((engine.parent / "inputs").glob("bench-*.npy"), key=lambda path: -path.stat().st_mtime):
        images: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
        if images.shape[1:] == (height, width, channels):
            return images
    return np.random.default_rng(0).integers(0, 256, (max(8, batch), height, width, channels), dtype=np.uint8)


def _run(job: Any, folder: Path) -> dict[str, Any]:
    return _payload(Local().run(job, folder))


def _payload(result: JobResult) -> dict[str, Any]:
    if result.status != "ok":
        log = "".join(f"\n  {line}" for line in result.log_tail.splitlines()[-LOG_LINES:])  # the file is gone when this is read
        raise EdgekdError((result.error or result.reason) + log, hint=result.hint)
    return result.payload
