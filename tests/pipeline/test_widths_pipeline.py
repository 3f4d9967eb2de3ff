"""One run, one slimmable checkpoint, an engine for every width."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from edgekd import recipe as recipes
from edgekd.artifacts import read_artifact
from edgekd.errors import RecipeError
from edgekd.nn.slimmable import at_width
from edgekd.train.checkpoint import load_float

SIDE = 32


def train():
    return {"epochs": 1, "batch_size": 8, "lr": 0.01}


@pytest.fixture
def masks(tmp_path):
    """Pictures of two brightnesses, left and right."""
    random = np.random.default_rng(0)
    for split, count in {"train": 12, "val": 4, "test": 4}.items():
        for kind in ("images", "masks"):
            (tmp_path / "scenes" / split / kind).mkdir(parents=True)
        for index in range(count):
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[:, : 8 + index] = 1
            pixels = mask[..., None] * 90 + random.integers(0, 60, (SIDE, SIDE, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "scenes" / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(tmp_path / "scenes" / split / "masks" / f"{index}.png")
    return str(tmp_path / "scenes")


def recipe(root, *, stages=(), student=None, **deploy):
    return {
        "name": "widths",
        "task": {"kind": "segmentation"},
        "data": {"kind": "masks", "root": root, "size_px": [SIDE, SIDE]},
        "student": {"model": student or {"name": "slim_unet", "arguments": {"width": 4, "widths": [1, 0.5]}}},
        "stages": [{"kind": "distill", "method": {"name": "slimseg"}, "train": train()}, *stages],
        "deploy": [{"backend": {"name": "onnxruntime", "threads": 1}, "precision": ["float32"], **deploy}],
        "measure": {"warmup_s": 0.01, "duration_s": 0.05, "compare_s": 0.1},
    }


def test_an_engine_for_every_width_from_one_checkpoint(masks, run, tmp_path):
    """Each width is evaluated, quantized, exported, built and measured for itself, and is what the slimmable net is at it."""
    data = recipe(masks, stages=[{"kind": "ptq"}])
    outcome, _ = run(data, smoke=True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    models = [(model["role"], model["stage"], model["title"]) for model in record["models"]]
    assert models == [
        ("student", "distill", "slim_unet"),
        ("student", "width", "unet"),
        ("student@0.5", "width", "unet"),
        ("student", "ptq", "unet"),
        ("student@0.5", "ptq", "unet"),
    ]
    assert [(cell["role"], cell["precision"], cell["status"], cell["reason"]) for cell in record["cells"]] == [
        ("student", "float32", "measured", None),
        ("student@0.5", "float32", "measured", None),
    ]
    (comparison,) = record["comparisons"]
    assert comparison["cells"] == [0, 1], "against the full width"

    whole, full, half = (read_artifact(tmp_path / "run" / model["folder"]) for model in record["models"][:3])
    assert half.parents == full.parents == (whole.id,)
    assert half.metrics["params"] < 0.3 * full.metrics["params"]
    assert half.metrics["macs"] < 0.35 * full.metrics["macs"]
    assert full.metrics["metric"] == whole.metrics["metric"]
    slimmable, images = load_float(whole).module, torch.randn(1, 3, SIDE, SIDE)
    for artifact, width in ((full, 1.0), (half, 0.5)):
        with torch.no_grad(), at_width(slimmable, width):
            assert torch.equal(load_float(artifact).module(images), slimmable(images))

    again, recorder = run(data, smoke=True)
    assert len(recorder.found) == 5, "all checkpoints are there already"
    assert again.report["models"] == outcome.report["models"]


def check(data, write):
    path = write(data)
    with pytest.raises(RecipeError) as caught:
        recipes.preflight(recipes.load_recipe(path))
    return f"{caught.value.message} {caught.value.hint}"


def test_what_a_recipe_may_ask_of_widths(masks, write):
    half = recipes.load_recipe(write(recipe(masks, widths=[0.5]))).recipe
    assert recipes.deployed_roles(half, half.deploy[0]) == ["student@0.5"]
    every = recipes.load_recipe(write(recipe(masks))).recipe
    assert recipes.deployed_roles(every, every.deploy[0]) == ["student", "student@0.5"]
    alone = recipe(masks)
    alone["stages"] = [{"kind": "finetune", "train": train()}]
    alone = recipes.load_recipe(write(alone)).recipe
    assert recipes.deployed_roles(alone, alone.deploy[0]) == ["student"], "it has learnt one width"


def test_recipes_that_cannot_be(masks, write):
    assert "not all are different widths of the student" in check(recipe(masks, widths=[0.3]), write)
    assert "its widths: 1, 0.5" in check(recipe(masks, widths=[0.5, 0.5]), write)
    plain = {"name": "unet", "arguments": {"width": 4}}
    assert "the student has one width" in check(recipe(masks, student=plain, widths=[1]), write)
    assert "slimseg trains a network at several widths" in check(recipe(masks, student=plain), write)
    assert "1 must be one of them" in check(recipe(masks, student={"name": "slim_unet", "arguments": {"widths": [0.5]}}), write)
    early = recipe(masks)
    early["stages"].insert(0, {"kind": "finetune", "train": train()})
    early["stages"].insert(1, {"kind": "prune", "ratio": 0.3, "train": train()})
    assert "prune needs an ordinary network, and slim_unet runs at several widths" in check(early, write)
    late = recipe(masks, stages=[{"kind": "prune", "ratio": 0.3, "method": {"name": "slimseg"}, "train": train()}])
    assert "slimseg trains several widths at once, and prune works on one" in check(late, write)
    assert "widths are the student's" in check(recipe(masks, widths=[1], models=["teacher"]), write)
