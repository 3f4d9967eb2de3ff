import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from edgekd.data import DataConfig, ImageFolderConfig, cache, image_folder, load, preflight
from edgekd.data.decode import decode_image
from edgekd.errors import DataError

COUNTS = {"train": 20, "val": 3, "test": 5}


def picture(path: Path, seed, size=(16, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def root(tmp_path, monkeypatch):
    """pets/<split>/<cat|dog|eel>/<number>.png, all different, 16 x 16."""
    monkeypatch.setenv("EDGEKD_CACHE", str(tmp_path / "cache"))
    seed = 0
    for split, count in COUNTS.items():
        for label in ("dog", "cat", "eel"):
            for number in range(count):
                picture(tmp_path / "pets" / split / label / f"{number:03}.png", seed)
                seed += 1
    return tmp_path / "pets"


def config(**changes):
    return ImageFolderConfig(**{"root": "pets", "size_px": 16, **changes})


def open_(root, **changes):
    return load(config(**changes), search=[root.parent])


def contents(split):
    return {image.tobytes() for image in split.images}


def test_pixels_labels_and_disjoint_splits(root):
    data = open_(root, calibration_images=4)
    assert data.classes == ("cat", "dog", "eel")
    assert [len(split) for split in data.splits] == [56, 9, 15, 4]
    for split in data.splits:
        folder = root / ("train" if split.name == "calib" else split.name)
        expected = {np.asarray(Image.open(path)).tobytes(): path.parent.name for path in folder.glob("*/*.png")}
        assert [expected[image.tobytes()] for image in split.images] == [data.classes[label] for label in split.labels]
        assert not split.images.flags.writeable
    assert not contents(data.train) & contents(data.calib)
    assert len(contents(data.train) | contents(data.calib)) == 60
    assert data.warnings == ()
    assert open_(root, calibration_images=4).fingerprint == data.fingerprint
    assert open_(root, calibration_images=5).fingerprint != data.fingerprint


def test_val_is_carved_where_there_is_none_and_calib_may_be_given(root):
    for number in range(2):
        picture(root / "ranges" / "eel" / f"{number}.png", 1000 + number)
    data = open_(root, splits={"val": None, "calib": "ranges"}, val_images=5)
    assert [len(split) for split in data.splits] == [55, 5, 15, 2]
    assert set(data.calib.labels) == {2}
    assert not contents(data.train) & contents(data.val)


def test_the_number_of_carved_images_has_a_limit(root):
    data = open_(root)
    assert len(data.calib) == 6
    assert data.warnings == ("calib has 6 images instead of 512: at most a tenth of the 60 training images",)


def test_limit_per_class_takes_always_the_same(root):
    data = open_(root, limit_per_class=2, calibration_images=1)
    assert [len(split) for split in data.splits] == [5, 6, 6, 1]
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]
    larger = open_(root, limit_per_class=3, calibration_images=1)
    assert contents(data.test) < contents(larger.test)
    assert open_(root, limit_per_class=2, calibration_images=1).fingerprint == data.fingerprint


def test_classes_txt_decides_the_order(root):
    (root / "classes.txt").write_text("eel\n\ncat\ndog\n")
    data = open_(root)
    assert data.classes == ("eel", "cat", "dog")
    (root / "classes.txt").write_text("eel\ncat\n")
    with pytest.raises(DataError, match=r"the class folder 'dog' is in .*train but not in classes.txt"):
        open_(root)
    (root / "classes.txt").write_text("eel\ncat\ndog\nfox\n")
    with pytest.raises(DataError, match=r"the class folder 'fox' is missing in .*train"):
        open_(root)
    (root / "classes.txt").write_text("eel\ncat\ndog\neel\n")
    with pytest.raises(DataError, match=r"names the class 'eel' twice"):
        open_(root)
    (root / "classes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"classes.txt cannot be read"):
        open_(root)


def test_other_files_are_ignored_and_counted(root):
    (root / "train" / "cat" / "notes.txt").write_text("a cat")
    (root / "train" / "dog" / "more").mkdir()
    (root / "train" / ".hidden").mkdir()
    data = open_(root, calibration_images=6)
    assert data.warnings == (f"2 entries of {root / 'train'} are no images and were left out",)
    assert len(data.train) == 54


# --- decoding ---


def test_an_image_of_the_right_size_is_left_alone(tmp_path):
    pixels = picture(tmp_path / "a.png", 0)
    assert (decode_image(tmp_path / "a.png", 16, 3) == pixels).all()
    grey = picture(tmp_path / "b.png", 0, mode="L")
    assert (decode_image(tmp_path / "b.png", 16, 1) == grey[..., None]).all()
    assert (decode_image(tmp_path / "b.png", 16, 3) == grey[..., None].repeat(3, 2)).all()


@pytest.mark.parametrize("flip", [False, True])
def test_shorter_side_is_resized_and_the_centre_cut_out(tmp_path, flip):
    # three vertical bands, 20 | 40 | 20 px wide and 40 px high: the square in the middle is exactly the second band
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:60], pixels[:, 60:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    if flip:
        pixels = pixels.transpose(1, 0, 2)
    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "bands.png")
    found = decode_image(tmp_path / "bands.png", 20, 3)
    assert found.shape == (20, 20, 3)
    inner = found[1:-1, 1:-1]  # the bicubic filter reaches over the edges of the bands
    assert (inner == np.array([0, 255, 0])).all()


def test_enlarging_and_odd_shapes(tmp_path):
    for number, size in enumerate([(5, 3), (3, 5), (1, 1), (31, 17), (400, 9)]):
        picture(tmp_path / f"{number}.png", 0, size=size)
        assert decode_image(tmp_path / f"{number}.png", 13, 3).shape == (13, 13, 3)


def test_modes(tmp_path):
    rgba = picture(tmp_path / "rgba.png", 0, mode="RGBA")
    assert (decode_image(tmp_path / "rgba.png", 16, 3) == rgba[..., :3]).all()
    palette = Image.fromarray(picture(tmp_path / "x.png", 1)).convert("P")
    palette.save(tmp_path / "p.png", transparency=b"\x00" * 20)
    assert (decode_image(tmp_path / "p.png", 16, 3) == np.asarray(palette.convert("RGB"))).all()
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png cannot be read as an image: its pixels have more than 8 bits"):
        decode_image(tmp_path / "deep.png", 16, 3)


@pytest.mark.parametrize("mode", ["disk", "memory"])
@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_an_unreadable_image_is_named(root, damage, mode):
    path = root / "test" / "dog" / "002.png"
    path.write_bytes({"empty": b"", "text": b"no image at all", "truncated": path.read_bytes()[:200]}[damage])
    with pytest.raises(DataError, match=r"test/dog/002.png cannot be read as an image"):
        open_(root, cache=mode)
    assert not list((root.parent / "cache").glob("images/.partial-*"))


# --- cache ---


@pytest.fixture
def decoded(monkeypatch):
    """Counts decoded images."""
    names = []

    def counting(path, *arguments):
        names.append(path.name)
        return decode_image(path, *arguments)

    monkeypatch.setattr(image_folder, "decode_image", counting)
    return names


def test_decoded_once_and_mapped(root, decoded):
    first = open_(root)
    assert len(decoded) == 84
    second = open_(root, calibration_images=2, augment={"flip": True})
    assert len(decoded) == 84
    assert isinstance(second.train.images.base, np.memmap) or isinstance(second.train.images, np.memmap)
    assert (second.test.images == first.test.images).all()
    open_(root, size_px=12)
    assert len(decoded) == 168


def test_a_changed_file_is_decoded_again(root, decoded):
    before = open_(root)
    picture(root / "test" / "cat" / "000.png", 777)
    after = open_(root)
    assert len(decoded) == 84 + 15
    assert after.fingerprint != before.fingerprint
    os.utime(root / "val" / "cat" / "000.png", ns=(1, 1))
    assert open_(root).fingerprint == after.fingerprint
    assert len(decoded) == 84 + 15 + 9


@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "no json", "wrong json", "no images", "other shape"])
def test_a_damaged_entry_is_named_and_rebuilt(root, decoded, damage):
    good = open_(root, calibration_images=6)
    # the entry of test: 15 images of 768 bytes
    entry = next(path.parent for path in (root.parent / "cache").rglob("images.npy") if np.load(path).shape[0] == 15)
    images, record = entry / "images.npy", entry / "entry.json"
    data = bytearray(images.read_bytes())
    if damage == "flip a bit":
        data[5000] ^= 1
        images.write_bytes(data)
    elif damage == "truncate":
        images.write_bytes(data[:-100])
    elif damage == "no json":
        record.unlink()
    elif damage == "wrong json":
        record.write_text("[]")
    elif damage == "no images":
        images.unlink()
    else:
        np.save(images, np.zeros((3, 16, 16, 3), np.uint8))
    again = open_(root, calibration_images=6)
    assert again.fingerprint == good.fingerprint
    assert again.warnings == (f"the cached images in {entry} were damaged and have been decoded again",)
    assert len(decoded) == 84 + 15
    assert open_(root, calibration_images=6).warnings == ()


def test_memory_and_disk_agree_and_memory_writes_nothing(root):
    memory = open_(root, cache="memory")
    assert not (root.parent / "cache").exists()
    assert memory.fingerprint == open_(root).fingerprint


def test_a_cache_that_cannot_be_used(root, monkeypatch):
    (root.parent / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"the cache folder .* cannot be used") as caught:
        open_(root)
    assert "data.cache: memory" in caught.value.hint
    (root.parent / "cache").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(DataError, match="0 MiB are needed and 0 MiB are free"):
        open_(root)


def test_another_process_that_was_faster_is_no_error(root, monkeypatch):
    fill = cache._fill

    def slow(images, decode):
        fill(images, decode)
        monkeypatch.setattr(cache, "_fill", fill)
        open_(root)  # the other process, from start to end

    monkeypatch.setattr(cache, "_fill", slow)
    data = open_(root)
    assert len(data.test) == 15
    assert not list((root.parent / "cache").glob("images/.partial-*"))


# --- folders ---


def test_missing_root_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKD_DATA", str(tmp_path))
    for verb in (load, preflight):
        with pytest.raises(DataError) as caught:
            verb(config(root="cats"), search=[tmp_path])
        assert str(tmp_path / "cats") in caught.value.message
        assert "EDGEKD_DATA" in caught.value.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        preflight(config(root="file"), search=[tmp_path])


def refused(root, message, hint="", **changes):
    """Both verbs refuse it, with the same words."""
    for verb in (preflight, load):
        with pytest.raises(DataError) as caught:
            verb(config(**changes), search=[root.parent])
        assert message in caught.value.message
        assert hint in caught.value.hint


def test_missing_split(root):
    preflight(config(), search=[root.parent])
    shutil.rmtree(root / "val")
    refused(root, "data.splits.val: 'val' does not exist", "val: null")
    refused(root, "test, train", "val: null")
    preflight(config(splits={"val": None}), search=[root.parent])
    refused(root, "data.splits.test: 'exam' does not exist", "correct", splits={"val": None, "test": "exam"})
    refused(root, "climbs out", "correct", splits={"val": "../other"})
    (root / "val").write_text("")
    refused(root, "is a file")


def test_a_class_in_one_split_only(root):
    shutil.move(root / "test" / "eel", root / "test" / "eal")
    refused(root, f"the class folder 'eal' is in {root / 'test'} but not in train (did you mean 'eel'?)")
    shutil.rmtree(root / "test" / "eal")
    refused(root, f"the class folder 'eel' is missing in {root / 'test'}")


def test_one_class(root):
    for split in COUNTS:
        for label in ("cat", "dog"):
            shutil.rmtree(root / split / label)
    refused(root, "has 1 class folders; at least 2 are needed")


def test_a_class_without_images(root):
    for path in (root / "val" / "cat").iterdir():
        path.rename(path.with_suffix(".gif2"))
    with pytest.raises(DataError, match=r"no images in .*val/cat; it has 3 other entries") as caught:
        open_(root)
    assert ".png" in caught.value.hint


def test_an_empty_calib_folder(root):
    (root / "ranges").mkdir()
    with pytest.raises(DataError, match=r"no images in .*ranges"):
        open_(root, splits={"calib": "ranges"})


def test_calibrating_on_the_evaluation_split_is_refused(root):
    # by name: already in the recipe, so that the message carries a line
    with pytest.raises(ValidationError, match="setting ranges on the evaluation split"):
        TypeAdapter(DataConfig).validate_python(
            {"kind": "image_folder", "root": "pets", "size_px": 16, "splits": {"calib": "test"}},
        )
    # by another spelling, by an absolute path, by a link to the folder, by a folder inside it
    (root / "ranges").symlink_to(root / "test")
    for calib in ("./test/", str(root / "test"), "ranges"):
        refused(root, "setting ranges on the evaluation split", "calib: null", splits={"calib": calib})
    refused(root, "calib and test share the folder" if False else "evaluation split", splits={"calib": "test/dog"})
    # by a copy of it
    shutil.copytree(root / "test", root / "copied")
    with pytest.raises(DataError, match="every image of calib is also in test"):
        open_(root, splits={"calib": "copied"})


def test_splits_must_be_disjoint(root):
    refused(root, "train and val share the folder", splits={"val": "./train"})
    refused(root, "splits must be disjoint", splits={"train": str(root)})
    with pytest.raises(ValidationError, match="train and test share the folder"):
        config(splits={"test": "train"})


@pytest.mark.parametrize("link", ["symlink", "hard link", "linked class folder"])
def test_one_file_in_two_splits_is_refused(root, link):
    source, new = root / "test" / "dog" / "001.png", root / "train" / "dog" / "zzz.png"
    if link == "symlink":
        new.symlink_to(source)
    elif link == "hard link":
        new.hardlink_to(source)
    else:
        shutil.rmtree(root / "train" / "dog")
        (root / "train" / "dog").symlink_to(root / "test" / "dog")
    with pytest.raises(DataError, match=r"test and train share a file: .*test/dog/.*png is .*train/dog/.*png"):
        open_(root)


def test_equal_contents_in_two_splits_are_a_warning(root):
    shutil.copy(root / "test" / "dog" / "001.png", root / "train" / "dog" / "copy.png")
    data = open_(root, calibration_images=6)
    split = "calib" if contents(data.calib) & contents(data.test) else "train"
    assert data.warnings == (f"1 of 15 images of test are in {split} too, byte for byte",)


def test_too_few_images_for_every_class(root):
    with pytest.raises(DataError, match="no training image of 1 of 3 classes"):
        open_(root, limit_per_class=1)


# --- real data ---


@pytest.mark.data
def test_cifar10(data_root):
    if not (data_root / "cls_cifar10").is_dir():
        pytest.skip(f"{data_root} has no cls_cifar10")
    data = load(ImageFolderConfig(root="cls_cifar10", size_px=32, limit_per_class=60), search=[data_root])
    assert data.classes[0] == "airplane"
    assert [len(split) for split in data.splits] == [540, 600, 600, 60]
    assert np.bincount(data.test.labels).tolist() == [60] * 10
    # the published statistics of the training set: 0.491, 0.482, 0.447 and 0.247, 0.243, 0.262
    assert data.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.02)
    assert data.std == pytest.approx((0.247, 0.243, 0.262), abs=0.02)


@pytest.mark.data
def test_imagenette_resized(data_root):
    if not (data_root / "cls_imagenette128").is_dir():
        pytest.skip(f"{data_root} has no cls_imagenette128")
    data = load(
        ImageFolderConfig(root="cls_imagenette128", size_px=64, limit_per_class=5, splits={"val": None}), search=[data_root]
    )
    assert (data.height, data.width, data.channels) == (64, 64, 3)
    assert "cassette player" in data.classes
    assert [len(split) for split in data.splits] == [40, 5, 50, 5]
