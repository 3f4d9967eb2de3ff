"""What every backend has in common: tensors, sessions, the io.json beside a model, and clear refusals.

A *backend* is a way to build and run; an *engine* is the folder it builds; a *session* is an engine opened in this process.
Standard library and NumPy only: this runs on the device.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import BuildError, nearest

Array = NDArray[Any]
DYNAMIC = -1
REPORTED = "reported.json"
"""What ``report`` writes."""


class WrongMachineError(BuildError):
    """The engine is fine, or could be, but this machine cannot do what was asked: the answer is "skipped", not "failed"."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an engine."""

    name: str
    dtype: str
    """NumPy's name, for instance float32."""
    shape: tuple[int, ...]
    """Sizes; -1 where the size is free."""

    def accepts(self, array: Array) -> bool:
        """Whether an array has this dtype and fits this shape."""
        return (
            array.dtype.name == self.dtype
            and array.ndim == len(self.shape)
            and all(want in (DYNAMIC, got) for want, got in zip(self.shape, array.shape, strict=True))
        )


@dataclass(frozen=True)
class Io:
    """io.json: what goes into a model, what comes out, how an image becomes an input, and what the outputs mean."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Mapping[str, Any]
    postprocessing: Mapping[str, Any] | None = None
    """None for a foreign model, which does not say."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend's library can be imported here; ``reason`` and ``hint`` say why not and what to install."""

    ok: bool
    version: str = ""
    reason: str = ""
    hint: str = ""
    debug: bool = False
    """The library says that it is a debug build: its times mean nothing."""


class Options(Protocol):
    """A backend's options: a frozen dataclass whose every value is recorded in the engine."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """What graphs it runs with these options: float32, float16, int8."""

    @property
    def encoding(self) -> str:
        """How an int8 graph must be written for it to run on integers: u8 or s8; see ``engines.encoding_for``."""

    @property
    def name(self) -> str:
        """The backend's name."""

    def unsupported(self, precision: str) -> str | None:
        """Why a graph of this precision cannot be built with these options, or None where it can."""


class Session(Protocol):
    """An opened engine; use it in a ``with`` block."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device_ns: int | None
    """Time of the last inference on the device alone, nanoseconds, where the library tells."""

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once: input name to array, output name to array (the caller's to keep).

        Raises:
            BuildError: A name, dtype or shape is not the engine's, or the library failed.
        """

    def __enter__(self) -> Session: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


@dataclass(frozen=True)
class Executed:
    """One operation of a built engine, as the library itself reports it."""

    nodes: tuple[str, ...]
    """Names of the model's nodes that went into it, or of the tensors that they made."""
    kind: str
    """The library's name for it, for instance QLinearConv."""
    precision: str
    """What it computes in: int8, float32, bfloat16, ..."""
    time_us: float | None = None
    """Its share of one inference, microseconds, where the library tells."""
    elsewhere: str = ""
    """Where it runs, if that is not where it was asked to: for instance CPU, when a GPU was asked."""


class Backend(Protocol):
    """A way to build and run engines; it holds no state."""

    name: str

    def available(self, options: Any = None, /) -> Availability:
        """Whether the library is here, with what these options need of it; never raises."""

    def fingerprint(self, options: Any, /) -> dict[str, Any]:
        """What the engine's bytes depend on besides the model: library version, CPU flags or GPU capabilities."""

    def build(self, model: Path, options: Any, out: Path, /) -> list[str]:
        """Write the engine's files into ``out`` and return their names; see also :func:`report`.

        Raises:
            BuildError: The library refuses the model; the message names the node where the library does.
            WrongMachineError: This machine cannot do what was asked.
        """

    def executed(self, folder: Path, options: Any, /) -> list[Executed]:
        """What the built engine really runs, for the precision audit.

        Raises:
            BuildError: The engine cannot be read.
            WrongMachineError: This machine cannot inspect it; the message says why.
        """

    def open(self, folder: Path, options: Any, /) -> Session:
        """Open what ``build`` wrote.

        Raises:
            BuildError: A file is missing or damaged.
            WrongMachineError: This machine cannot run it.
        """


def zeros(specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """Feeds of zeros, one for a free size: enough for a library to show what it runs."""
    return {spec.name: np.zeros([max(1, size) for size in spec.shape], spec.dtype) for spec in specs}


def check_feeds(inputs: tuple[TensorSpec, ...], feeds: Mapping[str, Array]) -> None:
    """Refuse feeds that are not what the engine takes; some libraries would convert them silently.

    Raises:
        BuildError: Names expected and received.
    """
    if len(feeds) == len(inputs) and all(spec.name in feeds and spec.accepts(feeds[spec.name]) for spec in inputs):
        return
    expected = ", ".join(f"{spec.name}: {spec.dtype} {list(spec.shape)}" for spec in inputs)
    received = ", ".join(f"{name}: {array.dtype.name} {list(array.shape)}" for name, array in feeds.items()) or "nothing"
    raise BuildError(
        f"the engine's inputs are {expected} (-1: any size); received {received}",
        hint="give every input under its name, with this dtype and shape",
    )


def precision_refusal(name: str, precisions: tuple[str, ...], precision: str) -> str | None:
    """Why a backend lacks a precision, or None where it has it."""
    if precision in precisions:
        return None
    return f"{name} here runs {', '.join(precisions)}; not {precision!r}{nearest(precision, list(precisions))}"


def report(out: Path, settings: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    """Hand over what a library says of its own settings while it builds: ``build_engine`` puts it into engine.json.

    Args:
        out: Where the engine is built.
        settings: The library's name of each setting, and its value.
        notes: What it made otherwise than asked, one sentence each.
    """
    (out / REPORTED).write_text(json.dumps({"reported": dict(settings), "notes": list(notes)}))


def check_int(field: str, value: object, low: int, high: int) -> None:
    """Raise ValueError unless ``value`` is an integer in [low, high]; JSON's true is no integer."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{field} must be an integer from {low} to {high}; received {value!r}")


def check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(allowed)}; received {value!r}{nearest(str(value), list(allowed))}")


def read_io(path: Path) -> Io:
    """Read an io.json.

    Raises:
        BuildError: It is missing, not JSON, or lacks a field.
    """
    try:
        data = json.loads(path.read_text())
        inputs, outputs = (
            tuple(TensorSpec(item["name"], item["dtype"], tuple(int(size) for size in item["shape"])) for item in data[key])
            for key in ("inputs", "outputs")
        )
        for spec in (*inputs, *outputs):
            np.dtype(spec.dtype)
        if not inputs or not outputs:
            raise ValueError("no inputs or no outputs")
        return Io(inputs, outputs, data["preprocessing"], data.get("postprocessing"))
    except FileNotFoundError as error:
        raise BuildError(f"{path} does not exist; it must lie beside the model", hint="export the model with edgekd") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{path} cannot be read as an io.json: {error!r}", hint="export the model again") from error


@contextlib.contextmanager
def native_log(path: Path) -> Iterator[None]:
    """Append what libraries write to the process's standard error to a file: C++ loggers do not go through ``sys.stderr``."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with path.open("ab") as stream:
            os.dup2(stream.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
