"""Where training runs: what is refused before anything starts."""

import shlex
import sys

import pytest
import torch

from edgekd.errors import RecipeError
from edgekd.train import hardware
from edgekd.train.hardware import ComputeConfig, check_processes, make_fabric


@pytest.fixture
def processes(monkeypatch):
    def start(world, rank=0, local=None):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local or world))

    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return start


def test_one_process_is_what_there_is_without_torchrun(processes):
    assert (hardware.world_size(), hardware.rank()) == (1, 0)
    check_processes(ComputeConfig(), "edgekd compress recipe.yaml")


def test_torchruns_variables_are_read(processes):
    processes(4, rank=3)
    assert (hardware.world_size(), hardware.rank()) == (4, 3)
    check_processes(ComputeConfig(devices=4), "edgekd compress recipe.yaml")


def test_too_few_processes_are_told_the_command_that_starts_enough(processes):
    with pytest.raises(RecipeError, match=r"compute.devices is 2, but 1 process\(es\) were started") as caught:
        check_processes(ComputeConfig(devices=2), "edgekd compress 'my recipe.yaml' --smoke")
    # that this very command runs is tested with the whole pipeline
    command = shlex.split(caught.value.hint.removeprefix("start it with: "))
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert command[3:] == ["--standalone", "--nproc-per-node", "2", "-m", "edgekd", "compress", "my recipe.yaml", "--smoke"]


def test_too_many_processes(processes):
    processes(3)
    with pytest.raises(RecipeError, match=r"compute.devices is 1, but 3 process") as caught:
        check_processes(ComputeConfig(), "edgekd compress recipe.yaml")
    assert caught.value.hint == "set compute.devices to 3, or start it without torchrun"


@pytest.mark.parametrize(
    ("config", "gpus", "expected"),
    [
        (ComputeConfig(), 0, "cpu"),
        (ComputeConfig(), 2, "cuda"),
        (ComputeConfig(accelerator="cpu"), 2, "cpu"),
        (ComputeConfig(accelerator="cuda"), 1, "cuda"),
        (ComputeConfig(precision="16-mixed"), 1, "cuda"),
        (ComputeConfig(precision="bf16-mixed"), 0, "cpu"),
    ],
)
def test_auto_takes_a_gpu_where_there_is_one(config, gpus, expected):
    assert hardware._accelerator(config, gpus, 1) == expected


@pytest.mark.parametrize(
    ("config", "gpus", "per_node", "message", "hint"),
    [
        (ComputeConfig(accelerator="cuda"), 0, 1, r"accelerator cuda with 1 device\(s\).*torch finds 0", "accelerator to cpu"),
        (ComputeConfig(devices=4), 2, 4, r"accelerator auto with 4 device\(s\).*torch finds 2", "lower compute.devices"),
        (ComputeConfig(precision="16-mixed"), 0, 1, "16-mixed needs a CUDA GPU", "bf16-mixed"),
        (ComputeConfig(accelerator="cpu", precision="16-mixed"), 8, 1, "16-mixed needs a CUDA GPU", "bf16-mixed"),
    ],
)
def test_what_this_machine_lacks_is_named(config, gpus, per_node, message, hint):
    with pytest.raises(RecipeError, match=message) as caught:
        hardware._accelerator(config, gpus, per_node)
    assert hint in caught.value.hint


def test_fabric_follows_the_recipe(processes):
    before = torch.get_num_threads()
    try:
        fabric = make_fabric(ComputeConfig(accelerator="cpu", threads=2, precision="bf16-mixed"))
        assert torch.get_num_threads() == 2
        assert (fabric.device.type, fabric.world_size, fabric.global_rank) == ("cpu", 1, 0)
        with fabric.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    finally:
        torch.set_num_threads(before)


def test_threads_are_left_alone_unless_given(processes):
    before = torch.get_num_threads()
    make_fabric(ComputeConfig(accelerator="cpu"))
    assert torch.get_num_threads() == before
