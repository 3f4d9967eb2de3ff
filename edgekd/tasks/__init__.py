"""Tasks: what labels mean, and how well a model does."""

from typing import Annotated

from pydantic import Field

from edgekd.data.base import Dataset
from edgekd.engines.detections import Heads
from edgekd.tasks.anchors import fit_anchors
from edgekd.tasks.base import Task
from edgekd.tasks.classification import Classification, ClassificationConfig
from edgekd.tasks.detection import ANCHORS, Detection, DetectionConfig
from edgekd.tasks.yolo_loss import Gains

AnyTask = ClassificationConfig | DetectionConfig
TaskConfig = Annotated[AnyTask, Field(discriminator="kind")]

__all__ = ["Classification", "ClassificationConfig", "Detection", "DetectionConfig", "Task", "TaskConfig", "build"]


def build(config: AnyTask, data: Dataset) -> Task:
    """The task that a recipe's ``task`` section describes.

    Args:
        config: The section.
        data: What it is about: anchors are fitted to its training boxes, where the section gives none.

    Raises:
        DataError: There is no box to fit them to.
    """
    if isinstance(config, ClassificationConfig):
        return Classification(config.label_smoothing)
    anchors = (
        fit_anchors(data.train.labels, len(config.strides), ANCHORS)
        if config.anchors is None
        else tuple(tuple(head) for head in config.anchors)
    )
    gains = Gains(config.box_gain, config.objectness_gain, config.class_gain)
    heads = Heads(data.height, tuple(config.strides), anchors)
    return Detection(heads, data.num_classes, config.iou, config.confidence, gains, config.nms)
