"""One class per image.

Shape letters: N images, B images of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from edgekd._config import Config
from edgekd.errors import DataError
from edgekd.tasks.base import check_finite, find_output

if TYPE_CHECKING:
    from torchmetrics import Metric


class ClassificationConfig(Config):
    """One class per image."""

    kind: Literal["classification"] = "classification"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the label's weight that is spread evenly over all classes."""


@dataclass(frozen=True)
class Classification:
    """Cross-entropy, and accuracy in 0..1."""

    label_smoothing: float = 0.0

    kind: ClassVar[str] = "classification"
    metric_name: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    output_names: ClassVar[tuple[str, ...]] = ("logits",)
    windows: ClassVar[None] = None

    def loss(self, logits: Tensor, labels: Tensor, progress: float = 1.0) -> Tensor:  # noqa: ARG002
        """Cross-entropy, averaged over the batch.

        Args:
            logits: [B, K], before softmax.
            labels: int64 [B].
            progress: Not looked at.
        """
        # float32 under autocast too: the exponentials lose too much in 16 bits
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)

    def new_metric(self) -> Metric:
        """The share of images whose largest logit is the label's."""
        return _accuracy(all_processes=True)

    def evaluate(self, outputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[np.int64]) -> float:
        """Accuracy of an engine's outputs.

        Args:
            outputs: ``logits``, [N, K].
            labels: int64 [N].

        Raises:
            DataError: There is no such output, it has another shape, or it is not finite.
        """
        name = self.output_names[0]
        logits = find_output(outputs, name)
        if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] <= labels.max():
            classes = f"at least {labels.max() + 1} classes"
            raise DataError(f"the output {name!r} has shape {list(logits.shape)}; expected [{len(labels)} images, {classes}]")
        check_finite(name, logits)
        # engine outputs are whole already, and one process alone evaluates them: under torchrun, adding up would wait for ever
        metric = _accuracy(all_processes=False)
        # copies: torch warns of arrays that it may not write to
        metric.update(torch.from_numpy(np.array(logits, dtype=np.float32)), torch.from_numpy(np.array(labels)))
        return float(metric.compute())

    def details(self, outputs: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[np.int64]) -> dict[str, float]:
        """Accuracy, alone."""
        return {self.metric_name: self.evaluate(outputs, labels)}

    def changed(self, expected: npt.NDArray[Any], received: npt.NDArray[Any]) -> float:
        """The share of images, [N, K] each, whose class differs."""
        return float(np.mean(np.argmax(expected, axis=1) != np.argmax(received, axis=1)))

    def postprocessing(self, classes: Sequence[str]) -> dict[str, Any]:
        """Logits, and the classes' names in their order."""
        return {"kind": self.kind, "output": self.output_names[0], "classes": list(classes)}


def _accuracy(*, all_processes: bool) -> Metric:
    from torchmetrics.classification import MulticlassAccuracy  # more than a second to import

    # Labels are checked when data is loaded; checking every batch would wait for the device. torchmetrics copies sync_on_compute
    # when the metric is made: setting the attribute later changes nothing.
    return MulticlassAccuracy(average="micro", validate_args=False, sync_on_compute=all_processes)
