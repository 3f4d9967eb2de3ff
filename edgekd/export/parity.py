"""Whether the next form of a model computes what the last one did, on real images: torch, then the ONNX file, then the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgekd.errors import DataError, ParityError
from edgekd.export import bisect
from edgekd.tasks.base import Task

BATCH = 64
LOCAL_IMAGES = 8
"""On so many images a file that failed is compared module by module: all their activations are in memory at once."""
NOISE = 1e-4
"""Added to images to see how far a model's own outputs move: a share of their standard deviation, far below one of 256 codes, and
enough for some pixels to round the other way."""
SENSITIVE = 0.05
"""A model whose outputs such noise moves further, as a share of their norm, may differ from its file without fault of either."""
LOCAL_LIMIT = {"float32": 1e-3, "float16": 1e-2, "u8": 1e-3, "u7": 1e-3, "s8": 1e-3}
"""A module that is fed with torch's values is wrong where its error is larger. Integers get no more room than floats: with equal
inputs they round alike, but for values within float32's rounding of the middle between two codes."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Worst:
    """The element that differs most."""

    image: int
    position: list[int]
    """In the output of this image."""
    expected: float | None
    """None where it is not finite."""
    received: float | None


@dataclass(frozen=True)
class OutputParity:
    """How far one output is from the one before."""

    output: str
    images: int
    max_error: float
    """Largest absolute difference of a value that counts (Limits.outliers), as a share of the largest expected magnitude."""
    cosine: float
    """Cosine between all values of both, 1 where they agree."""
    changed: float
    """Share of decisions that differ, 0..1; 0 for outputs that nobody decides on."""
    worst: Worst | None = None


def compare(
    expected: Mapping[str, Array],
    received: Mapping[str, Array],
    task: Task,
    *,
    what: str = "the ONNX file",
    outliers: float = 0.0,
) -> list[OutputParity]:
    """Every output of two forms of a model on the same images.

    Args:
        expected: Output name -> array, of the earlier form.
        received: Of the later one.
        task: Says what the outputs are called and what is decided on the first.
        what: The later form, for messages.
        outliers: Limits.outliers.

    Raises:
        ParityError: The outputs are others, or have other shapes.
    """
    if list(received) != list(task.output_names) or len(expected) != len(received):
        raise ParityError(f"{what} gives the outputs {', '.join(received)}; expected {', '.join(task.output_names)}")
    return [
        _compare(name, expected[name], received[name], task if index == 0 else None, what, outliers)
        for index, name in enumerate(task.output_names)
    ]


def metrics(expected: Mapping[str, Array], received: Mapping[str, Array], labels: Array, task: Task) -> dict[str, Any]:
    """The task's metric before and after, on the compared images; None where the outputs are not finite."""

    def value(outputs: Mapping[str, Array]) -> float | None:
        try:
            return task.evaluate(outputs, labels)
        except DataError:
            return None

    return {"name": task.metric_name, "before": value(expected), "after": value(received)}


@dataclass(frozen=True)
class Limits:
    """What may differ."""

    max_error: float
    """Largest difference of a value, as a share of the largest expected magnitude."""
    max_changed: float
    """Largest share of decisions; one image always may."""
    outliers: float = 0.0
    """Share of the values of an output that is a map, [N, C, H, W], or boxes to choose from, [N, M, 5 + K], that may differ by
    more than max_error: of a hundred thousand pixels, one always lies on the edge of something that a single step moves."""


def check(
    found: Sequence[OutputParity],
    metric: Mapping[str, Any] | None,
    limits: Limits,
    *,
    what: str = "the ONNX file",
    than: str = "torch",
    where: Callable[[OutputParity], str] = lambda _: "",
) -> dict[str, Any]:
    """Hold the differences against their limits.

    Args:
        found: Of every output.
        metric: What :func:`metrics` gives.
        limits: What is allowed.
        what: The later form, for messages.
        than: The earlier one.
        where: Asked only on failure, for the output that failed: the end of a sentence that says in which layer it goes wrong.

    Returns:
        What parity.json holds of this hop: outputs, allowed, metric.

    Raises:
        ParityError: One is over its limit; the message has the numbers and the layer.
    """
    for parity in found:
        few = parity.changed * parity.images <= max(1.0, limits.max_changed * parity.images)  # one image proves nothing
        if not (parity.max_error <= limits.max_error and few):  # not finite fails too
            raise ParityError(
                f"{what} disagrees with {than}: {_measured(parity, metric)}; "
                f"allowed: {limits.max_error:.0e} and {limits.max_changed:.2%}{where(parity)}",
                hint="raise export.max_error or export.max_changed only if you know why they differ",
            )
    return evidence(found, metric, limits)


def evidence(found: Sequence[OutputParity], metric: Mapping[str, Any] | None, limits: Limits) -> dict[str, Any]:
    """One hop as JSON holds it: outputs, allowed, metric."""
    return {"outputs": [asdict(parity) for parity in found], "allowed": asdict(limits), "metric": metric}


def _measured(parity: OutputParity, metric: Mapping[str, Any] | None) -> str:
    text = f"output {parity.output!r} on {parity.images} images: max error {parity.max_error:.2e} of its range"
    if parity.worst is not None:
        worst = parity.worst
        text += f" (image {worst.image}, element {list(worst.position)}: expected {_number(worst.expected)}, "
        text += f"received {_number(worst.received)})"
    text += f", cosine {parity.cosine:.6f}, {parity.changed:.2%} of the decisions changed"
    if metric is not None:
        text += f", {metric['name']} {_number(metric['before'])} -> {_number(metric['after'])}"
    return text


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _compare(
    name: str, expected: Array, received: Array, task: Task | None, what: str = "ONNX", outliers: float = 0.0
) -> OutputParity:
    if expected.shape != received.shape:
        raise ParityError(f"output {name!r} has shape {list(received.shape)} in {what} and {list(expected.shape)} before it")
    one, other = expected.astype(np.float64), received.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite values: found below
        difference = np.abs(one - other)
        largest = max(float(np.abs(one).max()), 1e-30)
        norms = float(np.linalg.norm(one) * np.linalg.norm(other))
        cosine = float(one.ravel() @ other.ravel()) / norms if norms else float(np.array_equal(one, other))
    place = np.unravel_index(int(np.where(np.isnan(difference), np.inf, difference).argmax()), one.shape)
    changed = 0.0 if task is None else task.changed(expected, received)
    counts = float(difference.max())
    if outliers and one.ndim > 2 and np.isfinite(counts):
        counts = float(np.quantile(difference, 1 - outliers))
    finite = [float(value) if np.isfinite(value) else None for value in (one[place], other[place])]
    return OutputParity(
        output=name,
        images=len(expected),
        max_error=counts / largest,
        cosine=cosine,
        changed=changed,
        worst=Worst(int(place[0]), [int(index) for index in place[1:]], *finite),
    )


def torch_outputs(module: nn.Module, images: Tensor, names: Sequence[str]) -> dict[str, Array]:
    """Name -> array of a module in eval mode; ``images`` are normalised, float32 [N, C, H, W].

    Raises:
        ParityError: It gives another number of outputs.
    """
    parts: list[list[Array]] = []
    with torch.no_grad():
        for batch in images.split(BATCH):
            given = module(batch)
            parts.append([value.numpy() for value in (given if isinstance(given, tuple | list) else [given])])
    if len(parts[0]) != len(names):
        raise ParityError(f"the model gives {len(parts[0])} outputs; expected {', '.join(names)}")
    return dict(zip(names, (np.concatenate(arrays) for arrays in zip(*parts, strict=True)), strict=True))


def file_outputs(model: Path | bytes, images: Array) -> dict[str, Array]:
    """Name -> array of an ONNX file, or of its bytes, which ONNX Runtime runs as written, without rewriting its graph.

    Raises:
        ParityError: ONNX Runtime cannot run it.
    """
    session = _session(model)
    return _run(session, {session.get_inputs()[0].name: images}, BATCH)


def run_once(model: Any, feeds: dict[str, Array]) -> dict[str, Array]:
    """All outputs of an onnx.ModelProto, run as written.

    Raises:
        ParityError: ONNX Runtime cannot run it.
    """
    return _run(_session(model.SerializeToString()), feeds)


def _session(model: Path | bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise _refused(error) from error


def _run(session: Any, feeds: dict[str, Array], batch: int | None = None) -> dict[str, Array]:
    """All outputs; in parts of ``batch``, or of the one size that a file takes: the last is filled up, its surplus cut off."""
    names = [output.name for output in session.get_outputs()]
    first, count = session.get_inputs()[0].shape[0], len(next(iter(feeds.values())))
    step = first if isinstance(first, int) else batch or count
    parts = []
    try:
        for start in range(0, count, step):
            rows = np.arange(start, start + step if isinstance(first, int) else min(start + step, count)).clip(max=count - 1)
            parts.append(session.run(names, {name: array[rows] for name, array in feeds.items()}))
    except Exception as error:  # as above
        raise _refused(error) from error
    return {name: np.concatenate([part[index] for part in parts])[:count] for index, name in enumerate(names)}


def _refused(error: Exception) -> ParityError:
    return ParityError(f"onnxruntime cannot run the exported file: {error}", hint="another export.opset may work")


def worst_first(found: Sequence[OutputParity], count: int) -> list[int]:
    """Indices of at most ``count`` images, the one that differs most before the others."""
    first = next((parity.worst.image for parity in found if parity.worst is not None), 0)
    return [first, *(index for index in range(found[0].images) if index != first)][:count]


def where_in_file(module: nn.Module, model: Any, images: Tensor, encoding: str) -> str:
    """In which module the file goes wrong, as the end of a sentence.

    Args:
        module: The one that was exported: the encoded one for integers.
        model: The file.
        images: Normalised, float32 [B, C, H, W].
        encoding: float32, float16, u8, u7 or s8.
    """
    try:
        places = bisect.local_errors(module, model, images, run_once)
    except ParityError as error:
        return f"; the layer cannot be found: {error.message}"
    limit, moved = LOCAL_LIMIT[encoding], sensitivity(module, images)
    wrong = next((place for place in places if not place.error <= limit), None)
    if wrong is None:
        largest = max(places, key=lambda place: place.error)
        return (
            f"; no layer is to blame: fed with torch's values, none of {len(places)} is off by more than {largest.error:.1e} of "
            f"its norm ({largest.path}), so the differences add up over the layers. {_own(moved)}"
        )
    # one value that rounds the other way is more than the limit where few of the codes are in use
    unsure = f". But perhaps no layer is wrong. {_own(moved)}" if moved > SENSITIVE else ""
    return f"; it goes wrong at {described(wrong)}, when fed with torch's values{unsure}"


def _own(moved: float) -> str:
    advice = ": train it for longer, or on with quantizers" if moved > SENSITIVE else ""
    return f"The model itself: noise of {NOISE:.0e} in its images moves its own outputs by {moved:.1e} of their norm{advice}"


def sensitivity(module: nn.Module, images: Tensor) -> float:
    """How far noise that no one would see moves a model's first output: a share of its norm.

    Quantizers turn a change of any size, where a value lies at the edge between two codes, into a whole step. A model in which
    that grows from layer to layer gives other outputs in every library that sums in another order.

    Args:
        module: In eval mode.
        images: Normalised, float32 [B, C, H, W].
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * images.std() * NOISE
    with torch.no_grad():
        outputs = [module(given) for given in (images, images + noise)]
    expected, moved = (value[0] if isinstance(value, tuple | list) else value for value in outputs)
    return bisect.relative_error(expected.numpy(), moved.numpy())


def described(place: bisect.Place) -> str:
    """A place with its numbers and those of what it reads."""
    text = f"{place.path} (tensor {place.point.tensor}): off by {place.error:.1e} of its norm"
    if place.reads:
        text += ", while what it reads is right: " + ", ".join(f"{path} {error:.1e}" for path, error in place.reads)
    return text
