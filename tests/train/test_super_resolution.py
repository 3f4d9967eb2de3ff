"""The super-resolution branch: what it draws, what the student sees, and that nothing of it stays."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgekd import models
from edgekd.data.base import Dataset, Split
from edgekd.errors import RecipeError, TrainingError
from edgekd.models import ModelConfig
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.step import Outputs, StepInputs
from edgekd.train.super_resolution import Branch, SuperResolution, SuperResolutionConfig

SIZE = 32


def dataset():
    empty = Split("train", np.zeros((1, SIZE, SIZE, 3), np.uint8), np.zeros((1, 1, 6), np.float32))
    return Dataset(empty, empty, empty, empty, classes=("a",), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), fingerprint="none")


def student():
    config = ModelConfig(name="superyolo_small", arguments={"width": 0.125})
    module = models.build(config, num_classes=1, in_channels=3)
    return Loaded(module, models.taps(config, module), Architecture(config.model_dump(mode="json"), 1, 3, SIZE, SIZE))


def objective(**options):
    return SuperResolution(SuperResolutionConfig(**options), student(), dataset())


class State:
    """The part of a training that the step touches."""

    def __init__(self, inner):
        self.inner = inner


def test_the_branch_draws_at_the_finer_size():
    branch = Branch((6, 10), 8, 2, 3, factor=8)
    picture = branch(torch.randn(2, 6, 5, 7), torch.randn(2, 10, 2, 3))
    assert picture.shape == (2, 3, 40, 56)
    picture.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in branch.parameters())


def test_the_term_by_hand():
    """A branch that draws grey: the distance of grey from pixels in 0..1."""
    term = objective(weight=0.1)

    class Grey(nn.Module):
        def forward(self, fine, coarse):
            return torch.full((2, 3, 2 * SIZE, 2 * SIZE), 0.5)

    term.branch = Grey()
    pixels = torch.rand(2, 3, 2 * SIZE, 2 * SIZE)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)))
    taps = {"block4": torch.zeros(1), "block8": torch.zeros(1)}
    step = StepInputs((pixels - mean) / std, torch.zeros(2, 1, 6), Outputs(torch.zeros(1), taps), None, 0, 0)
    (value,) = term.losses(step).values()
    assert value.item() == pytest.approx(0.1 * (pixels - 0.5).abs().mean().item(), rel=1e-5)


def test_the_student_sees_means_and_boxes_of_its_own_size(monkeypatch):
    term, seen = objective(scale=2), {}

    class Student(nn.Module):
        def forward(self, images):
            return images

    model = Student()

    def step(state, images, labels):
        seen.update(images=state.inner(images), labels=labels)
        return {}

    monkeypatch.setattr("edgekd.train.super_resolution.train_step", step)
    fine = torch.randn(2, 3, 64, 64)
    labels = torch.tensor([[[1.0, 10, 20, 30, 40, 1], [-1, 0, 0, 0, 0, 0]]])
    term.train_step(State(model), fine, labels)
    assert torch.allclose(seen["images"], functional.avg_pool2d(fine, 2))
    assert seen["labels"].tolist() == [[[1, 5, 10, 15, 20, 1], [-1, 0, 0, 0, 0, 0]]], "class and ignore stay"
    assert model(fine) is fine, "only while it trains"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fine": "block40"}, RecipeError, "no tap 'block40'"),
        ({"fine": "block8", "coarse": "block4"}, TrainingError, r"super_resolution: 'block8' is \[.*fine the larger|block8"),
    ],
)
def test_maps_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        objective(**options)
