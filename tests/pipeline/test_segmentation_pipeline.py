"""Masks from folders to engines that see windows of the images."""

import json

import numpy as np
import pytest
from conftest_hybrid import run_once
from PIL import Image

from edgekd.errors import DataError

HEIGHT, WIDTH = 48, 64


def squares(root, split, count, seed):
    """Pictures with a bright square on grey, and its mask."""
    random = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (root / split / kind).mkdir(parents=True)
    for index in range(count):
        pixels = random.integers(80, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        y, x, side = random.integers(0, HEIGHT - 20), random.integers(0, WIDTH - 20), random.integers(10, 20)
        mask[y : y + side, x : x + side] = 1
        pixels[mask == 1] += 100
        Image.fromarray(pixels).save(root / split / "images" / f"{index}.png")
        Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")


def content(root, windows):
    return {
        "name": "windows",
        "task": {"kind": "segmentation", "windows": windows},
        "data": {"kind": "masks", "root": str(root), "size_px": [HEIGHT, WIDTH], "cache": "memory"},
        "student": {"model": {"name": "unet", "arguments": {"width": 2}}},
        "stages": [{"kind": "finetune", "train": {"epochs": 4, "batch_size": 8, "optimizer": "adamw", "lr": 0.01}}],
        "deploy": [{"backend": {"name": "onnxruntime", "threads": 1}, "precision": ["float32"]}],
        "export": {"max_changed": 0.5, "max_error": 0.5},
        "measure": {"warmup_s": 0.01, "duration_s": 0.05, "compare_s": 0.1},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("masks")
    for seed, (split, count) in enumerate({"train": 32, "val": 6, "test": 10}.items()):
        squares(root, split, count, seed)
    return root


def test_engines_of_windows_are_judged_on_whole_images(root, tmp_path):
    outcome, folder = run_once(content(root, {"size_px": [32, 48], "stride_px": [16, 16]}), tmp_path)
    (engine,) = outcome.report["engines"]
    assert engine["status"] == "measured"
    (model,) = (model for model in outcome.report["models"] if model["stage"] == "finetune")
    found = engine["metric"]
    assert found["value"] == pytest.approx(model["metric"]["value"], abs=1e-4), "as the model, through the same windows"
    assert found["images"] == 10
    assert set(found["details"]) == {"mIoU", "Dice", "pixel accuracy", "boundary F"}
    (path,) = folder.glob("*-export-*/io.json")
    io = json.loads(path.read_text())
    assert io["inputs"][0]["shape"][1:] == [3, 32, 48]
    assert io["postprocessing"]["windows"] == {"size_px": [32, 48], "stride_px": [16, 16]}


def test_maps_of_saliency_are_put_together_from_windows(root, tmp_path):
    recipe = content(root, None)
    recipe["task"] = {"kind": "saliency", "windows": {"size_px": [32, 48], "stride_px": [16, 16]}}
    recipe["student"] = {"model": {"name": "scfnet"}}
    outcome, folder = run_once(recipe, tmp_path)
    (engine,) = outcome.report["engines"]
    (model,) = (model for model in outcome.report["models"] if model["stage"] == "finetune")
    assert engine["metric"]["value"] == pytest.approx(model["metric"]["value"], abs=0.01), (
        "as the model, through the same windows"
    )
    assert engine["metric"]["images"] == 10
    (path,) = folder.glob("*-export-*/io.json")
    io = json.loads(path.read_text())
    assert io["inputs"][0]["shape"][1:] == [3, 32, 48]
    assert io["postprocessing"]["windows"] == {"size_px": [32, 48], "stride_px": [16, 16]}


def test_windows_larger_than_the_images_are_refused(root, tmp_path):
    with pytest.raises(DataError, match=r"windows of \[64, 64\] pixels are larger than the images, \[48, 64\]"):
        run_once(content(root, {"size_px": [64, 64]}), tmp_path)
