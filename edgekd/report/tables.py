"""The data of a report: plain functions from a run's files to one JSON-able dict, which every printer reads.

``engines[i]`` is ``cells[i]`` of run.json; answer, comparisons and budget refer to engines by that index.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.report import answer, bits, measured, units, widths
from edgekd.report.files import Files, read_run

SCHEMA = 1


def build(root: Path) -> dict[str, Any]:
    """Everything that a report says.

    Args:
        root: A run directory, finished or not.

    Returns:
        What report.json holds.

    Raises:
        ArtifactError: ``root`` is no run directory.
    """
    files, run = Files(root), read_run(root)
    models = [found for model in run["models"] if (found := _model(model, files)) is not None]
    engines = measured.engines(run["cells"], files)
    comparisons = measured.comparisons(run["comparisons"], files, len(engines))
    training = [found for model in run["models"] if (found := _training(model, files)) is not None]
    layers, parity = _layers(run["models"], files), _parity(run, files)
    budget = run.get("budget")
    return {
        "schema": SCHEMA,
        "name": units.plain(run.get("name", "")),
        "state": _state(run),
        "smoke": bool(run.get("smoke")),
        "task": run.get("task"),
        "answer": answer.build(models, engines, comparisons, budget),
        "models": models,
        "engines": engines,
        "comparisons": comparisons,
        "widths": widths.build(models, engines),
        "budget": budget,
        "training": training,
        "layers": layers,
        "ladders": _ladders(run["models"], files),
        "bits": bits.build(run["models"], engines, files),
        "parity": parity,
        "skipped": _skipped(run, engines, files),
        "warnings": _warnings(run, engines, comparisons, files),
        "data": run["data"],
        "environment": run["environment"],
        "recipe": {"path": run.get("recipe_path"), "text": str(run.get("recipe_text") or "")},
        "reproduce": _reproduce(run, root, files),
    }


def _state(run: dict[str, Any]) -> dict[str, Any]:
    """``finished``, ``failed`` (at which stage, and why), or ``unfinished``: interrupted, or still running."""
    failed = next((step for step in run["steps"] if step.get("status") == "failed"), None)
    done = [step for step in run["steps"] if step.get("folder")]
    return {
        "status": "failed" if failed is not None else "finished" if run.get("finished") else "unfinished",
        "failed_at": (failed.get("stage") or None) if failed is not None else None,
        "reason": (failed.get("reason") or None) if failed is not None else None,
        # run.json's own "doing" is older than its last step
        "last_step": done[-1]["folder"] if done else None,
        "started": run.get("started"),
        "finished": run.get("finished"),
        "seconds": run.get("seconds"),
    }


def _model(model: dict[str, Any], files: Files) -> dict[str, Any] | None:
    """One checkpoint; None where its numbers cannot be read."""
    artifact = files.artifact(model.get("folder"))
    if artifact is None:
        return None
    metrics = artifact.metrics
    if not {"params", "macs", "metric"} <= metrics.keys():
        files.damage[artifact.folder.name] = "its manifest lacks params, macs or metric"
        return None
    pairs = sorted({(row.get("weight_bits"), row.get("activation_bits")) for row in metrics.get("layers") or []}, key=str)
    return {
        "role": model.get("role", artifact.role),
        "stage": model.get("stage", artifact.stage),
        "title": units.plain(model.get("title", "")),
        "params": metrics["params"],
        "macs": metrics["macs"],
        "metric": metrics["metric"],
        "val_metric": metrics.get("val_metric"),
        "epochs": metrics.get("epochs"),
        "seconds": artifact.seconds,
        "bits": [{"weight": weight, "activation": activation} for weight, activation in pairs],
        "folder": artifact.folder.name,
    }


def _training(model: dict[str, Any], files: Files) -> dict[str, Any] | None:
    """The epochs of one checkpoint; None where it was not trained here."""
    artifact = files.artifact(model.get("folder"))
    epochs = files.records(artifact, "metrics.jsonl")
    if artifact is None or not epochs:
        return None
    role, stage = str(model.get("role", artifact.role)), str(model.get("stage", artifact.stage))
    metric = artifact.metrics.get("metric") or {"name": "metric"}
    return {
        "role": role,
        "stage": stage,
        "title": units.stage_title(role, stage),
        "metric": metric["name"],
        "epochs": epochs,
        "folder": artifact.folder.name,
    }


def _layers(models: list[dict[str, Any]], files: Files) -> list[dict[str, Any]]:
    """The layers of the finished student; channels_before are those of its first checkpoint."""
    found = [files.artifact(model.get("folder")) for model in models if model.get("role") == "student"]
    students = [artifact for artifact in found if artifact is not None and artifact.metrics.get("layers")]
    before: dict[str, int] = {}
    for artifact in students:
        for row in artifact.metrics["layers"]:
            before.setdefault(row["path"], row.get("channels_before", row["channels"]))
    return [row | {"channels_before": before[row["path"]]} for row in students[-1].metrics["layers"]] if students else []


def _ladders(models: list[dict[str, Any]], files: Files) -> list[dict[str, Any]]:
    """The precision ladders that were climbed: how far each step was below the float model, and which one is the result."""
    found = []
    for model in models:
        artifact = files.artifact(model.get("folder"))
        ladder = artifact.metrics.get("ladder") if artifact is not None else None
        if artifact is not None and ladder:
            found.append({**ladder, "stage": artifact.stage, "folder": artifact.folder.name})
    return found


def _parity(run: dict[str, Any], files: Files) -> list[dict[str, Any]]:
    """What every hop found: torch to ONNX per file, and ONNX to engine per cell, with a reason where one was not run."""
    folders = dict.fromkeys(
        [step.get("folder") for step in run["steps"] if step.get("kind") == "onnx"] + [cell.get("onnx") for cell in run["cells"]]
    )
    found = []
    for folder in folders:
        artifact = files.artifact(folder)
        result = files.json(artifact, "parity.json")
        if artifact is not None and isinstance(result, dict):
            about = {"hop": "torch to ONNX", "folder": artifact.folder.name, "role": artifact.role}
            found.append(about | {"encoding": artifact.config.get("encoding")} | _hop(result))
    for cell in run["cells"]:
        about = {
            "hop": f"ONNX to {cell.get('backend_name', '')}",
            "folder": cell.get("engine") or "",
            "role": cell.get("role", ""),
        }
        found.append(about | {"encoding": cell.get("precision")} | _hop(cell.get("parity") or {}, cell.get("reason")))
    return found


def _hop(result: dict[str, Any], reason: Any = None) -> dict[str, Any]:
    why = "" if result.get("outputs") else units.plain(result.get("reason") or reason or "not recorded")
    return {
        "split": result.get("split"),
        "outputs": result.get("outputs") or [],
        "allowed": result.get("allowed") or {},
        "metric": result.get("metric"),
        "kept_float32": result.get("kept_float32") or [],
        "tensors": result.get("tensors") or {},
        "reason": why,
    }


def _skipped(run: dict[str, Any], engines: list[dict[str, Any]], files: Files) -> list[dict[str, str]]:
    """Everything that is not in the report although it was asked for, each with its reason."""
    rows = [
        {"what": f"stage {step.get('stage') or 'unknown'}", "status": "failed", "why": units.plain(step.get("reason", ""))}
        for step in run["steps"]
        if step.get("status") == "failed"
    ]
    rows += [
        {"what": engine["title"], "status": engine["status"], "why": engine["reason"]}
        for engine in engines
        if engine["status"] != "measured"
    ]
    rows += [{"what": folder, "status": "lost", "why": units.plain(why)} for folder, why in files.damage.items()]
    sensors = [("energy", engine["energy_reason"]) for engine in engines]
    for name in ("clock", "temperature"):
        sensors += [(name, (engine["sensors"] or {}).get(f"{name}_reason")) for engine in engines]
    rows += [{"what": name, "status": "not read", "why": units.plain(why)} for name, why in dict.fromkeys(sensors) if why]
    return rows


def _warnings(run: dict[str, Any], engines: list[dict[str, Any]], comparisons: list[dict[str, Any]], files: Files) -> list[str]:
    """What a reader has to know before using a number; an engine's lesser warnings stay with the engine."""
    found = []
    if run.get("smoke"):
        found.append("a smoke run: every training took a few steps, so accuracies mean nothing")
    found += [str(warning) for warning in run["warnings"]]
    if files.damage:
        found.append(f"{len(files.damage)} folders of this run are gone or damaged; what they held is missing below")
    found += [
        f"the measurement of {engine['title']} is invalid: {'; '.join(engine['warnings']) or 'no reason was recorded'}"
        for engine in engines
        if engine["valid"] is False
    ]
    for comparison in comparisons:
        if comparison["valid"] is False:
            reason = "; ".join(comparison["warnings"]) or "no reason was recorded"
            found.append(f"the comparison on {comparison['backend']} is invalid: {reason}")
        for ratio in comparison["ratios"]:
            engine, reference = engines[ratio["engine"]], engines[ratio["reference"]]
            twins = engine["role"] == reference["role"] and reference["precision"] == "float32" and engine["backend"] != "null"
            if twins and ratio["verdict"] != "faster":
                found.append(
                    f"{engine['title']} is not faster than its float32 twin: "
                    f"{units.ratio(ratio['speedup'])} {units.interval(ratio['interval'])}, {ratio['verdict']}"
                )
    return [units.plain(warning) for warning in dict.fromkeys(found)]


def _reproduce(run: dict[str, Any], root: Path, files: Files) -> dict[str, Any]:
    """The command, the seed, and the versions that shaped the result."""
    versions: dict[str, Any] = {}
    for step in run["steps"]:
        artifact = files.artifact(step.get("folder"))
        if artifact is not None and artifact.kind in ("checkpoint", "onnx"):
            libraries = artifact.environment.get("libraries", artifact.environment)
            versions |= {key: value for key, value in libraries.items() if key != "edgekd" and isinstance(value, str)}
    for name, backend in (run["environment"].get("backends") or {}).items():
        if backend.get("version"):
            versions.setdefault(name, backend["version"])
    return {
        "command": run.get("command"),
        "report": f"edgekd report {root}",
        "seed": run.get("seed"),
        "edgekd": run.get("edgekd"),
        "versions": versions,
        "steps": [
            {key: step.get(key) for key in ("folder", "kind", "stage", "role", "status", "seconds")}
            for step in run["steps"]
            if step.get("folder")
        ],
    }
