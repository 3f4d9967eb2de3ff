"""From a module to an ONNX file, through torch's exporter (torch.export, dynamo) and onnxslim."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.engines import graph
from edgekd.engines.onnx_layers import PATH, sizes
from edgekd.errors import ExportError
from edgekd.export import pooling, qdq
from edgekd.export.bisect import mark, scopes

INPUT = "images"
_OURS = ("quantizers.", "taps.")
"""Modules that edgekd puts into a model: what they make belongs to the module in front."""


def export(
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    output_names: Sequence[str],
    opset: int,
    input_names: Sequence[str] = (INPUT,),
    batch: int | None = None,
) -> Any:
    """The module as an ONNX model.

    Args:
        module: In eval mode; an encoded one for integers (edgekd.export.qdq).
        example: The input, or all of them in the order of ``forward``: [B, ...] each, with B of at least 2 (torch.export takes a
            batch of 1 for a constant).
        output_names: Of the outputs, in order.
        opset: ONNX opset.
        input_names: Of the inputs, in order.
        batch: The one batch size that the file takes; None leaves it free.

    Returns:
        An onnx.ModelProto, checked. Nodes say which module they belong to (edgekd.engines.onnx_layers.paths), and those that make
        a module's output say that too (edgekd.export.bisect).

    Raises:
        ExportError: The exporter does not follow the model, or its file is not valid.
    """
    import onnx
    import onnxslim

    examples = (example,) if isinstance(example, Tensor) else example
    if batch is not None:
        examples = tuple(part[:1].expand(batch, *part.shape[1:]).contiguous() for part in examples)
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx"), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch's own internals, nothing that a user could act on
            program = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                custom_translation_table={**qdq.translations(), **pooling.translations()},
                dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in examples) if batch is None else None,
                input_names=list(input_names),
                output_names=list(output_names),
                opset_version=opset,
                verbose=False,
            )
        assert program is not None
        modules = _module_of_each_tensor(program.model_proto)
        model = onnxslim.slim(program.model_proto)  # it drops the nodes' metadata, and keeps the tensors' names
        mark(program.model_proto, model)
        _name_global_pools(model)
        for node in model.graph.node:
            path = next((modules[name] for name in node.output if modules.get(name)), "")
            node.metadata_props.add(key=PATH, value=path)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the exporter raises what the model's code and its own passes raise
        raise ExportError(
            f"{type(module).__name__} cannot be exported as ONNX: {_first_lines(error)}",
            hint="torch.export must be able to follow the model's forward",
        ) from error
    return model


def _name_global_pools(model: Any) -> None:
    """Call a mean over a map what it is: torch's exporter writes ReduceMean, which ONNX Runtime does not run on integers."""
    import onnx

    constants = {weight.name: weight for weight in model.graph.initializer}
    constants |= {
        node.output[0]: node.attribute[0].t
        for node in model.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    shapes = sizes(model)
    for node in model.graph.node:
        if node.op_type != "ReduceMean" or len(node.input) != 2 or node.input[1] not in constants:
            continue
        kept = all(attribute.i for attribute in node.attribute if attribute.name == "keepdims")
        axes = {int(axis) % 4 for axis in onnx.numpy_helper.to_array(constants[node.input[1]]).ravel()}
        if kept and axes == {2, 3} and len(shapes.get(node.input[0], [])) == 4:
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            node.ClearField("attribute")
    unused = {name for name in constants if not any(name in node.input for node in model.graph.node)}
    for weight in [weight for weight in model.graph.initializer if weight.name in unused]:
        model.graph.initializer.remove(weight)
    for node in [node for node in model.graph.node if node.op_type == "Constant" and node.output[0] in unused]:
        model.graph.node.remove(node)


def _module_of_each_tensor(model: Any) -> dict[str, str]:
    """What torch's exporter says of where tensors are made; nothing for those that only the outermost forward makes."""
    found = {}
    for node in model.graph.node:
        within = scopes(node)
        path = within[-1] if within and not within[-1].startswith(_OURS) else ""
        found.update(dict.fromkeys(node.output, path))
    return found


def describe(model: Any, preprocessing: dict[str, Any], precision: str) -> dict[str, Any]:
    """io.json: inputs, outputs (name, dtype, shape with -1 where the size is free), preprocessing, precision."""
    inputs, outputs = ([asdict(spec) for spec in find(model.graph)] for find in (graph.inputs, graph.outputs))
    return {"inputs": inputs, "outputs": outputs, "preprocessing": preprocessing, "precision": precision}


def load(path: Path) -> Any:
    """Read a file that :func:`save` wrote."""
    import onnx

    return onnx.load(path)


def save(model: Any, path: Path) -> None:
    """Write the file.

    Raises:
        ExportError: It is larger than the 2 GiB that one ONNX file holds.
    """
    if model.ByteSize() >= 2**31:
        raise ExportError(
            f"the model has {model.ByteSize() / 2**30:.1f} GiB; one ONNX file holds less than 2", hint="use a smaller student"
        )
    path.write_bytes(model.SerializeToString())


class _quiet:  # noqa: N801  used like a function, in a with block
    """Keep a logger at errors only inside the block."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)


def _first_lines(error: Exception, lines: int = 3) -> str:
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " ".join(text[:lines])
