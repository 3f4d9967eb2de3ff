"""Tasks: what labels mean, and how well a model does."""

from typing import Annotated

from pydantic import Field

from edgekd.data.base import Dataset
from edgekd.data.windows import Windows, WindowsConfig
from edgekd.engines.detections import Heads
from edgekd.errors import DataError
from edgekd.tasks.anchors import fit_anchors
from edgekd.tasks.base import Task
from edgekd.tasks.classification import Classification, ClassificationConfig
from edgekd.tasks.detection import ANCHORS, Detection, DetectionConfig
from edgekd.tasks.saliency import Saliency, SaliencyConfig
from edgekd.tasks.segmentation import Segmentation, SegmentationConfig, balanced_weights
from edgekd.tasks.yolo_loss import Gains

AnyTask = ClassificationConfig | DetectionConfig | SegmentationConfig | SaliencyConfig
TaskConfig = Annotated[AnyTask, Field(discriminator="kind")]

__all__ = [
    "Classification",
    "ClassificationConfig",
    "Detection",
    "DetectionConfig",
    "Saliency",
    "SaliencyConfig",
    "Segmentation",
    "SegmentationConfig",
    "Task",
    "TaskConfig",
    "build",
]


def build(config: AnyTask, data: Dataset) -> Task:
    """The task that a recipe's ``task`` section describes.

    Args:
        config: The section.
        data: What it is about: anchors are fitted to its training boxes, where the section gives none, and balanced weights to
            its training pixels.

    Raises:
        DataError: There is no box to fit them to, there are not as many weights as classes, windows are larger than the images,
            or there are not two classes for saliency.
    """
    if isinstance(config, ClassificationConfig):
        return Classification(config.label_smoothing)
    if isinstance(config, SegmentationConfig):
        return _segmentation(config, data)
    if isinstance(config, SaliencyConfig):
        if data.num_classes != 2:
            raise DataError(
                f"saliency knows two classes, 0 and 1, and the data has {data.num_classes}",
                hint="where masks are pictures of 0 and 255, give data.threshold: 128",
            )
        return Saliency(config.boundary_weight, _windows(config.windows, data))
    anchors = (
        fit_anchors(data.train.labels, len(config.strides), ANCHORS)
        if config.anchors is None
        else tuple(tuple(head) for head in config.anchors)
    )
    gains = Gains(config.box_gain, config.objectness_gain, config.class_gain)
    heads = Heads(data.height, tuple(config.strides), anchors)
    return Detection(heads, data.num_classes, config.iou, config.confidence, gains, config.nms)


def _segmentation(config: SegmentationConfig, data: Dataset) -> Segmentation:
    weights: tuple[float, ...] | None = None
    if config.class_weights == "balanced":
        weights = balanced_weights(data.train.labels, data.num_classes)
    elif config.class_weights is not None:
        weights = tuple(config.class_weights)
        if len(weights) != data.num_classes:
            raise DataError(f"task.class_weights has {len(weights)} numbers, and the data {data.num_classes} classes")
    windows = _windows(config.windows, data)
    return Segmentation(data.num_classes, weights, config.hard_pixels, config.dice_weight, config.boundary_px, windows)


def _windows(config: WindowsConfig | None, data: Dataset) -> Windows | None:
    windows = None if config is None else config.build()
    if windows is not None and (windows.size_px[0] > data.height or windows.size_px[1] > data.width):
        raise DataError(
            f"windows of {list(windows.size_px)} pixels are larger than the images, {[data.height, data.width]}",
            hint="lower task.windows.size_px, or leave task.windows out",
        )
    return windows
