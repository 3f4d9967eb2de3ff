"""Which ONNX opset each engine version reads, so that one file serves all engines of a recipe.

Sources: docs/reference/compatibility of onnxruntime.ai; the support matrices of TensorRT 10.0, 10.15 and 11; where a library
documents no limit (OpenVINO, TensorRT-RTX), the newest opset in which files were built when tried. A version between two rows
counts as the earlier one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

PREFERRED = 20
"""Has every operator that the exporter writes; later ones add none that engines run faster."""
Rows = tuple[tuple[tuple[int, int], int], ...]
READS: dict[str, Rows] = {
    "onnxruntime": (((1, 14), 18), ((1, 15), 19), ((1, 17), 20), ((1, 18), 21), ((1, 32), 28)),
    "openvino": (((2025, 3), 22),),
    "tensorrt": (((8, 6), 17), ((9, 0), 19), ((10, 0), 20), ((10, 15), 24), ((11, 0), 25)),
    "tensorrt_rtx": (((1, 2), 22), ((1, 7), 27)),
}
"""Library -> (first version, newest opset), the versions rising."""


def newest(library: str, version: str) -> int | None:
    """The newest opset that a library is known to read; None where nothing is known of this version.

    Args:
        library: A backend's name.
        version: As the library states it, such as 10.3.0 or 2026.4.1-22982.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return None
    own = (int(found[1]), int(found[2]))
    known = [opset for first, opset in READS.get(library, ()) if first <= own]
    return known[-1] if known else None


def choose(versions: Mapping[str, str]) -> int:
    """The opset that files are written in, for engines of these libraries: library -> version."""
    limits = [limit for library, version in versions.items() if (limit := newest(library, version)) is not None]
    return min([PREFERRED, *limits])


def beyond(opset: int, versions: Mapping[str, str]) -> list[str]:
    """A line for each library that is not known to read an opset."""
    return [
        f"opset {opset}: {library} {version} is known to read up to {limit}"
        for library, version in versions.items()
        if (limit := newest(library, version)) is not None and limit < opset
    ]
