"""YAML 1.2 to plain data, with the place of every value: strict where a recipe could surprise its author.

Refused: duplicate keys, anchors and aliases, tags, several documents, keys that are not text, dates, non-finite numbers, tabs as
indentation, files over 256 KiB (ruamel.yaml needs seconds for a megabyte), nesting deeper than 32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Line and column, counted from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Document:
    """A recipe file as plain data."""

    file: Path
    text: str
    data: dict[str, Any]
    places: dict[Path_, Place]
    """Where the value of each path stands; for a mapping's entry: where its key stands."""

    def place(self, path: Path_) -> Place:
        """Where a path stands; where the file does not have it, the nearest parent that it has."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(1, 1))

    def located(self, path: Path_, message: str) -> str:
        """``file:line:column: path: message``."""
        place = self.place(path)
        where = dotted(path)
        return f"{self.file}:{place.line}:{place.column}: {where + ': ' if where else ''}{message}"


def dotted(path: Path_) -> str:
    """``stages[1].train.lr``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def load(file: Path) -> Document:
    """Read a recipe file.

    Raises:
        RecipeError: It is missing, not text, too large, not YAML 1.2, or uses what is refused (see above).
    """
    text = _read(file)
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        _scan(YAML(typ="safe", pure=True), text, file)
        yaml = YAML(typ="safe", pure=True)
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        problem = error.problem or error.context or "not valid YAML"
        hint = "quote values that begin with a special character, and close every bracket and quote"
        if _tab_indents(text, line):
            problem, hint = "a tab is used as indentation", "indent with spaces"
        raise RecipeError(f"{file}:{line}:{column}: not valid YAML 1.2: {problem}", hint=hint) from error
    except RecursionError as error:
        raise RecipeError(
            f"{file}: nested too deeply; at most {MAX_DEPTH} levels are allowed", hint="flatten the recipe"
        ) from error
    except YAMLError as error:
        raise RecipeError(f"{file}: not valid YAML 1.2: {error}", hint="recipes are plain YAML text") from error
    if node is None:
        raise RecipeError(f"{file}:1:1: the recipe is empty", hint="copy a recipe from recipes/ and change it")
    places: dict[Path_, Place] = {}
    data = _plain(node, (), places, file, yaml)
    if not isinstance(data, dict):
        raise RecipeError(f"{file}:1:1: a recipe is a mapping of sections, not {_word(data)}", hint="begin with: name: my-recipe")
    return Document(file, text, data, places)


def _read(file: Path) -> str:
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise RecipeError(
                f"{file} is not a file", hint="give the path of a recipe, for instance recipes/classification/quickstart.yaml"
            )
        if size > MAX_BYTES:
            raise RecipeError(
                f"{file} has {size:,} bytes; a recipe has at most {MAX_BYTES:,}",
                hint="is this a recipe? data and weights are named by path",
            )
        raw = file.read_bytes()
    except FileNotFoundError as error:
        raise RecipeError(
            f"{file} does not exist", hint="give the path of a recipe, for instance recipes/classification/quickstart.yaml"
        ) from error
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}", hint="check the path and its permissions") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(f"{file}:{line}:1: not UTF-8 text (byte {error.start})", hint="a recipe is a YAML text file") from error
    for number, line_text in enumerate(text.splitlines(), 1):
        bad = next((c for c in line_text if (ord(c) < 32 and c != "\t") or ord(c) == 127), None)
        if bad is not None:
            column = line_text.index(bad) + 1
            raise RecipeError(f"{file}:{number}:{column}: control character {bad!r}", hint="a recipe is a YAML text file")
    return text


def _scan(yaml: Any, text: str, file: Path) -> None:
    """Refuse by events what a node tree would already have expanded."""
    from ruamel.yaml.events import AliasEvent, DocumentStartEvent, MappingStartEvent, SequenceStartEvent

    depth = documents = 0
    for event in yaml.parse(text):
        place = f"{file}:{event.start_mark.line + 1}:{event.start_mark.column + 1}" if event.start_mark else str(file)
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None) is not None:
            raise RecipeError(
                f"{place}: anchors and aliases (& and *) are not allowed in recipes", hint="write the value out where it is used"
            )
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise RecipeError(f"{place}: a recipe is one YAML document; a second one begins here", hint="remove the line ---")
        if isinstance(event, MappingStartEvent | SequenceStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise RecipeError(
                    f"{place}: nested too deeply; at most {MAX_DEPTH} levels are allowed", hint="flatten the recipe"
                )
        elif type(event).__name__ in ("MappingEndEvent", "SequenceEndEvent"):
            depth -= 1


def _plain(node: Any, path: Path_, places: dict[Path_, Place], file: Path, yaml: Any) -> Any:
    from ruamel.yaml.nodes import MappingNode, SequenceNode

    places.setdefault(path, _place(node))
    if isinstance(node, MappingNode):
        _refuse_tag(node, "tag:yaml.org,2002:map", file)
        return _mapping(node, path, places, file, yaml)
    if isinstance(node, SequenceNode):
        _refuse_tag(node, "tag:yaml.org,2002:seq", file)
        return [_plain(item, (*path, index), places, file, yaml) for index, item in enumerate(node.value)]
    return _scalar(node, file)


def _mapping(node: Any, path: Path_, places: dict[Path_, Place], file: Path, yaml: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = _place(key_node)
        where = f"{file}:{place.line}:{place.column}"
        key = _scalar(key_node, file) if isinstance(key_node.value, str) else None
        if not isinstance(key, str):
            raise RecipeError(f"{where}: a key must be text, not {_word(key)}", hint="quote the key")
        inner = (*path, key)
        if key in result:
            raise RecipeError(
                f"{where}: {dotted(inner)}: duplicate key; it is already given in line {places[inner].line}",
                hint="remove one of the two",
            )
        places[inner] = place
        result[key] = _plain(value_node, inner, places, file, yaml)
    return result


def _scalar(node: Any, file: Path) -> Any:
    """A scalar by the YAML 1.2 core schema, as ruamel.yaml resolved its tag."""
    tag, text = str(node.tag).removeprefix("tag:yaml.org,2002:"), node.value
    where = f"{file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    if tag == "str":
        return text
    if tag == "null":
        return None
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        digits = text.replace("_", "")
        return int(digits, 0) if digits.lstrip("+-")[:2].lower() in ("0x", "0o", "0b") else int(digits)
    if tag == "float":
        name = text.replace("_", "").lower().removeprefix("+")
        value = math.nan if "nan" in name else math.inf if "inf" in name else float(name)
        if not math.isfinite(value):
            raise RecipeError(f"{where}: {text} is not a finite number", hint="give a finite number")
        return value
    if tag == "timestamp":
        return text  # a date means nothing in a recipe: it is the text that it looks like
    raise RecipeError(f"{where}: the tag {tag!r} is not allowed in recipes", hint="remove the tag; recipes hold plain values")


def _refuse_tag(node: Any, expected: str, file: Path) -> None:
    if str(node.tag) != expected:
        raise RecipeError(
            f"{file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}: the tag {node.tag} is not allowed in recipes",
            hint="remove the tag; recipes hold plain values",
        )


def _place(node: Any) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


def _tab_indents(text: str, line: int) -> bool:
    lines = text.splitlines()
    return any("\t" in found[: len(found) - len(found.lstrip())] for found in lines[max(0, line - 2) : line + 1])


def _word(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), "a number")
