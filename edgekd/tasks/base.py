"""What a task is: labels, supervised loss, metric, and what a model's outputs mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

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

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The supervised loss, a scalar averaged over the batch."""

    def new_metric(self) -> Metric:
        """An empty metric: ``update(logits, labels)`` per batch, then ``compute()``, which adds up all processes."""

    def evaluate(self, outputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[np.int64]) -> float:
        """The metric of an engine's outputs on a whole split, by the same code as :meth:`new_metric`."""

    def decisions(self, logits: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """What a user of the model would act on; parity counts how many of them change."""

    def postprocessing(self, classes: Sequence[str]) -> dict[str, Any]:
        """The same as data, for io.json: ``kind`` and its parameters (edgekd.engines.postprocess)."""
