"""An engine that answers zeros of the declared shapes: always there, needs nothing, and shows what measuring itself costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

import numpy as np

from edgekd.engines.base import (
    DYNAMIC,
    Array,
    Availability,
    Executed,
    Io,
    WrongMachineError,
    check_feeds,
    precision_refusal,
    read_io,
)
from edgekd.errors import BuildError


@dataclass(frozen=True)
class NullOptions:
    """Options of the null backend: none."""

    precisions: ClassVar[tuple[str, ...]] = ("float32", "int8")
    encoding: ClassVar[str] = "u8"

    name: Literal["null"] = "null"

    def unsupported(self, precision: str) -> str | None:
        """Why a graph of this precision cannot be built, or None."""
        return precision_refusal("null", self.precisions, precision)


class NullSession:
    """Zeros of the shapes in io.json."""

    device_ns: int | None = None

    def __init__(self, io: Io) -> None:
        self.inputs, self.outputs = io.inputs, io.outputs

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Zeros; a free leading size is the batch of the first input, any other free size is 1."""
        check_feeds(self.inputs, feeds)
        batch = feeds[self.inputs[0].name].shape[0]
        return {
            spec.name: np.zeros(
                [(batch if axis == 0 else 1) if size == DYNAMIC else size for axis, size in enumerate(spec.shape)], spec.dtype
            )
            for spec in self.outputs
        }

    def __enter__(self) -> NullSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class Null:
    """The null backend."""

    name = "null"

    def available(self, _options: Any = None) -> Availability:
        """Always."""
        return Availability(True, version="1")

    def fingerprint(self, _options: NullOptions) -> dict[str, Any]:
        """Nothing of the machine matters."""
        return {"library": "null", "version": "1"}

    def build(self, model: Path, _options: NullOptions, _out: Path) -> list[str]:
        """Check that the model is there; there is nothing to write besides io.json."""
        if not model.is_file():
            raise BuildError(f"{model} does not exist", hint="export the model first")
        return []

    def executed(self, _folder: Path, _options: NullOptions) -> list[Executed]:
        """Say that nothing is."""
        raise WrongMachineError("not inspected: the null backend runs nothing")

    def open(self, folder: Path, _options: NullOptions) -> NullSession:
        """Read io.json."""
        return NullSession(read_io(folder / "io.json"))
