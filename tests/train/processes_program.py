"""Train CASES in as many processes as torchrun started, or in one; the first process writes what came out.

python -m torch.distributed.run --nproc-per-node 2 processes_program.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import toy
from torch import nn

from edgekd.data.augment import AugmentConfig
from edgekd.train.hardware import ComputeConfig, world_size
from edgekd.train.loop import evaluate, train
from edgekd.train.optim import TrainConfig
from edgekd.train.step import TaskOnly, train_step


class Learned(nn.Module):
    """An objective that learns, and that normalises: both have to be shared by the processes."""

    student_taps = ("stage2",)
    teacher_taps = ("stage2",)

    def __init__(self):
        super().__init__()
        self.adapter = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))

    def losses(self, step):
        return {"own": (self.adapter(step.student.taps["stage2"]) - step.teacher.taps["stage2"]).square().mean()}

    def train_step(self, state, images, labels):
        return train_step(state, images, labels)


def config(**arguments):
    return TrainConfig(**{"epochs": 2, "batch_size": 8, "lr": 0.05, **arguments})


# name: training, student's arguments, objective
CASES = {
    "without-norm": (config(), {"norm": False}, TaskOnly),
    "batch-norm": (config(), {}, TaskOnly),
    "everything": (
        config(optimizer="adamw", lr=0.005, clip_norm=0.5, ema_decay=0.9, accumulate=2),
        {"norm": False},
        TaskOnly,
    ),
    # not AdamW: a bias in front of a batch norm has no gradient but noise, which Adam would scale up
    "learned": (config(), {}, Learned),
}


def run(name, folder):
    training, arguments, objective = CASES[name]
    student, teacher = toy.net(1, **arguments).double(), toy.net(2).double()
    torch.manual_seed(5)
    module = objective().double()
    setting = toy.setting(
        folder / "work" / name,
        compute=ComputeConfig(accelerator="cpu", devices=world_size(), threads=1),
        augment=AugmentConfig(flip=True, crop_padding_px=2, cutout_px=2),
    )
    history = train(
        student=student,
        objective=module,
        config=training,
        setting=setting,
        teacher=teacher if name == "learned" else None,
        student_taps=toy.NET_TAPS,
        teacher_taps=toy.NET_TAPS,
    )
    test = evaluate(student, setting.dataset.test, setting, batch_size=7)
    if setting.fabric.is_global_zero:
        torch.save(
            {**student.state_dict(), **{f"objective.{k}": v for k, v in module.state_dict().items()}}, folder / f"{name}.pt"
        )
        (folder / f"{name}.json").write_text(json.dumps({"history": history, "test": test}))


if __name__ == "__main__":
    for case in CASES:
        run(case, Path(sys.argv[1]))
