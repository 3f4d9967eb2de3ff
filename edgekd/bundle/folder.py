"""The folder: its manifest, whether it is whole, and what it holds."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.artifacts import check_file_table, file_problems, file_table, write_json
from edgekd.bench.measure import make_feeds
from edgekd.engines import Io, Session, WrongMachineError, open_engine, read_io
from edgekd.engines.base import Array
from edgekd.engines.postprocess import Classified, Detected, Salient, Segmented, postprocess
from edgekd.errors import ArtifactError, MissingDependency

SCHEMA = 1
MANIFEST = "bundle.json"
ENGINE, MODEL, GOLDEN = "engine", "model", "golden.npz"
_AGAIN = "copy the bundle again, or make it again with edgekd bundle"


@dataclass(frozen=True)
class Golden:
    """What an engine that is right gives for some images."""

    images: NDArray[np.uint8]
    """uint8 [N, H, W, C]."""
    outputs: Mapping[str, Array]
    """Output name -> array with N rows."""


@dataclass(frozen=True)
class Bundle:
    """An intact bundle."""

    folder: Path
    manifest: Mapping[str, Any]
    io: Io

    def session(self) -> Session:
        """The engine, opened in this process; use it in a ``with`` block.

        Raises:
            WrongMachineError: This machine cannot run it; the message says why, the hint what to do.
            BuildError: The library refuses the engine's files.
        """
        try:
            return open_engine(self.folder / ENGINE)
        except (WrongMachineError, MissingDependency) as error:
            raise self.cannot_run(error.message, error.hint if isinstance(error, MissingDependency) else "") from error

    def preprocess(self, images_NHWC: NDArray[np.uint8]) -> dict[str, Array]:
        """The engine's input for images, uint8 [N, H, W, C] of the size in io.json.

        Raises:
            DataError: The images are something else.
        """
        return make_feeds(images_NHWC, self.io)

    def postprocess(self, outputs: Mapping[str, Array]) -> Classified | Detected | Segmented | Salient:
        """What the engine's outputs mean.

        Raises:
            DataError: The model does not say what they mean.
        """
        return postprocess(outputs, self.io.postprocessing)

    def golden(self) -> Golden:
        """The golden batch.

        Raises:
            ArtifactError: It cannot be read.
        """
        path = self.folder / GOLDEN
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return Golden(arrays["images"], {spec.name: arrays[f"output.{spec.name}"] for spec in self.io.outputs})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{path} cannot be read: {error}", hint=_AGAIN) from error

    def cannot_run(self, reason: str, first: str = "") -> WrongMachineError:
        """The error that says why this machine cannot run the engine, and what to do."""
        ways = [
            f"edgekd check-bundle {self.folder} --rebuild NEW_FOLDER builds the engine for this machine",
            f"edgekd bench {self.folder / MODEL / 'model.onnx'} --backend NAME tries another backend",
        ]
        return WrongMachineError(
            f"this machine cannot run the engine: {reason}", hint="; ".join([first, *ways] if first else ways)
        )


def open_bundle(folder: str | Path) -> Bundle:
    """Read a bundle and check every file against its recorded size and hash. The engine is not opened yet.

    Raises:
        ArtifactError: It is no bundle, another edgekd wrote it, or files are missing, changed or too many; the message names all.
        BuildError: io.json cannot be read.
    """
    folder = Path(folder)
    manifest = _read(folder)
    found = [f"{folder}: {problem}" for problem in file_problems(folder, manifest["files"])]
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST}
    found += [f"{folder}: {name} is no file of this bundle" for name in sorted(here - manifest["files"].keys())]
    if found:
        raise ArtifactError("\n".join(found), hint=_AGAIN)
    return Bundle(folder, manifest, read_io(folder / ENGINE / "io.json"))


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write bundle.json, with a hash of every file that is there."""
    write_json(folder / MANIFEST, {"schema": SCHEMA, **content, "files": file_table(folder)})


def write_golden(path: Path, golden: Golden) -> None:
    """Write golden.npz."""
    arrays = {"images": golden.images, **{f"output.{name}": array for name, array in golden.outputs.items()}}
    with path.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def hide_paths(log: Path) -> None:
    """Cut the folders off the paths in a build log: libraries name the model by where it lay on the machine that built."""
    log.write_bytes(re.sub(rb"/[^\n]*/(?=model\.onnx)", b"", log.read_bytes()))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ArtifactError(f"{path} has schema {data['schema']!r}; this edgekd reads schema {SCHEMA}", hint=_AGAIN)
        check_file_table(data["files"])
        for name in (f"{ENGINE}/engine.json", f"{ENGINE}/io.json", f"{MODEL}/model.onnx", f"{MODEL}/io.json", GOLDEN):
            if name not in data["files"]:
                raise ValueError(f"files: there is no {name}")
        golden = data["golden"]
        if not isinstance(golden["batch"], int) or not isinstance(golden["max_error"], int | float):
            raise ValueError("golden: batch and max_error are not numbers")
        return {**data, "backend": str(data["backend"]), "precision": str(data["precision"])}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{folder} is no bundle: it has no {MANIFEST}", hint="make one with edgekd bundle RUN") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error!r}", hint=_AGAIN) from error
