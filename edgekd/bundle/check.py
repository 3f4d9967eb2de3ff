"""``edgekd check-bundle``: is a bundle whole, does this machine run its engine, and does it give what it gave before?"""

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
from edgekd.artifacts import whole_folder
from edgekd.bundle.folder import ENGINE, GOLDEN, MODEL, Bundle, Golden, hide_paths, open_bundle, write_manifest
from edgekd.engines import audit, backend, options_dict, read_engine
from edgekd.engines.base import Array
from edgekd.engines.detections import OUTPUT
from edgekd.engines.postprocess import postprocess
from edgekd.errors import BuildError, EdgekdError, ParityError
from edgekd.jobs import BuildJob, JobResult, PredictJob
from edgekd.targets.local import Local


@dataclass(frozen=True)
class Checked:
    """What a check found; one that found anything wrong raises instead."""

    bundle: Bundle
    images: int
    """Of the golden batch."""
    equal: bool
    """All outputs are the recorded ones, bit for bit."""
    max_error: float
    """Largest difference of an output value, as a share of the largest recorded one."""


def check(folder: Path) -> Checked:
    """Hash every file, run the golden batch in a worker, compare.

    Raises:
        ArtifactError: The bundle is not whole.
        WrongMachineError: This machine cannot run the engine.
        ParityError: The engine gives something else.
        EdgekdError: The engine failed.
    """
    bundle = open_bundle(folder)
    return _compare(bundle, folder / ENGINE, exact=_same_machine(bundle))


def rebuild(folder: Path, out: Path) -> Checked:
    """Build a bundle's engine for this machine from its ONNX model, as a new bundle with the same golden batch.

    Args:
        folder: The bundle.
        out: The new one, which must not exist; it is whole or absent.

    Raises:
        ArtifactError: The bundle is not whole, or there is something at ``out``.
        BuildError: It cannot be built here, or does not run in the precision that was asked.
        WrongMachineError: It is built, and this machine cannot run it.
        ParityError: The new engine gives something else than the old one did.
    """
    bundle = open_bundle(folder)
    old = read_engine(folder / ENGINE)
    with whole_folder(out) as draft, tempfile.TemporaryDirectory(prefix="edgekd-bundle-") as scratch:
        shutil.copytree(folder / MODEL, draft / MODEL)
        shutil.copyfile(folder / GOLDEN, draft / GOLDEN)
        (draft / ENGINE).mkdir()
        job = BuildJob(
            model=str((draft / MODEL / "model.onnx").resolve()),
            backend=options_dict(old.options),
            precision=old.precision,
            out=str((draft / ENGINE).resolve()),
        )
        result = Local().run(job, Path(scratch))
        if result.status != "ok":
            raise BuildError(f"the engine cannot be built here: {result.reason}", hint=result.hint)
        refused = audit.refusal(result.payload["audit"]) if "audit" in result.payload else None
        if refused is not None:
            raise BuildError(f"the engine built here {refused}", hint="another backend may run it as asked: edgekd doctor")
        checked = _compare(bundle, draft / ENGINE, exact=False)
        hide_paths(draft / ENGINE / "build.log")
        kept = {key: value for key, value in bundle.manifest.items() if key not in ("schema", "files")}
        content = {
            **kept,
            "edgekd": __version__,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            # what is known of the old engine is not known of this one
            "artifacts": {name: each for name, each in kept["artifacts"].items() if name not in ("engine", "bench")},
            "measured": None,
            "golden": {**kept["golden"], "fingerprint": None, "outputs_of": "the engine that this one was built again from"},
            "rebuilt_from": dict(old.fingerprint),
        }
        write_manifest(draft, content)
    return Checked(open_bundle(out), checked.images, checked.equal, checked.max_error)


def lines(checked: Checked) -> list[str]:
    """What a check found, as text."""
    bundle = checked.bundle
    outputs = "equal, bit for bit" if checked.equal else f"largest difference {checked.max_error:.1e} of their range"
    return [
        f"{bundle.folder}: {len(bundle.manifest['files'])} files, all as they were written",
        f"{bundle.manifest['backend']} {bundle.manifest['precision']}: runs here",
        f"golden batch: {checked.images} images; outputs: {outputs} (allowed: {bundle.manifest['golden']['max_error']:.0e})",
    ]


def predict(engine: Path, golden_images: Array, batch: int) -> tuple[JobResult, dict[str, Array]]:
    """An engine's outputs for images, from a worker: a crash of the library stays there."""
    with tempfile.TemporaryDirectory(prefix="edgekd-bundle-") as scratch:
        images, out = Path(scratch) / "images.npy", Path(scratch) / "outputs.npz"
        np.save(images, golden_images)
        result = Local().run(PredictJob(str(engine.resolve()), str(images), str(out), batch=batch), Path(scratch))
        if result.status != "ok":
            return result, {}
        with np.load(out, allow_pickle=False) as arrays:
            return result, dict(arrays)


def _same_machine(bundle: Bundle) -> bool:
    """Whether the golden outputs were made by this engine on a CPU like this one: then every bit must be the same."""
    made_on = bundle.manifest["golden"].get("fingerprint")
    if not made_on or "cpu" not in made_on:
        return False
    options = read_engine(bundle.folder / ENGINE).options
    return bool(backend(options.name).available().ok and backend(options.name).fingerprint(options) == made_on)


def _compare(bundle: Bundle, engine: Path, *, exact: bool) -> Checked:
    golden = bundle.golden()
    result, outputs = predict(engine, golden.images, bundle.manifest["golden"]["batch"])
    if result.status == "skipped":
        raise bundle.cannot_run(result.reason, result.hint if result.hint.startswith("run:") else "")
    if result.status != "ok":
        raise EdgekdError(f"the engine of {bundle.folder} failed: {result.error}", hint=result.hint)
    # rounding may swap two boxes of a graph: they count as decisions
    error = max(_error(name, expected, outputs) for name, expected in golden.outputs.items() if name != OUTPUT)
    equal = all(np.array_equal(expected, outputs[name]) for name, expected in golden.outputs.items())
    allowed, changed = bundle.manifest["golden"]["max_error"], _changed(bundle, golden, outputs)
    found = f"{changed} of {len(golden.images)} decisions changed, largest difference {error:.1e} of the outputs' range"
    if not error <= allowed or changed:  # not finite fails too
        raise ParityError(
            f"the engine of {bundle.folder} does not give the golden outputs: {found} (allowed: {allowed:.0e})",
            hint="do not deploy it here; build it with the versions in bundle.json, or try another backend",
        )
    if exact and not equal:
        raise ParityError(
            f"the engine of {bundle.folder} gave other bits on a machine like this one: {found}",
            hint="is this machine's memory sound, and its CPU the one that bundle.json names?",
        )
    return Checked(bundle, len(golden.images), equal, error)


def _error(name: str, expected: Array, outputs: Mapping[str, Array]) -> float:
    """How far an output is from the recorded one, as a share of its range; infinite where it is not even alike."""
    received: Any = outputs.get(name)
    if received is None or received.shape != expected.shape or received.dtype != expected.dtype:
        return float("inf")
    difference = np.abs(expected.astype(np.float64) - received.astype(np.float64)).max()
    return float(difference / max(float(np.abs(expected).max()), 1e-30))


def _changed(bundle: Bundle, golden: Golden, outputs: Mapping[str, Array]) -> int:
    """How many decisions differ; 0 where the model does not say what its outputs mean."""
    if bundle.io.postprocessing is None or any(outputs[name].shape != golden.outputs[name].shape for name in outputs):
        return 0
    before: Any = postprocess(golden.outputs, bundle.io.postprocessing)
    return int(before.changed(postprocess(outputs, bundle.io.postprocessing)))
