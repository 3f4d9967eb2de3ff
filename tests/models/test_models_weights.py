"""Weights files: every form that loads, and every one that is refused."""

import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from edgekd.errors import DataError
from edgekd.models import load_weights


def model(features=4):
    return nn.Sequential(nn.Linear(3, features), nn.BatchNorm1d(features), nn.Linear(features, 2))


@pytest.fixture
def trained():
    torch.manual_seed(3)
    return model()


def save_safetensors(state, path):
    safetensors.torch.save_file(state, path)


def save_nested(key):
    return lambda state, path: torch.save({"epoch": 3, key: state}, path)


def save_parallel(state, path):
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)


def save_old(state, path):
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}, path)


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_safetensors, "w.safetensors"),
        (torch.save, "w.pth"),
        (save_nested("state_dict"), "w.pt"),
        (save_nested("model"), "w.pt"),
        (save_parallel, "w.pt"),
        (save_old, "w.pt"),
    ],
    ids=["safetensors", "plain", "state_dict", "model", "parallel", "before-counters"],
)
def test_loads(trained, tmp_path, save, name):
    save(trained.state_dict(), tmp_path / name)
    other = model()
    load_weights(other, tmp_path / name)
    for key, value in trained.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(other.state_dict()[key], value), key


def test_disagreements_are_counted_and_named_and_nothing_is_changed(trained, tmp_path):
    state = trained.state_dict()
    state["0.weight"] = torch.zeros(9, 3)
    del state["2.weight"], state["2.bias"], state["1.weight"], state["1.bias"]
    state |= {f"extra{index}": torch.zeros(1) for index in range(5)}
    torch.save(state, tmp_path / "w.pth")
    other = model()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(DataError) as caught:
        load_weights(other, tmp_path / "w.pth")
    message = caught.value.message
    assert "4 missing: 1.weight, 1.bias, 2.weight, ..." in message
    assert "5 unexpected: extra0, extra1, extra2, ..." in message
    assert "1 of another shape: 0.weight [9, 3] instead of [4, 3]" in message
    assert "w.pth" in message
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key]), key


def write_junk(path):
    path.write_bytes(b"\x00\x01junk" * 100)


def write_truncated(path):
    torch.save({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


REFUSED = {
    "missing": ("w.pth", lambda path: None, "does not exist"),
    "pickled module": ("w.pth", lambda path: torch.save(model(), path), "unpickles nothing"),
    "pickled code": ("w.pkl", lambda path: path.write_bytes(pickle.dumps(Evil())), "unpickles nothing"),
    "code in a torch file": ("w.pth", lambda path: torch.save({"state_dict": Evil()}, path), "unpickles nothing"),
    "junk": ("w.pth", write_junk, "unpickles nothing|cannot be read"),
    "truncated": ("w.pth", write_truncated, "cannot be read as a torch file"),
    "empty": ("w.pth", lambda path: path.write_bytes(b""), "cannot be read as a torch file"),
    "a folder": ("w.pth", lambda path: path.mkdir(), "does not exist"),
    "a tensor": ("w.pth", lambda path: torch.save(torch.zeros(2), path), "holds no state_dict"),
    "no tensors": ("w.pth", lambda path: torch.save({"epoch": 3}, path), "holds no state_dict"),
    "junk safetensors": ("w.safetensors", write_junk, "cannot be read as safetensors"),
    "empty safetensors": ("w.safetensors", lambda path: path.write_bytes(b""), "cannot be read as safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, tmp_path, capsys):
    name, write, message = REFUSED[case]
    write(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        load_weights(model(), tmp_path / name)
    assert name in caught.value.message
    assert caught.value.hint
    assert "unpickled" not in capsys.readouterr().out
