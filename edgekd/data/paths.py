"""Where a recipe's relative paths are looked up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from edgekd.errors import DataError


def find(path: str | Path, search: Sequence[Path]) -> Path:
    """The file or folder that a path of a recipe means, with symbolic links resolved.

    Args:
        path: Absolute, beginning with ``~``, or relative to one of ``search``.
        search: Folders in which a relative path is looked up; the first hit wins.

    Raises:
        DataError: Nothing is there, or a relative path climbs out of the searched folders with ``..``.
    """
    try:
        wanted = Path(path).expanduser()
    except RuntimeError as error:  # ~name, and there is no such user
        raise DataError(f"{path} does not exist: {error}", hint="correct the path in the recipe") from error
    if wanted.is_absolute():
        if _exists(wanted):
            return wanted.resolve()
        raise DataError(f"{wanted} does not exist", hint="correct the path in the recipe")
    if ".." in wanted.parts:
        raise DataError(f"the relative path '{path}' climbs out of its folder with '..'", hint="give an absolute path")
    for folder in search:
        if _exists(folder / wanted):
            return (folder / wanted).resolve()
    places = ", ".join(str(folder / wanted) for folder in search) or "nowhere, because no folder to search was given"
    root = os.environ.get("EDGEKD_DATA")
    state = f"EDGEKD_DATA is {root}" if root else "EDGEKD_DATA is not set"
    raise DataError(
        f"'{path}' does not exist; looked for: {places}",
        hint=f"set the environment variable EDGEKD_DATA to the folder that holds '{wanted}' ({state}), or give an absolute path",
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name too long, or a folder on the way that may not be searched
        raise DataError(f"{str(path)[:200]} cannot be read: {error.strerror}", hint="correct the path in the recipe") from error
