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
