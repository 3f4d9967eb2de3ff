"""Recipes through the command line, as a user meets them: what is right is accepted, what is wrong is explained."""

import copy
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import edgekd
from edgekd.errors import RecipeError
from edgekd.models.superyolo import STRIDES
from edgekd.recipe import SALIENCY, SEGMENTERS, Recipe, json_schema, load_recipe, preflight, smoke

ROOT = Path(edgekd.__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))

BASE = """\
name: base
task: {kind: classification}
data: {kind: digits, size_px: 16}
teacher:
  model: {name: resnet20}
  train: {epochs: 20, lr: 0.1, warmup_epochs: 1}
student:
  model: {name: resnet8}
compare: [student_alone]
stages:
  - kind: distill
    method: {name: logits, temperature: 4}
    train: {epochs: 16, lr: 0.1}
  - kind: prune
    macs: 0.6
    train: {epochs: 8}
  - kind: quantize
    method: {name: logits}
    train: {epochs: 6, weight_decay: 0}
deploy:
  - backend: {name: onnxruntime, threads: 1}
    precision: [float32, int8]
    models: [teacher, student]
  - backend: {name: "null"}
    precision: [float32]
budget: {size_mib: 1.0, accuracy_drop: 3}
"""
IMAGES = BASE.replace("{kind: digits, size_px: 16}", "{kind: image_folder, root: pets, size_px: 16}")
TEACHER = BASE[BASE.index("teacher:") : BASE.index("student:\n")]
DISTILL = BASE[BASE.index("  - kind: distill") : BASE.index("  - kind: prune")]
QUANTIZE = BASE[BASE.index("  - kind: quantize") : BASE.index("deploy:")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, with a data folder of two classes."""
    for split in ("train", "val", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "data" / "pets" / split / label).mkdir(parents=True)
    monkeypatch.setenv("EDGEKD_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # validate adds the recipe's folder
    monkeypatch.setitem(sys.modules, "timm", None)  # not installed, whatever this environment has
    return tmp_path


def test_the_base_of_all_tests_is_valid(folder, run):
    for number, text in enumerate((BASE, IMAGES, "\ufeff" + BASE, BASE.replace("\n", "\r\n"))):
        (folder / f"{number}.yaml").write_bytes(text.encode())
        code, out, err = run("validate", f"{number}.yaml")
        assert (code, err) == (0, "")
        assert out == f"{number}.yaml: valid. distill > prune > quantize; up to 5 engines\n"


@dataclass(frozen=True)
class Bad:
    """A recipe with one thing wrong, and what must be said about it."""

    old: str
    """What is replaced in the base..."""
    new: str
    """... and by what."""
    at: str
    """Text in the new recipe where the message must point to; its first occurrence."""
    says: str
    """Part of the message."""
    hint: str = ""
    """Part of the hint."""
    base: str = BASE


BAD = {
    # --- keys ---
    "unknown section": Bad(
        "name: base", "name: base\nsed: 1", "sed", "sed: unknown key (did you mean 'seed'?); allowed: name, seed,"
    ),
    "unknown key in a section": Bad("size_mib", "size_mb", "size_mb", "budget.size_mb: unknown key (did you mean 'size_mib'?)"),
    "unknown key in training": Bad(
        "warmup_epochs", "warmup_epoch", "warmup_epoch", "teacher.train.warmup_epoch: unknown key (did you mean 'warmup_epochs'?)"
    ),
    "unknown key in a stage": Bad(
        "macs: 0.6", "macs: 0.6\n    roundto: 8", "roundto", "stages[1].roundto: unknown key (did you mean"
    ),
    "unknown key in a method": Bad(
        "temperature",
        "temprature",
        "temprature",
        "stages[0].method.temprature: unknown key (did you mean 'temperature'?); allowed: name,",
    ),
    "unknown key in a backend": Bad(
        "threads", "thread", "thread", "deploy[0].backend.thread: unknown key (did you mean 'threads'?)"
    ),
    "unknown key in data": Bad(
        "size_px", "size", "size", "data.size: unknown key (did you mean 'size_px'?); allowed: kind, size_px,"
    ),
    "key with spaces": Bad("name: base", 'name: base\n"two\\nlines": 1', '"two', '"two\\nlines": unknown key'),
    "duplicate section": Bad("compare:", "task:", "task: [", "task: duplicate key; it is already given in line 2", "remove one"),
    "duplicate inner key": Bad("epochs: 6", "epochs: 6, epochs: 7", "epochs: 7", "stages[2].train.epochs: duplicate key"),
    "missing section": Bad(
        "student:\n  model", "studnt:\n  model", "name: base", "student: required key is missing (did you mean 'studnt'?)"
    ),
    "missing key": Bad(
        "{epochs: 8}", "{lr: 1}", "train: {lr: 1}", "stages[1].train.epochs: required key is missing", "Passes over"
    ),
    "missing kind": Bad(
        "- kind: prune\n    macs", "- macs", "macs", "stages[1]: required key 'kind' is missing; allowed: distill, finetune,"
    ),
    "missing name of a backend": Bad(
        "{name: onnxruntime, threads: 1}",
        "{threads: 1}",
        "backend: {threads",
        "deploy[0].backend: required key 'name' is missing; allowed",
    ),
    "model without a name": Bad(
        "{name: resnet8}", "{}", "model: {}", "student.model.name: required key is missing", "A name that"
    ),
    # --- types ---
    "text for a section": Bad(
        "{kind: classification}", "classification", "task", "task: must be a mapping (key: value) with the keys kind"
    ),
    "number for a list": Bad(
        "compare: [student_alone]", "compare: 3", "compare", "compare: must be a list; given: 3", "also trains"
    ),
    "mapping for a list": Bad(
        "precision: [float32]", "precision: {a: 1}", "precision: {a", "must be a list of at least 1 items; given: a mapping"
    ),
    "text for an integer": Bad(
        "epochs: 20", 'epochs: "2"', "epochs", 'must be an integer from 1 to 10,000; given: "2"', "without quotes"
    ),
    "text for a number": Bad(
        "lr: 0.1", "lr: fast", "lr", 'teacher.train.lr: must be a number above 0 and at most 10; given: "fast"', "Learning rate"
    ),
    "boolean for an integer": Bad("epochs: 20", "epochs: true", "epochs", "must be an integer from 1 to 10,000; given: true"),
    "boolean for a number": Bad(
        "lr: 0.1", "lr: false", "lr", "teacher.train.lr: must be a number above 0 and at most 10; given: false"
    ),
    "fraction for an integer": Bad("epochs: 20", "epochs: 2.5", "epochs", "must be an integer from 1 to 10,000; given: 2.5"),
    "fraction that is whole": Bad("epochs: 20", "epochs: 2.0", "epochs", "must be an integer from 1 to 10,000; given: 2.0"),
    "nothing for a number": Bad(
        "temperature: 4", "temperature: null", "temperature", "must be a number above 0 and at most 100; given: nothing"
    ),
    "number for text": Bad(
        "name: base", "name: 3", "name", "name: must be text of at least 1 and at most 64 characters; given: 3", "quote it"
    ),
    "word of YAML 1.1 for a boolean": Bad(
        "size_px: 16", "size_px: 16, augment: {flip: on}", "flip", 'data.augment.flip: must be true or false; given: "on"'
    ),
    "text for an option": Bad(
        "threads: 1", "threads: '1'", "threads", 'backend.threads: must be an integer; given: "1"', "without quotes"
    ),
    "nothing for a section": Bad("{size_mib: 1.0, accuracy_drop: 3}", "[]", "budget", "budget: must be a mapping"),
    # --- values ---
    "out of range": Bad("lr: 0.1", "lr: 0", "lr", "teacher.train.lr: must be a number above 0 and at most 10; given: 0"),
    "out of range in a method": Bad(
        "temperature: 4", "temperature: 1e3", "temp", "must be a number above 0 and at most 100; given: 1000.0"
    ),
    "out of range in an option": Bad(
        "threads: 1", "threads: 0", "threads", "deploy[0].backend.threads: must be an integer from 1 to 1024", "1 to 1024"
    ),
    "negative seed": Bad(
        "name: base", "name: base\nseed: -1", "seed", "seed: must be an integer from 0 to 2,147,483,647; given: -1"
    ),
    "a seed of 30 digits": Bad(
        "name: base", "name: base\nseed: " + "9" * 30, "seed", "seed: must be an integer from 0 to 2,147,483,647"
    ),
    "a number of 30 digits": Bad("lr: 0.1", "lr: " + "9" * 30, "lr", "teacher.train.lr: must be a number above 0 and at most 10"),
    "a number of 300 digits": Bad("lr: 0.1", "lr: " + "9" * 300, "999", "has more than 40 digits"),
    "NaN": Bad("lr: 0.1", "lr: .nan", ".nan", ".nan is not a finite number"),
    "1e400": Bad("lr: 0.1", "lr: 1e400", "1e400", "1e400 is not a finite number"),
    "no stages": Bad(
        BASE[BASE.index("stages:") :], "stages: []\n", "stages", "stages: must be a list of at least 1 and at most 20 items"
    ),
    "a name with a space": Bad(
        "name: base", "name: my base", "name", 'name: must match the pattern ^[A-Za-z0-9][A-Za-z0-9._-]*$; given: "my', "letters"
    ),
    "a name that climbs": Bad("name: base", "name: ../../base", "name", "name: must match the pattern", "letters, digits"),
    "an endless name": Bad("name: base", "name: " + "x" * 5000, "name", 'at most 64 characters; given: "xxxxxxxx'),
    "unknown task": Bad("classification", "segmentaton", "kind", 'task.kind: unknown value "segmentaton"'),
    "unknown data": Bad(
        "digits",
        "digit",
        "kind: digit,",
        "data.kind: unknown value \"digit\" (did you mean 'digits'?); allowed: callable, callable_boxes,",
    ),
    "unknown stage": Bad(
        "kind: prune", "kind: prun", "kind: prun\n", "stages[1].kind: unknown value \"prun\" (did you mean 'prune'?); allowed:"
    ),
    "unknown method": Bad(
        "name: logits, temp", "name: logit, temp", "name: logit,", 'stages[0].method.name: unknown value "logit" (did you mean'
    ),
    "unknown backend": Bad(
        "onnxruntime",
        "onxruntime",
        "name: onx",
        "deploy[0].backend.name: unknown value \"onxruntime\" (did you mean 'onnxruntime'?)",
    ),
    "null without quotes": Bad(
        '{name: "null"}', "{name: null}", "name: null", "deploy[1].backend.name: unknown value null", "quote it: 'null'"
    ),
    "unknown model": Bad(
        "resnet8",
        "resnet9",
        "name: resnet9",
        "student.model.name: unknown model 'resnet9' (did you mean 'resnet8'?); allowed: resnet8,",
    ),
    "unknown precision": Bad(
        "[float32, int8]", "[float32, int4]", "int4", "deploy[0].precision[1]: unknown value \"int4\" (did you mean 'int8'?)"
    ),
    "unknown role": Bad(
        "[teacher, student]",
        "[techer, student]",
        "techer",
        "deploy[0].models[0]: unknown value \"techer\" (did you mean 'teacher'?)",
    ),
    "unknown GPU": Bad(
        '{name: "null"}',
        "{name: tensorrt_rtx, compute_capabilities: [SM90]}",
        "compute_cap",
        "deploy[1].backend.compute_capabilities: must be one of SM75, SM80, SM86, SM89, SM120, SM121, current; received 'SM90'",
        "GPUs to build for",
    ),
    # --- what one key demands of another ---
    "warm-up longer than training": Bad(
        "epochs: 20", "epochs: 1", "warmup_epochs", "warmup_epochs 1.0 must be less than epochs 1"
    ),
    "batch that cannot be split": Bad(
        "epochs: 20", "epochs: 20, batch_size: 50, accumulate: 3", "batch_size", "must be a multiple of accumulate 3"
    ),
    "ratio and macs": Bad(
        "macs: 0.6", "macs: 0.6\n    ratio: 0.5", "ratio", "stages[1].ratio: give exactly one of ratio and macs"
    ),
    "neither ratio nor macs": Bad("    macs: 0.6\n", "", "kind: prune", "stages[1]: give exactly one of ratio and macs"),
    "teacher missing": Bad(
        TEACHER,
        "",
        "method: {name: logits, temp",
        "stages[0].method: the method 'logits' needs a teacher",
        "add a teacher section",
    ),
    "untrained teacher": Bad(
        "\n  train: {epochs: 20, lr: 0.1, warmup_epochs: 1}",
        "",
        "teacher",
        "teacher: an untrained teacher teaches nothing",
        "teacher.train",
    ),
    "drop without a teacher": Bad(
        TEACHER + BASE[BASE.index("student:\n") : BASE.index("  - kind: prune")],
        "student:\n  model: {name: resnet8}\nstages:\n  - kind: finetune\n    train: {epochs: 1}\n",
        "accuracy_drop",
        "budget.accuracy_drop: the drop is measured against the teacher, and the recipe has none",
        "add a teacher section",
    ),
    "quantizing under a teacher that is not there": Bad(
        TEACHER,
        "",
        "method: {name: logits, temp",
        "needs a teacher",
        base=BASE.replace("    method: {name: logits}", "    teacher: teacher"),
    ),
    "alone without a distill stage": Bad(
        DISTILL,
        "  - kind: finetune\n    train: {epochs: 1}\n",
        "compare",
        "student_alone needs a distill stage, whose budget it takes",
    ),
    "prune before training": Bad(
        DISTILL,
        "",
        "kind: prune",
        "stages[0].kind: prune needs a trained student",
        base=BASE.replace("compare: [student_alone]\n", ""),
    ),
    "stage after quantize": Bad(
        "deploy:",
        "  - kind: finetune\n    train: {epochs: 1}\ndeploy:",
        "kind: finetune",
        "stages[3].kind: finetune comes after quantize",
        "put one stage that quantizes last",
    ),
    "stage after ptq": Bad(
        QUANTIZE,
        "  - kind: ptq\n" + QUANTIZE,
        "kind: quantize",
        "stages[3].kind: quantize comes after ptq; a quantized model is final",
    ),
    "ptq before training": Bad(
        DISTILL,
        "  - kind: ptq\n",
        "kind: ptq",
        "stages[0].kind: ptq needs a trained student",
        base=BASE.replace("compare: [student_alone]\n", ""),
    ),
    "fallback without a limit": Bad(
        QUANTIZE,
        "  - kind: ptq\n    fallback: {max_float: 0.2}\n",
        "fallback:",
        "stages[2].fallback",
        "max_drop",
    ),
    "unknown calibration": Bad(
        QUANTIZE,
        "  - kind: ptq\n    quantizer: {calibration: entropic}\n",
        "calibration: entropic",
        "stages[2].quantizer.calibration",
        "least KL divergence",
    ),
    "int8 without quantize": Bad(
        QUANTIZE,
        "",
        "int8",
        "deploy[0].precision[1]: int8 needs a quantized student, and no stage quantizes it",
        "deploy float32",
    ),
    "precision that the backend lacks": Bad(
        "[float32, int8]",
        "[float32, float16]",
        "float16",
        "deploy[0].precision[1]: onnxruntime on the CPU here runs float32, int8; not 'float16'",
    ),
    "precision that the GPU lacks": Bad(
        '{name: "null"}',
        "{name: tensorrt_rtx, compute_capabilities: [SM75]}",
        "float32]\nbudget",
        "no float32 matrix products on SM75",
    ),
    "precision twice": Bad(
        "[float32, int8]", "[float32, int8, float32]", "float32]", "deploy[0].precision[2]: float32 is given twice", "remove one"
    ),
    "model twice": Bad(
        "[teacher, student]", "[student, student]", "student]\n  - backend", "deploy[0].models[1]: student is given twice"
    ),
    "no precision": Bad(
        "precision: [float32, int8]", "precision: []", "precision: []", "deploy[0].precision: must be a list of at least 1 items"
    ),
    "teacher in int8 only": Bad(
        "[float32, int8]", "[int8]", "teacher, student]", "deploy[0].models[0]: teacher is deployed in float only"
    ),
    "alone that is not trained": Bad(
        "compare: [student_alone]\n",
        "",
        "student_alone",
        "student_alone is not trained",
        "add compare",
        BASE.replace("[teacher, student]", "[student_alone]"),
    ),
    "batch that the files do not take": Bad(
        "budget: {size",
        "export: {batch: 4}\nbudget: {size",
        "backend: {name: onnxruntime",
        "deploy[0].batch: batch is 1, and the files take 4 only",
        "leave export.batch free",
    ),
    "budget without limit": Bad(
        "{size_mib: 1.0, accuracy_drop: 3}",
        "{size_mib: null}",
        "budget",
        "budget: the budget has no limit",
        "give one of latency_ms",
    ),
    "budget without a student": Bad(
        "models: [teacher, student]",
        "models: [teacher]",
        "budget",
        "a budget needs a deployed student",
        base=BASE.replace("[float32]", "[float32]\n    models: [teacher]"),
    ),
    "call without callable": Bad(
        "{name: resnet8}", "{name: resnet8, call: 'a:b'}", "call", "call belongs to name 'callable', but name is 'resnet8'"
    ),
    "callable without call": Bad(
        "{name: resnet8}", "{name: callable}", "name: callable", "student.model.name: 'callable' needs call"
    ),
    "no import path": Bad(
        "{name: resnet8}",
        "{name: callable, call: a.b}",
        "call: a.b",
        "'a.b' is not an import path; write package.module:function",
    ),
    "calibrating on the test split": Bad(
        "size_px: 16}",
        "size_px: 16, splits: {calib: test}}",
        "calib",
        "setting ranges on the evaluation split would flatter its result",
        base=IMAGES,
    ),
    "two splits in one folder": Bad(
        "size_px: 16}", "size_px: 16, splits: {val: train}}", "val", "train and val share the folder 'train'", base=IMAGES
    ),
    # --- what is looked up: files, folders, modules, taps ---
    "missing data folder": Bad(
        "root: pets", "root: pest", "root", "data.root: 'pest' does not exist; looked for: ", "EDGEKD_DATA", IMAGES
    ),
    "path that climbs": Bad(
        "root: pets", "root: ../data/pets", "root", "climbs out of its folder with '..'", "give an absolute path", IMAGES
    ),
    "absolute path that is not there": Bad(
        "root: pets", "root: /no/such", "root", "data.root: /no/such does not exist", base=IMAGES
    ),
    "missing split": Bad(
        "size_px: 16}",
        "size_px: 16, splits: {test: exam}}",
        "test: exam",
        "data.splits.test: 'exam' does not exist",
        "correct data.splits.test",
        IMAGES,
    ),
    "split that climbs": Bad(
        "size_px: 16}",
        "size_px: 16, splits: {val: ../x}}",
        "val",
        "data.splits.val: the relative path '../x' climbs out",
        "under data.root",
        IMAGES,
    ),
    "calibration split inside the test split": Bad(
        "size_px: 16}",
        "size_px: 16, splits: {calib: test/cat}}",
        "root",
        "calib and test share the folder",
        "data.splits.calib: null",
        IMAGES,
    ),
    "missing weights": Bad(
        "resnet8}", "resnet8, weights: w.safetensors}", "weights", "student.model.weights: 'w.safetensors' does not exist"
    ),
    "missing weights of a backbone": Bad(
        "resnet8}",
        "resnet8, backbone_weights: w.safetensors}",
        "backbone_weights",
        "student.model.backbone_weights: 'w.safetensors' does not exist",
    ),
    "weights in nobody's home": Bad(
        "resnet8}", "resnet8, weights: ~nobody-here/w.pt}", "weights", "~nobody-here/w.pt does not exist"
    ),
    "weights with an endless name": Bad(
        "resnet8}", "resnet8, weights: " + "w" * 5000 + "}", "weights", "cannot be read: File name too long"
    ),
    "unknown tap": Bad(
        "resnet8}",
        "resnet8, taps: {stage1: layers.9}}",
        "taps",
        "student.model.taps: tap 'stage1': the model has no module 'layers.9'",
        "stage1",
    ),
    "unknown argument of a model": Bad(
        "resnet8}",
        "resnet8, arguments: {widh: 2}}",
        "arguments",
        "model 'resnet8' has no argument 'widh' (did you mean 'width'?)",
        "its arguments are: width",
    ),
    "module that is not there": Bad(
        "{name: resnet8}",
        "{name: callable, call: 'nowhere.models:build'}",
        "call: 'n",
        "the module 'nowhere.models' of 'nowhere.models:build' cannot be imported",
    ),
    "function that is not there": Bad(
        "{kind: digits, size_px: 16}",
        "{kind: callable, call: 'json:lods'}",
        "call: 'j",
        "data.call: the module 'json' has no 'lods' (did you mean 'loads'?)",
    ),
    "data call that is no import path": Bad(
        "{kind: digits, size_px: 16}",
        "{kind: callable, call: json}",
        "call: j",
        "must match the pattern",
        "package.module:function",
    ),
    "zoo that is not installed": Bad(
        "resnet8",
        "'timm:resnet18'",
        "name: 'timm",
        "student.model.name: the Python package 'timm' cannot be imported",
        "pip install 'edgekd[zoo]'",
    ),
    # --- YAML ---
    "tab": Bad(
        "  model: {name: resnet8}", "\tmodel: {name: resnet8}", "\tmodel", "a tab is used as indentation", "indent with spaces"
    ),
    "open bracket": Bad("[teacher, student]", "[teacher, student", ': {name: "null', "which begins in line 23"),
    "anchor": Bad("{epochs: 8}", "&t {epochs: 8}", "&t", "anchors and aliases (& and *) are not allowed"),
    "merge key": Bad("{epochs: 8}", "{<<: {epochs: 8}}", "<<", "merge keys (<<) are not allowed"),
    "tag": Bad(
        "name: base",
        "name: !!python/object/apply:os.system [ls]",
        "!!python",
        "the tag !!python/object/apply:os.system is not allowed",
    ),
    "date as a key": Bad("name: base", "2024-01-01: base", "2024", '"2024-01-01": unknown key'),
    "number as a key": Bad("name: base", "name: base\n1: 2", "1: 2", "a key must be text, not a number"),
    "list as a key": Bad("name: base", "? [a]\n: base", "[a]", "a key must be text, not a list"),
    "two documents": Bad("teacher:", "---\nteacher:", "---", "a recipe is one YAML document; a second one begins here"),
    "control character": Bad("resnet8", "resnet8\x07", "\x07", "control character '\\x07'"),
    "3,000 brackets": Bad(
        "name: base",
        "name: base\nx: " + "[" * 31 + "a,\n" + "[" * 3000,
        "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
        "nested too deeply; at most 32 levels are allowed",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_explained(name, folder, run):
    bad = BAD[name]
    assert bad.old in bad.base
    text = bad.base.replace(bad.old, bad.new, 1)
    (folder / "bad.yaml").write_bytes(text.encode())
    code, out, err = run("validate", "bad.yaml")
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert len(err) < 3000
    *errors, hint = err.splitlines()
    assert hint.startswith("hint: ")
    assert bad.hint in hint
    assert all(line.startswith("error: bad.yaml:") for line in errors)
    before = text[: text.index(bad.at)]
    place = f"bad.yaml:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}: "
    assert [line for line in errors if line.startswith(f"error: {place}") and bad.says in line], (place, err)


WHOLE = {
    "empty": (b"", "bad.yaml:1:1: the recipe is empty", "copy a recipe"),
    "only a comment": (b"# later", "bad.yaml:1:1: the recipe is empty", "copy a recipe"),
    "list": (b"- name: x", "bad.yaml:1:1: a recipe is a mapping of sections, not a list", "begin with: name"),
    "text": (b"name", "bad.yaml:1:1: a recipe is a mapping of sections, not text", "begin with: name"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "bad.yaml:1:1: not UTF-8 text (byte 0)", "a YAML text file"),
    "zeros": (bytes(1000), "bad.yaml:1:1: control character '\\x00'", "a YAML text file"),
    "UTF-16": (BASE.encode("utf-16"), "bad.yaml:1:1: not UTF-8 text", "a YAML text file"),
    "10 MB": (b"# " + b"x" * 10_000_000, "bad.yaml has 10,000,002 bytes; a recipe has at most 262,144", "is this a recipe?"),
    "JSON that is no recipe": (b'{"a": [1, 2]}', "bad.yaml:1:2: a: unknown key; allowed: name", ""),
    "billion laughs": (
        b"".join(b"%c: &%c [%s]\n" % (97 + n, 97 + n, b", ".join([b"*%c" % (96 + n) if n else b"x"] * 9)) for n in range(9)),
        "bad.yaml:1:4: anchors and aliases",
        "write the value out",
    ),
    "100 unknown keys": ("".join(f"k{n}: 1\n" for n in range(100)).encode(), "bad.yaml: and 85 more problems", ""),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_no_recipe_is_explained(name, folder, run):
    content, message, hint = WHOLE[name]
    (folder / "bad.yaml").write_bytes(content)
    code, out, err = run("validate", "bad.yaml")
    assert (code, out) == (2, "")
    assert f"error: {message}" in err
    assert hint in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("path", "message"), [("gone.yaml", "gone.yaml does not exist"), (".", ". is not a file"), ("x" * 300, "too long")]
)
def test_a_path_that_is_no_file_is_explained(path, message, folder, run):
    code, _, err = run("validate", path)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_all_problems_are_told_at_once_in_the_order_of_the_file(folder):
    (folder / "bad.yaml").write_text(BASE.replace("lr: 0.1", "lr: 0").replace("size_px", "size").replace("[float32]", "[flot32]"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "bad.yaml")
    lines = [int(line.split(":")[1]) for line in caught.value.message.splitlines()]
    assert lines == [3, 6, 13, 25]


def test_a_model_whose_channels_cannot_be_followed_is_not_pruned(folder):
    text = (ROOT / "recipes" / "segmentation" / "fakd.yaml").read_text()
    text = text.replace("student:\n  model: {name: unet, arguments: {width: 8}}", "student:\n  model: {name: fanet}")
    (folder / "recipe.yaml").write_text(text.replace("deploy:", "  - {kind: prune, macs: 0.6, train: {epochs: 1}}\ndeploy:"))
    with pytest.raises(RecipeError, match=r"stages\[1\].kind: the channels of fanet cannot be followed"):
        load_recipe(Path("recipe.yaml"))


def test_logits_are_for_classes(folder):
    text = (ROOT / "recipes" / "segmentation" / "fakd.yaml").read_text()
    (folder / "recipe.yaml").write_text(re.sub(r"method: .*", "method: {name: logits}", text))
    with pytest.raises(
        RecipeError, match=r"stages\[0\].method: logits compares the scores of classes, .* segmentation does not give"
    ):
        load_recipe(Path("recipe.yaml"))


def test_what_the_message_calls_allowed_is_accepted(folder, run):
    """Every name and key that a refusal lists, put in place of the wrong one, is not refused as unknown."""
    (folder / "bad.yaml").write_text(BASE.replace("resnet8", "x"))
    allowed = re.search(r"allowed: (.*)", run("validate", "bad.yaml")[2])[1].split(", ")
    assert len(allowed) > 10
    for name in allowed[:-2]:  # the last two are callable and the zoos
        if name in (*STRIDES, *SEGMENTERS, *SALIENCY):  # it is refused for its task, not for its name
            continue
        (folder / "bad.yaml").write_text(BASE.replace("resnet8", name))
        assert load_recipe(folder / "bad.yaml").recipe.student.model.name == name


MASKS = """\
name: masks
task: {kind: segmentation}
data: {kind: masks, root: streets, size_px: SIZE}
teacher:
  model: {name: MODEL}
  train: {epochs: 1}
student:
  model: {name: MODEL}
stages:
  - kind: distill
    method: METHOD
    train: {epochs: 1}
deploy:
  - backend: {name: "null"}
    precision: [float32]
"""


@pytest.mark.parametrize(
    ("size", "model", "method", "says"),
    [
        ("[48, 96]", "unet", "{name: structured_kd}", "score maps of at least 64 x 64; the student's are 48 x 96"),
        ("[96, 96]", "unet", "{name: structured_kd, node_px: 1}", "9216 regions of 'top' are too many"),
        ("[96, 96]", "unet", "{name: structured_kd}", None),
        ("[32, 96]", "unet", "{name: idd, layer: bottom}", "the student's map 'bottom' has 2 x 6"),
        ("[128, 96]", "mobile_unet", "{name: idd, layer: bottom}", None),
    ],
)
def test_methods_are_checked_with_images_of_the_datas_size(size, model, method, says, folder):
    """Before a teacher is trained for hours; the data itself is not there."""
    (folder / "masks.yaml").write_text(MASKS.replace("SIZE", size).replace("MODEL", model).replace("METHOD", method))
    with pytest.raises(RecipeError, match="'streets' does not exist") as caught:
        preflight(load_recipe(folder / "masks.yaml"))
    told = [line for line in caught.value.message.splitlines() if "stages[0].method" in line]
    assert len(told) == (says is not None)
    assert all(says in line for line in told)


def test_a_model_that_does_not_run_on_images_of_that_size(folder, monkeypatch):
    lines = (
        "from torch import nn",
        "def build(num_classes, in_channels):",
        "    return nn.Sequential(nn.Conv2d(in_channels, num_classes, 1), nn.AvgPool2d(64))",
    )
    (folder / "coarse.py").write_text("\n".join(lines))
    model = "callable, call: 'coarse:build', taps: {top: '0'}"
    text = MASKS.replace("SIZE", "[48, 96]").replace("MODEL", model).replace("METHOD", "{name: structured_kd}")
    (folder / "masks.yaml").write_text(text)
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(RecipeError, match=r"student or teacher does not run on images of 48 x 96 px: .*too small"):
        preflight(load_recipe(folder / "masks.yaml"))


# --- fuzz ---

WORDS = [
    "name",
    "kind",
    "stages",
    "train",
    "epochs",
    "null",
    "true",
    "1e400",
    "-1",
    ".nan",
    '"2"',
    "[",
    "]",
    "{",
    "}",
    ": ",
    "- ",
    ", ",
    "\n",
    "  ",
    "\t",
]
WORDS += [
    "&a",
    "*a",
    "!!int",
    "<<",
    "'",
    '"',
    "#",
    "|",
    "---",
    "timm:",
    "callable",
    "..",
    "~",
    "\x00",
    "é",
    "\ufeff",
    "0x",
    "[" * 40,
    "9" * 50,
]


@st.composite
def mutated(draw):
    """The base after a few cuts, copies and insertions."""
    text = draw(st.sampled_from([BASE, IMAGES]))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 30)))
        new = draw(st.sampled_from(WORDS) | st.just(text[stop : stop + 40]) | st.text(max_size=8) | st.integers().map(str))
        text = text[:start] + new + text[stop:]
    return text


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def check(path, text):
    """Loading raises nothing but RecipeError, whose every line names the file."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        loaded = load_recipe(path)
    except RecipeError as error:
        assert error.hint  # noqa: PT017  # half of the examples raise, half do not
        assert all(line.startswith(str(path)) for line in error.message.split("\n")), error.message  # noqa: PT017
        return None
    return loaded


@given(mutated())
@settings(max_examples=250)
def test_a_mutated_recipe_raises_nothing_but_recipe_errors(fuzz_folder, text):
    check(fuzz_folder / "recipe.yaml", text)


@given(st.text(max_size=200) | st.binary(max_size=200))
@settings(max_examples=100)
def test_random_files_raise_nothing_but_recipe_errors(fuzz_folder, text):
    check(fuzz_folder / "recipe.yaml", text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "kind", "train", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@pytest.fixture(scope="module")
def plain(fuzz_folder):
    (fuzz_folder / "base.yaml").write_text(BASE)
    return load_recipe(fuzz_folder / "base.yaml").document.data


@given(st.data())
@settings(max_examples=150)
def test_any_value_at_any_place_raises_nothing_but_recipe_errors(fuzz_folder, plain, data):
    """Well-formed files: JSON is YAML, so these reach the checks behind the parser."""
    recipe = copy.deepcopy(plain)
    path = data.draw(st.sampled_from([path for path in places(recipe) if path]))
    parent = recipe
    for part in path[:-1]:
        parent = parent[part]
    if data.draw(st.booleans()):
        parent[path[-1]] = data.draw(VALUES)
    elif isinstance(parent, dict) and data.draw(st.booleans()):
        parent[data.draw(st.sampled_from(["ratio", "teacher", "taps", "arguments", "x"]))] = data.draw(VALUES)
    else:
        del parent[path[-1]]
    loaded = check(fuzz_folder / "recipe.yaml", json.dumps(recipe, indent=1))
    if loaded is not None and data.draw(st.integers(0, 19)) == 0:
        try:
            preflight(loaded)
        except RecipeError as error:
            assert error.message.startswith(str(fuzz_folder))  # noqa: PT017  # most are valid


# --- what is shipped ---


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_shipped_recipe_is_valid(path):
    loaded = load_recipe(path)
    assert loaded.recipe.name == path.stem
    root = getattr(loaded.recipe.data, "root", None)
    if root is not None and not (Path(os.environ.get("EDGEKD_DATA", "/nowhere")) / root).is_dir():
        return  # all but what needs the data
    missing = [line for line in _refused(loaded) if "cannot be imported" not in line]  # a backend may be missing here
    assert missing == []


def _refused(loaded):
    try:
        preflight(loaded)
    except RecipeError as error:
        return error.message.splitlines()
    return []


def test_there_are_shipped_recipes():
    assert len(SHIPPED) >= 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_smoke_keeps_types_and_makes_everything_short(path):
    recipe = load_recipe(path).recipe
    tiny = smoke(recipe)
    # what smoke gives is a recipe that could have been written
    again = Recipe.model_validate_json(tiny.model_dump_json(by_alias=True), strict=True)
    assert again == tiny
    assert [type(stage) for stage in tiny.stages] == [type(stage) for stage in recipe.stages]
    assert type(tiny.data) is type(recipe.data)
    trainings = [getattr(stage, "train", None) for stage in tiny.stages] + ([tiny.teacher.train] if tiny.teacher else [])
    fallbacks = [stage.fallback for stage in tiny.stages if getattr(stage, "fallback", None) is not None]
    trainings += [fallback.train for fallback in fallbacks]
    assert {train.epochs for train in trainings if train is not None} == {1}
    methods = [stage.method for stage in tiny.stages if getattr(stage, "method", None) is not None]
    assert {value for method in methods for name, value in method if name.endswith("epochs")} <= {0, 1}
    assert tiny.budget is None
    assert tiny.deploy == recipe.deploy
    assert tiny.measure.duration_s < 1
    assert smoke(tiny) == tiny


# --- the schema ---


def test_the_schema_is_closed_and_its_references_lead_somewhere():
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for name, node in {"Recipe": schema, **schema["$defs"]}.items():
        if node.get("type") == "object":
            assert node["additionalProperties"] is False, name
            assert set(node.get("required", [])) <= set(node["properties"]), name
    references = re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(schema))
    assert set(references) <= set(schema["$defs"])
    assert json.loads(json.dumps(schema)) == schema


def test_every_option_is_documented():
    """An editor shows these sentences, and refusals use them as hints."""
    exempt = {"kind", "name", "task", "data", "teacher", "student", "compute", "export", "measure", "budget", "model", "train"}
    for title, node in {"Recipe": json_schema(), **json_schema()["$defs"]}.items():
        for key, option in node.get("properties", {}).items():
            assert option.get("description") or key in exempt, f"{title}.{key}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_schema_accepts_the_shipped_recipes(path):
    validator = Draft202012Validator(json_schema())
    validator.check_schema(validator.schema)
    data = load_recipe(path).document.data
    assert list(validator.iter_errors(data)) == []
    assert list(validator.iter_errors({**data, "sed": 1}))
    assert list(validator.iter_errors({**data, "stages": [{"kind": "prun"}]}))
