"""Where an ONNX file or an engine goes wrong: the first module whose output is wrong while all that it reads is right.

The exporter knows which module every node comes from, and the slimmer forgets it; :func:`mark` writes it back into the nodes
whose output is a module's output. These tensors are the *points* at which two computations can be compared.

- A file against torch: every part of the graph between points is fed with torch's own values, all parts in one run. Errors cannot
  add up, so each module answers for itself alone.
- An engine against the file: an engine cannot be fed in the middle, and one with every tensor as an output would fuse nothing. So
  graphs that end at a point are built and run, as few as a binary search needs. Errors do add up on this way, and a wrong value
  may come out of any branch: the search ends at a point that is wrong while every point that it reads is right.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

MODULE, CALL, CALLS = "edgekd.module", "edgekd.call", "edgekd.calls"
"""Metadata of a node: whose output it makes, in which call of how many."""
_SCOPES = "pkg.torch.onnx.name_scopes"  # torch's exporter: for every node the modules that it was traced in
_FED = "/fed"
_WEIGHT = re.compile(r"(.+)\.(codes|weight)$")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Point:
    """A tensor of the file that is the output of a module's call."""

    tensor: str
    path: str
    call: int = 0
    calls: int = 1


@dataclass(frozen=True)
class Place:
    """A point, how wrong it is, and the part of the graph that makes it."""

    point: Point
    error: float
    """Norm of the difference as a share of the expected values' norm; infinite where a value is not finite."""
    layers: tuple[str, ...] = ()
    """Modules whose weights are in this part."""
    reads: tuple[tuple[str, float], ...] = ()
    """Points that this part reads, and how wrong these are."""

    @property
    def path(self) -> str:
        """What to call it: the layers with weights, or else the module."""
        return ", ".join(self.layers) or self.point.path


def scopes(node: Any) -> list[str] | None:
    """The modules that a node of the exporter's model was traced in, outermost first; None where it does not say."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), None)
    # the last scope is the operation's own name; the model itself has no name
    return None if text is None else [str(path) for path in ast.literal_eval(text)[:-1] if path]


def mark(traced: Any, model: Any) -> None:
    """Write into the nodes of ``model`` which module's output they make.

    Args:
        traced: The exporter's own model: its nodes carry the scopes that they were traced in.
        model: The same graph, simplified: tensors that are left have kept their names. Changed in place.
    """
    runs: dict[str, list[tuple[str, int]]] = {}  # path -> per call its last tensor, and how deep the path is
    previous: list[str] = []
    for node in traced.graph.node:
        paths = scopes(node)
        if paths is None:
            continue
        for depth, path in enumerate(paths):
            found = runs.setdefault(path, [])
            if path in previous and found:
                found.pop()  # the same call goes on: what it makes last is its output
            found.append((node.output[0], depth))
        previous = paths
    made = {name: node for node in model.graph.node for name in node.output[:1]}
    marks: dict[str, tuple[int, dict[str, Any]]] = {}
    for path, found in runs.items():
        for call, (tensor, depth) in enumerate(found):
            if tensor in made and (tensor not in marks or depth > marks[tensor][0]):  # of a block and its last module, the module
                marks[tensor] = depth, {MODULE: path, CALL: call, CALLS: len(found)}
    for tensor, (_depth, facts) in marks.items():
        for key, value in facts.items():
            made[tensor].metadata_props.add(key=key, value=str(value))


class Graph:
    """An ONNX model and its points, in the graph's order."""

    def __init__(self, model: Any, *, integers: bool = False) -> None:
        """Read the points.

        Args:
            model: An onnx.ModelProto.
            integers: Take only points behind a DequantizeLinear: a graph cut elsewhere would be built of float operations.
        """
        import onnx

        self.model = model
        self.makers = {name: node for node in model.graph.node for name in node.output}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.values = {value.name: value for value in (*inferred.value_info, *inferred.output)}
        self.points: dict[str, Point] = {}
        for node in model.graph.node:
            facts = {entry.key: entry.value for entry in node.metadata_props}
            if MODULE in facts and node.output[0] in self.values and (not integers or node.op_type == "DequantizeLinear"):
                point = Point(node.output[0], facts[MODULE], int(facts[CALL]), int(facts[CALLS]))
                self.points[point.tensor] = point
        for value in model.graph.output:
            self.points.setdefault(value.name, Point(value.name, f"output {value.name!r}"))

    def keep(self, tensors: Iterable[str]) -> None:
        """Forget the other points, but not the outputs."""
        kept = {*tensors, *(value.name for value in self.model.graph.output)}
        self.points = {name: point for name, point in self.points.items() if name in kept}

    def part(self, tensor: str) -> tuple[list[Any], list[str]]:
        """The nodes that make a tensor from the nearest points, and these points."""
        nodes: list[Any] = []
        reads: list[str] = []
        waiting, seen = [tensor], {tensor}
        while waiting:
            node = self.makers.get(waiting.pop())
            if node is None:  # an input or a weight
                continue
            nodes.append(node)
            for name in node.input:
                if name not in seen:
                    seen.add(name)
                    (reads if name in self.points else waiting).append(name)
        return nodes, reads

    def before(self, tensor: str) -> list[str]:
        """Every point that a tensor depends on, in the graph's order."""
        found: set[str] = set()
        waiting = [tensor]
        while waiting:
            reads = [name for name in self.part(waiting.pop())[1] if name not in found]
            found.update(reads)
            waiting += reads
        return [name for name in self.points if name in found]

    def place(self, tensor: str, errors: Mapping[str, float]) -> Place:
        """What is known of a point."""
        nodes, reads = self.part(tensor)
        for name in [name for node in nodes for name in node.input if name in self.makers]:
            nodes += [self.makers[name]] if self.makers[name].op_type == "DequantizeLinear" else []  # of weights
        names = [match[1] for node in nodes for name in node.input if (match := _WEIGHT.match(name))]
        known = tuple((self.points[name].path, errors[name]) for name in reads if name in errors)
        return Place(self.points[tensor], errors[tensor], tuple(dict.fromkeys(reversed(names))), known)

    def cut(self, tensor: str) -> Any:
        """A copy that ends at a tensor."""
        import onnx

        needed, waiting = set(), [tensor]
        while waiting:
            node = self.makers.get(waiting.pop())
            if node is not None and node.output[0] not in needed:
                needed.add(node.output[0])
                waiting += node.input
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        nodes = [node for node in copy.graph.node if node.output[0] in needed]
        read = {name for node in nodes for name in node.input}
        weights = [weight for weight in copy.graph.initializer if weight.name in read]
        for field, content in (("node", nodes), ("initializer", weights), ("output", [self.values[tensor]]), ("value_info", [])):
            kept = [type(item).FromString(item.SerializeToString()) for item in content]
            copy.graph.ClearField(field)
            getattr(copy.graph, field).extend(kept)
        return copy


def relative_error(expected: Array, received: Array) -> float:
    """Norm of the difference as a share of the expected values' norm."""
    one, other = expected.astype(np.float64).ravel(), received.astype(np.float64).ravel()
    if one.shape != other.shape or not np.isfinite(other).all():
        return float("inf")
    return float(np.linalg.norm(one - other) / max(float(np.linalg.norm(one)), 1e-30))


def local_errors(
    module: nn.Module, model: Any, images: Tensor, run: Callable[[Any, dict[str, Array]], dict[str, Array]]
) -> list[Place]:
    """How wrong every part of a file is when it is fed with torch's values.

    Args:
        module: The one that was exported, in eval mode.
        model: The file.
        images: Normalised, float32 [B, C, H, W].
        run: Runs a model on named arrays and returns all its outputs.

    Returns:
        A place per point, in the graph's order.
    """
    import onnx

    graph = Graph(model)
    expected = _values(module, images, graph)
    graph.keep(expected)
    fed = onnx.ModelProto()
    fed.CopyFrom(model)
    types = {name: graph.values[name].type.tensor_type.elem_type for name in graph.points}
    for node in fed.graph.node:
        for index, name in enumerate(node.input):
            if name in graph.points:
                node.input[index] = name + _FED
    read = {name for node in fed.graph.node for name in node.input}
    feeds = {fed.graph.input[0].name: images.numpy()}
    outputs = {value.name for value in fed.graph.output}
    for name in graph.points:
        if name + _FED in read:
            fed.graph.input.append(onnx.helper.make_tensor_value_info(name + _FED, types[name], None))
            feeds[name + _FED] = expected[name].astype(onnx.helper.tensor_dtype_to_np_dtype(types[name]))
        if name not in outputs:
            fed.graph.output.append(onnx.helper.make_tensor_value_info(name, types[name], None))
    received = run(fed, feeds)
    errors = {name: relative_error(expected[name], received[name]) for name in graph.points}
    return [graph.place(name, errors) for name in graph.points]


@torch.no_grad()
def _values(module: nn.Module, images: Tensor, graph: Graph) -> dict[str, Array]:
    """What torch gives at the points that its modules are called as often as the file says; tensor -> array."""
    calls: Counter[str] = Counter()
    found: dict[tuple[str, int], Array] = {}
    wanted = {point.path for point in graph.points.values()}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, result: Any) -> None:
            if isinstance(result, Tensor):
                found[path, calls[path]] = result.numpy().copy()  # a copy: operations in place may follow
            calls[path] += 1

        return hook

    hooks = [part.register_forward_hook(keep(path)) for path, part in module.named_modules() if path in wanted]
    try:
        given = module(images)
    finally:
        for hook in hooks:
            hook.remove()
    values = {
        name: found[point.path, point.call]
        for name, point in graph.points.items()
        if calls[point.path] == point.calls
        and (point.path, point.call) in found
        and _fits(found[point.path, point.call], graph, name)
    }
    outputs = given if isinstance(given, tuple | list) else [given]
    return values | {value.name: array.numpy() for value, array in zip(graph.model.graph.output, outputs, strict=True)}


def _fits(array: Array, graph: Graph, tensor: str) -> bool:
    """Whether a value has the tensor's shape: a module may return something else than what it made last."""
    shape = graph.values[tensor].type.tensor_type.shape.dim
    return len(shape) == array.ndim and all(
        not dim.dim_value or dim.dim_value == size for dim, size in zip(shape, array.shape, strict=True)
    )


def first_wrong(graph: Graph, output: str, error_at: Callable[[str], float], limit: float) -> Place:
    """Search for a point that is wrong while every point that it reads is right.

    A binary search in the graph's order alone would blame an addition for its other branch, and needs every point behind a wrong
    one to be wrong. So it is repeated before every wrong point that it finds, and ends only where what this one reads is right.

    Args:
        graph: With its points.
        output: A tensor that is wrong.
        error_at: Measures one point; asked once for each.
        limit: A point with a larger error is wrong, and so is one with more than half of the output's.
    """
    errors: dict[str, float] = {}

    def wrong(tensor: str) -> bool:
        if tensor not in errors:
            errors[tensor] = error_at(tensor)
        return not errors[tensor] <= limit

    wrong(output)
    limit = min(limit, errors[output] / 2)  # an output may fail by its decisions alone
    while True:
        earlier = graph.before(output)
        low, high = -1, len(earlier)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if wrong(earlier[middle]) else (middle, high)
        found = earlier[high] if high < len(earlier) else next((name for name in graph.part(output)[1] if wrong(name)), None)
        if found is None:
            return graph.place(output, errors)
        output = found
