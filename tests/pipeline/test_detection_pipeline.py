"""A detector from annotation files to engines, a report and a bundle."""

import json

import numpy as np
import pytest
from conftest_hybrid import run_once
from PIL import Image
from safetensors.torch import load_file

from edgekd import recipe as recipes
from edgekd.bundle import open_bundle
from edgekd.bundle.check import check
from edgekd.bundle.make import Choice, make
from edgekd.engines.postprocess import Detected, postprocess
from edgekd.errors import RecipeError
from edgekd.train.checkpoint import WEIGHTS

SIZE = 64
TRAIN = {"epochs": 20, "batch_size": 8, "optimizer": "adamw", "lr": 0.01}


def rectangles(root, split, count, seed):
    """Grey pictures with a bright square and a dark one, and their boxes."""
    random = np.random.default_rng(seed)
    images, annotations = [], []
    folder = root / split / "images"
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = random.integers(100, 120, (SIZE, SIZE, 3), dtype=np.uint8)
        for label, value in ((1, 250), (2, 5)):
            x, y, side = random.integers(2, 40), random.integers(2, 40), random.integers(10, 20)
            pixels[y : y + side, x : x + side] = value
            box = {"bbox": [int(x), int(y), int(side), int(side)], "iscrowd": 0, "category_id": label, "image_id": index}
            annotations.append({"id": len(annotations), **box})
        Image.fromarray(pixels).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": SIZE, "height": SIZE})
    (root / "annotations").mkdir(exist_ok=True)
    categories = [{"id": 1, "name": "bright"}, {"id": 2, "name": "dark"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


def detection(root, **changes):
    return {
        "name": "boxes",
        "task": {"kind": "detection", "strides": [4], "objectness_gain": 20.0, "nms": "graph"},
        "data": {
            "kind": "coco",
            "root": str(root),
            "size_px": SIZE,
            "cache": "memory",
            "augment": {"mosaic": 0.3, "flip": True, "scale": 0.2},
        },
        "student": {"model": {"name": "superyolo_small", "arguments": {"width": 0.125}}},
        "stages": [
            {"kind": "finetune", "train": TRAIN, "super_resolution": {"channels": 4, "blocks": 1}},
            {
                "kind": "quantize",
                "quantizer": {"kind": "hybrid", "bits": 6, "recalibration_batches": 5},
                "method": {"name": "ost", "layers": ["block4", "block9", "block17"]},
                "task_weight": 1,
                "train": {**TRAIN, "epochs": 10, "lr": 0.003},
            },
        ],
        "deploy": [
            {"backend": {"name": "onnxruntime", "threads": 1}, "precision": ["float32", "int8"]},
            {"backend": {"name": "openvino", "threads": 1}, "precision": ["int8"]},
        ],
        "export": {"max_changed": 0.5, "max_error": 0.5},
        "measure": {"warmup_s": 0.01, "duration_s": 0.05, "compare_s": 0.1},
        **changes,
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("boxes")
    for seed, (split, count) in enumerate({"train": 48, "val": 8, "test": 32}.items()):
        rectangles(root, split, count, seed)
    return run_once(detection(root), root)


def test_the_detector_learns_and_its_engines_find_the_same(done):
    outcome, folder = done
    metric = {model["stage"]: model["metric"] for model in outcome.report["models"]}
    assert metric["finetune"]["name"] == "mAP50"
    assert min(metric["finetune"]["value"], metric["quantize"]["value"]) > 0.3, "bright and dark squares are easy"
    epochs = outcome.report["training"][0]["epochs"]
    first, last = (epoch["terms"]["super_resolution"] for epoch in (epochs[0], epochs[-1]))
    assert 0 < last < 0.5 * first, "the branch learns to draw"
    (checkpoint,) = folder.glob("*-finetune-*")
    assert not [name for name in load_file(checkpoint / WEIGHTS) if "branch" in name], "and is gone"
    engines = outcome.report["engines"]
    assert {engine["status"] for engine in engines} == {"measured"}
    for engine in engines:
        details = engine["metric"]["details"]
        assert details["mAP50"] == engine["metric"]["value"]
        assert 0 <= details["mAP50_95"] <= details["mAP50"]
    integer = [engine for engine in engines if engine["precision"] == "int8"]
    assert all(abs(engine["metric"]["value"] - metric["quantize"]["value"]) < 0.1 for engine in integer)
    for engine in integer:
        heads = [row for row in engine["audit"]["layers"] if row["path"].startswith("heads")]
        assert [row["asked"] for row in heads] == ["float32"]
    assert "Metrics in detail" in (folder / "report" / "report.md").read_text()


def test_a_bundle_finds_boxes_without_torch(done, tmp_path):
    _, folder = done
    make(folder, choice=Choice(backend="onnxruntime", precision="int8"), out=tmp_path / "bundle")
    assert check(tmp_path / "bundle").equal
    bundle = open_bundle(tmp_path / "bundle")
    golden = bundle.golden()
    with bundle.session() as session:
        found = bundle.postprocess(session.infer(bundle.preprocess(golden.images)))
    assert isinstance(found, Detected)
    assert found.classes == ("bright", "dark")
    assert len(found.boxes) == len(golden.images)
    outside = postprocess(golden.outputs, {**bundle.io.postprocessing, "nms": "outside"})
    assert found.changed(outside) == 0, "the graph's boxes are those of its raw predictions"
    assert any(len(boxes) for boxes in found.boxes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": {"kind": "digits"}, "task": {"kind": "classification"}},
            "super_resolution reads images with boxes finer than size_px, and digits cannot",
        ),
        ({"task": {"kind": "classification"}}, "the task classification needs classes, and coco gives boxes"),
        ({"data": {"kind": "digits"}}, "the task detection needs boxes, and digits gives classes"),
        ({"task": {"kind": "detection"}}, r"has heads of stride \[4\]; strides is \[4, 8, 16\]"),
        ({"student": {"model": {"name": "resnet8"}}}, "resnet8 is no detector"),
    ],
)
def test_recipes_that_cannot_be(write, tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        recipes.load_recipe(write(detection(tmp_path, **change)))
