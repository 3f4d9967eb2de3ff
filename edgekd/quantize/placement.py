"""Where quantizers go: at the producers, so that every tensor has one set of codes and engines can run on integers throughout.

The model is traced (torch.fx) and these rules applied to the graph:

- Convolutions, transposed ones and linear layers get int8 weights, and every tensor that they read is quantized where it is
  made: after the ReLU, or after the batch norm where no ReLU follows, which are folded into the convolution at export.
- A convolution's result is always quantized, except where it is the model's output: ONNX Runtime runs no convolution on integers
  whose result is not.
- Both inputs of an addition behind convolutions are quantized, and its result, after the ReLU. Quantizing the residual input
  alone leaves ONNX Runtime with float convolutions (a ResNet-18 then runs no faster than in float32).
- Operations that move values without changing them (max pooling, reshape, split, nearest upsampling) and concatenations share one
  quantizer among what goes in and what comes out.
- Everything else stays in float: SiLU, hard-swish, LayerNorm, softmax, GELU, batch norms that follow no convolution, and products
  of two activations (attention's q k and its weights times v; the linear layers around them are int8).
- A transposed convolution with groups stays in float as well (:func:`quantizable`). One without is int8 in every file; OpenVINO
  runs it on integers, and ONNX Runtime, which has no such kernel, in float with the same int8 weights: the audit says so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from edgekd.errors import TrainingError
from edgekd.nn.taps import INPUT

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
NONNEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softmax, F.relu, F.relu6, torch.relu, torch.sigmoid, "relu", "relu_", "sigmoid")
RELUS = (nn.ReLU, nn.ReLU6, F.relu, F.relu6, torch.relu, "relu", "relu_")
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
AVERAGES = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, F.adaptive_avg_pool2d, F.avg_pool2d, torch.mean, "mean")
WEIGHTED = ("bilinear", "linear", "area")
"""Ways to resize a map whose results are averages: of nonnegative values they are nonnegative (bicubic ones overshoot)."""
DROPOUTS = (nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d)
SPLITS = (torch.chunk, torch.split, "chunk", "split")
MOVES = (
    *(*DROPOUTS, nn.Identity, nn.MaxPool2d, nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle),
    *(F.max_pool2d, F.channel_shuffle, F.pixel_shuffle, torch.flatten, torch.reshape, torch.permute, torch.transpose),
    *(*SPLITS, torch.squeeze, torch.unsqueeze),
    *("flatten", "unflatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze"),
)


def quantizable(layer: nn.Module) -> bool:
    """Whether a layer can have int8 weights.

    A transposed convolution with groups cannot: ONNX gives its weights one scale per entry of axis 1, which holds one channel of
    every group, so the batch norm behind it could not be folded in.
    """
    return isinstance(layer, LAYERS) and not (isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1)


def kept_in_float(traced: fx.GraphModule, which: Sequence[str]) -> set[str]:
    """Module paths of the layers that stay in float by their place or kind.

    Args:
        traced: The graph.
        which: ``first`` and ``last``, by the order of execution; ``outputs``: layers whose result is an output of the model, as
            it is or moved; and ``depthwise``: convolutions with one channel per group.

    Raises:
        TrainingError: The model has no depthwise convolution, and they were named.
    """
    modules = dict(traced.named_modules())
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    paths = [path for path in called if isinstance(modules[path], LAYERS)]
    depthwise = {path for path in paths if 1 < getattr(modules[path], "groups", 1) == modules[path].in_channels}
    if "depthwise" in which and not depthwise:
        raise TrainingError("quantizer.keep_float: the model has no depthwise convolution", hint="remove it there")
    found = {
        "first": set(paths[:1]),
        "last": set(paths[-1:]),
        "outputs": output_layers(traced),
        "depthwise": depthwise,
    }
    return {path for name in which for path in found[name]}


def output_layers(traced: fx.GraphModule) -> set[str]:
    """Module paths of the layers whose result is an output of the model, as it is, moved or concatenated."""
    look = Placement(traced, lambda path: True)  # noqa: ARG005  the rules alone
    found = set()
    for node in look.outputs():
        if node.op == "call_module" and isinstance(look.modules[str(node.target)], LAYERS):
            found.add(str(node.target))
    return found


class Tracer(fx.Tracer):
    """Follows a model down to torch's own modules, and remembers the tensors at its taps."""

    def __init__(self, places: Mapping[str, str]) -> None:
        super().__init__()
        self.places = set(places.values())
        self.found: dict[str, fx.Node] = {}
        """Place -> node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's own modules, and layers and batch norms derived from them: tracing into those would freeze their mode."""
        return isinstance(m, (*LAYERS, nn.modules.batchnorm._BatchNorm)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As the base class; notes what goes in and out where a tap is."""
        path = self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        for place, value in ((path, result), (path + INPUT, args[0] if args else None)):
            if place in self.places and isinstance(value, fx.Proxy):
                self.found[place] = value.node
        return result


def out_of_place(graph: fx.Graph) -> None:
    """Replace in-place operations: they would overwrite values that a quantizer needs for its gradient."""
    methods = {"add_": "add", "relu_": "relu", "mul_": "mul", "clamp_": "clamp"}
    functions = {operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub}
    for node in graph.nodes:
        if node.op == "call_method":
            node.target = methods.get(node.target, node.target)
        elif node.op == "call_function":
            node.target = functions.get(node.target, node.target)
            if node.kwargs.get("inplace"):
                node.kwargs = {**node.kwargs, "inplace": False}


def trace(module: nn.Module, taps: Mapping[str, str]) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """The model as a graph, and the node at each tap: role -> node.

    Raises:
        TrainingError: The model's forward depends on its data, or a tap's module is never called.
    """
    tracer = Tracer(taps)
    try:
        graph = tracer.trace(module)
    except Exception as error:  # the user's forward may raise anything when it meets a symbol
        raise TrainingError(
            f"{type(module).__name__} cannot be quantized: torch.fx cannot trace its forward: {error}",
            hint="write the forward without branches on tensor values, or remove the quantize stage",
        ) from error
    out_of_place(graph)
    for role, place in taps.items():
        if place not in tracer.found:
            raise TrainingError(
                f"tap {role!r}: {place!r} gives no single tensor while {type(module).__name__} is traced",
                hint="correct the model's taps",
            )
    return fx.GraphModule(tracer.root, graph, type(module).__name__), {role: tracer.found[place] for role, place in taps.items()}


class Placement:
    """The rules above, applied to one traced model.

    Args:
        traced: The graph.
        skip: Whether the layer at this module path stays in float.
    """

    def __init__(self, traced: fx.GraphModule, skip: Callable[[str], bool]) -> None:
        self.modules = dict(traced.named_modules())
        self.nodes = list(traced.graph.nodes)
        self.layers = [
            str(node.target)
            for node in self.nodes
            if node.op == "call_module" and quantizable(self.modules[node.target]) and not skip(node.target)
        ]
        self._integer = {node for node in self.nodes if node.op == "call_module" and node.target in set(self.layers)}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._additions: set[fx.Node] = set()
        self._sources: set[fx.Node] = set()
        self._results: set[fx.Node] = set()  # of integer convolutions and additions
        for node in self.nodes:
            self._look(node)
        self._drop_outputs()

    def quantized(self) -> dict[fx.Node, fx.Node]:
        """Every node whose value is quantized -> the node that stands for its quantizer; nodes that share one have the same."""
        result = {node: self._group(node) for node in self._sources}
        # What merely moves a quantized value is quantized again where an integer operation reads it, so that the operation and
        # its input's codes stand side by side in the exported graph; the same scale makes it the identity.
        # Not so a dropout's result: in training its values are scaled up, beyond the range that inference sees.
        for node in self.nodes:
            if (
                self.moves(node)
                and not self._dropped(node)
                and any(user in self._readers() for user in node.users)
                and self._group(node) in result.values()
            ):
                result[node] = self._group(node)
        return {node: result[node] for node in self.nodes if node in result}

    def signed(self, group: fx.Node) -> bool:
        """Whether any value of a quantizer's tensors may be negative."""
        return any(not self.nonnegative(node) for node in self._sources if self._group(node) is group)

    def limit(self, group: fx.Node) -> float | None:
        """The largest value that any of a quantizer's tensors can have; None where what made them does not say."""
        return 6.0 if all(self._within_six(node) for node in self._sources if self._group(node) is group) else None

    def makers(self, group: fx.Node) -> set[str]:
        """Module paths of the integer layers whose results, with their batch norm and ReLU, a quantizer serves."""
        sources = {node for node in self._sources if self._group(node) is group}
        return {str(node.target) for node in self._integer if self.end(node) in sources}

    def takers(self, group: fx.Node) -> set[str]:
        """Module paths of the integer layers that read a quantizer's tensors."""
        return {str(node.target) for node in self._integer if self._group(node.all_input_nodes[0]) is group}

    def reads_input(self, group: fx.Node) -> bool:
        """Whether a quantizer serves an input of the model."""
        return any(node.op == "placeholder" for node in self._sources if self._group(node) is group)

    def unit_end(self, group: fx.Node) -> float | None:
        """Where the values of a quantizer end if every ReLU behind a convolution ends at 1; None where that says nothing."""
        ends = [self._unit_end(node) for node in self._sources if self._group(node) is group]
        return max(ends) if all(ends) else None

    def _unit_end(self, node: fx.Node) -> float:
        """The end of one tensor's values; 0 where it is unknown."""
        if self._is(node, RELUS):
            source = node.all_input_nodes[0]
            return 0.0 if self.adds(source) else 1.0
        if self.adds(node):
            ends = [self._unit_end(part) for part in node.all_input_nodes]
            return sum(ends) if all(ends) else 0.0
        if self.moves(node) or self._is(node, AVERAGES) or self._resizes(node) in WEIGHTED:
            return self._unit_end(node.all_input_nodes[0])
        if self.concatenates(node):
            ends = [self._unit_end(part) for part in node.all_input_nodes]
            return max(ends) if all(ends) else 0.0
        return 0.0

    def has_norm(self, path: str) -> bool:
        """Whether a batch norm that can be folded follows every call of this layer: it takes up any gain of its weights."""
        calls = [node for node in self.nodes if node.op == "call_module" and node.target == path]
        return all(len(node.users) == 1 and self.folds(node, next(iter(node.users))) for node in calls)

    def behind_relus(self) -> dict[fx.Node, str | None]:
        """Every ReLU of the model -> the integer layer that it follows, directly or behind its batch norm; None for another."""
        made = {self.end(node): str(node.target) for node in self._integer}
        return {node: made.get(node) for node in self.nodes if self._is(node, RELUS)}

    def _within_six(self, node: fx.Node) -> bool:
        if self._is(node, (nn.ReLU6, F.relu6)):
            return True
        if self.moves(node) or self._is(node, AVERAGES) or self._resizes(node) in WEIGHTED:
            return self._within_six(node.all_input_nodes[0])
        return bool(self.concatenates(node) and all(self._within_six(part) for part in node.all_input_nodes))

    def nonnegative(self, node: fx.Node) -> bool:
        """Whether a tensor holds no negative values, by what made it."""
        if self._is(node, NONNEGATIVE):
            return True
        if self.moves(node) or self._is(node, AVERAGES) or self._resizes(node) in WEIGHTED:
            return self.nonnegative(node.all_input_nodes[0])
        joins = self.concatenates(node) or self.adds(node)
        return joins and all(self.nonnegative(part) for part in node.all_input_nodes)

    def moves(self, node: fx.Node) -> bool:
        """Whether a node only moves values."""
        if mode := self._resizes(node):
            return mode == "nearest"
        if node.target is operator.getitem:  # a part of a split, or a slice of a tensor; an entry of any other tuple is new
            source, index = node.args
            return isinstance(source, fx.Node) and (self._is(source, SPLITS) or not isinstance(index, int | str))
        return self._is(node, MOVES) and bool(node.all_input_nodes)

    def _resizes(self, node: fx.Node) -> str:
        """The mode of a node that resizes a map; empty for any other."""
        if not self._is(node, (nn.Upsample, F.interpolate)):
            return ""
        return str(getattr(self.modules.get(str(node.target)), "mode", None) or node.kwargs.get("mode", "nearest"))

    def concatenates(self, node: fx.Node) -> bool:
        """Whether a node joins tensors."""
        return self._is(node, (torch.cat, torch.concat))

    def adds(self, node: fx.Node) -> bool:
        """Whether a node adds two tensors."""
        return self._is(node, ADDITIONS) and len(node.args) == 2 and all(isinstance(part, fx.Node) for part in node.args)

    def _is(self, node: fx.Node, kinds: tuple[Any, ...]) -> bool:
        if node.op == "call_module":
            return isinstance(self.modules[str(node.target)], tuple(kind for kind in kinds if isinstance(kind, type)))
        if node.op == "call_method":
            return node.target in [kind for kind in kinds if isinstance(kind, str)]
        return node.op == "call_function" and any(node.target is kind for kind in kinds)

    def _look(self, node: fx.Node) -> None:
        """Nodes come in the order of execution, so what a node reads has been looked at."""
        if node in self._integer:
            self._want(node.all_input_nodes[0])
            if isinstance(self.modules[str(node.target)], CONVOLUTIONS):
                self._produce(node)
        elif self.adds(node) and any(self._behind_convolution(part) for part in node.all_input_nodes):
            self._additions.add(node)
            for part in node.all_input_nodes:
                self._want(part)
            self._produce(node)

    def end(self, node: fx.Node) -> fx.Node:
        """The last node of what is fused into a convolution or an addition: its batch norm and its ReLU.

        Neither is, where something else reads the value before it.
        """
        follower = next(iter(node.users)) if len(node.users) == 1 else None
        if follower is not None and node.op == "call_module" and self.folds(node, follower):
            node = follower
            follower = next(iter(node.users)) if len(node.users) == 1 else None
        return follower if follower is not None and self._is(follower, RELUS) else node

    def folds(self, node: fx.Node, follower: fx.Node) -> bool:
        """Whether ``follower`` is a plain batch norm that can be folded into the convolution ``node``."""
        return (
            follower.op == "call_module"
            and type(self.modules[str(follower.target)]) in (nn.BatchNorm2d, nn.SyncBatchNorm)
            and isinstance(self.modules[str(node.target)], CONVOLUTIONS)
        )

    def _behind_convolution(self, node: fx.Node) -> bool:
        """Whether a value comes out of an integer convolution or addition, possibly moved."""
        while self.moves(node):
            node = node.all_input_nodes[0]
        if self.concatenates(node):
            return any(self._behind_convolution(part) for part in node.all_input_nodes)
        return node in self._results

    def _produce(self, node: fx.Node) -> None:
        self._results.add(self.end(node))
        self._sources.add(self.end(node))

    def _want(self, node: fx.Node) -> None:
        """Have a value quantized where it is made."""
        if self.moves(node):
            source = node.all_input_nodes[0]
            self._join(source, node)
            self._want(source)
        elif self.concatenates(node):
            for part in node.all_input_nodes:
                self._join(part, node)
                self._want(part)
            self._sources.add(node)
        else:
            self._sources.add(node)

    def _join(self, one: fx.Node, other: fx.Node) -> None:
        self._parent[self._group(one)] = self._group(other)

    def _group(self, node: fx.Node) -> fx.Node:
        while self._parent.get(node, node) is not node:
            node = self._parent[node]
        return node

    def _readers(self) -> set[fx.Node]:
        concatenations = {node for node in self._sources if self.concatenates(node)}
        return self._integer | self._additions | concatenations

    def _dropped(self, node: fx.Node) -> bool:
        """Whether a moved value has gone through a dropout."""
        while self.moves(node):
            if self._is(node, DROPOUTS):
                return True
            node = node.all_input_nodes[0]
        return False

    def _drop_outputs(self) -> None:
        """The model's own outputs stay in float, unless an integer operation reads them too."""
        outputs = self.outputs()
        for node in list(self._sources):
            readers = self._readers()
            if node in outputs and not any(user in readers or (self.moves(user) and user not in outputs) for user in node.users):
                self._sources.discard(node)

    def outputs(self) -> set[fx.Node]:
        """Every node whose value is an output of the model, as it is, moved or concatenated."""
        found = {value for node in self.nodes if node.op == "output" for value in node.all_input_nodes}
        for node in reversed(self.nodes):
            if node in found and (self.moves(node) or self.concatenates(node)):
                found.update(node.all_input_nodes)
        return found
