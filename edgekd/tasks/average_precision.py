"""COCO's mean average precision, by faster-coco-eval.

Shape letters: N images, M labelled boxes of an image, n detected ones.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MOST = 300
"""Detections of an image that count; COCO's own 100 would cut crowded aerial images."""


def average_precisions(found: Sequence[npt.NDArray[Any]], labels: npt.NDArray[Any], classes: int) -> tuple[float, float]:
    """MAP at an overlap of 0.5, and averaged over 0.5, 0.55, .. 0.95; both 0..1.

    Args:
        found: For each image [n, 6]: x1, y1, x2, y2, score, class.
        labels: [N, M, 6]: class (-1: no box), x1, y1, x2, y2, ignore.
        classes: How many there are; those without a labelled box do not count.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truth: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image, (boxes, rows) in enumerate(zip(found, labels, strict=True), start=1):
        for row in rows[rows[:, 0] >= 0].tolist():
            about = {"id": len(truth) + 1, "image_id": image, "category_id": int(row[0]) + 1, "iscrowd": int(row[5])}
            truth.append(about | _box(row[1:5]))
        results += [
            {"id": len(results) + index, "image_id": image, "category_id": int(row[5]) + 1, "score": row[4], "iscrowd": 0}
            | _box(row[:4])
            for index, row in enumerate(np.asarray(boxes, dtype=np.float64).tolist(), start=1)
        ]
    if not any(not row["iscrowd"] for row in truth) or not results:
        return 0.0, 0.0
    about_images = [{"id": image, "width": 1, "height": 1} for image in range(1, len(labels) + 1)]
    categories = [{"id": index + 1, "name": str(index)} for index in range(classes)]
    with contextlib.redirect_stdout(io.StringIO()):  # some of its parts print
        data = COCO({"images": about_images, "annotations": truth, "categories": categories})
        evaluation = COCOeval_faster(data, data.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 10, MOST]
        evaluation.evaluate()
        evaluation.accumulate()
    # [thresholds, recalls, classes, areas, counts]: all areas, the largest count; -1 where a class has no labelled box
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    counted = precision[:, :, (precision > -1).any((0, 1))]
    return float(counted[0].mean()), float(counted.mean())


def _box(edges: Sequence[float]) -> dict[str, Any]:
    x1, y1, x2, y2 = map(float, edges)
    return {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
