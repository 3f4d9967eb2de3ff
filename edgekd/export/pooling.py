"""Adaptive average pooling to grids that do not divide the map, as pyramid pooling has it, in two products with constants.

torch's exporter writes it as dozens of gathers and a division, which some engines do not fuse and some cannot run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def averages(cells: int, side: int) -> npt.NDArray[np.float32]:
    """What each cell takes of each place along one side, torch's rule: [cells, side], float32; rows add up to 1.

    Cell i averages the places from floor(i side / cells) to the one before ceil((i + 1) side / cells).
    """
    shares = np.zeros((cells, side), np.float32)
    for cell in range(cells):
        start, end = cell * side // cells, -(-(cell + 1) * side // cells)
        shares[cell, start:end] = 1 / (end - start)
    return shares


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=...)``."""
    import onnx_ir as ir
    from onnxscript import opset18 as op

    def constant(value: npt.NDArray[np.float32]) -> Any:
        return op.Constant(value=ir.tensor(value))

    def pool(maps: Any, output_size: Any) -> Any:
        (height, width), (rows, columns) = (int(side) for side in maps.shape[-2:]), (int(side) for side in output_size)
        if height % rows == 0 and width % columns == 0:
            cell = [height // rows, width // columns]
            return op.AveragePool(maps, kernel_shape=cell, strides=cell)
        down = op.MatMul(constant(averages(rows, height)), maps)
        return op.MatMul(down, constant(averages(columns, width).T.copy()))

    return {torch.ops.aten._adaptive_avg_pool2d.default: pool}
