"""One step: what it hands to the terms, and what it does with them."""

import math

import pytest
import torch
import toy
from torch import nn

from edgekd.errors import TrainingError
from edgekd.tasks import Classification
from edgekd.train.hardware import ComputeConfig, make_fabric
from edgekd.train.step import TaskOnly, TrainState, finite, forward, train_step


class Recorder(TaskOnly):
    def __init__(self, terms=None):
        super().__init__()
        self.steps = []
        self.terms = terms or {}

    def losses(self, step):
        self.steps.append(step)
        return {name: weight * step.student.logits.square().mean() for name, weight in self.terms.items()}


def make(student=None, *, objective=None, teacher=None, precision="32-true", lr=0.1, **given):
    fabric = make_fabric(ComputeConfig(accelerator="cpu", precision=precision, threads=1))
    inner = student if student is not None else toy.net(1, norm=False)
    wrapped, optimizer = fabric.setup(inner, torch.optim.SGD(inner.parameters(), lr=lr))
    return TrainState(
        fabric=fabric,
        task=Classification(),
        student=wrapped,
        inner=inner,
        teacher=teacher,
        objective=objective or Recorder(),
        student_taps=given.pop("student_taps", {}),
        teacher_taps=given.pop("teacher_taps", {}),
        optimizer=optimizer,
        **given,
    )


def batch(count=6):
    torch.manual_seed(0)
    return torch.randn(count, 3, 8, 8), torch.arange(count) % toy.CLASSES


def test_the_task_is_told_how_far_the_training_is():
    told = []

    class Scheduled(Classification):
        def loss(self, logits, labels, progress=1.0):
            told.append(progress)
            return super().loss(logits, labels, progress)

    state = make(objective=Recorder({"own": 1.0}), step=7, total_steps=10)
    state.task = Scheduled()
    train_step(state, *batch())
    assert told == [0.7]
    state.task_weight = 0.0
    assert train_step(state, *batch())["task"] == 0
    assert told == [0.7], "what has no weight is not computed"


def test_terms_see_the_batch_both_outputs_and_their_taps():
    teacher = toy.net(2).eval()
    objective = Recorder({"own": 1.0})
    state = make(objective=objective, teacher=teacher, student_taps={"a": "conv1"}, teacher_taps={"b": "norm2"}, step=7, epoch=2)
    images, labels = batch()
    train_step(state, images, labels)
    (step,) = objective.steps
    assert torch.equal(step.images, images)
    assert torch.equal(step.labels, labels)
    assert (step.step, step.epoch) == (7, 2)
    assert step.student.logits.shape == step.teacher.logits.shape == (6, toy.CLASSES)
    assert {role: tap.shape for role, tap in step.student.taps.items()} == {"a": (6, 8, 8, 8)}
    assert {role: tap.shape for role, tap in step.teacher.taps.items()} == {"b": (6, 16, 4, 4)}
    assert step.student.logits.requires_grad
    assert not step.teacher.logits.requires_grad
    assert not step.teacher.taps["b"].requires_grad


def test_without_a_teacher_there_are_no_teacher_outputs():
    assert forward(make(), *batch()).teacher is None


def test_the_gradient_is_that_of_the_sum_of_all_terms():
    images, labels = batch()
    student = toy.net(1, norm=False)
    reference = toy.net(1, norm=False)
    values = train_step(make(student, objective=Recorder({"first": 0.5, "second": 2.0}), task_weight=3.0), images, labels)
    logits = reference(images)
    task, own = nn.functional.cross_entropy(logits, labels), logits.square().mean()
    (3 * task + 2.5 * own).backward()
    assert values == pytest.approx({"task": 3 * task.item(), "first": 0.5 * own.item(), "second": 2 * own.item()}, rel=1e-5)
    for mine, theirs in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
        torch.testing.assert_close(mine, theirs - 0.1 * theirs.grad)


@pytest.mark.parametrize("parts", [1, 3, 4, 6])
def test_parts_weigh_by_their_images(parts):
    """8 images in 3 parts are 3, 3 and 2: their means may not be averaged plainly."""
    images, labels = batch(8)
    student, reference = toy.net(1, norm=False), toy.net(1, norm=False)
    values = train_step(make(student, accumulate=parts), images, labels)
    loss = nn.functional.cross_entropy(reference(images), labels)
    loss.backward()
    assert values["task"] == pytest.approx(loss.item(), rel=1e-5)
    for mine, theirs in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_gradients_of_the_step_before_are_gone():
    images, labels = batch()
    student = toy.net(1, norm=False)
    state = make(student, lr=0.0)
    train_step(state, images, labels)
    first = [parameter.grad.clone() for parameter in student.parameters()]
    train_step(state, images, labels)
    for parameter, before in zip(student.parameters(), first, strict=True):
        torch.testing.assert_close(parameter.grad, before)


def test_clipping_scales_all_gradients_together():
    images, labels = batch()
    student, reference = toy.net(1, norm=False), toy.net(1, norm=False)
    train_step(make(student, clip_norm=0.01), images, labels)
    nn.functional.cross_entropy(reference(images), labels).backward()
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in reference.parameters()))
    assert norm > 0.01
    for mine, theirs in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad * 0.01 / norm, rtol=1e-3, atol=1e-7)


def test_bf16_computes_in_16_bits_and_keeps_float32_weights():
    objective = Recorder()
    state = make(objective=objective, teacher=toy.net(2).eval(), precision="bf16-mixed", student_taps={"a": "conv1"})
    values = train_step(state, *batch())
    assert objective.steps[0].student.taps["a"].dtype == torch.bfloat16
    assert objective.steps[0].teacher.logits.dtype == torch.bfloat16
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in state.inner.parameters())
    exact = train_step(make(), *batch())
    assert values["task"] == pytest.approx(exact["task"], rel=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite_names_the_term_the_place_and_the_others(value):
    state = make(step=41, epoch=3)
    terms = {"task": torch.tensor(1.25), "kd": torch.tensor(value), "fit": torch.tensor(3e30)}
    with pytest.raises(TrainingError, match=rf"term 'kd' is {value} in epoch 4, step 41 \(the others: task 1.25, fit 3e\+30\)"):
        finite(terms, state)


def test_finite_gives_plain_numbers():
    assert finite({"a": torch.tensor(0.5, requires_grad=True), "b": torch.tensor(-2.0)}, make()) == {"a": 0.5, "b": -2.0}
