"""Hinton's softened logits against numbers by hand, loops, limits and gradients."""

import math

import pytest
import torch
from pydantic import ValidationError

from edgekd.distill.logits import LogitsConfig, LogitsDistiller, soft_cross_entropy
from edgekd.train.step import Outputs, StepInputs


def by_hand(student, teacher, temperature):
    """Equation 1 and section 2 of the paper, one number at a time."""
    total = 0.0
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True):
        q = [math.exp(z / temperature) for z in student_row]
        p = [math.exp(v / temperature) for v in teacher_row]
        q, p = [value / sum(q) for value in q], [value / sum(p) for value in p]
        cross_entropy = -sum(target * math.log(given) for target, given in zip(p, q, strict=True))
        entropy = -sum(target * math.log(target) for target in p)
        total += cross_entropy - entropy
    return temperature**2 * total / len(student)


def pair(images=5, classes=7, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(images, classes, generator=draw, dtype=dtype) * 3 for _ in range(2))


def test_value_computed_by_hand():
    """Teacher (2/3, 1/3), student (1/2, 1/2), T = 1: 2/3 ln(4/3) + 1/3 ln(2/3)."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(2), 0.0]])
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert expected == pytest.approx(0.0566330)
    assert soft_cross_entropy(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-5)
    # T = 2 of doubled logits is the same divergence, times T squared
    assert soft_cross_entropy(student, 2 * teacher, 2.0).item() == pytest.approx(4 * expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("images", "classes"), [(1, 2), (5, 7), (64, 3)])
def test_agrees_with_loops(images, classes, temperature):
    student, teacher = pair(images, classes)
    actual = soft_cross_entropy(student, teacher, temperature)
    assert actual.item() == pytest.approx(by_hand(student, teacher, temperature), rel=1e-9)


def test_least_where_both_agree_and_nowhere_else():
    student, teacher = pair()
    assert soft_cross_entropy(teacher, teacher, 4.0).item() == pytest.approx(0, abs=1e-12)
    assert soft_cross_entropy(student, teacher, 4.0) > 0.1
    for _ in range(20):
        assert soft_cross_entropy(teacher + 0.01 * torch.randn_like(teacher), teacher, 4.0) > 0


def test_a_shift_of_all_logits_changes_nothing():
    student, teacher = pair()
    expected = soft_cross_entropy(student, teacher, 3.0)
    shift = torch.randn(len(student), 1, dtype=torch.float64) * 50
    torch.testing.assert_close(soft_cross_entropy(student + shift, teacher, 3.0), expected)
    torch.testing.assert_close(soft_cross_entropy(student, teacher - shift, 3.0), expected)


def test_is_averaged_over_the_batch():
    student, teacher = pair()
    whole = soft_cross_entropy(student, teacher, 2.0)
    torch.testing.assert_close(soft_cross_entropy(student.repeat(3, 1), teacher.repeat(3, 1), 2.0), whole)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(soft_cross_entropy(student[order], teacher[order], 2.0), whole)


def test_at_high_temperature_it_matches_logits():
    """Section 2.1: as T grows, this becomes half the squared difference of the centred logits, divided by the classes."""
    student, teacher = pair()
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = centred.square().sum(1).mean() / (2 * student.shape[1])
    errors = [abs(soft_cross_entropy(student, teacher, t) / limit - 1).item() for t in (10.0, 100.0, 1000.0)]
    assert errors[2] < 1e-2
    assert errors[0] > errors[1] > errors[2]
    leaf = student.clone().requires_grad_()
    soft_cross_entropy(leaf, teacher, 1000.0).backward()
    torch.testing.assert_close(leaf.grad, centred / student.shape[1] / len(student), rtol=0.05, atol=1e-3)


def test_gradient_is_right():
    student, teacher = pair(3, 4)
    assert torch.autograd.gradcheck(lambda logits: soft_cross_entropy(logits, teacher, 3.0), student.requires_grad_())


def test_gradient_is_that_of_the_papers_cross_entropy():
    """The teacher's entropy, by which divergence and cross-entropy differ, has no gradient."""
    student, teacher = pair()
    first, second = student.clone().requires_grad_(), student.clone().requires_grad_()
    soft_cross_entropy(first, teacher, 4.0).backward()
    cross_entropy = -(torch.softmax(teacher / 4, 1) * torch.log_softmax(second / 4, 1)).sum(1).mean()
    (16 * cross_entropy).backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_nothing_flows_into_the_teacher():
    student, teacher = (logits.requires_grad_() for logits in pair())
    soft_cross_entropy(student, teacher, 4.0).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_float64_stays_and_16_bits_are_widened():
    student, teacher = pair()
    assert soft_cross_entropy(student, teacher, 4.0).dtype == torch.float64
    half = soft_cross_entropy(student.bfloat16(), teacher.bfloat16(), 4.0)
    assert half.dtype == torch.float32
    exact = soft_cross_entropy(student.bfloat16().double(), teacher.bfloat16().double(), 4.0)
    assert half.item() == pytest.approx(exact.item(), rel=1e-5)


def test_large_logits_stay_finite():
    student, teacher = torch.tensor([[1e4, -1e4]], requires_grad=True), torch.tensor([[-1e4, 1e4]])
    loss = soft_cross_entropy(student, teacher, 1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_the_term_is_weighted_and_named():
    student, teacher = pair(dtype=torch.float32)
    distiller = LogitsDistiller(LogitsConfig(name="logits", temperature=2.0, weight=0.3))
    step = StepInputs(torch.zeros(5, 1, 1, 1), torch.zeros(5, dtype=torch.int64), Outputs(student), Outputs(teacher), 0, 0)
    terms = distiller.losses(step)
    assert list(terms) == ["kd"]
    torch.testing.assert_close(terms["kd"], 0.3 * soft_cross_entropy(student, teacher, 2.0))
    assert list(distiller.parameters()) == []


def test_defaults():
    assert LogitsConfig(name="logits").model_dump() == {"name": "logits", "temperature": 4.0, "weight": 0.9}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "greater than 0"),
        ({"temperature": 101}, "less than or equal to 100"),
        ({"weight": -0.1}, "greater than or equal to 0"),
        ({"alpha": 0.5}, "Extra inputs"),
        ({"name": "logit"}, "Input should be 'logits'"),
    ],
)
def test_options_that_cannot_be(arguments, message):
    with pytest.raises(ValidationError, match=message):
        LogitsConfig(**{"name": "logits", **arguments})
