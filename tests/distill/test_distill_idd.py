"""Inter-class distances against loops and what they do not see; positions; weights that are found; who learns from which term."""

import copy
import math

import pytest
import torch
import toy
from torch import nn

from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.distill.idd import IddConfig, PositionReader, class_means, edges, inter_class_distance, ramps
from edgekd.errors import RecipeError, TrainingError
from edgekd.nn.adversary import Adversary
from edgekd.nn.critics import gradient_penalty
from edgekd.nn.divergences import pixel_divergence
from edgekd.nn.taps import capture
from edgekd.tasks import Segmentation
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.hardware import ComputeConfig, make_fabric
from edgekd.train.step import Outputs, StepInputs, TrainState

SIDE = 8


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def masks(*shape, seed=1, classes=toy.CLASSES):
    """Classes and 255."""
    found = torch.randint(0, classes + 1, shape, generator=torch.Generator().manual_seed(seed))
    return found.where(found < classes, 255).to(torch.uint8)


# Distances between classes


def slow_distance(student, teacher, labels, *, metric="l2", edge_norm="none", scope="image", least_pixels=1):
    """In loops over [B][C][H][W]."""

    def graph(maps, images):
        nodes = {}
        for index in range(toy.CLASSES):
            places = [(b, y, x) for b in images for y in range(SIDE) for x in range(SIDE) if labels[b][y][x] == index]
            if len(places) >= least_pixels:
                nodes[index] = [sum(maps[b][c][y][x] for b, y, x in places) / len(places) for c in range(len(maps[0]))]
        found = []
        for one in nodes:
            for other in nodes:
                if one < other:
                    pairs = list(zip(nodes[one], nodes[other], strict=True))
                    if metric == "l2":
                        found.append(math.sqrt(sum((a - b) ** 2 for a, b in pairs)))
                    else:
                        lengths = [math.sqrt(sum(value**2 for value in nodes[name])) for name in (one, other)]
                        found.append(1 - sum(a * b for a, b in pairs) / (lengths[0] * lengths[1]))
        if edge_norm == "mean":
            found = [value * len(found) / sum(found) for value in found]
        return found

    parts = []
    for images in [[b] for b in range(len(labels))] if scope == "image" else [list(range(len(labels)))]:
        ours, theirs = graph(student, images), graph(teacher, images)
        if ours:
            parts.append(sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(ours))
    return sum(parts) / len(parts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "cosine"},
        {"edge_norm": "mean"},
        {"scope": "batch"},
        {"least_pixels": 14},
        {"metric": "cosine", "edge_norm": "mean", "scope": "batch", "least_pixels": 27},
    ],
)
def test_distances_agree_with_loops(options):
    student, teacher, labels = drawn(3, 4, SIDE, SIDE), drawn(3, 6, SIDE, SIDE, seed=1), masks(3, SIDE, SIDE)
    labels[2] = 1  # an image of one class has no edge
    expected = slow_distance(student.tolist(), teacher.tolist(), labels.tolist(), **options)
    value = inter_class_distance(student, teacher, labels, toy.CLASSES, **options)
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_a_distance_by_hand():
    """Two classes; their means are 0 and (3, 4) in the student, 2 and 4 in the teacher: (2 - 5)^2."""
    student = torch.tensor([[[[0.0, 2.0, 4.0]], [[0.0, 4.0, 4.0]]]])
    teacher = torch.tensor([[[[2.0, 1.0, 7.0]]]])
    labels = torch.tensor([[[0, 3, 3]]])
    assert inter_class_distance(student, teacher, labels, 4).item() == pytest.approx(9)


def test_equal_maps_are_at_the_minimum():
    maps, labels = drawn(2, 4, SIDE, SIDE).requires_grad_(), masks(2, SIDE, SIDE)
    value = inter_class_distance(maps, maps, labels, toy.CLASSES)
    assert value.item() == 0
    (received,) = torch.autograd.grad(value, maps)
    assert (received == 0).all()


def test_what_distances_do_not_see():
    student, teacher, labels = drawn(2, 4, SIDE, SIDE), drawn(2, 6, SIDE, SIDE, seed=1), masks(2, SIDE, SIDE)
    plain = inter_class_distance(student, teacher, labels, toy.CLASSES)
    turned = torch.einsum("dc,bchw->bdhw", torch.linalg.qr(drawn(4, 4, seed=3))[0], student)
    renamed = labels.where(labels == 255, (toy.CLASSES - 1) - labels)
    order = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(2))
    moved = [part.flatten(-2)[..., order].view_as(part) for part in (student, teacher, labels)]
    ignored = torch.where((labels == 255)[:, None], drawn(2, 4, SIDE, SIDE, seed=4), student)
    for other in (
        inter_class_distance(student + drawn(1, 4, 1, 1, seed=5), teacher, labels, toy.CLASSES),
        inter_class_distance(turned, teacher, labels, toy.CLASSES),
        inter_class_distance(student, teacher, renamed, toy.CLASSES),
        inter_class_distance(*moved, toy.CLASSES),
        inter_class_distance(ignored, teacher, labels, toy.CLASSES),
    ):
        torch.testing.assert_close(other, plain)
    scaled, same = (inter_class_distance(factor * student, teacher, labels, toy.CLASSES, edge_norm="mean") for factor in (7, 1))
    torch.testing.assert_close(scaled, same)


def test_scale_counts():
    """c times the teacher's map: (1 - c)^2 times the mean squared distance."""
    teacher, labels = drawn(1, 4, SIDE, SIDE), masks(1, SIDE, SIDE)
    means, _ = class_means(teacher, labels, toy.CLASSES)
    expected = 0.3**2 * edges(means[0]).square().mean()
    torch.testing.assert_close(inter_class_distance(0.7 * teacher, teacher, labels, toy.CLASSES), expected)


def test_gradients_of_distances():
    """The same for all pixels of a class in an image; none for pixels that do not count, nor for an image of one class."""
    student, teacher, labels = drawn(2, 3, SIDE, SIDE), drawn(2, 5, SIDE, SIDE, seed=1).requires_grad_(), masks(2, SIDE, SIDE)
    labels[1] = 2
    student.requires_grad_()
    inter_class_distance(student, teacher, labels, toy.CLASSES).backward()
    assert teacher.grad is None
    assert (student.grad[1] == 0).all()
    rows, classes = student.grad[0].flatten(1).t(), labels[0].flatten()
    assert (rows[classes == 255] == 0).all()
    for index in range(toy.CLASSES):
        torch.testing.assert_close(rows[classes == index], rows[classes == index][:1].expand(int((classes == index).sum()), -1))
    assert torch.autograd.gradcheck(lambda x: inter_class_distance(x, teacher.detach(), labels, toy.CLASSES), student)


def test_nothing_to_compare_and_equal_means_are_no_accident():
    maps = drawn(2, 3, SIDE, SIDE).requires_grad_()
    value = inter_class_distance(maps, maps.detach() + 1, torch.full((2, SIDE, SIDE), 255), toy.CLASSES)
    assert value.item() == 0
    value.backward()
    large = torch.ones(1, 1, 300, 300, dtype=torch.float16)  # their sum is beyond 16 bits
    assert inter_class_distance(large, large, torch.full((1, 300, 300), 255), toy.CLASSES).item() == 0
    same = torch.ones(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    inter_class_distance(same, drawn(1, 3, 2, 2), torch.tensor([[[0, 1], [0, 1]]]), toy.CLASSES).backward()
    assert same.grad.isfinite().all()


def test_labels_and_the_teachers_map_take_the_students_size():
    student, teacher, labels = drawn(1, 3, 4, 4), drawn(1, 3, 2, 2, seed=1), masks(1, 8, 8)
    large = nn.functional.interpolate(teacher, (4, 4), mode="bilinear", align_corners=False)
    value = inter_class_distance(student, teacher, labels, toy.CLASSES)
    torch.testing.assert_close(value, inter_class_distance(student, large, labels[:, ::2, ::2], toy.CLASSES))


# Positions


def test_ramps():
    right, down = ramps(4, 6, like=torch.zeros(()))
    torch.testing.assert_close(right, torch.tensor([[0.2, 0.4, 0.6, 0.8]] * 2))
    torch.testing.assert_close(down, torch.tensor([[1 / 3] * 4, [2 / 3] * 4]))


def test_the_reading_network():
    reader = PositionReader(5, sigmoid=True)
    assert sum(value.numel() for value in reader.parameters()) == 2 * 5 * 9 + 2 + 4
    assert (reader.layers[0].bias == 0).all()
    assert reader(drawn(2, 5, 6, 7, dtype=torch.float32)).shape == (2, 2, 4, 5), "no padding: it would tell positions"
    assert isinstance(PositionReader(5, sigmoid=False).layers[2], nn.Identity)


# The distiller


class Net(nn.Module):
    """One map, and a score map of it."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Conv2d(3, channels, 3, padding=1)
        self.head = nn.Conv2d(channels, toy.CLASSES, 1)

    def forward(self, images):
        return self.head(torch.relu(self.body(images)))


def loaded(channels=4, seed=0, side=SIDE, module=None, taps=None):
    torch.manual_seed(seed)
    return Loaded(module or Net(channels), taps or {"top": "body"}, Architecture({}, toy.CLASSES, 3, side, side))


def built(student=4, side=SIDE, **options):
    """Student, teacher and distiller."""
    ours, theirs = loaded(student, side=side), loaded(6, seed=1, side=side)
    torch.manual_seed(2)
    return ours.module, theirs.module, IddConfig(name="idd", **options).build(ours, theirs)


def outputs(module, images):
    with capture(module, {"top": "body"}) as taps:
        logits = module(images)
    return Outputs(logits, taps)


def inputs(student, teacher, side=SIDE):
    images = drawn(2, 3, side, side, dtype=torch.float32)
    return StepInputs(images, masks(2, side, side), outputs(student, images), outputs(teacher, images), 0, 0)


def state(student, teacher, distiller, **given):
    fabric = make_fabric(ComputeConfig(accelerator="cpu", threads=1))
    parameters = [*student.parameters(), *(value for value in distiller.adapter.parameters())]
    wrapped, optimizer = fabric.setup(student, torch.optim.SGD(parameters, lr=0.1))
    common = {"fabric": fabric, "task": Segmentation(toy.CLASSES), "student": wrapped, "inner": student}
    taps = {name: {"top": "body"} for name in ("student_taps", "teacher_taps")}
    teacher.requires_grad_(False)
    return TrainState(**common, **taps, teacher=teacher, objective=distiller, optimizer=optimizer, total_steps=200, **given)


def test_terms_are_weighted():
    student, teacher, distiller = built()
    step = inputs(student, teacher)
    terms = distiller.losses(step)
    assert list(terms) == ["distance", "position", "pixel"]
    ours, theirs = step.student.taps["top"], step.teacher.taps["top"]
    torch.testing.assert_close(terms["distance"], 0.05 * inter_class_distance(ours, theirs, step.labels, toy.CLASSES))
    read = [distiller.reader(maps) for maps in (distiller.adapter(ours), theirs)]
    torch.testing.assert_close(terms["position"], (read[0] - read[1]).square().mean())
    torch.testing.assert_close(
        terms["pixel"], 10 * pixel_divergence(step.student.logits, step.teacher.logits, reduction="mean_element")
    )


def test_equal_nets_are_at_the_minimum():
    student, _, distiller = built(student=6)
    assert not list(distiller.adapter.parameters()), "as many channels need no adapter"
    step = inputs(student, student)
    assert all(term.item() == 0 for term in distiller.losses(step).values())


def test_positions_may_be_the_true_ones():
    student, teacher, distiller = built(position_target="ramp", position_output="linear")
    step = inputs(student, teacher)
    read = distiller.reader(distiller.adapter(step.student.taps["top"]))
    expected = (read - ramps(SIDE, SIDE, like=read)).square().mean()
    torch.testing.assert_close(distiller.losses(step)["position"], expected)


def test_terms_reach_the_student_and_the_adapter_alone():
    student, teacher, distiller = built()
    terms = distiller.losses(inputs(student, teacher))
    torch.stack([terms["distance"], terms["position"]]).sum().backward()
    assert all(value.grad.abs().sum() > 0 for part in (student.body, distiller.adapter) for value in part.parameters())
    assert all(value.grad is None for part in (teacher, distiller.reader) for value in part.parameters())


def test_terms_of_weight_0_are_left_out():
    student, teacher, distiller = built(position_weight=0, pixel_weight=0)
    assert list(distiller.losses(inputs(student, teacher))) == ["distance"]
    assert not list(distiller.parameters())
    student, teacher, distiller = built(distance_weight=0, pixel_weight=0)
    assert list(distiller.losses(inputs(student, teacher))) == ["position"]


def test_scale_free_distances_begin_with_1():
    for options in ({"metric": "cosine"}, {"edge_norm": "mean"}):
        assert built(**options)[2].weights.tolist() == [1, 1]
    assert built(edge_norm="mean", distance_weight=3, position_weight=2)[2].weights.tolist() == [3, 2]


@pytest.mark.parametrize("given", [{}, {"distance_weight": 0.3}])
def test_weights_are_found_once(given):
    """In step 100 each term becomes half of the task's loss, unless its weight was given."""
    student, teacher, distiller = built(**given)
    images = drawn(2, 3, SIDE, SIDE, dtype=torch.float32)
    before = distiller.weights.clone()
    for step in (98, 100):
        distiller.train_step(state(student, teacher, distiller, step=step), images, masks(2, SIDE, SIDE))
        assert torch.equal(distiller.weights, before)
    terms = distiller.train_step(state(student, teacher, distiller, step=99), images, masks(2, SIDE, SIDE))
    expected = [0.5 * terms["task"] / (terms[name] / old) for name, old in zip(("distance", "position"), before, strict=True)]
    if given:
        expected[0] = before[0]
    torch.testing.assert_close(distiller.weights, torch.tensor(expected))


class Placed(nn.Module):
    """A teacher whose map tells where it is: two ramps beside noise."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Identity(), nn.Conv2d(3, toy.CLASSES, 1)

    def forward(self, images):
        place = ramps(34, 34, like=images).expand(len(images), -1, -1, -1)
        return self.head(self.body(torch.cat([images[:, :1], place], 1)))


def test_positions_are_learnt_before_the_student_is(tmp_path):
    setting = toy.setting(
        tmp_path, data=toy.scenes(train=8), task=Segmentation(toy.CLASSES), augment=MaskAugmentConfig(flip=True)
    )
    student, teacher = loaded(4, side=32), loaded(side=32, module=Placed())
    distiller = IddConfig(name="idd", position_epochs=150).build(student, teacher)
    untouched = copy.deepcopy(teacher.module.state_dict())
    distiller.prepare(student.module, teacher.module, setting)
    assert distiller.unread.max() < 0.05
    assert toy.same_state(teacher.module.state_dict(), untouched)
    assert not distiller.reader.training
    assert all(value.grad is None and not value.requires_grad for value in distiller.reader.parameters())
    found = distiller.statistics(student.module, teacher.module, setting)
    assert set(found) == {"distance_weight", "position_weight", "unread_columns", "unread_rows"}


def test_positions_that_diverge_are_named(tmp_path):
    setting = toy.setting(
        tmp_path, data=toy.scenes(train=8), task=Segmentation(toy.CLASSES), augment=MaskAugmentConfig(flip=True)
    )
    student, teacher = loaded(4, side=32), loaded(6, side=32)
    with torch.no_grad():
        teacher.module.body.weight.fill_(math.inf)
    distiller = IddConfig(name="idd", position_epochs=2).build(student, teacher)
    with pytest.raises(TrainingError, match="the loss of reading positions is"):
        distiller.prepare(student.module, teacher.module, setting)


def test_a_critic_where_asked():
    """Its step comes after the student's, on the score maps that the student had before it moved."""
    student, teacher, distiller = built(side=64, holistic_weight=0.001, critic_lr=0.1)
    assert isinstance(distiller.adversary, Adversary)
    critic, own = copy.deepcopy(distiller.adversary.critic), copy.deepcopy(student)
    images, labels = drawn(2, 3, 64, 64, dtype=torch.float32), masks(2, 64, 64)
    torch.manual_seed(7)
    terms = distiller.train_step(state(student, teacher, distiller, step=20), images, labels)
    torch.manual_seed(7)
    fake, real = own(images).detach(), teacher(images).detach()
    assert terms["holistic"] == pytest.approx(-0.001 * critic(fake).mean().item(), rel=1e-4)
    loss = -critic(real).mean() + critic(fake).mean() + 10 * gradient_penalty(critic, real, fake)
    assert terms["critic"] == pytest.approx(0.1 * loss.item(), rel=1e-4)
    assert distiller.adversary.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**0.9)
    moved = [torch.equal(a, b) for a, b in zip(distiller.adversary.critic.parameters(), critic.parameters(), strict=True)]
    assert not all(moved)
    assert built()[2].adversary is None


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (loaded(module=toy.Net(), taps={"top": "norm1"}), {}, "score maps"),
        (loaded(), {"layer": "end"}, "the student has no tap 'end'"),
        (loaded(), {"holistic_weight": 1}, "at least 64 x 64"),
        (loaded(side=2), {}, "positions are read from 3 x 3 places; the student's map 'top' has 2 x 2"),
    ],
)
def test_what_does_not_fit(student, options, message):
    teacher = loaded(6, side=student.architecture.height_px)
    with pytest.raises(RecipeError, match=message):
        IddConfig(name="idd", **options).build(student, teacher)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_gradients_of_positions(sigmoid):
    """The reader's error at the ramps, with the reader fixed as it is while a student learns."""
    reader = PositionReader(3, sigmoid=sigmoid).double().eval()
    maps = drawn(2, 3, 5, 6).requires_grad_()
    true = ramps(5, 6, like=maps)
    assert torch.autograd.gradcheck(lambda maps: (reader(maps) - true).square().mean(), maps)
