"""What a run leaves on disk: one folder per artifact, whole or absent, named by the hash of everything that went into it.

A run directory looks like this::

    runs/quickstart/
      run.json                     what was planned, done, reused, skipped (written by pipeline.py, read by report/)
      01-teacher-0a1b2c3d4e5f/     one artifact: artifact.json and its files
      02-distill-...
      work/<id>/                   unfinished work of one artifact (training state), deleted once the artifact is there
      report/                      report.json, report.md, report.html

The *id* is the sha256 of the inputs (what was asked, parents, data, versions); the *file hashes* in artifact.json say what came
out. Same id and intact files: the artifact is reused. Standard library only: the deployment half reads artifacts too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgekd.errors import ArtifactError

SCHEMA = 1
MANIFEST = "artifact.json"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact.

    ``stage`` is the word in the folder's name (teacher, distill, prune, export, engine, bench, ...); ``role`` says whose model it
    belongs to: teacher, student_alone or student.
    """

    kind: str
    id: str
    stage: str
    role: str
    folder: Path
    parents: tuple[str, ...]
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    environment: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    """Name in the folder -> {"sha256", "size_bytes"}."""
    created: str
    seconds: float

    def file(self, name: str) -> Path:
        """The path of one of the artifact's files.

        Raises:
            ArtifactError: The artifact has no such file.
        """
        if name not in self.files:
            raise ArtifactError(f"{self.folder} has no file {name!r}; it has {', '.join(self.files)}")
        return self.folder / name

    def json(self, name: str) -> Any:
        """One of the artifact's JSON files, parsed."""
        return json.loads(self.file(name).read_text())


class Checkpoint(Artifact):
    """model.safetensors and model.json (architecture, arguments, channel plan, bit plan); metrics.jsonl where it was trained."""


class OnnxModel(Artifact):
    """model.onnx, io.json, layers.json and parity.json."""


class Engine(Artifact):
    """The engine's files, io.json, engine.json (options, fingerprint of what built it, audit) and build.log."""


class BenchRecord(Artifact):
    """record.json: every raw sample in nanoseconds and the state of the machine."""


KINDS: dict[str, type[Artifact]] = {"checkpoint": Checkpoint, "onnx": OnnxModel, "engine": Engine, "bench": BenchRecord}


def content_id(inputs: Mapping[str, Any]) -> str:
    """The sha256 of a JSON-able description, independent of the order of its keys."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10, which JetPack 6 has, lacks hashlib.file_digest
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as stream:
        json.dump(data, stream, indent=1, sort_keys=False, default=str)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


class Draft:
    """An artifact being written: put files into ``folder``, set ``metrics``, leave the ``with`` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: dict[str, Any] = {}
        self.seconds: float | None = None
        """How long the work took, where it began before the draft."""


class Store:
    """The artifacts of one run directory.

    Args:
        root: The run directory; created where it is missing.
        notice: Called with one line where a damaged artifact was found and removed.

    Raises:
        ArtifactError: The run directory cannot be made.
    """

    def __init__(self, root: Path, notice: Any = print) -> None:
        self.root = root
        self.notice = notice
        self._drafts: set[Path] = set()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"the run directory {root} cannot be made: {error.strerror}", hint="give another directory with --out"
            ) from error

    def work(self, id: str) -> Path:
        """The folder for unfinished, resumable work towards the artifact ``id``."""
        folder = self._work(id)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _work(self, id: str) -> Path:
        return self.root / "work" / id[:12]

    def find(self, id: str) -> Artifact | None:
        """The artifact with this id, or None where there is none or it is damaged; a damaged one is named and removed."""
        for folder in sorted(self.root.glob(f"[0-9]*-{id[:12]}")):
            try:
                artifact = read_artifact(folder)
                if artifact.id != id:
                    continue
                check_files(artifact)
            except ArtifactError as error:
                self.notice(f"damaged artifact {folder.name}: {error.message}; it is computed again")
                _remove(folder)
                continue
            # a run that was killed between naming the artifact and clearing up left this behind
            shutil.rmtree(self._work(id), ignore_errors=True)
            return artifact
        return None

    def peek(self, id: str) -> Artifact | None:
        """The artifact with this id, its files unchecked: for one that was just written, or that another process has checked."""
        folder = next(iter(sorted(self.root.glob(f"[0-9]*-{id[:12]}"))), None)
        return read_artifact(folder) if folder is not None else None

    @contextlib.contextmanager
    def draft(
        self,
        *,
        id: str,
        order: int,
        kind: str,
        stage: str,
        role: str,
        parents: tuple[str, ...],
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
    ) -> Iterator[Draft]:
        """Write an artifact: the block fills a temporary folder, which gets its real name once it is complete and on disk.

        A block that raises leaves nothing behind but its work folder. Only one process at a time may write drafts into a run
        directory: whatever drafts it finds there are those of killed runs, and are removed.

        Raises:
            ArtifactError: The disk is full.
        """
        name = f"{order:02}-{stage}-{id[:12]}"
        partial = self.root / f".partial-{name}"
        for left in set(self.root.glob(".partial-*")) - self._drafts:
            _remove(left)
        draft, start = Draft(partial), time.monotonic()
        self._drafts.add(partial)
        try:
            partial.mkdir()
            yield draft
            manifest = {
                "schema": SCHEMA,
                "kind": kind,
                "id": id,
                "stage": stage,
                "role": role,
                "parents": list(parents),
                "config": config,
                "metrics": draft.metrics,
                "environment": environment,
                "files": file_table(partial),
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "seconds": round(time.monotonic() - start if draft.seconds is None else draft.seconds, 3),
            }
            write_json(partial / MANIFEST, manifest)
            _sync(partial)
            final = self.root / name
            _remove(final)
            partial.rename(final)
            _sync_folder(self.root)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ArtifactError(
                    f"the disk of {self.root} is full: {name} cannot be written",
                    hint="free some space, and give the same command again: finished work is reused",
                ) from error
            raise
        finally:
            self._drafts.discard(partial)
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(self._work(id), ignore_errors=True)


def read_artifact(folder: Path) -> Artifact:
    """Read a folder's manifest.

    Raises:
        ArtifactError: There is no manifest, it is not JSON, a field is missing or of another type, or another edgekd wrote it.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {data['schema']!r}; this edgekd reads schema {SCHEMA}",
                hint="use the edgekd that wrote it, or another run directory",
            )
        _check_manifest(data)
        return KINDS[data["kind"]](
            kind=data["kind"],
            id=data["id"],
            stage=data["stage"],
            role=data["role"],
            folder=folder,
            parents=tuple(data["parents"]),
            config=data["config"],
            metrics=data["metrics"],
            environment=data["environment"],
            files=data["files"],
            created=data["created"],
            seconds=data["seconds"],
        )
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist", hint="give the folder of a finished artifact") from error
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error!r}") from error


def _check_manifest(data: Mapping[str, Any]) -> None:
    """Refuse a manifest that would fail only where it is used.

    Raises:
        KeyError: A field is missing.
        ValueError: A field has another type, the kind is unknown, or a file lies outside the folder.
    """
    if data["kind"] not in KINDS:
        raise ValueError(f"kind {data['kind']!r}; allowed: {', '.join(KINDS)}")
    types = {
        **dict.fromkeys(("id", "stage", "role", "created"), str),
        **dict.fromkeys(("config", "metrics", "environment"), dict),
        "parents": list,
    }
    for name, expected in types.items():
        if not isinstance(data[name], expected):
            raise ValueError(f"{name} is {type(data[name]).__name__} instead of {expected.__name__}")
    check_file_table(data["files"])


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """What a manifest holds of every file in a folder: name -> sha256, size_bytes."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_file_table(files: Any) -> None:
    """Refuse a table that :func:`file_table` did not make.

    Raises:
        KeyError: A size or a hash is missing.
        ValueError: It is no table, a size or a hash has another type, or a file lies outside the folder.
    """
    if not isinstance(files, dict):
        raise ValueError(f"files is {type(files).__name__} instead of dict")
    for name, entry in files.items():
        if not isinstance(entry["size_bytes"], int) or not isinstance(entry["sha256"], str):
            raise ValueError(f"files: size_bytes and sha256 of {name!r} are not a number and a text")
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"files: {name!r} lies outside the folder")


def check_files(artifact: Artifact) -> None:
    """Compare every file with its recorded size and hash.

    Raises:
        ArtifactError: A file is missing, truncated or changed; the message names it.
    """
    for problem in file_problems(artifact.folder, artifact.files):
        raise ArtifactError(problem)


def file_problems(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is wrong with the files of a table, one line each: missing, truncated or changed."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            yield f"its file {name} is missing"
        elif (size := path.stat().st_size) != expected["size_bytes"]:
            yield f"its file {name} has {size} bytes instead of {expected['size_bytes']}"
        elif file_sha256(path) != expected["sha256"]:
            yield f"its file {name} has changed (sha256 differs)"


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Write a folder that is whole or absent: the block fills a temporary one beside it, which is synced and renamed.

    Args:
        final: Where the folder goes; its parents are made.

    Raises:
        ArtifactError: There is something already, or the disk refuses.
    """
    if final.exists() or final.is_symlink():
        raise ArtifactError(f"{final} exists already", hint="give another folder, or remove this one")
    partial = final.with_name(f".partial-{final.name}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # of one that was killed
        partial.mkdir()
        yield partial
        _sync(partial)
        partial.rename(final)
        _sync_folder(final.parent)
    except OSError as error:
        raise ArtifactError(f"{final} cannot be written: {error}", hint="give another folder, or free some space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove whatever is there; a link itself, and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
        elif path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
