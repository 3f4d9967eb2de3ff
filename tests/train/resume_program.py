"""Train one of CASES, up to a point, in a process of its own: ``python resume_program.py FOLDER STOP``.

STOP is ``epoch:N`` (stop once N epochs are saved), ``step:N`` (stop in step N, between two saves) or ``end``, which writes the
weights to FOLDER/<case>.pt.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import toy
from torch import nn

from edgekd.distill.logits import LogitsConfig
from edgekd.train.hardware import ComputeConfig
from edgekd.train.loop import train
from edgekd.train.optim import TrainConfig
from edgekd.train.step import TaskOnly, train_step

EPOCHS = 3


class Stopped(Exception):  # noqa: N818  it is no error
    """What a killed process would leave behind is on disk already."""


class Learned(nn.Module):
    """An objective with a parameter of its own and a count: both must survive."""

    student_taps = ("stage1",)
    teacher_taps = ()

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(8, 1, 1)
        self.register_buffer("calls", torch.zeros(()))

    def losses(self, step):
        self.calls += 1
        return {"own": self.head(step.student.taps["stage1"]).square().mean() / self.calls}

    def train_step(self, state, images, labels):
        return train_step(state, images, labels)


def config(**arguments):
    return TrainConfig(epochs=EPOCHS, batch_size=8, **{"lr": 0.05, **arguments})


# name: training, precision, student's arguments, objective
CASES = {
    "sgd": (config(warmup_epochs=0.5), "32-true", {}, TaskOnly),
    "ema-dropout": (config(ema_decay=0.9), "32-true", {"dropout": 0.3}, TaskOnly),
    "adamw": (config(optimizer="adamw", lr=0.01, weight_decay=0.1, ema_decay=0.5), "32-true", {}, TaskOnly),
    "accumulate-clip": (config(accumulate=4, clip_norm=0.1), "32-true", {"dropout": 0.1}, TaskOnly),
    "bf16": (config(clip_norm=1.0, ema_decay=0.9), "bf16-mixed", {"dropout": 0.3}, TaskOnly),
    "teacher": (config(), "32-true", {}, lambda: LogitsConfig(name="logits").build(None, None)),
    "learned": (config(optimizer="adamw", lr=0.01), "32-true", {}, Learned),
}


def run(name, folder, stop):
    training, precision, arguments, objective = CASES[name]
    kind, _, number = stop.partition(":")

    def on_epoch(record):
        if kind == "epoch" and record["epoch"] == int(number):
            raise Stopped

    def on_step(done, total, images):
        if kind == "step" and done == int(number):
            raise Stopped

    student, teacher = toy.net(1, **arguments), toy.net(2, channels=12)
    torch.manual_seed(5)
    try:
        train(
            student=student,
            objective=objective(),
            config=training,
            setting=toy.setting(
                folder / name,
                compute=ComputeConfig(accelerator="cpu", threads=1, precision=precision),
                on_epoch=on_epoch,
                on_step=on_step,
            ),
            teacher=teacher if name == "teacher" else None,
            student_taps=toy.NET_TAPS,
            teacher_taps=toy.NET_TAPS,
        )
    except Stopped:
        return
    torch.save(student.state_dict(), folder / f"{name}.pt")


if __name__ == "__main__":
    for case in CASES:
        run(case, Path(sys.argv[1]), sys.argv[2])
