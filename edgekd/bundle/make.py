"""``edgekd bundle``: from a finished run to a bundle of one of its engines."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import __version__
from edgekd.artifacts import Artifact, file_problems, read_artifact, whole_folder
from edgekd.bench.measure import load_images
from edgekd.bundle.check import predict
from edgekd.bundle.folder import ENGINE, GOLDEN, MODEL, Bundle, Golden, hide_paths, open_bundle, write_golden, write_manifest
from edgekd.engines import backend, read_engine, read_io
from edgekd.engines.base import Array
from edgekd.engines.postprocess import postprocess
from edgekd.errors import ArtifactError, DataError, EdgekdError, UsageError
from edgekd.jobs import BuildJob
from edgekd.report import tables, units
from edgekd.targets.local import Local

GOLDEN_IMAGES = 8
_MODEL_FILES = ("model.onnx", "io.json", "layers.json")


@dataclass(frozen=True)
class Choice:
    """Which engine of a run; where nothing is said, the one that the report's answer is about."""

    backend: str | None = None
    precision: str | None = None
    engine: str | None = None
    """Its folder in the run; without one, only the student's engines are looked at."""


def make(run: Path, *, choice: Choice, out: Path | None = None) -> Bundle:
    """Write a bundle of one engine of a run.

    Args:
        run: A run directory that ``edgekd compress`` finished.
        choice: Which engine.
        out: The folder to write, which must not exist; RUN/bundle-BACKEND-PRECISION where None.

    Raises:
        UsageError: No engine, or more than one, is what was asked for; the message lists what there is.
        ArtifactError: The run is unfinished or damaged, or there is something at ``out``.
        DataError: The run's images are gone.
        EdgekdError: The engine does not run any more.
    """
    report = tables.build(run)
    if report["state"]["status"] == "unfinished":
        raise ArtifactError(f"the run {run} is unfinished", hint="the same edgekd compress command goes on with it")
    entry = _choose(run, report, choice)
    artifacts = _artifacts(run, report, entry)
    golden, about = _golden(run, report, entry, artifacts["onnx"], artifacts["engine"])
    content = {
        "edgekd": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "run": {
            "name": report["name"],
            "smoke": report["smoke"],
            "started": report["state"]["started"],
            "finished": report["state"]["finished"],
            "seed": report["reproduce"]["seed"],
            "data": report["data"].get("fingerprint"),
        },
        "task": report["task"],
        "model": {"role": entry["role"], "stage": entry["stage"]},
        "backend": entry["backend"],
        "precision": entry["precision"],
        "artifacts": {
            name: {"id": artifact.id, "created": artifact.created, "environment": artifact.environment}
            for name, artifact in artifacts.items()
        },
        "measured": _measured(entry, artifacts.get("bench")),
        "golden": about,
    }
    folder = out if out is not None else run / f"bundle-{entry['backend']}-{entry['precision']}"
    with whole_folder(folder) as draft:
        (draft / ENGINE).mkdir()
        (draft / MODEL).mkdir()
        for name in artifacts["engine"].files:
            shutil.copyfile(artifacts["engine"].file(name), draft / ENGINE / name)
        hide_paths(draft / ENGINE / "build.log")
        for name in _MODEL_FILES:
            shutil.copyfile(artifacts["onnx"].file(name), draft / MODEL / name)
        write_golden(draft / GOLDEN, golden)
        write_manifest(draft, content)
    return open_bundle(folder)


def lines(bundle: Bundle) -> list[str]:
    """What was written, as text."""
    manifest, measured = bundle.manifest, bundle.manifest["measured"]
    size = sum(each["size_bytes"] for each in manifest["files"].values())
    out = [
        f"{bundle.folder}: {len(manifest['files'])} files, {units.size(size)}",
        f"{manifest['backend']} {manifest['precision']} of the {units.role(manifest['model']['role'])}",
    ]
    if measured is not None:
        out[1] += (
            f": {measured['metric']['name']} {units.metric(measured['metric'])}, p50 {units.ms(measured['latency_ms']['p50'])} "
            f"at batch {measured['batch']} on {units.plain(measured['host']['cpu']['model'])}"
            + ("" if measured["valid"] else " (an invalid measurement)")
        )
    out.append(f"golden batch: {manifest['golden']['images']} images, outputs of {manifest['golden']['outputs_of']}")
    if bundle.io.postprocessing is None:
        out.append("warning: its io.json does not name the classes: an older edgekd exported it; run edgekd compress again")
    return [*out, f"on the device: edgekd check-bundle {bundle.folder}"]


def _choose(run: Path, report: dict[str, Any], choice: Choice) -> dict[str, Any]:
    """The engine that was asked for."""
    there = [each for each in report["engines"] if each["status"] in ("measured", "built") and each["folders"]["engine"]]
    if not there:
        reason = report["state"]["reason"]
        raise ArtifactError(
            f"the run {run} has no engine" + (f": it failed: {reason}" if reason else ""),
            hint="add a deploy section to its recipe, or see its report for what became of the engines",
        )
    engine, wanted = choice.engine, {"backend": choice.backend, "precision": choice.precision}
    asked = ", ".join(f"{key} {value}" for key, value in {**wanted, "folder": engine}.items() if value is not None)
    listed = [f"{each['folders']['engine']}: {each['title']}, {each['status']}" for each in there]
    if not asked:
        answer = report["answer"]["compressed"]
        if answer is None:
            raise UsageError(
                "\n".join([f"{report['answer']['reason']}; there are:", *listed]), hint="choose one with --engine FOLDER"
            )
        return dict(report["engines"][answer])
    found = [
        each
        for each in there
        if all(value in (None, each[key]) for key, value in wanted.items())
        and (each["folders"]["engine"] == Path(engine).name if engine is not None else each["role"] == "student")
    ]
    if len(found) == 1:
        return found[0]
    if found:
        listed = [f"{each['folders']['engine']}: {each['title']}, {each['status']}" for each in found]
    count = f"{len(found)} engines" if found else "no engine"
    owner = "" if engine is not None else " of the student"
    raise UsageError(
        "\n".join([f"{count}{owner} with {asked} in {run}; there are:", *listed]),
        hint="choose one with --engine FOLDER",
    )


def _artifacts(run: Path, report: dict[str, Any], entry: dict[str, Any]) -> dict[str, Artifact]:
    """By kind: checkpoint where it is still there, onnx, engine, and bench where it was measured; their files are whole."""
    found = {name: read_artifact(run / folder) for name, folder in entry["folders"].items() if folder}
    damage = [f"{each.folder}: {problem}" for each in found.values() for problem in file_problems(each.folder, each.files)]
    if damage:
        raise ArtifactError("\n".join(damage), hint="the same edgekd compress command makes it again")
    models = [read_artifact(run / model["folder"]) for model in report["models"]]
    checkpoint = {model.id: model for model in models}.get(next(iter(found["onnx"].parents), ""))
    return ({"checkpoint": checkpoint} if checkpoint is not None else {}) | found


def _measured(entry: dict[str, Any], bench: Artifact | None) -> dict[str, Any] | None:
    """Metric and latency with what they depend on; None for an engine that was only built."""
    if entry["status"] != "measured" or bench is None:
        return None
    keys = ("metric", "latency_ms", "first_ms", "peak_memory_mib", "batch", "threads", "samples", "valid", "warnings")
    host = bench.json("record.json")["host"]
    return {key: entry[key] for key in keys} | {"host": host}


def _golden(
    run: Path, report: dict[str, Any], entry: dict[str, Any], onnx: Artifact, engine: Artifact
) -> tuple[Golden, dict[str, Any]]:
    """The golden batch, and what the manifest says of it."""
    path = run / "inputs" / f"bench-{str(report['data'].get('fingerprint'))[:12]}.npy"
    try:
        images = load_images(path)
    except DataError as error:
        raise DataError(error.message, hint="the same edgekd compress command writes the run's images again") from error
    info, batch = read_engine(engine.folder), entry["batch"]
    about: dict[str, Any] = {"batch": batch, "max_error": onnx.json("parity.json")["allowed"]["max_error"]}
    with tempfile.TemporaryDirectory(prefix="edgekd-bundle-") as scratch:
        source = engine.folder
        result, outputs = predict(source, images, batch)
        if result.status == "skipped":  # an engine for another machine: what its model gives stands for it
            source = _reference(onnx, Path(scratch))
            about |= {"fingerprint": None, "outputs_of": "model.onnx in ONNX Runtime: the engine does not run on the host"}
            result, outputs = predict(source, images, batch)
        elif result.status == "ok":
            about |= {"fingerprint": backend(info.options.name).fingerprint(info.options), "outputs_of": "this engine"}
        if result.status == "ok":
            images = np.ascontiguousarray(images[_clear(outputs, read_io(engine.file("io.json")).postprocessing, len(images))])
            result, outputs = predict(source, images, batch)
    if result.status != "ok":
        raise EdgekdError(f"the engine {engine.folder} does not run: {result.reason}", hint=result.hint)
    return Golden(images, outputs), {"images": len(images), **about}


def _reference(onnx: Artifact, scratch: Path) -> Path:
    """The model as an engine of ONNX Runtime, its graph as it is."""
    folder = scratch / "reference"
    folder.mkdir()
    # "float32" for any graph: this is about what it means, and not about the precision that it runs in
    job = BuildJob(
        str(onnx.file("model.onnx").resolve()), {"name": "onnxruntime", "optimization": "none"}, "float32", str(folder)
    )
    result = Local().run(job, scratch)
    if result.status != "ok":
        raise EdgekdError(f"the model of {onnx.folder} does not run in ONNX Runtime: {result.reason}", hint=result.hint)
    return folder


def _clear(outputs: Mapping[str, Array], postprocessing: Mapping[str, Any] | None, count: int) -> list[int]:
    """Which images to keep: the first of those whose decision is clearer than the median one.

    A decision on the edge may fall either way on another machine, and would say that a sound engine is none.
    """
    if postprocessing is None:
        return list(range(min(GOLDEN_IMAGES, count)))
    margins = postprocess(outputs, postprocessing).margins()
    return [int(index) for index in np.flatnonzero(margins >= np.median(margins))[:GOLDEN_IMAGES]]
