"""What a task is: labels, supervised loss, metric, and what a model's outputs mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from edgekd.data.windows import Windows
from edgekd.errors import DataError

if TYPE_CHECKING:
    from torchmetrics import Metric


class Task(Protocol):
    """What every stage, the export and the report need to know of a task."""

    kind: ClassVar[str]
    """The name in recipes."""
    metric_name: ClassVar[str]
    """What reports call the metric."""
    higher_is_better: ClassVar[bool]
    output_names: ClassVar[tuple[str, ...]]
    """The outputs of the exported model, in order."""

    @property
    def windows(self) -> Windows | None:
        """Models are evaluated, and engines run, on such windows of the images; None: on whole images."""

    def loss(self, logits: Tensor, labels: Tensor, progress: float = 1.0) -> Tensor:
        """The supervised loss, a scalar averaged over the batch; ``progress`` is the share of the training that is done, 0..1."""

    def new_metric(self) -> Metric:
        """An empty metric: ``update(logits, labels)`` per batch, then ``compute()``, which adds up all processes."""

    def evaluate(self, outputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any]) -> float:
        """The metric of an engine's outputs on a whole split, by the same code as :meth:`new_metric`."""

    def details(self, outputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any]) -> dict[str, float]:
        """All metrics of an engine's outputs, by name, :meth:`evaluate`'s among them."""

    def changed(self, expected: npt.NDArray[Any], received: npt.NDArray[Any]) -> float:
        """The share, 0..1, of what a user of the model would act on that differs between two arrays of its first output."""

    def postprocessing(self, classes: Sequence[str]) -> dict[str, Any]:
        """The same as data, for io.json: ``kind`` and its parameters (edgekd.engines.postprocess)."""


def find_output(outputs: Mapping[str, npt.NDArray[Any]], name: str) -> npt.NDArray[Any]:
    """One of an engine's outputs.

    Raises:
        DataError: There is none of this name.
    """
    if name not in outputs:
        raise DataError(f"expected an output {name!r}; the engine gave {', '.join(outputs) or 'none'}")
    return outputs[name]


def check_finite(name: str, values: npt.NDArray[Any]) -> None:
    """Refuse an output with infinite values or none at all.

    Raises:
        DataError: It has some.
    """
    if bad := int(values.size - np.isfinite(values).sum()):
        raise DataError(
            f"{bad} of {values.size} values of the output {name!r} are not finite", hint="use a precision with a wider range"
        )


def checked_output(outputs: Mapping[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """One of an engine's outputs, of this shape and finite.

    Raises:
        DataError: It is not.
    """
    values = find_output(outputs, name)
    if values.shape != shape:
        raise DataError(f"the output {name!r} has shape {list(values.shape)}; expected {list(shape)}")
    check_finite(name, values)
    return values
