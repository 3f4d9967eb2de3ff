import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from edgekd.data import CallableConfig, DataConfig, load, preflight
from edgekd.errors import DataError


def split(count, seed, classes=3, size=6, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8), np.arange(count) % classes


GOOD = {"train": split(60, 0), "test": split(9, 1), "val": split(6, 2), "calib": split(6, 3)}


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Gives a function that loads what it is told, through a module on the path."""
    import sys

    (tmp_path / "my_own_data.py").write_text("def get(**arguments):\n    return HOOK(**arguments)\n\nNUMBER = 3\n")
    (tmp_path / "my_broken_data.py").write_text("raise RuntimeError('no such disk')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own_data", raising=False)

    def run(result, **options):
        import my_own_data

        my_own_data.HOOK = result if callable(result) else lambda: result
        return load(CallableConfig(call="my_own_data:get", **options), search=[])

    return run


def test_all_four_splits_keep_their_order(user):
    data = user({**GOOD, "classes": ["x", "y", "z"]})
    for found in data.splits:
        assert (found.images == GOOD[found.name][0]).all()
        assert (found.labels == GOOD[found.name][1]).all()
        assert found.labels.dtype == np.int64
    assert data.classes == ("x", "y", "z")
    assert GOOD["train"][0].flags.writeable  # the user's own arrays stay as they were


def test_val_and_calib_are_carved_out_of_train(user):
    data = user({"train": GOOD["train"], "test": GOOD["test"]}, calibration_images=3, val_images=40)
    assert [len(found) for found in data.splits] == [51, 6, 9, 3]
    assert sorted(np.bincount(data.calib.labels)) == [1, 1, 1]
    pixels = [image.tobytes() for found in (data.train, data.val, data.calib) for image in found.images]
    assert sorted(pixels) == sorted(image.tobytes() for image in GOOD["train"][0])
    assert data.warnings == ("val has 6 images instead of 40: at most a tenth of the 60 training images",)
    assert data.classes == ("0", "1", "2")
    again = user({"train": GOOD["train"], "test": GOOD["test"]}, calibration_images=3, val_images=40)
    assert again.fingerprint == data.fingerprint


def test_arguments_reach_the_function(user):
    data = user(
        lambda size, labels: {"train": split(20, 0, size=size), "test": split(3, 1, size=size)},
        arguments={"size": 8, "labels": None},
    )
    assert data.height == 8


def changed(**changes):
    return {**GOOD, **changes}


IMAGES, LABELS = GOOD["test"]


@pytest.mark.parametrize(
    ("result", "message", "hint"),
    [
        ([1], "returned a list; expected a mapping", ""),
        ({"train": GOOD["train"]}, "returned no 'test'; it returned train", ""),
        (changed(tset=1), "unknown key 'tset' (did you mean 'test'?)", ""),
        (changed(test=IMAGES), "test is a ndarray; expected a pair", ""),
        (changed(test=(IMAGES / 255, LABELS)), "test: images are float64; expected uint8", "* 255"),
        (changed(test=(IMAGES[..., 0], LABELS)), "shape [9, 6, 6]; expected [N, H, W, C]", "images[..., None]"),
        (changed(test=(np.zeros((9, 3, 20, 20), np.uint8), LABELS)), "shape [9, 3, 20, 20]", "transpose(0, 2, 3, 1)"),
        (changed(test=(IMAGES, LABELS.astype(float))), "labels are float64; expected integers", ""),
        (changed(test=(IMAGES, LABELS[:4])), "labels have shape [4]; expected [9]", ""),
        (changed(test=(IMAGES[:0], LABELS[:0])), "the split test has no images", ""),
        (changed(classes=["x", "y"]), "labels of train range from 0 to 2; with 2 classes", ""),
        (changed(test=split(9, 5, size=7)), "images of test are 7 x 7", ""),
        (changed(test=split(9, 5, classes=5)), "no training image of 2 of 5 classes: 3, 4", ""),
        (changed(calib=GOOD["test"]), "test and calib are the same images in memory", "disjoint"),
        (changed(val=(GOOD["train"][0][4:8], GOOD["train"][1][4:8])), "train and val are the same images in memory", "disjoint"),
        (changed(calib=(IMAGES.copy(), LABELS)), "every image of calib is also in test", "carved"),
    ],
)
def test_wrong_results(user, result, message, hint):
    with pytest.raises(DataError) as caught:
        user(result)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_an_error_in_the_function_keeps_its_cause(user):
    def fail():
        raise KeyError("path")

    with pytest.raises(DataError, match="my_own_data:get raised KeyError: 'path'") as caught:
        user(fail)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("no_such_module_here:get", "'no_such_module_here' cannot be imported: ModuleNotFoundError"),
        ("my_broken_data:get", "cannot be imported: RuntimeError: no such disk"),
        ("my_own_data:gte", "has no 'gte' (did you mean 'get'?)"),
        ("my_own_data:NUMBER", "my_own_data:NUMBER is a int, not a function"),
    ],
)
def test_preflight_imports_but_does_not_call(user, call, expected):
    preflight(CallableConfig(call="my_own_data:get"), search=[])
    with pytest.raises(DataError) as caught:
        preflight(CallableConfig(call=call), search=[])
    assert expected in caught.value.message


@pytest.mark.parametrize("call", ["noname", "a.b:", ":f", "a-b:f", "a:b.c", "a:f()"])
def test_malformed_calls_are_refused_by_the_recipe(call):
    with pytest.raises(ValidationError):
        CallableConfig(call=call)


def test_kind_selects_the_config():
    config = TypeAdapter(DataConfig).validate_json('{"kind": "callable", "call": "a.b:c", "arguments": {"n": 1}}', strict=True)
    assert config == CallableConfig(call="a.b:c", arguments={"n": 1})
    with pytest.raises(ValidationError, match="digits"):
        TypeAdapter(DataConfig).validate_python({"kind": "folder"})


def boxed(count, seed, size=32):
    images, _ = split(count, seed, size=size)
    return images, [[[index % 2, 1, 2, 9 + row, 12.5] for row in range(index % 3)] for index in range(count)]


def masked(count, seed, size=32):
    images, _ = split(count, seed, size=size)
    masks = np.random.default_rng(seed).integers(0, 3, (count, size, size))
    masks[:, 0] = 255
    return images, masks


@pytest.fixture
def other(tmp_path, monkeypatch):
    """As ``user``, of a kind with boxes or masks."""
    import sys

    (tmp_path / "my_labels.py").write_text("def get():\n    return HOOK\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_labels", raising=False)

    def run(kind, result, **options):
        import my_labels

        my_labels.HOOK = result
        config = TypeAdapter(DataConfig).validate_python({"kind": kind, "call": "my_labels:get", **options})
        return load(config, search=[])

    return run


def test_boxes_of_a_function_become_padded_rows(other):
    data = other("callable_boxes", {"train": boxed(40, 0), "test": boxed(9, 1)}, augment={"mosaic": 0.5})
    assert [len(found) for found in data.splits] == [32, 4, 9, 4]
    assert data.classes == ("0", "1")
    assert data.test.labels.dtype == np.float32
    assert data.test.labels.shape == (9, 2, 6)
    assert data.test.labels[5].tolist() == [[1, 1, 2, 9, 12.5, 0], [1, 1, 2, 10, 12.5, 0]]
    assert (data.test.labels[0, :, 0] == -1).all()
    images, rows = boxed(9, 1)
    arrays = [np.pad(np.array(row, dtype=float).reshape(-1, 5), ((0, 0), (0, 1))) for row in rows]
    same = other("callable_boxes", {"train": boxed(40, 0), "test": (images, arrays)})
    assert same.fingerprint == data.fingerprint


def test_masks_of_a_function_keep_their_pixels(other):
    data = other("callable_masks", {"train": masked(20, 0), "test": masked(3, 1)}, augment={"scale": 0.2})
    assert data.classes == ("0", "1", "2")
    assert data.test.labels.dtype == np.uint8
    assert (data.test.labels == masked(3, 1)[1]).all()
    carved = [image.tobytes() for part in (data.train, data.val, data.calib) for image in part.labels]
    assert sorted(carved) == sorted(mask.astype(np.uint8).tobytes() for mask in masked(20, 0)[1])


PICTURES, ROWS = boxed(9, 1)
_, MASKS = masked(9, 1)


@pytest.mark.parametrize(
    ("kind", "test", "message", "hint"),
    [
        ("callable_boxes", (PICTURES, ROWS[:4]), "boxes of 4 for 9 images", ""),
        ("callable_boxes", (PICTURES, 3), "boxes of a int for 9 images", ""),
        ("callable_boxes", (PICTURES, [[[0, 1, 2, 3]]] * 9), "boxes of image 0 have shape [1, 4]; expected [M, 5]", ""),
        ("callable_boxes", (PICTURES, [[["a", 1, 2, 3, 4]]] * 9), "boxes of image 0 are no numbers", ""),
        (
            "callable_boxes",
            (PICTURES, [[], *[[[0, 5, 5, 3, 9]]] * 8]),
            "image 1: [0.0, 5.0, 5.0, 3.0, 9.0, 0.0] is no box",
            "corners",
        ),
        ("callable_boxes", (PICTURES, [[[0, 5, 5, 33, 9]]] * 9), "0 <= x1 < x2 <= 32", "shares"),
        ("callable_boxes", (PICTURES, [[[0.5, 5, 5, 13, 9]]] * 9), "expected a class from 0", ""),
        ("callable_boxes", (PICTURES, [[[0, 5, np.nan, 13, 9]]] * 9), "is no box", ""),
        ("callable_boxes", boxed(9, 1, size=24), "images are 24 x 24; both sides must be multiples of 16", "pad"),
        ("callable_boxes", (PICTURES[:, :16], ROWS), "images are 16 x 32; a detector takes square ones", "pad"),
        ("callable_boxes", (PICTURES, [[]] * 9), "no image of test has a box that counts", ""),
        ("callable_masks", (PICTURES, MASKS[:4]), "masks have shape [4, 32, 32]; expected [9, 32, 32]", ""),
        ("callable_masks", (PICTURES, MASKS[..., None]), "masks have shape [9, 32, 32, 1]", "masks[..., 0]"),
        ("callable_masks", (PICTURES, MASKS / 1), "labels are float64; expected integers", ""),
        ("callable_masks", (PICTURES, MASKS - 1), "masks range from -1 to 254", ""),
    ],
)
def test_wrong_boxes_and_masks(other, kind, test, message, hint):
    train = boxed(40, 0) if kind == "callable_boxes" else masked(40, 0)
    if test[0].shape[1:] != train[0].shape[1:]:
        train = (train[0][:, : test[0].shape[1], : test[0].shape[2]], train[1])
    with pytest.raises(DataError) as caught:
        other(kind, {"test": test, "train": train})
    assert message in caught.value.message
    assert hint in caught.value.hint
