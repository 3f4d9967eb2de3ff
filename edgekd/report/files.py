"""Reading a run directory that may be unfinished or damaged: what cannot be used is left out, and the reason kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgekd.artifacts import Artifact, file_sha256, read_artifact
from edgekd.errors import ArtifactError

RUN = "run.json"
SCHEMA = 1
_HINT = "give a directory that edgekd compress wrote, for instance runs/quickstart"


class Files:
    """The files of one run.

    Args:
        root: The run directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.damage: dict[str, str] = {}
        """Artifact folder -> why it, or a file of it, could not be used."""
        self._artifacts: dict[str, Artifact | None] = {}

    def artifact(self, folder: Any) -> Artifact | None:
        """The artifact in a folder that run.json names; None where it names none, or the folder is gone or damaged."""
        if not isinstance(folder, str) or not folder:
            return None
        if folder not in self._artifacts:
            self._artifacts[folder] = self._read(folder)
        return self._artifacts[folder]

    def json(self, artifact: Artifact | None, name: str) -> Any:
        """One of an artifact's JSON files, checked against its recorded hash; None where it cannot be used."""
        text = self._text(artifact, name)
        return self._parse(artifact, name, text) if text is not None else None

    def records(self, artifact: Artifact | None, name: str) -> list[dict[str, Any]]:
        """The records of a JSON-lines file; none where it cannot be used or the artifact has no such file."""
        if artifact is None or name not in artifact.files:
            return []
        rows = [self._parse(artifact, name, line) for line in (self._text(artifact, name) or "").splitlines() if line.strip()]
        return [row for row in rows if isinstance(row, dict)]

    def why(self, folder: Any) -> str:
        """Why a folder's content could not be used."""
        return self.damage.get(str(folder), "no artifact was recorded")

    def _read(self, folder: str) -> Artifact | None:
        try:
            if Path(folder).name != folder:
                raise ArtifactError("its name in run.json leads out of the run directory")
            if not (self.root / folder).is_dir():
                raise ArtifactError("the folder is gone")
            artifact = read_artifact(self.root / folder)
            json.dumps([artifact.config, artifact.metrics], allow_nan=False)  # JSON has no NaN, so report.json cannot hold it
            return artifact
        except (ArtifactError, ValueError) as error:
            self.damage[folder] = str(error)
            return None

    def _text(self, artifact: Artifact | None, name: str) -> str | None:
        if artifact is None:
            return None
        try:
            path = artifact.file(name)
            if file_sha256(path) != artifact.files[name]["sha256"]:
                raise ArtifactError("it has changed since it was written (sha256 differs)")
            return path.read_text(encoding="utf-8")
        except (ArtifactError, OSError, UnicodeDecodeError, KeyError, TypeError) as error:
            self.damage[artifact.folder.name] = f"its file {name} cannot be used: {error}"
            return None

    def _parse(self, artifact: Artifact | None, name: str, text: str) -> Any:
        assert artifact is not None
        try:
            return json.loads(text, parse_constant=_refuse)
        except ValueError as error:
            self.damage[artifact.folder.name] = f"its file {name} cannot be used: {error}"
            return None


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def read_run(root: Path) -> dict[str, Any]:
    """run.json, with every section there and of the right shape.

    Raises:
        ArtifactError: There is no run.json, or it is not what edgekd writes.
    """
    path = root / RUN
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError as error:
        raise ArtifactError(f"{root} is no run directory: it has no {RUN}", hint=_HINT) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", hint=_HINT) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ArtifactError(f"{path} has schema {found!r}; this edgekd reads schema {SCHEMA}", hint=_HINT)
    for key, kind in {"steps": list, "models": list, "cells": list, "comparisons": list, "warnings": list}.items():
        if not isinstance(data.setdefault(key, kind()), kind):
            raise ArtifactError(f"{path}: {key} must be a list; received {type(data[key]).__name__}", hint=_HINT)
    for key in ("steps", "models", "cells", "comparisons"):
        if wrong := [entry for entry in data[key] if not isinstance(entry, dict)]:
            raise ArtifactError(f"{path}: {key} must hold objects; received {wrong[0]!r}", hint=_HINT)
    for key in ("environment", "data"):
        if not isinstance(data.setdefault(key, {}), dict):
            raise ArtifactError(f"{path}: {key} must be an object; received {type(data[key]).__name__}", hint=_HINT)
    return data
