"""Several processes train the model that one process trains on the same global batches."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import processes_program
import pytest
import safetensors.torch
import torch
import toy
from torch import nn

from edgekd.nn.batch_norm import CpuSyncBatchNorm, synchronize

PROGRAM = Path(processes_program.__file__)


def run(*command, **given):
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
        **given,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folders with the results of one process and of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    done = run("torch.distributed.run", "--standalone", "--nproc-per-node", 2, PROGRAM, two)
    assert done.returncode == 0, done.stderr
    for case in processes_program.CASES:
        processes_program.run(case, one)
    return one, two


@pytest.mark.parametrize("case", processes_program.CASES)
def test_two_processes_train_what_one_does(both, case):
    one, two = (torch.load(folder / f"{case}.pt", weights_only=True) for folder in both)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    assert not toy.same_state(one, two), "sums of two processes round otherwise: did the second take part?"


@pytest.mark.parametrize("case", processes_program.CASES)
def test_two_processes_record_what_one_does(both, case):
    one, two = (json.loads((folder / f"{case}.json").read_text()) for folder in both)
    assert two["test"] == pytest.approx(one["test"])
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours["terms"] == pytest.approx(theirs["terms"], rel=1e-6)
        assert ours["val"] == pytest.approx(theirs["val"])
        assert ours["lr"] == theirs["lr"]


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (6, 4)),
        (nn.BatchNorm2d(4), (3, 4, 5, 2)),
        (nn.BatchNorm2d(4, momentum=None), (3, 4, 5, 2)),
        (nn.BatchNorm2d(4, affine=False), (3, 4, 5, 2)),
        (nn.BatchNorm3d(4, track_running_stats=False), (2, 4, 3, 2, 2)),
    ],
    ids=["1d", "2d", "cumulative", "plain", "3d-untracked"],
)
def test_alone_it_is_torchs_batch_norm(group, norm, shape):
    torch.manual_seed(0)
    model = nn.Sequential(norm.double())
    images = [torch.randn(shape, dtype=torch.float64) * 3 + 50 for _ in range(3)]
    expected_state = None
    results = []
    for shared in (False, True):
        if shared:
            model = nn.Sequential(
                type(norm)(4, momentum=norm.momentum, affine=norm.affine, track_running_stats=norm.track_running_stats)
            )
            synchronize(model, torch.device("cpu"))
            assert isinstance(model[0], CpuSyncBatchNorm)
        outputs = []
        for image in images:
            leaf = image.float().requires_grad_()
            out = model.float()(leaf)
            out.square().mul(torch.arange(4.0).view(1, 4, *[1] * (len(shape) - 2))).sum().backward()
            outputs += [out.detach(), leaf.grad]
        outputs.append(model.eval()(images[0].float()).detach())
        results.append(outputs)
        if expected_state is None:
            expected_state = toy.state_of(model)
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    for name, value in expected_state.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-4)


def test_synchronizing_keeps_parameters_names_and_modes():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "b": nn.BatchNorm1d(4).eval()})
    before = dict(model.named_parameters())
    names = list(model.state_dict())
    synchronize(model, torch.device("cpu"))
    assert list(model.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model["a"][1].training
    assert not model["b"].training
    # without a process group it is an ordinary batch norm
    images = torch.randn(5, 4)
    torch.testing.assert_close(model["b"](images), nn.BatchNorm1d(4).eval()(images))
    assert model["a"](torch.randn(2, 3, 4, 4)).shape == (2, 4, 4, 4)


RECIPE = """
name: two
task: {kind: classification}
data: {kind: digits, size_px: 8}
teacher:
  model: {name: resnet14}
  train: {epochs: 1, batch_size: 250, lr: 0.01}
student:
  model: {name: resnet8}
stages:
  - kind: distill
    method: {name: logits}
    train: {epochs: 1, batch_size: 250, lr: 0.01}
compute: {devices: 2, accelerator: cpu, threads: 1}
"""


def weights(folder):
    # read, not mapped into memory: the test cuts one of these files short
    found = folder.glob("0*/model.safetensors")
    return {path.parent.name.split("-")[1]: safetensors.torch.load(path.read_bytes()) for path in found}


def test_the_command_in_the_hint_trains_what_one_process_trains(tmp_path):
    """One process refuses and says what to type; that works, and works again after a checkpoint was damaged."""
    (tmp_path / "two.yaml").write_text(RECIPE)
    (tmp_path / "one.yaml").write_text(RECIPE.replace("devices: 2", "devices: 1"))
    refused = run("edgekd", "compress", "two.yaml", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    hint = refused.stderr.partition("start it with: ")[2].strip()
    _, _, *command = shlex.split(" ".join(hint.split()))
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("teacher: accuracy") == 1, "both processes talk"

    two = weights(tmp_path / "runs" / "two")
    alone = run("edgekd", "compress", "one.yaml", "--out", "alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    one = weights(tmp_path / "alone")
    assert sorted(one) == sorted(two) == ["distill", "teacher"]
    for stage, tensors in one.items():
        for name, value in tensors.items():
            # float32 rounding moves a ReLU here and there; in float64 (above) no difference is left
            torch.testing.assert_close(two[stage][name], value, rtol=5e-3, atol=2e-3, msg=lambda text, n=name: f"{n}: {text}")

    (damaged,) = (tmp_path / "runs" / "two").glob("02-distill-*/model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    again = run(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "damaged artifact 02-distill" in again.stderr
    assert "reused 01-teacher" in again.stderr
    assert toy.same_state(weights(tmp_path / "runs" / "two")["distill"], two["distill"])
