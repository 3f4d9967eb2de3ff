"""One-to-one self-teaching: distances, gates and what the switch does to gradients."""

import math

import pytest
import torch
from torch import nn

from edgekd.distill.base import map_channels
from edgekd.distill.ost import OstConfig, distance, gumbel, one_to_one, open_gates
from edgekd.errors import RecipeError, TrainingError
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.step import Outputs, StepInputs


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distance_by_hand(student, teacher):
    """The specification's equations, place by place."""
    found = []
    for one, other in zip(student.tolist(), teacher.tolist(), strict=True):
        values = []
        for image in (one, other):
            channels, rows, columns = len(image), len(image[0]), len(image[0][0])
            flat = [sum(image[c][r][k] ** 2 for c in range(channels)) / channels for r in range(rows) for k in range(columns)]
            norm = max(math.sqrt(sum(value**2 for value in flat)), 1e-12)
            values.append([value / norm for value in flat])
        found.append(sum((a - b) ** 2 for a, b in zip(*values, strict=True)) / len(values[0]))
    return found


def test_value_by_hand():
    """One channel, two places: (1, 0) against (0, 1) as squares: two vectors of length 1, each differs by 1 in both."""
    student, teacher = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, -3.0]]]])
    assert distance(student, teacher).tolist() == [1.0]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 2, 2), (3, 7, 1, 6)])
def test_agrees_with_loops(shape):
    student, teacher = maps(*shape), maps(*shape, seed=1)
    torch.testing.assert_close(distance(student, teacher), torch.tensor(distance_by_hand(student, teacher), dtype=torch.float64))


def test_zero_for_equal_maps_and_blind_to_their_scale():
    student, teacher = maps(3, 4, 5, 5), maps(3, 4, 5, 5, seed=1)
    assert distance(student, student).abs().max() == 0
    scale = torch.tensor([0.1, 3.0, 50.0], dtype=torch.float64).view(3, 1, 1, 1)
    torch.testing.assert_close(distance(scale * student, teacher), distance(student, teacher))
    torch.testing.assert_close(distance(student, scale * teacher), distance(student, teacher))
    assert (distance(student, teacher) > 0).all()
    assert distance(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).item() == 0, "no division by zero"


def test_gradients():
    teacher = maps(2, 3, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda one: distance(one, teacher.detach()), maps(2, 3, 3, 3).requires_grad_())
    distance(maps(2, 3, 3, 3).requires_grad_(), teacher).sum().backward()
    assert teacher.grad is None


def test_gates_open_with_the_stated_probability():
    torch.manual_seed(0)
    for logit in (-1.0, 0.0, 1.0):
        logits = torch.full((200_000,), logit)
        rate = open_gates(logits, gumbel(logits)).mean().item()
        assert rate == pytest.approx(1 - math.exp(-math.exp(logit)), abs=0.005)


def test_a_gate_is_0_or_1_with_the_sigmoids_gradient():
    logits = torch.tensor([-1.0, 0.3, 2.0], requires_grad=True)
    noise = torch.tensor([0.5, -0.1, -3.0])
    gates = open_gates(logits, noise)
    assert gates.tolist() == [0, 1, 0]
    gates.sum().backward()
    soft = torch.sigmoid(logits.detach() + noise)
    torch.testing.assert_close(logits.grad, soft * (1 - soft))


def test_the_sum_over_blocks_of_batch_means():
    far = [torch.tensor([1.0, 3.0]), torch.tensor([10.0, 20.0])]
    assert one_to_one(far, [torch.ones(2)] * 2).item() == 2 + 15
    assert one_to_one(far, [torch.tensor([1.0, 0.0]), torch.zeros(2)]).item() == 0.5


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 6, 3, 2, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x))))).flatten(1)


TAPS = {"one": "a", "same": "a", "two": "b", "head0": "head"}
SHAPE = Architecture({"name": "x"}, 2, 3, 8, 8)


def loaded(width=4, taps=TAPS):
    torch.manual_seed(width)
    return Loaded(Net(width), dict(taps), SHAPE)


def step(student, teacher, images=4):
    torch.manual_seed(0)
    batch = torch.randn(images, 3, 8, 8)

    def run(model):
        a = model.a(batch)
        b = model.b(torch.relu(a))
        return Outputs(model.head(torch.relu(b)).flatten(1), {"one": a, "two": b})

    with torch.no_grad():
        given = run(teacher.module)
    return StepInputs(batch, torch.zeros(images, dtype=torch.int64), run(student.module), given, 0, 0)


def test_all_common_maps_are_taken_once_and_heads_are_not():
    distiller = OstConfig(name="ost").build(loaded(), loaded(5))
    assert distiller.student_taps == ("one", "two")
    assert distiller.keys["one"].linear.in_features == 4
    assert distiller.queries["one"].linear.in_features == 5


@pytest.mark.parametrize("options", [{}, {"detach_gate": False}, {"train_gate": True}])
def test_who_gets_a_gradient(options):
    student, teacher = loaded(), loaded(5)
    distiller = OstConfig(name="ost", **options).build(student, teacher)
    torch.manual_seed(1)
    terms = distiller.losses(step(student, teacher))
    assert set(terms) == ({"ost", "gate_rate"} if options.get("train_gate") else {"ost"})
    sum(terms.values()).backward()
    assert student.module.a.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.module.parameters())
    trained = [name for name, parameter in distiller.named_parameters() if parameter.grad is not None]
    assert bool(trained) == bool(options.get("train_gate"))


def test_a_detached_gate_leaves_the_student_the_distances_alone():
    """With the gates drawn the same, the gradient is that of the distances times 0 or 1."""
    student, teacher = loaded(), loaded(5)
    distiller = OstConfig(name="ost", weight=1.0).build(student, teacher)
    inputs = step(student, teacher)
    torch.manual_seed(7)
    distiller.losses(inputs)["ost"].backward()
    received = student.module.b.weight.grad.clone()
    student.module.zero_grad()
    again = step(student, teacher)
    torch.manual_seed(7)
    gates = []
    for role in distiller.student_taps:
        logits = distiller._logits(role, again.student.taps[role].detach(), again.teacher.taps[role])
        gates.append(open_gates(logits, gumbel(logits)).detach())
    far = [distance(again.student.taps[role], again.teacher.taps[role]) for role in distiller.student_taps]
    one_to_one(far, gates).backward()
    torch.testing.assert_close(received, student.module.b.weight.grad)


def test_statistics_are_rates():
    student, teacher = loaded(), loaded(5)
    distiller = OstConfig(name="ost").build(student, teacher)
    for _ in range(20):
        distiller.losses(step(student, teacher))
    found = distiller.statistics(student.module, teacher.module, None)
    assert set(found) == {"open gates of one", "open gates of two"}
    assert all(0 < rate <= 1 for rate in found.values())


def test_one_image_is_too_few():
    student, teacher = loaded(), loaded(5)
    distiller = OstConfig(name="ost").build(student, teacher)
    with pytest.raises(TrainingError, match="at least 2 images"):
        distiller.losses(step(student, teacher, images=1))


@pytest.mark.parametrize(
    ("layers", "taps", "message"),
    [
        (["three"], TAPS, "ost.layers: the student has no tap 'three'"),
        (["two"], {"one": "a"}, "the teacher has no tap 'two'"),
        (None, {"other": "a"}, "student and teacher have no map in common"),
    ],
)
def test_layers_that_are_not_there(layers, taps, message):
    with pytest.raises(RecipeError, match=message):
        OstConfig(name="ost", layers=layers).build(loaded(), loaded(5, taps))


def test_a_vector_is_no_map():
    student = Loaded(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), {"v": "1"}, SHAPE)
    with pytest.raises(RecipeError, match=r"'v' is no map \[B, C, H, W\]: \[2, 2\]"):
        map_channels(student, student, ["v"], method="ost")


def test_the_last_ones():
    assert list(map_channels(loaded(), loaded(), None, method="x", last=1)) == ["two"]
