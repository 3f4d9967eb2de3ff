"""``edgekd bench``: measure ONNX files and engines outside a run, through the same jobs and the same worker."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifacts import write_json
from edgekd.engines import audit, graph, model_check, options_from, read_io
from edgekd.engines.onnx_layers import layers
from edgekd.errors import BuildError, EdgekdError, nearest
from edgekd.jobs import BenchJob, BuildJob, CompareJob, JobResult
from edgekd.targets.local import Local

LOG_LINES = 10
"""Lines of a failed worker's log that a message ends with."""
Shape = tuple[int, ...]
# The preprocessing of a model that says nothing about it: plain 0..1 images.
PLAIN = {"layout": "NCHW", "color": "RGB", "scale": 1 / 255, "mean": [0.0], "std": [1.0]}


def bench(
    models: list[Path], *, backend: str, threads: int, batch: int, seconds: float, shapes: Mapping[str, Shape] | None = None
) -> dict[str, Any]:
    """Build what is not built yet, measure each engine alone, and several interleaved.

    Args:
        models: ONNX files or engine folders.
        backend: Builds and runs the ONNX files.
        threads: CPU threads for the ONNX files' engines.
        batch: Images per inference.
        seconds: Steady state per engine.
        shapes: Of the ONNX files' inputs by name, the batch first; needed where a size besides the batch is free.

    Returns:
        {"engines": [bench payloads with "model" and "audit" (the precision audit, or None)], "skipped": [{"model", "reason"}] for
        those that this machine cannot run, "comparison": compare payload or None}; raw samples included.

    Raises:
        EdgekdError: A file is missing, a build or a measurement failed, or nothing can be measured here.
    """
    with tempfile.TemporaryDirectory(prefix="edgekd-bench-") as scratch:
        folder = Path(scratch)
        engines = [
            _engine(model, backend, threads, folder / f"engine{number}", shapes or {}) for number, model in enumerate(models)
        ]
        inputs = _inputs(engines[0], batch, folder)
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


def parse_shapes(texts: Sequence[str]) -> dict[str, Shape]:
    """``name=1x3x224x224``, several times.

    Raises:
        BuildError: One is not of this form.
    """
    found = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        if not name or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
            raise BuildError(f"the shape {text!r} is not understood", hint="write NAME=1x3x224x224, the batch first")
        found[name] = tuple(int(size) for size in sizes.split("x"))
    return found


def _engine(model: Path, backend: str, threads: int, folder: Path, shapes: Mapping[str, Shape]) -> Path:
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
    known: dict[str, Any] = {}
    if io.exists():
        read_io(io)  # refuse a damaged one
        known = json.loads(io.read_text())
    if shapes:
        model = _fixed(model, shapes, folder / "fixed.onnx")
    # what an io.json says of inputs and outputs does not hold where their sizes were set
    description = known if known and not shapes else {**known, **_describe(model, known.get("preprocessing"))}
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


def _describe(model: Path, preprocessing: dict[str, Any] | None) -> dict[str, Any]:
    """The io.json of a foreign ONNX file; unknown preprocessing is that of plain images, where it takes one batch of them."""
    proto = model_check.load(model).graph
    inputs, outputs = ([asdict(spec) for spec in find(proto, model)] for find in (graph.inputs, graph.outputs))
    free = [f"{each['name']} {list(each['shape'])}" for each in inputs if -1 in each["shape"][1:]]
    if free:
        raise BuildError(
            f"{model} has inputs with free sizes besides the batch: {', '.join(free)}",
            hint="give them with --shape NAME=1x3x224x224, or export the model with fixed sizes",
        )
    if preprocessing is None:
        image = len(inputs) == 1 and len(inputs[0]["shape"]) == 4 and inputs[0]["dtype"] == "float32"
        channels = inputs[0]["shape"][1] if image else 0
        preprocessing = {**PLAIN, "mean": [0.0] * channels, "std": [1.0] * channels} if image else {}
    return {"inputs": inputs, "outputs": outputs, "preprocessing": preprocessing}


def _fixed(model: Path, shapes: Mapping[str, Shape], out: Path) -> Path:
    """The model with the sizes of its inputs set."""
    import onnx

    proto = model_check.load(model)
    inputs = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    for name, shape in shapes.items():
        if name not in inputs:
            raise BuildError(f"{model} has no input {name!r}{nearest(name, list(inputs))}; it has {', '.join(inputs)}")
        given = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in inputs[name]]
        if len(given) != len(shape) or any(have not in (-1, want) for have, want in zip(given, shape, strict=True)):
            raise BuildError(f"input {name!r} of {model} has shape {given} (-1: free); {list(shape)} does not fit it")
        for dim, size in zip(inputs[name], shape, strict=True):
            dim.dim_value = size
    onnx.external_data_helper.load_external_data_for_model(proto, str(model.parent))
    onnx.save(proto, str(out))
    return out


def _inputs(engine: Path, batch: int, folder: Path) -> Path:
    """The run's own images where the engine belongs to one, else random values of the right shapes and types."""
    io = read_io(engine / "io.json")
    draw, count = np.random.default_rng(0), max(8, batch)
    if not io.preprocessing:
        values = {
            spec.name: draw.normal(size=shape).astype(spec.dtype)
            if spec.dtype.startswith("float")
            else draw.integers(0, 2, shape).astype(spec.dtype)  # small: what they count or index is not known
            for spec in io.inputs
            for shape in [(count, *spec.shape[1:])]
        }
        np.savez(folder / "inputs.npz", allow_pickle=False, **values)
        return folder / "inputs.npz"
    channels, height, width = io.inputs[0].shape[1:]
    images: np.ndarray[Any, Any] = draw.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    for path in sorted((engine.parent / "inputs").glob("bench-*.npy"), key=lambda path: path.stat().st_mtime):
        found: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
        if found.shape[1:] == (height, width, channels):
            images = found
    np.save(folder / "images.npy", images)
    return folder / "images.npy"


def _run(job: Any, folder: Path) -> dict[str, Any]:
    return _payload(Local().run(job, folder))


def _payload(result: JobResult) -> dict[str, Any]:
    if result.status != "ok":
        log = "".join(f"\n  {line}" for line in result.log_tail.splitlines()[-LOG_LINES:])  # the file is gone when this is read
        raise EdgekdError((result.error or result.reason) + log, hint=result.hint)
    return result.payload
