"""Structured distillation: pairs of regions against loops, who learns from which term, and in which order."""

import copy
import math

import pytest
import torch
import toy
from pydantic import ValidationError
from torch import nn

from edgekd.distill.structured_kd import StructuredKdConfig, node_sides, nodes, pairwise
from edgekd.errors import RecipeError, TrainingError
from edgekd.nn.critics import AttentionCritic, gradient_penalty
from edgekd.nn.taps import capture
from edgekd.tasks import Segmentation
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.hardware import ComputeConfig, make_fabric
from edgekd.train.step import Outputs, StepInputs, TrainState

SIDE = 64


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Net(nn.Module):
    """One map, and a score map of it."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Conv2d(3, channels, 3, padding=1)
        self.head = nn.Conv2d(channels, toy.CLASSES, 1)

    def forward(self, images):
        return self.head(torch.relu(self.body(images)))


def loaded(channels, seed=0, side=SIDE, module=None, taps=None):
    torch.manual_seed(seed)
    shape = Architecture({}, toy.CLASSES, 3, side, side)
    return Loaded(module or Net(channels), {"top": "body"} if taps is None else taps, shape)


def built(**options):
    """Student, teacher and distiller."""
    student, teacher = loaded(4), loaded(6, seed=1)
    torch.manual_seed(2)
    return student.module, teacher.module, StructuredKdConfig(name="structured_kd", **options).build(student, teacher)


def outputs(module, images):
    with capture(module, {"top": "body"}) as taps:
        logits = module(images)
    return Outputs(logits, taps)


def inputs(student, teacher, batch=2):
    images = drawn(batch, 3, SIDE, SIDE, dtype=torch.float32)
    return StepInputs(images, torch.zeros(batch, SIDE, SIDE), outputs(student, images), outputs(teacher, images), 0, 0)


def state(student, teacher, distiller, **given):
    fabric = make_fabric(ComputeConfig(accelerator="cpu", threads=1))
    wrapped, optimizer = fabric.setup(student, torch.optim.SGD(student.parameters(), lr=0.1))
    common = {"fabric": fabric, "task": Segmentation(toy.CLASSES), "student": wrapped, "inner": student}
    places = dict.fromkeys(distiller.student_taps, "body")
    taps = {"student_taps": places, "teacher_taps": places}
    teacher.requires_grad_(False)
    return TrainState(**common, **taps, teacher=teacher, objective=distiller, optimizer=optimizer, total_steps=10, **given)


def batch(count=2):
    labels = torch.randint(0, toy.CLASSES, (count, SIDE, SIDE), generator=torch.Generator().manual_seed(5))
    return drawn(count, 3, SIDE, SIDE, seed=4, dtype=torch.float32), labels


# Pairs of regions


def cosines_by_hand(maps, sides, pool):
    """[M][M] of one image [C][H][W], in loops."""
    channels, height, width = len(maps), len(maps[0]), len(maps[0][0])
    vectors = []
    for top in range(0, height, sides[0]):
        for left in range(0, width, sides[1]):
            places = [(y, x) for y in range(top, min(top + sides[0], height)) for x in range(left, min(left + sides[1], width))]
            values = [[maps[c][y][x] for y, x in places] for c in range(channels)]
            vectors.append([max(each) if pool == "max" else sum(each) / len(each) for each in values])
    lengths = [math.sqrt(sum(value * value for value in vector)) + 1e-8 for vector in vectors]
    return [
        [sum(a * b for a, b in zip(one, other, strict=True)) / (p * q) for other, q in zip(vectors, lengths, strict=True)]
        for one, p in zip(vectors, lengths, strict=True)
    ]


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize(("options", "sides"), [({}, (2, 3)), ({"px": 2}, (2, 2)), ({"px": 1}, (1, 1)), ({"scale": 1.0}, (5, 7))])
def test_pairs_agree_with_loops(options, sides, pool):
    """Maps of 5 x 7: the regions at the border are smaller."""
    student, teacher = drawn(2, 3, 5, 7), drawn(2, 4, 5, 7, seed=1)
    squares = []
    for one, other in zip(student.tolist(), teacher.tolist(), strict=True):
        ours, theirs = cosines_by_hand(one, sides, pool), cosines_by_hand(other, sides, pool)
        squares += [(b - a) ** 2 for p, q in zip(ours, theirs, strict=True) for a, b in zip(p, q, strict=True)]
    assert pairwise(student, teacher, pool=pool, **options).item() == pytest.approx(sum(squares) / len(squares))


def test_pairs_by_hand():
    """Two places: the student's vectors are at right angles, the teacher's opposite. Of four cosines two differ by 1."""
    student = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])
    teacher = torch.tensor([[[[1.0, -5.0]]]])
    assert pairwise(student, teacher, px=1).item() == pytest.approx(0.5)


@pytest.mark.parametrize(("side", "regions", "half"), [(65, 9, 32), (64, 4, 32), (1, 1, 1)])
def test_half_a_map_is_a_region(side, regions, half):
    """65 leaves a strip of one place, which counts as a region."""
    sides = node_sides(side, side)
    assert sides == (half, half)
    assert nodes(drawn(1, 2, side, side), sides).shape == (1, 2, regions)


def test_what_pairs_do_not_see():
    student, teacher = drawn(2, 3, 4, 4), drawn(2, 5, 4, 4, seed=1)
    plain = pairwise(student, teacher, px=1)
    assert pairwise(teacher, teacher, px=1).item() == 0
    scale = drawn(2, 1, 4, 4, seed=2).abs() + 0.1
    turned = torch.einsum("dc,bchw->bdhw", torch.linalg.qr(drawn(5, 5, seed=3))[0], teacher)
    torch.testing.assert_close(pairwise(scale * student, teacher, px=1), plain)
    torch.testing.assert_close(pairwise(student, turned, px=1), plain)
    assert 0 < plain <= 4


def test_lengths_are_constants_for_the_gradient():
    student, teacher = drawn(1, 3, 4, 4).requires_grad_(), drawn(1, 3, 4, 4, seed=1).requires_grad_()
    (received,) = torch.autograd.grad(pairwise(student, teacher), student)
    sides = node_sides(4, 4)
    ours, theirs = nodes(student, sides)[0], nodes(teacher.detach(), sides)[0]
    lengths = (ours.detach().square().sum(0).sqrt() + 1e-8, theirs.square().sum(0).sqrt() + 1e-8)
    one, other = (v.T @ v / (n[:, None] * n) for v, n in zip((ours, theirs), lengths, strict=True))
    (expected,) = torch.autograd.grad((one - other).square().mean(), student)
    torch.testing.assert_close(received, expected)
    (whole,) = torch.autograd.grad(pairwise(student, teacher, detach_norm=False), student)
    assert (whole - received).norm() > 0.1 * whole.norm()
    pairwise(student, teacher).backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda x: pairwise(x, teacher.detach(), detach_norm=False), student)


def test_a_smaller_student_map_is_resized():
    teacher = drawn(1, 2, 6, 6)
    student = drawn(1, 2, 3, 3, seed=1)
    large = nn.functional.interpolate(student, size=(6, 6), mode="bilinear", align_corners=True)
    assert torch.equal(pairwise(student, teacher), pairwise(large, teacher))


# The student's terms


def test_terms_are_weighted():
    student, teacher, distiller = built(pixel_form="ce", pixel_reduction="sum_over_batch", holistic_weight=0.2)
    step = inputs(student, teacher)
    before = copy.deepcopy(distiller.adversary.critic)
    terms = distiller.losses(step)
    assert list(terms) == ["pixel", "pair", "holistic"]
    ours, theirs = step.student.logits, step.teacher.logits
    entropy = -(theirs.softmax(1) * ours.log_softmax(1)).sum() / SIDE**2
    torch.testing.assert_close(terms["pixel"], 10 * entropy)
    torch.testing.assert_close(terms["pair"], 0.5 * pairwise(step.student.taps["top"], step.teacher.taps["top"]))
    torch.testing.assert_close(terms["holistic"], -0.2 * before(ours).mean())


def test_the_pixel_terms_gradient_is_a_difference_of_probabilities():
    student, teacher, distiller = built(pair_weight=0, holistic_weight=0, pixel_weight=1, pixel_reduction="sum_over_batch")
    step = inputs(student, teacher)
    (received,) = torch.autograd.grad(distiller.losses(step)["pixel"], step.student.logits)
    torch.testing.assert_close(received, (step.student.logits.softmax(1) - step.teacher.logits.softmax(1)) / SIDE**2)


def test_the_students_terms_reach_the_student_alone():
    student, teacher, distiller = built()
    torch.stack(list(distiller.losses(inputs(student, teacher)).values())).sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in student.parameters())
    assert all(value.grad is None for value in teacher.parameters()), "a constant, even where it could learn"
    assert all(value.grad is None for value in distiller.parameters())


def test_terms_of_weight_0_are_left_out():
    student, teacher, distiller = built(pair_weight=0, holistic_weight=0)
    assert distiller.student_taps == ()
    assert not list(distiller.parameters())
    assert list(distiller.losses(inputs(student, teacher))) == ["pixel"]
    _, _, distiller = built(pixel_weight=0, holistic_weight=0)
    assert list(distiller.losses(inputs(student, teacher))) == ["pair"]


def test_a_conditional_critic_sees_the_image_and_probabilities():
    student, teacher, distiller = built(critic_input="conditional")
    seen = []
    distiller.adversary.critic.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    step = inputs(student, teacher)
    distiller.losses(step)
    assert torch.equal(seen[0][:, :3], step.images)
    torch.testing.assert_close(seen[0][:, 3:], step.student.logits.softmax(1))


# Steps


@pytest.mark.parametrize("adversarial", ["wgan-gp", "hinge"])
def test_a_step_is_the_students_then_the_critics(adversarial):
    """Against the same step written out: the critic is taught what the student answered before it moved."""
    student, teacher, distiller = built(adversarial=adversarial, critic_lr=0.1, score_side_px=None)
    critic, own = copy.deepcopy(distiller.adversary.critic), copy.deepcopy(student)
    images, labels = batch()
    torch.manual_seed(7)
    terms = distiller.train_step(state(student, teacher, distiller, step=4), images, labels)

    torch.manual_seed(7)
    theirs, ours = outputs(teacher, images), outputs(own, images)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(ours.logits, labels)
    p, q = theirs.logits.softmax(1), ours.logits.log_softmax(1)
    loss = loss + 10 * (p * (p.log() - q)).sum() / (2 * SIDE**2)
    loss = loss + 0.5 * pairwise(ours.taps["top"], theirs.taps["top"]) - 0.1 * critic(ours.logits).mean()
    loss.backward()
    optimizer.step()
    second = torch.optim.SGD(critic.parameters(), lr=0.1 * 0.6**0.9, momentum=0.9, weight_decay=5e-4)
    second.zero_grad()
    fake, real = ours.logits.detach(), theirs.logits.detach()
    high, low = critic(real), critic(fake)
    if adversarial == "hinge":
        against = 0.1 * ((1 - high).clamp_min(0).mean() + (1 + low).clamp_min(0).mean())
    else:
        against = 0.1 * (low.mean() - high.mean()) + 0.1 * 10 * gradient_penalty(critic, real, fake)
    against.backward()
    second.step()

    for one, other in ((student, own), (distiller.adversary.critic, critic)):
        for name, value in one.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[name], msg=name)
    assert sum(value for name, value in terms.items() if name != "critic") == pytest.approx(loss.item(), rel=1e-4)
    assert terms["critic"] == pytest.approx(against.item(), rel=1e-4)


def test_a_batch_in_parts_teaches_the_critic_once():
    student, teacher, distiller = built()
    calls = []
    distiller.adversary.critic.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    distiller.train_step(state(student, teacher, distiller, accumulate=2), *batch(4))
    assert calls == [2, 2, 4, 4, 4], "the student's term in both parts; then the teacher's maps, the student's, and those between"


def test_a_critic_that_diverges_is_named():
    student, teacher, distiller = built()
    with torch.no_grad():
        distiller.adversary.critic.layers[-1].weight.fill_(1e21)  # its scores are finite, the square of its gradient is not
    with pytest.raises(TrainingError, match="term 'critic' is"):
        distiller.train_step(state(student, teacher, distiller), *batch())


def test_adam_is_the_other_optimizer():
    _, _, distiller = built(critic_optimizer="adam")
    optimizer = distiller.adversary.optimizer
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["betas"] == (0.9, 0.99)
    assert optimizer.defaults["weight_decay"] == 0, "as published with it"
    _, _, distiller = built()
    assert isinstance(distiller.adversary.optimizer, torch.optim.SGD)
    assert distiller.adversary.optimizer.defaults["weight_decay"] == 5e-4
    assert isinstance(distiller.adversary.critic, AttentionCritic)


# Errors


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (loaded(4, module=toy.Net(), taps={"top": "norm1"}), {}, r"of one shape; the student's output is \[2, 4\]"),
        (loaded(4, side=48), {}, "at least 64 x 64; the student's are 48 x 48"),
        (loaded(4), {"node_px": 1, "layers": ["top"]}, None),
        (loaded(4), {"layers": ["end"]}, "structured_kd.layers: the student has no tap 'end'"),
        (loaded(4, side=80), {"node_px": 1}, "6400 regions of 'top' are too many: all pairs are compared; at most 4096"),
    ],
)
def test_what_does_not_fit(student, options, message):
    teacher = loaded(6, side=student.architecture.height_px)
    config = StructuredKdConfig(name="structured_kd", **options)
    if message is None:
        config.build(student, teacher)
        return
    with pytest.raises(RecipeError, match=message):
        config.build(student, teacher)


def test_without_a_critic_small_maps_will_do():
    StructuredKdConfig(name="structured_kd", holistic_weight=0).build(loaded(4, side=32), loaded(6, side=32))


def test_no_layers_are_no_choice():
    with pytest.raises(ValidationError, match="at least 1 item"):
        StructuredKdConfig(name="structured_kd", layers=[])
