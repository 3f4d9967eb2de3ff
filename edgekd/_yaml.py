"""YAML 1.2 to plain data, with the place of every value: strict where a recipe could surprise its author.

Plain values follow the core schema of YAML 1.2 and nothing else: ``on`` and a date are text, ``1e-4`` is a number. Refused:
duplicate keys, anchors and aliases, merge keys, tags, directives of other versions, several documents, keys that are not text,
non-finite numbers, tabs as indentation, files over 256 KiB (ruamel.yaml needs seconds for a megabyte), nesting deeper than 32.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_DIGITS = 40
"""No number of a recipe needs more, and Python refuses to read thousands."""

Path_ = tuple[str | int, ...]

# YAML 1.2.2, chapter 10.3.2; ruamel.yaml's own resolver also takes 1_000, 0b1 and dates
_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# what YAML 1.2 calls unprintable (chapter 5.1), and what ends a line in some editors and not in others
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


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
    """``stages[1].train.lr``; a key that is no plain name is quoted, so that a message stays one line."""
    text = ""
    for part in path:
        name = f"[{part}]" if isinstance(part, int) else part if _NAME.fullmatch(part) else shown(part)
        text += name if not text or isinstance(part, int) else f".{name}"
    return text


def shown(value: Any, limit: int = 60) -> str:
    """A value as a message shows it: on one line, and not endless."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def load(file: Path) -> Document:
    """Read a recipe file.

    Raises:
        RecipeError: It is missing, not text, too large, not YAML 1.2, or uses what is refused (see above).
    """
    text = _read(file)
    return _Builder(file, text).document()


def _read(file: Path) -> str:
    example = "give the path of a recipe, for instance recipes/classification/quickstart.yaml"
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise RecipeError(f"{file} is not a file", hint=example)
        if size > MAX_BYTES:
            raise RecipeError(
                f"{file} has {size:,} bytes; a recipe has at most {MAX_BYTES:,}",
                hint="is this a recipe? data and weights are named by path",
            )
        raw = file.read_bytes()
    except FileNotFoundError as error:
        raise RecipeError(f"{file} does not exist", hint=example) from error
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}", hint="check the path and its permissions") from error
    plain = "a recipe is a YAML text file"
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{file}:{line}:1: not UTF-8 text (byte {error.start})", hint=plain) from error
    if found := _UNPRINTABLE.search(text):
        line, column = text.count("\n", 0, found.start()) + 1, found.start() - text.rfind("\n", 0, found.start())
        raise RecipeError(f"{file}:{line}:{column}: control character {found.group()!r}", hint=plain)
    return text


@dataclass
class _Builder:
    """Builds plain data from the parser's events: nothing is expanded before it can be refused."""

    file: Path
    text: str
    places: dict[Path_, Place] = field(default_factory=dict)
    here: Place = Place(1, 1)
    """Where the latest event begins."""

    def document(self) -> Document:
        """The whole file."""
        self.events = self._events()
        data = None
        documents = 0
        for event in self.events:
            kind = type(event).__name__
            if kind == "DocumentStartEvent":
                documents += 1
                if documents > 1:
                    raise self._error("a recipe is one YAML document; a second one begins here", "remove the line ---")
                if event.version not in (None, (1, 2)) or event.tags:
                    raise self._error("only the directive %YAML 1.2 is allowed in recipes", "remove the lines that begin with %")
            elif kind not in ("StreamStartEvent", "StreamEndEvent", "DocumentEndEvent"):
                data = self._value(event, (), 0)
        if data is None:
            raise RecipeError(f"{self.file}:1:1: the recipe is empty", hint="copy a recipe from recipes/ and change it")
        if not isinstance(data, dict):
            place = self.places[()]
            where = f"{self.file}:{place.line}:{place.column}"
            raise RecipeError(
                f"{where}: a recipe is a mapping of sections, not {_word(data)}", hint="begin with: name: my-recipe"
            )
        return Document(self.file, self.text, data, self.places)

    def _value(self, event: Any, path: Path_, depth: int) -> Any:
        kind = type(event).__name__
        self.places.setdefault(path, self.here)
        self._refuse_surprises(event, kind)
        if kind == "ScalarEvent":
            return self._scalar(event)
        if depth == MAX_DEPTH:
            raise self._error(f"nested too deeply; at most {MAX_DEPTH} levels are allowed", "flatten the recipe")
        if kind == "MappingStartEvent":
            return self._mapping(path, depth)
        items: list[Any] = []
        while type(item := next(self.events)).__name__ != "SequenceEndEvent":
            items.append(self._value(item, (*path, len(items)), depth + 1))
        return items

    def _mapping(self, path: Path_, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while type(event := next(self.events)).__name__ != "MappingEndEvent":
            kind = type(event).__name__
            self._refuse_surprises(event, kind)
            if kind != "ScalarEvent":
                raise self._error(
                    f"a key must be text, not a {'list' if kind == 'SequenceStartEvent' else 'mapping'}", "write key: value"
                )
            if event.value == "<<" and not event.style:
                raise self._error("merge keys (<<) are not allowed in recipes", "write the values out where they are used")
            key = self._scalar(event)
            if not isinstance(key, str):
                raise self._error(f"a key must be text, not {_word(key)}", "quote the key")
            inner = (*path, key)
            if key in result:
                raise self._error(
                    f"{dotted(inner)}: duplicate key; it is already given in line {self.places[inner].line}",
                    "remove one of the two",
                )
            self.places[inner] = self.here
            result[key] = self._value(next(self.events), inner, depth + 1)
        return result

    def _refuse_surprises(self, event: Any, kind: str) -> None:
        if kind == "AliasEvent" or event.anchor is not None:
            raise self._error("anchors and aliases (& and *) are not allowed in recipes", "write the value out where it is used")
        if event.tag is not None:
            tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            raise self._error(
                f"the tag {shown(tag)[1:-1]} is not allowed in recipes", "remove the tag; recipes hold plain values"
            )

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if event.style:  # quoted, or a block of lines: text, whatever it looks like
            if found := re.search("[\ud800-\udfff]|[^\t\n\r\x20-\x7e\x85\xa0-\U0010ffff]", text):
                raise self._error(f"control character {found.group()!r} in a text", "remove the escape sequence")
            return text
        if _NULL.fullmatch(text):
            return None
        if found := _BOOL.fullmatch(text):
            return found[1] is not None
        number = _INT.fullmatch(text)
        if (number or _FLOAT.fullmatch(text)) and len(text) > MAX_DIGITS:
            raise self._error(f"{shown(text)[1:-1]} has more than {MAX_DIGITS} digits", "give a shorter number")
        if number:
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and not math.isfinite(float(text))):
            raise self._error(f"{text} is not a finite number", "give a finite number")
        return float(text) if _FLOAT.fullmatch(text) else text

    def _events(self) -> Iterator[Any]:
        """The parser's events; its errors become ours here, and nowhere else."""
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError

        try:
            for event in YAML(typ="safe", pure=True).parse(self.text):
                self.here = Place(event.start_mark.line + 1, event.start_mark.column + 1)
                yield event
        except MarkedYAMLError as error:
            raise self._syntax_error(error) from error
        except (RecipeError, GeneratorExit):
            raise
        except Exception as error:
            # Not only YAMLError: the scanner lets ValueError and others through for some malformed escapes and directives.
            raise self._error(f"not valid YAML 1.2: {str(error).splitlines()[0] if str(error) else error!r}", _QUOTE) from error

    def _syntax_error(self, error: Any) -> RecipeError:
        mark, opened = error.problem_mark or error.context_mark, error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (self.here.line, self.here.column)
        lines = self.text.splitlines()
        for number in range(max(1, line - 1), min(len(lines), line + 1) + 1):
            indentation = lines[number - 1][: len(lines[number - 1]) - len(lines[number - 1].lstrip())]
            if "\t" in indentation:
                self.here = Place(number, indentation.index("\t") + 1)
                return self._error("not valid YAML 1.2: a tab is used as indentation", "indent with spaces")
        self.here = Place(line, column)
        problem = error.problem or error.context or "it cannot be read"
        if opened and opened.line + 1 < line and error.context:
            # an open bracket or quote is noticed only where something else no longer fits
            problem += f" ({error.context}, which begins in line {opened.line + 1})"
        return self._error(f"not valid YAML 1.2: {' '.join(problem.split())}", _QUOTE)

    def _error(self, message: str, hint: str) -> RecipeError:
        return RecipeError(f"{self.file}:{self.here.line}:{self.here.column}: {message}", hint=hint)


_QUOTE = "quote values that begin with a special character, and close every bracket and quote"


def _word(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), "a number")
