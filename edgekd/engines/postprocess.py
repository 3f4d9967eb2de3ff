"""From an engine's outputs to what a user acts on, as io.json describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.engines.base import Array
from edgekd.errors import DataError


@dataclass(frozen=True, eq=False)
class Classified:
    """One class per image."""

    indices: NDArray[np.int64]
    """int64 [N]."""
    names: tuple[str, ...]
    """The class of each image, N names."""
    scores: NDArray[np.float32]
    """float32 [N, K], each row adds up to 1: the softmax of the logits."""


def postprocess(outputs: Mapping[str, Array], postprocessing: Mapping[str, Any] | None) -> Classified:
    """What an engine's outputs mean.

    Args:
        outputs: Output name to array, one row per image.
        postprocessing: ``kind`` and its parameters. ``classification``: ``output`` (whose rows are logits) and ``classes`` (their
            names in the order of the logits).

    Raises:
        DataError: io.json does not say what the outputs mean, the kind is not known here, or the output is not what it says.
    """
    if postprocessing is None:
        raise DataError("io.json does not say what the outputs mean", hint="export the model again with this edgekd")
    if postprocessing.get("kind") != "classification":
        raise DataError(f"postprocessing kind {postprocessing.get('kind')!r}; this edgekd knows classification")
    name, classes = postprocessing["output"], postprocessing["classes"]
    if name not in outputs:
        raise DataError(f"expected an output {name!r}; the engine gave {', '.join(outputs) or 'none'}")
    logits = np.asarray(outputs[name], np.float32)
    if logits.ndim != 2 or logits.shape[1] != len(classes):
        raise DataError(f"the output {name!r} has shape {list(logits.shape)}; expected [N, {len(classes)} classes]")
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    indices = logits.argmax(axis=1)
    return Classified(indices, tuple(classes[index] for index in indices), exponents / exponents.sum(axis=1, keepdims=True))
