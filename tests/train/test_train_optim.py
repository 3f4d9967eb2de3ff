"""Optimizers, the schedule at its edges, and the moving average."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from edgekd.train.optim import Average, TrainConfig, learning_rate, make_optimizer


def test_schedule_without_warmup_goes_from_the_peak_to_almost_zero():
    rates = [learning_rate(step, 10, 0, 2.0) for step in range(11)]
    assert rates[0] == 2.0
    assert rates[5] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(0.0, abs=1e-12)  # after the last step; the last step itself still moves
    assert rates[9] == pytest.approx(2.0 * 0.5 * (1 + math.cos(0.9 * math.pi)))
    assert rates == sorted(rates, reverse=True)


def test_warmup_rises_in_equal_steps_and_joins_the_cosine():
    rates = [learning_rate(step, 20, 4, 1.0) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] < 1.0
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (1, 1), (5, 5), (3, 9)])
def test_shortest_schedules_are_finite_and_positive(total, warmup):
    assert all(0 < learning_rate(step, total, warmup, 0.1) <= 0.1 for step in range(total))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.tied = self.fc


def groups(optimizer, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_matrices_and_kernels_decay(name):
    model = Mixed()
    optimizer = make_optimizer([model], TrainConfig(epochs=1, optimizer=name, weight_decay=0.3))
    assert groups(optimizer, model) == {
        0.3: {"conv.weight", "fc.weight"},
        0.0: {"conv.bias", "norm.weight", "norm.bias", "fc.bias", "scale"},
    }


def test_each_parameter_is_there_once_however_many_modules_share_it():
    model = Mixed()
    optimizer = make_optimizer([model, model.conv, nn.Sequential(model.fc), nn.Identity()], TrainConfig(epochs=1))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in parameters}) == len(parameters) == 7


def test_a_model_of_biases_alone_has_one_group():
    assert len(make_optimizer([nn.BatchNorm2d(3)], TrainConfig(epochs=1)).param_groups) == 1


def test_optimizers_are_those_of_the_recipe():
    model = Mixed()
    sgd = make_optimizer([model], TrainConfig(epochs=1, momentum=0.7, lr=0.3))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"], sgd.defaults["lr"]) == (0.7, True, 0.3)
    assert not make_optimizer([model], TrainConfig(epochs=1, momentum=0)).defaults["nesterov"]
    adamw = make_optimizer([model], TrainConfig(epochs=1, optimizer="adamw"))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.9, 0.999)


def test_average_warms_up_then_keeps_its_decay():
    """From 0 towards 1: one minus the value is the product of all decays so far."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = Average(model, 0.5)
    nn.init.ones_(model.weight)
    left = 1.0
    for count in range(1, 30):
        average.update(model)
        left *= min(0.5, (1 + count) / (10 + count))
        assert average.values["weight"].item() == pytest.approx(1 - left, rel=1e-5)
    assert min((1 + 1) / (10 + 1), 0.5) < 0.5, "the first step should count for more than the decay says"


def test_average_copies_counters_and_follows_float_buffers():
    model = nn.BatchNorm1d(2)
    average = Average(model, 0.9)
    model(torch.randn(8, 2) + 5)
    model(torch.randn(8, 2) + 5)
    average.update(model)
    assert average.values["num_batches_tracked"] == 2
    expected = model.running_mean * (1 - 2 / 11)
    torch.testing.assert_close(average.values["running_mean"], expected)


def test_average_leaves_the_model_alone_and_round_trips():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    average = Average(model, 0.9)
    average.update(model)
    assert torch.equal(model.weight, before)
    other = Average(nn.Linear(2, 2), 0.9)
    other.load_state_dict(average.state_dict())
    assert other.updates == 1
    assert torch.equal(other.values["weight"], average.values["weight"])


def test_average_of_positive_scales_is_positive():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor([1e-6, 3.0]))
    average = Average(model, 0.99)
    for value in (5.0, 1e-7, 2.0):
        model.scale.data.fill_(value)
        average.update(model)
        assert (average.values["scale"] > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 2, "warmup_epochs": 2.0}, "warmup_epochs 2.0 must be less than epochs 2"),
        ({"epochs": 2, "batch_size": 10, "accumulate": 4}, "batch_size 10 must be a multiple of accumulate 4"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"epochs": 1, "lr": 0}, "greater than 0"),
        ({"epochs": 1, "ema_decay": 1}, "less than 1"),
        ({"epochs": 1, "clip_norm": 0}, "greater than 0"),
        ({"epochs": 1, "learning_rate": 1}, "Extra inputs"),
    ],
)
def test_trainings_that_cannot_be(arguments, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**arguments)
