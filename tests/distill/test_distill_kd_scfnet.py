"""KD-SCFNet: the teacher's prediction for all of the student's maps."""

import math

import pytest
import torch
import toy

from edgekd import models
from edgekd.distill.kd_scfnet import KdScfnetConfig, response_loss
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.step import Outputs, StepInputs


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loaded(name, size_px=32, **arguments):
    config = ModelConfig(name=name, arguments=arguments)
    module = models.build(config, num_classes=2, in_channels=3)
    return Loaded(module, models.taps(config, module), Architecture(config.model_dump(mode="json"), 2, 3, size_px, size_px))


def scfnet(width=0.125, size_px=32):
    return loaded("scfnet", size_px, backbone="resnet18", width=width, channels=4)


def slow(student, teacher, side_weight=0.5):
    """From the equations, pixel by pixel."""
    total = 0.0
    for image in range(len(student)):
        for index, logits in enumerate(student[image]):
            both = ours = theirs = 0.0
            for one, other in zip(logits.flatten().tolist(), teacher[image, 0].flatten().tolist(), strict=True):
                p, q = 1 / (1 + math.exp(-one)), 1 / (1 + math.exp(-other))
                both, ours, theirs = both + p * q, ours + p, theirs + q
            total += side_weight**index * (1 - (2 * both + 1) / (ours + theirs + 1))
    return total / len(student)


def test_by_hand():
    """One pixel of one half in both maps: 1 - (2 / 4 + 1) / (1 + 1)."""
    half = torch.zeros(1, 1, 1, 1)
    assert response_loss(half, half).item() == pytest.approx(0.25)
    assert response_loss(half.expand(1, 4, 1, 1), half).item() == pytest.approx(0.25 * (1 + 1 / 2 + 1 / 4 + 1 / 8))


@pytest.mark.parametrize("maps", [1, 2, 4])
@pytest.mark.parametrize("side_weight", [0.0, 0.5, 1.0])
def test_it_agrees_with_loops(maps, side_weight):
    student, teacher = drawn(3, maps, 4, 5), drawn(3, 1, 4, 5, seed=1)
    assert response_loss(student, teacher, side_weight).item() == pytest.approx(slow(student, teacher, side_weight))


def test_the_teachers_side_outputs_are_not_looked_at():
    student, teacher = drawn(2, 4, 4, 5), drawn(2, 4, 4, 5, seed=1)
    other = torch.cat([teacher[:, :1], drawn(2, 3, 4, 5, seed=2)], 1)
    assert torch.equal(response_loss(student, teacher), response_loss(student, other))
    assert torch.equal(response_loss(student, teacher), response_loss(student, teacher[:, :1]))


def test_the_order_of_a_batch_does_not_matter():
    student, teacher = drawn(3, 4, 4, 5), drawn(3, 1, 4, 5, seed=1)
    order = [2, 0, 1]
    assert response_loss(student[order], teacher[order]).item() == pytest.approx(response_loss(student, teacher).item())


def test_of_equal_soft_maps_it_is_not_zero():
    """1 - (2 sum q^2 + 1) / (2 sum q + 1), which vanishes as maps become decided; its gradient goes that way."""
    maps = drawn(1, 1, 4, 5)
    q = maps.sigmoid()
    expected = 1 - (2 * q.square().sum() + 1) / (2 * q.sum() + 1)
    assert response_loss(maps, maps).item() == pytest.approx(expected.item())
    values = [response_loss(scale * maps, scale * maps).item() for scale in (1, 4, 16, 400)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-3
    student = maps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(response_loss(student, maps), student)
    assert gradient.abs().max() > 0
    assert gradient[maps == maps.max()] < 0 < gradient[maps == maps.min()]


def test_nothing_stands_out():
    """Two empty maps are equal, thanks to the one that is added above and below."""
    nothing = torch.full((1, 4, 8, 8), -100.0)
    assert response_loss(nothing, nothing).item() == pytest.approx(0)
    assert 0.9 < response_loss(-nothing, nothing).item() / (1 + 1 / 2 + 1 / 4 + 1 / 8) < 1


def test_gradients():
    teacher = drawn(2, 1, 3, 4, seed=1).requires_grad_()
    student = drawn(2, 4, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda maps: response_loss(maps, teacher.detach()), student)
    response_loss(student, teacher).backward()
    assert teacher.grad is None
    assert (student.grad.flatten(2).abs().sum(2) > 0).all(), "all four maps are taught"


def test_only_the_student_is_taught(tmp_path):
    """Through both networks, as the loop calls them: the teacher in evaluation mode gives its prediction alone."""
    torch.manual_seed(0)
    student, teacher = scfnet(), scfnet(width=0.25)
    distiller = KdScfnetConfig(name="kd_scfnet", weight=2.0).build(student, teacher)
    assert not list(distiller.parameters())
    images = torch.randn(2, 3, 32, 32)
    before = toy.state_of(teacher.module)
    ours, theirs = student.module.train()(images), teacher.module.eval()(images)
    assert (ours.shape[1], theirs.shape[1]) == (4, 1)
    (term,) = distiller.losses(StepInputs(images, images, Outputs(ours), Outputs(theirs), 0, 0)).values()
    assert term.item() == pytest.approx(2 * slow(ours.detach(), theirs.detach()), rel=1e-5)
    term.backward()
    assert all(parameter.grad is not None for parameter in student.module.parameters())
    assert all(parameter.grad is None for parameter in teacher.module.parameters())
    assert toy.same_state(teacher.module.state_dict(), before)


def test_building_leaves_the_modes_alone():
    student, teacher = scfnet(), scfnet()
    student.module.train()
    KdScfnetConfig(name="kd_scfnet").build(student, teacher)
    assert student.module.training


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda: loaded("resnet8"), r"the student's output is \[2, 2\]"),
        (lambda: loaded("unet", width=4), r"\[2, 2, 32, 32\], the teacher's \[2, 1, 32, 32\]"),
        (lambda: scfnet(size_px=64), r"\[2, 1, 64, 64\], the teacher's \[2, 1, 32, 32\]"),
    ],
)
def test_models_that_give_no_such_map(student, message):
    with pytest.raises(RecipeError, match=message) as caught:
        KdScfnetConfig(name="kd_scfnet").build(student(), scfnet())
    assert "saliency" in caught.value.hint
