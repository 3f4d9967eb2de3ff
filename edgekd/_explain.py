"""Pydantic's errors in the words of a recipe's author: where, what was given, what is allowed, and the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekd._yaml import Document, Path_, dotted, shown
from edgekd.errors import RecipeError, nearest

MAX_PROBLEMS = 20
MAX_HINTS = 3
_MISSING = ("missing", "missing_argument")
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number", "int_from_float")
_LENGTHS = ("too_short", "too_long", "string_too_short", "string_too_long")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe."""

    path: Path_
    message: str
    hint: str = ""


def recipe_error(document: Document, problems: Sequence[Problem]) -> RecipeError:
    """All problems as one error, one line each, in the order of the file; the first few hints."""
    unique = {(problem.path, problem.message): problem for problem in problems}
    places = {key: document.place(problem.path) for key, problem in unique.items()}
    ordered = [unique[key] for key in sorted(unique, key=lambda key: (places[key].line, places[key].column))]
    lines = [document.located(problem.path, problem.message) for problem in ordered[:MAX_PROBLEMS]]
    if len(ordered) > MAX_PROBLEMS:
        lines.append(f"{document.file}: and {len(ordered) - MAX_PROBLEMS} more problems")
    hints = list(dict.fromkeys(problem.hint for problem in ordered if problem.hint))
    hints = [hint for hint in hints if not any(other != hint and other.startswith(hint) for other in hints)]
    return RecipeError("\n".join(lines), hint="; ".join(hints[:MAX_HINTS]) or "edgekd schema prints all keys and their types")


def explain(found: Any, data: Any, schema: dict[str, Any]) -> Problem:
    """One of pydantic's errors.

    Args:
        found: An item of ``ValidationError.errors()``.
        data: The whole recipe, as plain data.
        schema: The JSON Schema of recipes.
    """
    kind, context, given = found["type"], found.get("ctx", {}), found.get("input")
    path, parent, node = _resolve(found["loc"], data, schema, missing=kind in _MISSING)
    keys = list(parent.get("properties", {}))
    meaning = _meaning(path, node)
    if kind in _UNKNOWN:
        return Problem(path, f"unknown key{nearest(str(path[-1]), keys)}; allowed: {', '.join(keys)}")
    if kind in _MISSING:
        strangers = [key for key in _mapping_at(data, path[:-1]) if key not in keys]
        return Problem(path, f"required key is missing{nearest(str(path[-1]), strangers)}", meaning)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_member(path, str(context["discriminator"]).strip("'"), given, node)
    if kind == "literal_error":
        allowed = re.findall(r"'[^']*'|\d+", str(context["expected"]))
        choices = [choice.strip("'") for choice in allowed]
        text = str(given)
        return Problem(path, f"unknown value {shown(given)}{nearest(text[:40], choices)}; allowed: {', '.join(choices)}", meaning)
    if kind == "string_pattern_mismatch":
        return Problem(path, f"must match the pattern {context['pattern']}; given: {shown(given)}", meaning)
    message = str(found["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind == "value_error":
        return _from_validator(path, message, given, _follow(node, schema, given), meaning)
    if kind.endswith("_type") or kind in _RANGES or kind in _LENGTHS:
        message = f"must be {_allowed(node, schema)}"
    return Problem(path, f"{message}; given: {_described(given)}", _quotes(kind, given) or meaning)


def _wrong_member(path: Path_, key: str, given: Any, node: dict[str, Any]) -> Problem:
    """A mapping whose discriminator (kind or name) is missing or unknown."""
    choices = list(node.get("discriminator", {}).get("mapping", {}))
    allowed = f"allowed: {', '.join(choices)}"
    if not isinstance(given, dict) or key not in given:
        return Problem(path, f"required key {key!r} is missing; {allowed}")
    hint = "quote it: 'null'; without quotes it is YAML's word for nothing" if given[key] is None and "null" in choices else ""
    return Problem((*path, key), f"unknown value {shown(given[key])}{nearest(str(given[key])[:40], choices)}; {allowed}", hint)


def _from_validator(path: Path_, message: str, given: Any, node: dict[str, Any], meaning: str) -> Problem:
    """A message of our own validators. One over a whole mapping is about the first of its keys that it names."""
    if not isinstance(given, dict):
        return Problem(path, message, meaning)
    key = next((word for word in re.findall(r"\w+", message) if word in given), None)
    if key is None:
        return Problem(path, message)
    path, message = (*path, key), re.sub(rf"^{key}:? (?=must|'|names)", "", message)
    return Problem(path, message, _meaning(path, node.get("properties", {}).get(key)))


def _quotes(kind: str, given: Any) -> str:
    if (
        kind in ("int_type", "float_type", "bool_type")
        and isinstance(given, str)
        and re.fullmatch(r"[-+\d.e]+|true|false", given)
    ):
        return "write it without quotes"
    return "quote it" if kind == "string_type" and isinstance(given, bool | int | float) else ""


def _meaning(path: Path_, node: dict[str, Any] | None) -> str:
    """What a key is for, as its documentation says."""
    text = " ".join(str((node or {}).get("description", "")).split())
    return f"{dotted(path[-1:])}: {text.rstrip('.')}" if text and path and isinstance(path[-1], str) else ""


def _described(given: Any) -> str:
    return {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(given)) or shown(given)


def _allowed(node: dict[str, Any] | None, schema: dict[str, Any]) -> str:
    """What may stand at a place, from its schema."""
    if node is None:
        return "something else"
    if choices := node.get("anyOf"):
        return " or ".join(dict.fromkeys(_allowed(choice, schema) for choice in choices))
    node = _follow(node, schema, None)
    kind = node.get("type")
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _range(node)
    if kind in ("array", "string"):
        low, high = (node.get(key) for key in (("minItems", "maxItems") if kind == "array" else ("minLength", "maxLength")))
        name, unit = ("a list", "items") if kind == "array" else ("text", "characters")
        limits = [f"at least {low}"] * bool(low) + [f"at most {high}"] * (high is not None)
        return name + (f" of {' and '.join(limits)} {unit}" if limits else "")
    if kind == "object" or "properties" in node or "discriminator" in node:
        keys = list(node.get("properties", {})) or [node["discriminator"]["propertyName"]] if node.keys() & _KEYED else []
        return "a mapping (key: value)" + (f" with the keys {', '.join(keys)}" if keys else "")
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "something else")


_KEYED = {"properties", "discriminator"}


def _range(node: dict[str, Any]) -> str:
    if {"minimum", "maximum"} <= node.keys():
        return f" from {node['minimum']:,} to {node['maximum']:,}"
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {node[key]:,}" for key, word in words.items() if key in node]
    return f" {' and '.join(limits)}" if limits else ""


def _mapping_at(data: Any, path: Path_) -> dict[str, Any]:
    for part in path:
        if isinstance(data, list) and isinstance(part, int):
            data = data[part]
        else:
            data = data.get(part) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def _resolve(
    loc: tuple[Any, ...], data: Any, schema: dict[str, Any], *, missing: bool
) -> tuple[Path_, dict[str, Any], dict[str, Any]]:
    """What pydantic's location means: it also names members of unions, which are no part of the path.

    Returns:
        The path in the recipe, the schema of the mapping or list that it lies in, and the schema of its value.
    """
    path: list[str | int] = []
    node = parent = schema
    for number, part in enumerate(loc):
        around = _follow(node, schema, data)
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if not inside and not (missing and number == len(loc) - 1):
            continue
        path.append(part)
        parent, data = around, data[part] if inside else None
        node = around.get("properties", {}).get(part, {}) if isinstance(part, str) else around.get("items", {})
    return tuple(path), parent, node


def _follow(node: dict[str, Any], schema: dict[str, Any], data: Any) -> dict[str, Any]:
    """Resolve references, optional values and discriminated unions down to the schema of ``data``."""
    for _ in range(8):
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        elif "discriminator" in node:
            tag = data.get(node["discriminator"]["propertyName"]) if isinstance(data, dict) else None
            reference = node["discriminator"]["mapping"].get(tag) if isinstance(tag, str) else None
            if reference is None:
                return node
            node = {"$ref": reference}
        elif "anyOf" in node:
            node = next((choice for choice in node["anyOf"] if choice.get("type") != "null"), {})
        else:
            return node
    return node
