"""Images are decoded once: into memory, or into a memory-mapped file that later runs reuse.

A cache entry is one folder, named by the hash of what was decoded, with images.npy and entry.json. It is written under another
name and renamed, so it is whole or absent; its contents are checked against their hash at every load, in the same pass that gives
the data set's fingerprint. Entries may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgekd.artifacts import content_id, write_json
from edgekd.data.base import Images, image_digests
from edgekd.errors import DataError

logger = logging.getLogger(__name__)

CHUNK = 64
"""Images per task of the thread pool: small ones cost less than handing a task over."""

Decode = Callable[[int], Images]


def cache_folder() -> Path:
    """$EDGEKD_CACHE, or ~/.cache/edgekd."""
    return Path(os.environ.get("EDGEKD_CACHE") or "~/.cache/edgekd").expanduser()


def decode_all(
    where: Literal["disk", "memory"],
    shape: tuple[int, int, int, int],
    decode: Decode,
    describe: Callable[[], Mapping[str, Any]],
    notice: Callable[[str], None],
) -> tuple[Images, Images]:
    """Every image of a split, decoded where the recipe says, and the sha256 of each.

    Args:
        where: ``disk`` for :func:`on_disk`, ``memory`` for :func:`in_memory`.
        shape: [N, H, W, C].
        decode: Index -> uint8 [H, W, C]; called from several threads.
        describe: Gives everything but the shape that decides what the images are; asked for the disk alone.
        notice: Told in one sentence of a damaged entry.

    Raises:
        DataError: As :func:`on_disk`.
    """
    if where == "memory":
        return in_memory(shape, decode)
    import PIL

    # another version of Pillow may decode or resize to other pixels
    return on_disk(shape, decode, {**describe(), "shape": shape, "pillow": PIL.__version__}, notice)


def stamps(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Size in bytes and modification time in nanoseconds of each file."""
    return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]


def in_memory(shape: tuple[int, int, int, int], decode: Decode) -> tuple[Images, Images]:
    """Decode every image into memory.

    Args:
        shape: [N, H, W, C].
        decode: Index -> uint8 [H, W, C]; called from several threads.

    Returns:
        The images, and the sha256 of each.
    """
    images = np.empty(shape, dtype=np.uint8)
    _fill(images, decode)
    return images, image_digests(images)


def on_disk(
    shape: tuple[int, int, int, int], decode: Decode, description: Mapping[str, Any], notice: Callable[[str], None]
) -> tuple[Images, Images]:
    """The cached images, decoded first where there is no intact entry.

    Args:
        shape: [N, H, W, C].
        decode: Index -> uint8 [H, W, C]; called from several threads.
        description: Everything that decides what the images are.
        notice: Told in one sentence of a damaged entry.

    Returns:
        The images, memory-mapped and read-only, and the sha256 of each.

    Raises:
        DataError: The cache folder cannot be written, or its disk is too small.
    """
    root = cache_folder()
    entry = root / "images" / content_id(description)[:24]
    try:
        if entry.exists():
            if (found := _read(entry, shape)) is not None:
                return found
            notice(f"the cached images in {entry} were damaged and have been decoded again")
            shutil.rmtree(entry)
        entry.parent.mkdir(parents=True, exist_ok=True)
        _check_space(entry.parent, int(np.prod(shape)))
        return _write(entry, shape, decode)
    except OSError as error:
        raise DataError(
            f"the cache folder {root} cannot be used: {error}",
            hint="set EDGEKD_CACHE to a folder that can be written, or data.cache: memory",
        ) from error


def _write(entry: Path, shape: tuple[int, int, int, int], decode: Decode) -> tuple[Images, Images]:
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=entry.parent))
    try:
        images = np.lib.format.open_memmap(partial / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        _fill(images, decode)
        images.flush()
        digests = image_digests(images)
        with (partial / "images.npy").open("rb") as stream:
            os.fsync(stream.fileno())
        write_json(partial / "entry.json", {"sha256": hashlib.sha256(digests.data).hexdigest()})
        del images
        try:
            partial.rename(entry)
        except OSError:
            # another process was faster with the same images; anything else comes up again below
            if not entry.exists():
                raise
        return np.load(entry / "images.npy", mmap_mode="r"), digests
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(entry: Path, shape: tuple[int, int, int, int]) -> tuple[Images, Images] | None:
    """An entry's images and digests, or None where it is damaged."""
    try:
        expected = json.loads((entry / "entry.json").read_text())["sha256"]
        images = np.load(entry / "images.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    if images.shape != shape or images.dtype != np.uint8:
        return None
    digests = image_digests(images)
    return (images, digests) if hashlib.sha256(digests.data).hexdigest() == expected else None


def _check_space(folder: Path, size_bytes: int) -> None:
    # writing to a mapped file on a full disk kills the process, with no error to catch
    free = shutil.disk_usage(folder).free
    if free < size_bytes * 1.05:
        raise OSError(f"{size_bytes / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free")


def _fill(images: Images, decode: Decode) -> None:
    """Decode into ``images`` from several threads: Pillow works without Python's lock."""
    logger.info("decoding %d images", len(images))

    def fill(start: int) -> None:
        for index in range(start, min(start + CHUNK, len(images))):
            images[index] = decode(index)

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        tasks = [pool.submit(fill, start) for start in range(0, len(images), CHUNK)]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the first unreadable image ends it all
            raise
