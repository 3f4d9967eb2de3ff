"""Boxes from COCO and YOLO files: their places on the letterboxed image, splits, warnings and errors."""

import json
import shutil
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from edgekd import data
from edgekd.data.boxes import CocoConfig, YoloConfig, padded
from edgekd.data.letterbox import decode, displayed_size, fit
from edgekd.errors import DataError

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}]


def picture(path, width=64, height=32, seed=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def coco(tmp_path):
    """train 20, val 3, test 4 images of 64 x 32, one box each: images/i.png, annotations/split.json."""
    seed = 0
    for split, count in (("train", 20), ("val", 3), ("test", 4)):
        images, annotations = [], []
        for index in range(count):
            seed += 1
            picture(tmp_path / split / "images" / f"{split}{index}.png", seed=seed)
            images.append({"id": index, "file_name": f"{split}{index}.png", "width": 64, "height": 32})
            box = {"image_id": index, "category_id": 3 if index % 2 else 7, "bbox": [10, 4, 20, 16], "iscrowd": 0}
            annotations.append({"id": index, **box})
        write(tmp_path, split, images=images, annotations=annotations)
    return tmp_path


def write(root, split, **given):
    path = root / "annotations" / f"{split}.json"
    path.parent.mkdir(exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {"categories": CATEGORIES}
    path.write_text(json.dumps({**content, **given}))


def load(root, **options):
    return data.load(
        CocoConfig(kind="coco", root=str(root), size_px=options.pop("size_px", 64), cache="memory", **options), search=[]
    )


def change(root, split, key, index, **given):
    path = root / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    content[key][index] |= given
    path.write_text(json.dumps(content))


def test_splits_and_classes(coco):
    found = load(coco)
    assert found.classes == ("ant", "cat"), "in the order of their ids"
    assert {split.name: len(split) for split in found.splits} == {"train": 18, "val": 3, "test": 4, "calib": 2}
    assert found.train.images.shape == (18, 64, 64, 3)
    assert found.train.labels.dtype == np.float32
    assert found.train.labels.shape == (18, 1, 6)
    assert set(found.train.labels[:, 0, 0]) == {0.0, 1.0}
    # 64 x 32 on 64 x 64: 16 px of grey above and below
    assert found.test.labels[0, 0, 1:].tolist() == [10, 20, 30, 36, 0]
    assert (found.train.images[:, :16] == 114).all()
    assert not (found.train.images[:, 16:48] == 114).all((1, 2, 3)).any()
    assert load(coco).fingerprint == found.fingerprint
    assert load(coco, limit=3).train.images.shape[0] <= 3


def test_scaled_boxes(coco):
    found = load(coco, size_px=96)
    np.testing.assert_allclose(found.test.labels[0, 0, 1:5], [15, 30, 45, 54])


def test_another_box_is_another_data_set(coco):
    before = load(coco).fingerprint
    change(coco, "test", "annotations", 0, bbox=[10, 4, 21, 16])
    assert load(coco).fingerprint != before


def test_boxes_are_cut_and_small_ones_left_out(coco):
    change(coco, "train", "annotations", 0, bbox=[50, 20, 100, 100])
    change(coco, "train", "annotations", 1, bbox=[3, 3, 1, 9])
    found = load(coco)
    assert "1 boxes of train reach beyond their images and were cut" in found.warnings
    assert "1 boxes of train have a side under 2 pixels at 64 px and were left out" in found.warnings
    boxes = np.concatenate([found.train.labels, found.calib.labels]).reshape(-1, 6)
    assert boxes[:, 3:5].max() <= 64
    assert (boxes[:, 0] == -1).sum() == 1, "an image without a box stays"


def test_crowds_are_ignored(coco):
    change(coco, "test", "annotations", 0, iscrowd=1)
    found = load(coco)
    assert sorted(found.test.labels[:, 0, 5].tolist()) == [0, 0, 0, 1]


def test_images_without_entry(coco):
    picture(coco / "test" / "images" / "more.png", seed=99)
    assert any("1 images of" in warning and "have no entry" in warning for warning in load(coco).warnings)


def test_one_class_is_enough(coco):
    for split in ("train", "val", "test"):
        content = json.loads((coco / "annotations" / f"{split}.json").read_text())
        write(coco, split, categories=CATEGORIES[:1], annotations=[{**row, "category_id": 7} for row in content["annotations"]])
    assert load(coco).classes == ("cat",)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "annotations" / "test.json").unlink(), "the annotations of test are missing"),
        (lambda root: shutil.rmtree(root / "val" / "images"), "the images of val are missing"),
        (lambda root: (root / "annotations" / "train.json").write_text("{"), "train.json cannot be read"),
        (lambda root: (root / "annotations" / "train.json").write_text("[]"), "has no list 'images'"),
        (lambda root: change(root, "train", "annotations", 2, bbox=[1, 2, 3]), r"annotations\[2\]: bbox is \[1, 2, 3\]"),
        (lambda root: change(root, "train", "annotations", 2, bbox=[1, 2, 3, "4"]), "bbox is"),
        (lambda root: change(root, "train", "annotations", 2, bbox=[10**400, 2, 3, 4]), "bbox is"),
        (lambda root: change(root, "train", "annotations", 2, bbox=[True, 2, 3, 4]), "bbox is"),
        (lambda root: change(root, "train", "annotations", 2, category_id=[7]), r"has the category_id \[7\]"),
        (lambda root: change(root, "train", "annotations", 2, image_id=[2]), "belongs to an image that the file does not list"),
        (lambda root: change(root, "train", "images", 2, file_name="train0.png"), "lists the image train0.png twice"),
        (lambda root: change(root, "train", "annotations", 2, category_id=4), r"has the category_id 4; the file lists \[3, 7\]"),
        (lambda root: change(root, "train", "annotations", 2, image_id=400), "belongs to an image that the file does not list"),
        (lambda root: change(root, "train", "images", 2, id=0), "two images have the id 0"),
        (lambda root: change(root, "train", "images", 2, file_name="no.png"), "names the image no.png, which is not in"),
        (lambda root: write(root, "train", categories=[]), "has no categories"),
        (lambda root: write(root, "val", categories=CATEGORIES[:1]), "has other categories than"),
        (lambda root: write(root, "test", annotations=[]), "no image of test has a box that counts"),
        (lambda root: (root / "train" / "images" / "train3.png").write_bytes(b"no"), "train3.png cannot be read as an image"),
        (
            lambda root: (shutil.rmtree(root / "val" / "images"), (root / "val" / "images").write_text("")),
            "the images of val are no folder",
        ),
        (
            lambda root: change(root, "val", "images", 0, file_name="../../train/images/train0.png"),
            "val and train share the image|train and val share the image",
        ),
    ],
)
def test_what_cannot_be_read(coco, spoil, message):
    spoil(coco)
    with pytest.raises(DataError, match=message):
        load(coco)


def test_a_class_without_a_box(coco):
    content = json.loads((coco / "annotations" / "train.json").read_text())
    write(coco, "train", annotations=[{**row, "category_id": 7} for row in content["annotations"]])
    found = load(coco)
    assert found.classes == ("ant", "cat")
    assert "no training box of 1 of 2 classes: ant; they are not learnt" in found.warnings
    write(coco, "train", annotations=[])
    with pytest.raises(DataError, match="no training box of 2 of 2 classes: ant, cat"):
        load(coco)


def test_val_without_a_box(coco):
    write(coco, "val", annotations=[])
    assert "no image of val has a box that counts, so its metric stays 0 while training" in load(coco).warnings


def test_images_of_another_size_than_annotated(coco):
    change(coco, "test", "images", 2, width=128, height=64)
    found = [warning for warning in load(coco).warnings if "other sides than" in warning]
    assert len(found) == 1
    assert found[0].startswith("1 images have other sides than")
    assert "test2.png, which is shown as 64 x 32: their boxes may be misplaced" in found[0]


def test_a_repeated_image_in_two_splits_warns(coco):
    shutil.copy(coco / "train" / "images" / "train0.png", coco / "test" / "images" / "test0.png")
    assert any("1 of 4 images of test are in" in warning for warning in load(coco).warnings)


def test_the_disk_cache_holds_the_same_images(coco, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path / "cache"))
    config = CocoConfig(kind="coco", root=str(coco), size_px=64)
    first, again, in_memory = data.load(config, search=[]), data.load(config, search=[]), load(coco)
    assert first.fingerprint == again.fingerprint == in_memory.fingerprint
    assert np.array_equal(again.test.images, in_memory.test.images)


def test_preflight_reads_no_image(coco):
    config = CocoConfig(kind="coco", root=str(coco), size_px=64)
    for path in (coco / "train" / "images").iterdir():
        path.write_bytes(b"")
    data.preflight(config, search=[])
    (coco / "annotations" / "val.json").unlink()
    with pytest.raises(DataError, match="annotations of val") as caught:
        data.preflight(config, search=[])
    assert "data.splits.val: null" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_px": 60}, "multiple of 16"),
        ({"channels": 4}, "channels: 4 and infrared belong together"),
        ({"infrared": "{folder}/x"}, "channels: 4 and infrared belong together"),
        ({"images": "images"}, "must contain {split}"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValidationError, match=message):
        CocoConfig(**{"kind": "coco", "root": "x", "size_px": 64, **options})


def test_four_channels(coco):
    for split in ("train", "val", "test"):
        for index, path in enumerate(sorted((coco / split / "images").iterdir())):
            picture(coco / split / "infrared" / path.name, seed=1000 + index)
    pattern = "{folder}/../infrared/{stem}{suffix}"
    found = load(coco, channels=4, infrared=pattern)
    assert found.channels == 4
    assert len(found.mean) == 4
    colour = load(coco)
    assert np.array_equal(found.test.images[..., :3], colour.test.images)
    assert not np.array_equal(found.test.images[..., 3], found.test.images[..., 0])
    (coco / "test" / "infrared" / "test0.png").unlink()
    with pytest.raises(DataError, match=r"the infrared image of .*test0.png is missing"):
        load(coco, channels=4, infrared=pattern)
    with pytest.raises(DataError, match=r"unknown 'folders' \(did you mean 'folder'"):
        load(coco, channels=4, infrared="{folders}/x")


def test_infrared_is_the_first_channel_of_its_file_and_of_the_same_size(tmp_path):
    picture(tmp_path / "a.png", seed=1)
    picture(tmp_path / "colour.png", seed=2)
    picture(tmp_path / "grey.png", seed=2, mode="L")
    picture(tmp_path / "small.png", width=32, height=32)
    found = decode(tmp_path / "a.png", 64, 4, tmp_path / "colour.png")
    assert np.array_equal(found[16:48, :, 3], np.asarray(Image.open(tmp_path / "colour.png"))[..., 0])
    found = decode(tmp_path / "a.png", 64, 4, tmp_path / "grey.png")
    assert np.array_equal(found[16:48, :, 3], np.asarray(Image.open(tmp_path / "grey.png")))
    with pytest.raises(DataError, match=r"has other sides than .*: 32 x 32 instead of 64 x 32"):
        decode(tmp_path / "a.png", 64, 4, tmp_path / "small.png")


def test_infrared_images_beside_the_others_are_no_images_of_their_own(coco, yolo):
    for path in [*coco.glob("*/images/*.png"), *yolo.glob("images/*/*.png")]:
        picture(path.with_name(f"{path.stem}_ir.png"), seed=7, mode="L")
    pattern = "{folder}/{stem}_ir{suffix}"
    found = load(coco, channels=4, infrared=pattern)
    assert not any("have no entry" in warning for warning in found.warnings)
    assert len(load_yolo(yolo, channels=4, infrared=pattern).test) == 3


def test_infrared_images_with_an_ending_of_their_own(yolo):
    for path in yolo.glob("images/*/*.png"):
        picture(path.with_name(f"{path.stem}_ir.png"), seed=7, mode="L")
        label = yolo / "labels" / path.parent.name / f"{path.stem}.txt"
        label.rename(label.with_name(f"{path.stem}_co.txt"))
        path.rename(path.with_name(f"{path.stem}_co.png"))
    found = load_yolo(yolo, channels=4, infrared="{folder}/{prefix}_ir{suffix}")
    assert found.test.images.shape == (3, 64, 64, 4)
    assert (found.test.labels[..., 0] >= 0).sum() == 3


def test_turned_pictures(tmp_path):
    """Orientation 6: to be shown turned by a quarter to the right."""
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert displayed_size(tmp_path / "a.png") == (10, 40)
    square = decode(tmp_path / "a.png", 40, 3)
    assert (square[:20, 15:25] == 255).all(), "its left half is on top"
    assert (square[20:, 15:25] == 0).all()
    assert (square[:, :15] == 114).all()


@pytest.mark.parametrize("place", ["before", "after", "nowhere"])
def test_turned_png_files(tmp_path, place):
    """A PNG file may say how it is turned before or after its pixels; both count for its size and for its pixels alike."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((10, 40, 3), np.uint8)).save(path)
    content = path.read_bytes()
    payload = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = len(payload).to_bytes(4, "big") + b"eXIf" + payload + zlib.crc32(b"eXIf" + payload).to_bytes(4, "big")
    cut = content.index({"before": b"IDAT", "after": b"IEND", "nowhere": b"IEND"}[place]) - 4
    path.write_bytes(content[:cut] + (b"" if place == "nowhere" else chunk) + content[cut:])
    width, height = displayed_size(path)
    assert (width, height) == ((40, 10) if place == "nowhere" else (10, 40))
    black = (decode(path, 40, 3) == 0).all(-1)
    assert (black.any(0).sum(), black.any(1).sum()) == (width, height)


def test_a_palette_with_transparency(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode(tmp_path / "a.png", 8, 3), np.asarray(image.convert("RGB")))


def test_deep_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        decode(tmp_path / "a.png", 8, 1)


def test_letterbox():
    place = fit(640, 480, 320)
    assert (place.scale, place.left, place.top, place.width, place.height) == (0.5, 0, 40, 320, 240)
    assert place.boxes(np.array([[0, 0, 640, 480]])).tolist() == [[0, 40, 320, 280]]


def test_padding():
    rows = padded([np.zeros((0, 6)), np.ones((2, 6))])
    assert rows.shape == (2, 2, 6)
    assert rows[0].tolist() == [[-1, 0, 0, 0, 0, 0]] * 2
    assert padded([np.zeros((0, 6))]).shape == (1, 1, 6)


@pytest.fixture
def yolo(tmp_path):
    """Ultralytics' layout: images/train/a.png, labels/train/a.txt, data.yaml."""
    tmp_path /= "yolo"
    seed = 0
    for split, count in (("train", 20), ("test", 3)):
        for index in range(count):
            seed += 1
            picture(tmp_path / "images" / split / f"{index}.png", seed=seed)
            label = tmp_path / "labels" / split / f"{index}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(f"{index % 2} 0.5 0.5 0.25 0.5\n")
    (tmp_path / "data.yaml").write_text("train: images/train\ntest: images/test\nnames: {0: ant, 1: cat}\nnc: 2\n")
    return tmp_path


def load_yolo(root, **options):
    return data.load(YoloConfig(kind="yolo", root=str(root), size_px=64, cache="memory", **options), search=[])


def test_yolo(yolo):
    found = load_yolo(yolo)
    assert found.classes == ("ant", "cat")
    assert {split.name: len(split) for split in found.splits} == {"train": 16, "val": 2, "test": 3, "calib": 2}
    assert found.test.labels[0, 0, 1:].tolist() == [24, 24, 40, 40, 0]
    (yolo / "labels" / "train" / "0.txt").unlink()
    assert "1 images of train have no label file: taken as empty" in load_yolo(yolo).warnings


def test_yolo_lists_and_names(yolo):
    (yolo / "list.txt").write_text("images/test/0.png\nimages/test/1.png\n")
    (yolo / "data.yaml").write_text("train: [images/train]\ntest: list.txt\nnames: [ant, cat]\n")
    assert len(load_yolo(yolo).test) == 2


@pytest.mark.parametrize(
    "content",
    [
        "train: ../images/train\ntest: ../images/test\n",  # as Roboflow exports it
        "path: coco8\ntrain: images/train\ntest: images/test\n",  # relative to Ultralytics' own folder of data
        "path: ../yolo\ntrain: images/train\ntest: images/test\n",
        "path: images\ntrain: train\ntest: test\nval:\n",
    ],
)
def test_paths_that_ultralytics_understands(yolo, content):
    (yolo / "data.yaml").write_text(content + "names: [ant, cat]\n")
    assert len(load_yolo(yolo).test) == 3


def test_a_yolo_image_without_boxes_stays(yolo):
    (yolo / "labels" / "test" / "0.txt").write_text("")
    found = load_yolo(yolo)
    assert sorted(found.test.labels[:, 0, 0].tolist()) == [-1, 0, 1]
    assert not any("no label file" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "data.yaml").unlink(), "data.yaml"),
        (lambda root: (root / "data.yaml").write_text("a: [\n"), "data.yaml cannot be read"),
        (lambda root: (root / "data.yaml").write_text("train: x\nnames: [a]\n"), "data.yaml: test: Field required"),
        (lambda root: (root / "data.yaml").write_text("train: x\ntest: y\nnames: {1: a}\n"), r"names has the keys \[1\]"),
        (lambda root: (root / "labels/train/3.txt").write_text("0 0.5 0.5\n"), r"3.txt:1: expected `class x y width height`"),
        (lambda root: (root / "labels/train/3.txt").write_text("\n5 .5 .5 .1 .1\n"), r"3.txt:2: class 5; .* 2 classes"),
        (lambda root: (root / "labels/train/3.txt").write_text("0 50 50 10 10\n"), "positions are shares of the image"),
        (lambda root: shutil.rmtree(root / "labels"), "no image of train has a label file"),
        (lambda root: (root / "labels/train/3.txt").write_bytes(b"\xff\xfe0"), "3.txt cannot be read"),
        (lambda root: (root / "data.yaml").write_text("path: /none\ntrain: x\ntest: y\nnames: [a]\n"), "/none does not exist"),
        (lambda root: (root / "data.yaml").write_text("train: x\ntest: y\nnames: [a]\n"), "'x' does not exist"),
        (lambda root: (root / "labels/train/3.txt").write_text("0 nan .5 .1 .1\n"), "positions are shares of the image"),
        (lambda root: [path.unlink() for path in (root / "images/test").iterdir()], "test has no images in"),
    ],
)
def test_yolo_that_cannot_be_read(yolo, spoil, message):
    spoil(yolo)
    with pytest.raises(DataError, match=message):
        load_yolo(yolo)


REAL = {
    # classes, images of val and test, boxes of test, those to be ignored among them
    "det_airbus_aircraft": (1, 75, 140, 411, 67),
    "det_bccd": (3, 87, 48, 614, 0),
    "det_coco128": (80, 24, 80, 533, 0),
    "det_simd_sample": (15, 10, 11, 94, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data(data_root, name):
    if not (Path(data_root) / name).is_dir():
        pytest.skip(f"{name} is not in {data_root}")
    config = CocoConfig(kind="coco", root=name, size_px=320, cache="memory")
    found = data.load(config, search=[Path(data_root)])
    labels = found.test.labels
    real = labels[..., 0] >= 0
    counts = len(found.classes), len(found.val), len(found.test), int(real.sum()), int(labels[..., 5].sum())
    assert counts == REAL[name]
    assert labels[..., 1:5].min() >= 0
    assert labels[..., 1:5].max() <= 320
    assert (labels[real][:, 3:5] - labels[real][:, 1:3] >= 2).all()
    assert not any("misplaced" in warning for warning in found.warnings)
    few = data.load(config.model_copy(update={"limit": 8}), search=[Path(data_root)])
    assert np.array_equal(few.test.images, found.test.images[:8]), "a quick try takes the first of the same order"
