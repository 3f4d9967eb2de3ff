import math
import os
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd._yaml import MAX_BYTES, MAX_DEPTH, Place, dotted, load, shown
from edgekd.errors import RecipeError


def read(folder, text):
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return load(path)


def refusal(folder, text):
    """The error that reading raises, or None."""
    try:
        read(folder, text)
    except RecipeError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-7", -7),
        ("010", 10),
        ("0o17", 15),
        ("0xFf", 255),
        ("1e-4", 1e-4),
        ("1e5", 1e5),
        (".5", 0.5),
        ("-1.", -1.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # all of these are something else in YAML 1.1, or to ruamel.yaml
        ("on", "on"),
        ("no", "no"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("_", "_"),
        ("0b11", "0b11"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("tRUE", "tRUE"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("'~'", "~"),
        ('"a\\nb\\u00e9"', "a\nbé"),
        ("|\n  two\n  lines", "two\nlines\n"),
        ("[1, [2, {b: c}]]", [1, [2, {"b": "c"}]]),
        ("{b: 1, c: }", {"b": 1, "c": None}),
    ],
)
def test_the_core_schema_of_yaml_1_2(text, value, tmp_path):
    found = read(tmp_path, f"a: {text}\n").data["a"]
    assert found == value
    assert type(found) is type(value)


def test_places(tmp_path):
    document = read(tmp_path, "name: x\nstages:\n  - kind: distill\n    train: {lr: 1, epochs: 2}\n  - {kind: prune}\n")
    assert document.place(("name",)) == Place(1, 1)
    assert document.place(("stages", 0)) == Place(3, 5)
    assert document.place(("stages", 0, "train", "epochs")) == Place(4, 20)
    assert document.place(("stages", 1, "kind")) == Place(5, 6)
    # what the file does not have stands where its nearest parent does
    assert document.place(("stages", 1, "train", "lr")) == Place(5, 5)
    assert document.place(("budget",)) == Place(1, 1)
    assert document.located(("stages", 0, "train", "lr"), "too large").endswith("recipe.yaml:4:13: stages[0].train.lr: too large")
    assert document.located((), "empty").endswith("recipe.yaml:1:1: empty")


def test_byte_order_mark_and_crlf(tmp_path):
    document = read(tmp_path, "\ufeffa: 1\r\nb:\r\n  c: [x,\r\n  y]\r\n")
    assert document.data == {"a": 1, "b": {"c": ["x", "y"]}}
    assert document.place(("b", "c")) == Place(3, 3)


def test_the_directive_of_this_version_is_allowed(tmp_path):
    assert read(tmp_path, "%YAML 1.2\n---\na: on\n...\n").data == {"a": "on"}


def test_paths_and_values_stay_on_one_line():
    assert dotted(("stages", 0, "train", "lr")) == "stages[0].train.lr"
    assert dotted(("data", "two\nlines", "x.y")) == 'data."two\\nlines"."x.y"'
    assert shown("é") == '"é"'
    assert len(shown("x" * 1000)) == 60


REFUSED = {
    "duplicate key": ("a: 1\nb: {c: 1, d: 2, c: 3}", 2, 17, "b.c: duplicate key; it is already given in line 2"),
    "duplicate key, other quotes": ("a: 1\n'a': 2", 2, 1, "a: duplicate key; it is already given in line 1"),
    "anchor": ("a: &x 1", 1, 4, "anchors and aliases"),
    "alias": ("a: *x", 1, 4, "anchors and aliases"),
    "anchor on a key": ("&x a: 1", 1, 1, "anchors and aliases"),
    "anchor on a list": ("a: 1\nb: &x [1]", 2, 4, "anchors and aliases"),
    "merge key": ("a:\n  <<: {b: 1}", 2, 3, "merge keys (<<) are not allowed"),
    "tag of Python": ("a: !!python/object:os.system [x]", 1, 4, "the tag !!python/object:os.system is not allowed"),
    "tag of one's own": ("a: 1\nb: !thing {c: 1}", 2, 4, "the tag !thing is not allowed"),
    "tag of the schema": ("a: !!int foo", 1, 4, "the tag !!int is not allowed"),
    "tag that means nothing": ("a: ! x", 1, 4, "the tag ! is not allowed"),
    "tag on a key": ("!!str 1: x", 1, 1, "the tag !!str is not allowed"),
    "endless tag": ("a: !" + "b" * 1000 + " x", 1, 4, "the tag !bbb"),
    "set": ("a: !!set {b}", 1, 4, "the tag !!set is not allowed"),
    "binary": ("a: !!binary aGVsbG8=", 1, 4, "the tag !!binary is not allowed"),
    "old version": ("%YAML 1.1\n---\na: on", 2, 1, "only the directive %YAML 1.2 is allowed"),
    "tag directive": ("%TAG ! tag:x,1:\n---\na: 1", 2, 1, "only the directive %YAML 1.2 is allowed"),
    "two documents": ("a: 1\n---\nb: 1", 2, 1, "a recipe is one YAML document; a second one begins here"),
    "number as key": ("a: {1: x}", 1, 5, "a key must be text, not a number"),
    "boolean as key": ("true: x", 1, 1, "a key must be text, not true or false"),
    "null as key": ("~: x", 1, 1, "a key must be text, not nothing"),
    "list as key": ("? [a, b]\n: x", 1, 3, "a key must be text, not a list"),
    "mapping as key": ("? {a: b}\n: x", 1, 3, "a key must be text, not a mapping"),
    "NaN": ("a: .nan", 1, 4, ".nan is not a finite number"),
    "infinity": ("a: [1, -.inf]", 1, 8, "-.inf is not a finite number"),
    "1e400": ("a: 1e400", 1, 4, "1e400 is not a finite number"),
    "5,000 digits": ("a: " + "7" * 5000, 1, 4, "has more than 40 digits"),
    "tab": ("a:\n  b: 1\n\tc: 2", 3, 1, "a tab is used as indentation"),
    "tab behind spaces": ("a:\n  b: 1\n  \tc: 2", 3, 3, "a tab is used as indentation"),
    "bracket": (
        "a: [1, 2\nb: 3",
        2,
        2,
        "expected ',' or ']', but got ':' (while parsing a flow sequence, which begins in line 1)",
    ),
    "brace": ("a: {b: 1\n", 2, 1, "which begins in line 1"),
    "quote": ("a: 'x", 1, 6, "unexpected end of stream"),
    "indentation": ("a: 1\n b: 2", 2, 3, "mapping values are not allowed here"),
    "reserved character": ("a: @b", 1, 4, "found character '@' that cannot start any token"),
    "escape beyond Unicode": ('a: "\\UFFFFFFFF"', 1, 1, "not valid YAML 1.2"),
    "escaped surrogate": ('a: "\\ud800"', 1, 4, "control character '\\ud800' in a text"),
    "escaped zero": ('b: 1\na: "x\\0"', 2, 4, "control character '\\x00' in a text"),
    "bell": ("a: 1\nb: \x07", 2, 4, "control character '\\x07'"),
    "form feed": ("a: 1\x0c\nb: 1", 1, 5, "control character '\\x0c'"),
    "delete": ("a: \x7f", 1, 4, "control character '\\x7f'"),
    "line separator": ("a: \u2028b", 1, 4, "control character '\\u2028'"),
    "second byte order mark": ("a: 1\n\ufeffb: 1", 2, 1, "control character '\\ufeff'"),
    "empty": ("", 1, 1, "the recipe is empty"),
    "only a comment": ("# nothing\n", 1, 1, "the recipe is empty"),
    "only a marker": ("---\n", 1, 1, "the recipe is empty"),
    "list": ("\n- a", 2, 1, "a recipe is a mapping of sections, not a list"),
    "text": ("a:b", 1, 1, "a recipe is a mapping of sections, not text"),
    "number": ("42", 1, 1, "a recipe is a mapping of sections, not a number"),
    "3,000 brackets": ("a: " + "[" * 3000, 1, 4 + MAX_DEPTH - 1, "nested too deeply; at most 32 levels"),
    "3,000 braces": ("{a: " * 3000, 1, 1 + 4 * MAX_DEPTH, "nested too deeply; at most 32 levels"),
    "3,000 dashes": ("- " * 3000, 1, 1 + 2 * MAX_DEPTH, "nested too deeply; at most 32 levels"),
    "Latin-1": ("a: 1\nb: é".encode("latin-1"), 2, 1, "not UTF-8 text (byte 8)"),
    "UTF-16": ("a: 1".encode("utf-16"), 1, 1, "not UTF-8 text (byte 0)"),
    "PNG": (b"\x89PNG\r\n\x1a\n\x00\x00", 1, 1, "not UTF-8 text (byte 0)"),
    "zeros": (bytes(100), 1, 1, "control character '\\x00'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_place_and_hint(name, tmp_path):
    text, line, column, message = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert caught.value.message.startswith(f"{tmp_path / 'recipe.yaml'}:{line}:{column}: ")
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    assert caught.value.hint


BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_a_billion_laughs_cost_nothing(tmp_path):
    start = time.monotonic()
    with pytest.raises(RecipeError, match="anchors and aliases"):
        read(tmp_path, BILLION_LAUGHS)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "text",
    [
        "&a " * 60_000,
        "%" * 200_000,
        "!" * 200_000,
        "? " * 100_000,
        'a: "' + "\\n" * 100_000 + '"',
        "a: " * 60_000,
        "- - \n" * 40_000,
    ],
)
def test_the_largest_files_are_read_or_refused_within_seconds(text, tmp_path):
    start = time.monotonic()
    error = refusal(tmp_path, text[:MAX_BYTES])
    assert error is None or len(error.message) < 500
    assert time.monotonic() - start < 10  # a guard against quadratic time; about 1 s on an idle machine


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"gone\.yaml does not exist") as caught:
        load(tmp_path / "gone.yaml")
    assert "quickstart.yaml" in caught.value.hint
    with pytest.raises(RecipeError, match="is not a file"):
        load(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read: File name too long"):
        load(tmp_path / ("x" * 300))
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be read: Not a directory"):
        load(tmp_path / "file" / "recipe.yaml")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="is not a file"):  # and does not wait for a writer
        load(tmp_path / "pipe")


def test_ten_megabytes_are_refused_unread(tmp_path):
    (tmp_path / "large.yaml").touch()
    os.truncate(tmp_path / "large.yaml", 10 << 20)
    with pytest.raises(RecipeError, match=re.escape("has 10,485,760 bytes; a recipe has at most 262,144")) as caught:
        load(tmp_path / "large.yaml")
    assert "is this a recipe?" in caught.value.hint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml")


SNIPPETS = [
    "a: ",
    "b: ",
    "- ",
    "? ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "\n",
    "  ",
    "\t",
    "&x ",
    "*x",
    "!t ",
    "!!int ",
    "<<: ",
    "'",
    '"',
    "\\",
    "|",
    ">",
    "#",
    "%",
]
SNIPPETS += [
    "---\n",
    "...\n",
    "1",
    "1e5",
    "0x",
    ".nan",
    "_",
    "~",
    "true",
    "\ufeff",
    "\x00",
    "é",
    "\\U",
    "%YAML 1.1\n",
    "%TAG ",
    "@",
    "`",
    ":",
]


@given(
    st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=3), max_size=30).map("".join)
    | st.text(max_size=60)
    | st.binary(max_size=60)
)
@settings(max_examples=400)
def test_any_file_is_plain_data_or_a_recipe_error(folder, text):
    if error := refusal(folder, text):
        assert error.hint
        assert "\n" not in error.message
    else:
        document = read(folder, text)
        check_plain(document.data, (), document)


def check_plain(value, path, document):
    assert document.place(path).line >= 1
    assert path in document.places
    if isinstance(value, dict):
        for key, item in value.items():
            assert type(key) is str
            check_plain(item, (*path, key), document)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_plain(item, (*path, index), document)
    else:
        assert type(value) in (str, int, float, bool, type(None))
        assert not isinstance(value, float) or math.isfinite(value)
