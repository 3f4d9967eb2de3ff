"""Raw outputs: squared differences, and divergences of the probabilities that they stand for."""

import math

import pytest
import torch

from edgekd import models
from edgekd.distill.raw_output import RawOutputConfig, RawOutputDistiller, divergence, squared_difference
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.step import Outputs, StepInputs


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_squared_difference_by_hand():
    assert squared_difference(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).item() == 2.5


def test_divergence_of_classes_by_loops():
    student, teacher = drawn(3, 4), drawn(3, 4, seed=1)
    total = 0.0
    for one, other in zip(student.tolist(), teacher.tolist(), strict=True):
        q = [math.exp(v) / sum(map(math.exp, one)) for v in one]
        p = [math.exp(v) / sum(map(math.exp, other)) for v in other]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert divergence(student, teacher).item() == pytest.approx(total / 3)


def test_divergence_of_predictions_by_loops():
    student, teacher = drawn(2, 5, 8), drawn(2, 5, 8, seed=1)
    total = 0.0
    for one, other in zip(student[..., 4:].flatten().tolist(), teacher[..., 4:].flatten().tolist(), strict=True):
        q, p = (1 / (1 + math.exp(-value)) for value in (one, other))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert divergence(student, teacher).item() == pytest.approx(total / 2)


def test_the_box_is_not_a_probability():
    student, teacher = drawn(2, 5, 8), drawn(2, 5, 8, seed=1)
    moved = student.clone()
    moved[..., :4] += 3
    assert torch.equal(divergence(moved, teacher), divergence(student, teacher))
    assert squared_difference(moved, teacher) != squared_difference(student, teacher)


@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 8)])
def test_least_where_both_agree(shape):
    teacher = drawn(*shape)
    for term in (squared_difference, divergence):
        assert term(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
        assert term(teacher + 0.1 * drawn(*shape, seed=3), teacher) > 0


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 6)])
def test_gradients(shape):
    teacher = drawn(*shape, seed=1).requires_grad_()
    for term in (squared_difference, divergence):
        assert torch.autograd.gradcheck(lambda one, term=term: term(one, teacher.detach()), drawn(*shape).requires_grad_())
        term(drawn(*shape).requires_grad_(), teacher).backward()
        assert teacher.grad is None


def test_large_logits_stay_finite():
    student, teacher = torch.full((1, 1, 6), 200.0), torch.full((1, 1, 6), -200.0)
    assert divergence(student, teacher).isfinite()


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_the_term_is_weighted_and_named(kind):
    student, teacher = drawn(2, 3), drawn(2, 3, seed=1)
    step = StepInputs(torch.zeros(2, 1, 1, 1), torch.zeros(2), Outputs(student), Outputs(teacher), 0, 0)
    terms = RawOutputDistiller(RawOutputConfig(name="raw_output", divergence=kind, weight=0.5)).losses(step)
    expected = 0.5 * (squared_difference if kind == "mse" else divergence)(student.float(), teacher.float())
    assert list(terms) == ["raw_output"]
    torch.testing.assert_close(terms["raw_output"], expected)


def test_what_has_no_divergence_and_what_differs_in_shape():
    def loaded(name, **arguments):
        config = ModelConfig(name=name, arguments=arguments)
        module = models.build(config, num_classes=5, in_channels=3)
        return Loaded(module, {}, Architecture(config.model_dump(mode="json"), 5, 3, 32, 32))

    classifier, segmenter = loaded("resnet8"), loaded("unet", width=4)
    RawOutputConfig(name="raw_output").build(segmenter, segmenter)
    with pytest.raises(RecipeError, match=r"raw_output\.divergence: kl is for scores of classes and for boxes"):
        RawOutputConfig(name="raw_output", divergence="kl").build(segmenter, segmenter)
    with pytest.raises(RecipeError, match="raw_output compares outputs of one shape"):
        RawOutputConfig(name="raw_output").build(segmenter, classifier)
