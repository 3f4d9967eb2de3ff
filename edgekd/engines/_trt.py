"""What the tensorrt and tensorrt_rtx backends share: both libraries have the same API for reading a model and building an engine.

Every function takes the imported module. Networks are strongly typed: every precision is in the graph.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from edgekd.engines.audit import LAYERS
from edgekd.engines.base import DYNAMIC, native_log
from edgekd.engines.detections import ADDED
from edgekd.errors import BuildError

FILE = "engine.trt"
_UINT8_AS_INT8 = "Defaulting to INT8 instead"
"""What the parser's warning says where it silently changes a graph's meaning."""
_NOISE = (
    r"^\w+::\w+: Error Code \d+: ",  # the function of the library that was called
    r"\[[\w.]+\.(cpp|h|cu)[^\]]*\] ?",  # places in its source
    r"\(?In \w+ at [^\s)]+\)?",
    r"\b(Myelin|Serialization|[A-Z][\w ]* Error) \(|(?<=\.) ?\)$",  # its part, and the bracket around the message
)
_NAMED_AT_MOST = 5


class Log:
    """What the library says during a build or a run, without its thousands of verbose lines.

    Args:
        trt: tensorrt or tensorrt_rtx.
    """

    def __init__(self, trt: Any) -> None:
        self.lines: list[tuple[str, str]] = []
        self.logger = _logger(trt, lambda severity, text: self.lines.append((severity, text)))

    def error(self) -> str:
        """The first error, on one line and without places in the library's source; those that follow come of it."""
        errors = [text for severity, text in self.lines if severity in ("ERROR", "INTERNAL_ERROR")]
        return clean(errors[0]) if errors else "it gives no reason"

    def text(self) -> str:
        """All of it, one line per message."""
        return "".join(f"{severity}: {text}\n" for severity, text in self.lines)


def _logger(trt: Any, write: Callable[[str, str], None]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base comes with the module
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity != trt.ILogger.Severity.VERBOSE:
                write(severity.name, " ".join(msg.split()))

    return Logger()


class Build:
    """One build: the parsed network and the builder's settings. Use it in a ``with`` block, which writes build.log at the end.

    Args:
        trt: tensorrt or tensorrt_rtx.
        name: The backend's name, for messages.
        model: The .onnx file.
        out: The engine's folder.
    """

    def __init__(self, trt: Any, name: str, model: Path, out: Path) -> None:
        self._trt, self._name, self._model, self._path = trt, name, model, out / "build.log"
        self.log = Log(trt)
        self.builder = trt.Builder(self.log.logger)
        self.config = self.builder.create_builder_config()
        self.network: Any = None

    def __enter__(self) -> Build:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._path.open("a") as stream:
            stream.write(self.log.text())

    def parse(self) -> None:
        """Read the model.

        Raises:
            BuildError: The parser refuses it, or would change what it means.
        """
        # TensorRT 11 has no other networks, but takes the flag; 10.x and TensorRT-RTX need it.
        flag = int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(1 << flag)
        parser = self._trt.OnnxParser(self.network, self.log.logger)
        with native_log(self._path):  # protobuf's complaints go to standard error
            read = parser.parse_from_file(str(self._model))
        if not read:
            raise self._parse_error(parser)
        if not self.network.num_inputs or not self.network.num_outputs:  # what it makes of an empty file, and of some garbage
            raise BuildError(
                f"{self._name} cannot read {self._model}: it holds no graph with inputs and outputs",
                hint="check that the file is a whole ONNX model; export it again",
            )
        if any(_UINT8_AS_INT8 in text for _severity, text in self.log.lines):
            raise BuildError(
                f"{self._model} has activations in uint8, which {self._name} would read as int8: codes over 127 would be cut off",
                hint="write the graph with signed activations (int8, zero point 0) for this backend",
            )

    def set_batch(self, opt_batch: int, max_batch: int) -> None:
        """Give a model whose batch is free its smallest, usual and largest batch.

        Raises:
            BuildError: Another size than the batch is free.
        """
        profile, free = self.builder.create_optimization_profile(), False
        for index in range(self.network.num_inputs):
            tensor = self.network.get_input(index)
            shape = tuple(tensor.shape)
            if DYNAMIC in shape[1:]:
                raise BuildError(
                    f"input {tensor.name} has shape {list(shape)}; only the batch may be free", hint="export fixed sizes"
                )
            if shape and shape[0] == DYNAMIC:
                free = True
                profile.set_shape(tensor.name, *((batch, *shape[1:]) for batch in (1, opt_batch, max_batch)))
        if free:
            self.config.add_optimization_profile(profile)

    def serialize(self, target: str, way_out: str) -> bytes:
        """Build the engine.

        Args:
            target: What it is for, for messages.
            way_out: What else than another precision may help, for the hint; may be empty.

        Raises:
            BuildError: The builder refuses; the message names the layers where it does.
        """
        with native_log(self._path):
            plan = self.builder.build_serialized_network(self.network, self.config)
        if plan is not None:
            return bytes(plan)
        reason = self.log.error()
        if scratch := re.search(r"OutOfMemory(?:.*?(\d+) bytes)?|workspace limit", reason):
            needs = f": a layer needs {int(scratch[1]) / 2**20:.0f} MiB" if scratch[1] else ""
            raise BuildError(
                f"{self._name} cannot build {self._model} for {target} with so little scratch memory{needs}",
                hint="raise backend.workspace_mib; see build.log",
            )
        names = named(reason, [self.network.get_layer(index) for index in range(self.network.num_layers)])
        paths = module_paths(self._model, names)
        where = f" at {_list(describe(name, paths) for name in names)}" if names else ""
        blamed = _list(paths.get(name, name) for name in names) or "the layer that build.log names"
        hint = f"try another precision{way_out}, or keep {blamed} in float through quantizer.skip; see build.log"
        if any(name.startswith(ADDED) for name in names):
            hint = "leave the suppression of boxes to edgekd.engines.postprocess: task.nms: outside"
        raise BuildError(f"{self._name} cannot build {self._model} for {target}{where}: {reason}", hint)

    def _parse_error(self, parser: Any) -> BuildError:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        paths = module_paths(self._model, [error.node_name() for error in errors])
        unsupported = sorted({error.node_operator() for error in errors if error.code().name.startswith("UNSUPPORTED_NODE")})
        texts = []
        for error in errors:
            operator = error.node_operator()
            what = clean(error.desc())
            if what == "false" or "creator" in what:  # the parser's own assertions; they say nothing to a reader
                what = f"the library has no operator {operator}"
            texts.append((f"node {describe(error.node_name(), paths)} ({operator}): " if operator else "") + what)
        if not any(error.node_operator() for error in errors):
            hint = "check that the file is a whole ONNX model; export it again"
        elif unsupported:
            hint = f"replace {', '.join(unsupported)} in the model, or choose another backend; see build.log"
        else:
            hint = "keep that layer in float through quantizer.skip, or choose another precision or backend; see build.log"
        reason = "; ".join(texts) or self.log.error()
        return BuildError(f"{self._name} cannot read {self._model}: {reason}", hint=hint)


def clean(text: str) -> str:
    """The library's message on one line, without places in its source."""
    line = " ".join(text.split())
    for pattern in _NOISE:
        line = re.sub(pattern, "", line)
    return " ".join(line.split()) or " ".join(text.split())


def named(text: str, layers: list[Any]) -> list[str]:
    """The layers that a message means: those that it names, else those that hold a type that it names."""
    names = dict.fromkeys(layer.name for layer in layers if layer.name)
    found = [name for name in names if re.search(rf"(?<![\w./]){re.escape(name)}(?![\w/]|\.\w)", text)]
    if found:
        return found
    types = re.search(r"datatypes: ([\w, ]+)", text)
    if types is None:
        return []
    wanted = {word.strip().upper() for word in types.group(1).split(",")}
    return [layer.name for layer in layers if wanted & _types(layer)]


def _types(layer: Any) -> set[str]:
    tensors = [layer.get_input(index) for index in range(layer.num_inputs)]
    tensors += [layer.get_output(index) for index in range(layer.num_outputs)]
    return {tensor.dtype.name for tensor in tensors if tensor is not None}


def module_paths(model: Path, nodes: list[str]) -> dict[str, str]:
    """The torch modules behind nodes of the model, where layers.json lies beside it and has them."""
    try:
        rows = json.loads(model.with_name(LAYERS).read_text())
        known = {row["node"]: row["path"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # the refusal itself must reach the reader; the audit reports a damaged file
    return {name: known[name] for name in nodes if name in known}


def describe(name: str, paths: dict[str, str]) -> str:
    """A node as messages call it, with its torch module where it is known."""
    path = paths.get(name, name)
    return repr(name) if path == name else f"{name!r} (module {path})"


def _list(parts: Iterable[str]) -> str:
    every = list(parts)
    return ", ".join(every[:_NAMED_AT_MOST]) + (", ..." if len(every) > _NAMED_AT_MOST else "")
