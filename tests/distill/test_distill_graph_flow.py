"""Graph flow: patches and their products against loops, what the terms do not see, who learns, and images without labels."""

import copy

import pytest
import torch
import toy
from pydantic import ValidationError
from torch import nn

from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.data.base import IGNORE
from edgekd.distill.graph_flow import GraphFlowConfig, edges, graph_flow, vertices
from edgekd.distill.stage import fit
from edgekd.errors import RecipeError, TrainingError
from edgekd.nn.critics import gradient_penalty
from edgekd.nn.taps import capture
from edgekd.tasks import Segmentation
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.hardware import ComputeConfig, make_fabric
from edgekd.train.optim import TrainConfig
from edgekd.train.stage import Context
from edgekd.train.step import Outputs, StepInputs, TrainState

SIDE = 64
TAPS = {"shallow": "first", "deep": "second"}


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Net(nn.Module):
    """Two maps of as many channels, and logits."""

    def __init__(self, channels, deep=None):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1, stride=4)
        self.second = nn.Conv2d(channels, deep or channels, 3, padding=1)
        self.head = nn.Conv2d(deep or channels, toy.CLASSES, 1)

    def forward(self, images):
        x = torch.relu(self.second(torch.relu(self.first(images))))
        return nn.functional.interpolate(self.head(x), scale_factor=4)


def loaded(channels, seed=0, side=SIDE, module=None, taps=TAPS):
    torch.manual_seed(seed)
    return Loaded(module or Net(channels), dict(taps), Architecture({}, toy.CLASSES, 3, side, side))


def built(student=4, teacher=6, **options):
    """Student, teacher and distiller."""
    one, other = loaded(student), loaded(teacher, seed=1)
    torch.manual_seed(2)
    return one.module, other.module, GraphFlowConfig(name="graph_flow", **options).build(one, other)


def outputs(module, images):
    with capture(module, TAPS) as taps:
        logits = module(images)
    return Outputs(logits, taps)


def inputs(student, teacher, batch=2):
    images = drawn(batch, 3, SIDE, SIDE, dtype=torch.float32)
    return StepInputs(images, torch.zeros(batch, SIDE, SIDE), outputs(student, images), outputs(teacher, images), 0, 0)


def four(*shape):
    maps = [drawn(*shape, seed=seed) for seed in range(4)]
    return (maps[0], maps[1]), (maps[2], maps[3])


# The graph


def patch_by_hand(channel, patch):
    """[P] of one channel [H][W]: the first of the largest values, and zeros around the map."""
    height, width, reach = len(channel), len(channel[0]), patch // 2
    best, place = None, None
    for y in range(height):
        for x in range(width):
            if best is None or channel[y][x] > best:
                best, place = channel[y][x], (y, x)
    rows = range(place[0] - reach, place[0] + reach + 1)
    columns = range(place[1] - reach, place[1] + reach + 1)
    return [channel[y][x] if 0 <= y < height and 0 <= x < width else 0.0 for y in rows for x in columns]


@pytest.mark.parametrize("patch", [1, 3, 5])
def test_vertices_agree_with_loops(patch):
    maps = drawn(2, 6, 4, 5)
    maps[0, 0] = 0.0  # all alike: the first place
    maps[0, 1, 3, 4] = maps[0, 2, 0, 0] = 9.0  # in corners
    expected = [[patch_by_hand(channel, patch) for channel in image] for image in maps.tolist()]
    torch.testing.assert_close(vertices(maps, patch), torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(vertices(maps.contiguous(memory_format=torch.channels_last), patch), vertices(maps, patch))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("edge", ["inner", "cosine"])
@pytest.mark.parametrize("patch", [1, 3])
def test_both_terms_agree_with_loops(patch, edge, reduction):
    student, teacher = four(2, 3, 4, 5)
    totals = [0.0, 0.0]
    for b in range(2):
        v = [[patch_by_hand(c, patch) for c in maps[b].tolist()] for maps in (*student, *teacher)]
        places = patch * patch
        for c in range(3):
            for j in range(places):
                totals[0] += ((v[3][c][j] - v[2][c][j]) - (v[1][c][j] - v[0][c][j])) ** 2
        e = []
        for one in v:
            lengths = [sum(x * x for x in vector) ** 0.5 + 1e-8 if edge == "cosine" else 1.0 for vector in one]
            products = [[sum(x * y for x, y in zip(p, q, strict=True)) for q in one] for p in one]
            e.append([[products[p][q] / (lengths[p] * lengths[q]) for q in range(3)] for p in range(3)])
        totals[1] += sum(((e[3][p][q] - e[2][p][q]) - (e[1][p][q] - e[0][p][q])) ** 2 for p in range(3) for q in range(3))
    counts = (2 * 3 * patch**2, 2 * 9) if reduction == "mean" else (2, 2)
    found = graph_flow(student, teacher, patch_px=patch, edge=edge, reduction=reduction)
    for value, total, count in zip(found, totals, counts, strict=True):
        assert value.item() == pytest.approx(total / count)


def test_both_terms_by_hand():
    """One channel, patches of one place: the student goes from 1 to 3, the teacher from 2 to 5."""
    student = tuple(torch.full((1, 1, 1, 1), value) for value in (1.0, 3.0))
    teacher = tuple(torch.full((1, 1, 1, 1), value) for value in (2.0, 5.0))
    far = graph_flow(student, teacher, patch_px=1)
    assert [value.item() for value in far] == [(3 - 2) ** 2, ((25 - 4) - (9 - 1)) ** 2]


def test_only_changes_are_seen():
    (one, two), (three, _) = four(2, 3, 6, 6)
    assert [value.item() for value in graph_flow((one, two), (one, two))] == [0, 0]
    assert [value.item() for value in graph_flow((one, one), (three, three))] == [0, 0], "nothing changes on either side"


def test_a_constant_moves_edges_and_not_vertices():
    """Inside the map, where no patch has zeros of the border."""
    student, teacher = four(2, 3, 8, 8)
    for maps in (*student, *teacher):
        maps[..., 4, 3] += 10
    plain = graph_flow(student, teacher)
    lifted = graph_flow(tuple(one + 2 for one in student), teacher)
    torch.testing.assert_close(lifted[0], plain[0])
    assert abs(lifted[1] - plain[1]) > 1


def test_channels_may_change_places_in_all_maps_alike():
    student, teacher = four(2, 4, 5, 5)
    order = [2, 0, 3, 1]
    plain = graph_flow(student, teacher)
    together = graph_flow(tuple(one[:, order] for one in student), tuple(one[:, order] for one in teacher))
    torch.testing.assert_close(together, plain)
    assert not torch.allclose(graph_flow(tuple(one[:, order] for one in student), teacher)[0], plain[0])


def test_where_something_is_does_not_matter():
    maps = [torch.zeros(1, 2, 9, 9, dtype=torch.float64) for _ in range(4)]
    for number, one in enumerate(maps):
        one[..., 2:5, 2:5] = drawn(1, 2, 3, 3, seed=number).abs()
    moved = [one.roll((2, 3), (2, 3)) for one in maps]
    plain = graph_flow((maps[0], maps[1]), (maps[2], maps[3]))
    torch.testing.assert_close(graph_flow((moved[0], maps[1]), (maps[2], moved[3])), plain)


def test_edges_do_not_see_a_mirror():
    student, teacher = four(1, 3, 5, 5)
    mirrored = [one.flip(3) for one in (*student, *teacher)]
    found = graph_flow((mirrored[0], mirrored[1]), (mirrored[2], mirrored[3]))
    torch.testing.assert_close(found[1], graph_flow(student, teacher)[1])


def test_gradients():
    student, teacher = four(2, 3, 5, 5)
    student = tuple(one.requires_grad_() for one in student)
    teacher = tuple(one.requires_grad_() for one in teacher)
    for kind in ("inner", "cosine"):
        assert torch.autograd.gradcheck(
            lambda a, b, kind=kind: graph_flow((a, b), tuple(one.detach() for one in teacher), edge=kind), student
        )
    torch.stack(graph_flow(student, teacher)).sum().backward()
    assert all(one.grad is None for one in teacher)
    for one in student:
        touched = (one.grad != 0).sum((2, 3))
        assert touched.max() <= 9
        assert touched.min() >= 1


def test_maps_of_several_sizes_are_brought_to_the_smallest():
    student, teacher = (drawn(1, 2, 8, 8), drawn(1, 2, 4, 6, seed=1)), (drawn(1, 2, 8, 8, seed=2), drawn(1, 2, 5, 5, seed=3))
    small = [nn.functional.interpolate(one, size=(4, 5), mode="bilinear") for one in (*student, *teacher)]
    assert graph_flow(student, teacher) == graph_flow((small[0], small[1]), (small[2], small[3]))


def test_edges_grow_with_the_square_and_cosines_do_not():
    found = drawn(1, 3, 9)
    torch.testing.assert_close(edges(2 * found), 4 * edges(found))
    torch.testing.assert_close(edges(2 * found, "cosine"), edges(found, "cosine"))
    torch.testing.assert_close(edges(found, "cosine").diagonal(dim1=1, dim2=2), torch.ones(1, 3, dtype=torch.float64))


# The student's terms


def test_terms_are_weighted():
    student, teacher, distiller = built(vertex_weight=2, edge_weight=3, holistic_weight=0.2, pixel_weight=0.5)
    before = copy.deepcopy(distiller.adversary.critic)
    step = inputs(student, teacher)
    terms = distiller.losses(step)
    assert list(terms) == ["vertices", "edges", "pixel", "holistic"]
    said = tuple(distiller.paraphrasers[role](step.teacher.taps[role]) for role in TAPS)
    assert said[0].shape[1] == 4, "in the student's channels"
    far = graph_flow((step.student.taps["shallow"], step.student.taps["deep"]), said)
    torch.testing.assert_close(terms["vertices"], 2 * far[0])
    torch.testing.assert_close(terms["edges"], 3 * far[1])
    p, q = step.teacher.logits.softmax(1), step.student.logits.softmax(1)
    torch.testing.assert_close(terms["pixel"], 0.5 * (p * (p.log() - q.log())).mean())
    torch.testing.assert_close(terms["holistic"], -0.2 * before(step.student.logits).mean())


def test_several_pairs_are_averaged():
    student, teacher, distiller = built(layers=[["shallow", "deep"], ["deep", "shallow"]], vertex_weight=1, holistic_weight=0)
    step = inputs(student, teacher)
    one = built(layers=[["shallow", "deep"]], vertex_weight=1, holistic_weight=0)[2]
    back = "changes back are as large"
    torch.testing.assert_close(distiller.losses(step)["vertices"], one.losses(step)["vertices"], msg=back)


def test_the_students_terms_reach_the_student_alone():
    student, teacher, distiller = built(vertex_weight=1, edge_weight=1)
    torch.stack(list(distiller.losses(inputs(student, teacher)).values())).sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in student.parameters())
    assert all(value.grad is None for value in [*teacher.parameters(), *distiller.parameters()])
    assert not any(value.requires_grad for value in distiller.paraphrasers.parameters()), "no optimizer takes them"


def test_the_critic_can_be_left_out():
    student, teacher, distiller = built(holistic_weight=0, pixel_weight=0)
    assert distiller.adversary is None
    assert list(distiller.losses(inputs(student, teacher))) == ["vertices", "edges"]


# Before the training


def test_prepare_trains_the_paraphrasers_and_leaves_them(tmp_path):
    student, teacher, distiller = built(paraphraser_epochs=3, paraphraser_lr=0.3)
    setting = toy.setting(
        tmp_path, data=toy.scenes(train=16, size_px=SIDE), task=Segmentation(toy.CLASSES), augment=MaskAugmentConfig()
    )
    before = toy.state_of(distiller.paraphrasers)
    teacher.requires_grad_(False)
    distiller.prepare(student, teacher, setting)
    after = distiller.paraphrasers.state_dict()
    assert not any(torch.equal(before[name], value) for name, value in after.items())
    assert not any(value.requires_grad or value.grad is not None for value in distiller.paraphrasers.parameters())
    found = distiller.statistics(student, teacher, setting)
    assert set(found) == {"not restored of shallow", "not restored of deep"}
    assert all(0 < share < 2 for share in found.values())
    again = built()[2]
    again.load_state_dict(distiller.state_dict())
    assert again.statistics(student, teacher, setting) == found, "a training that goes on knows it"


# Steps


def state(student, teacher, distiller, **given):
    fabric = make_fabric(ComputeConfig(accelerator="cpu", threads=1))
    wrapped, optimizer = fabric.setup(student, torch.optim.SGD(student.parameters(), lr=0.1))
    common = {"fabric": fabric, "task": Segmentation(toy.CLASSES), "student": wrapped, "inner": student}
    teacher.requires_grad_(False)
    taps = {"student_taps": TAPS, "teacher_taps": TAPS}
    return TrainState(**common, **taps, teacher=teacher, objective=distiller, optimizer=optimizer, total_steps=10, **given)


def flat(module):
    return torch.cat([value.detach().flatten() for value in module.parameters()])


def batch(count=2):
    labels = torch.randint(0, toy.CLASSES, (count, SIDE, SIDE), generator=torch.Generator().manual_seed(5))
    return drawn(count, 3, SIDE, SIDE, seed=4, dtype=torch.float32), labels


@pytest.mark.parametrize("adversarial", ["wgan-gp", "hinge"])
def test_a_step_is_the_students_then_the_critics(adversarial):
    """Against the same step written out; of the four images two have no labels, which only the task's loss leaves out."""
    student, teacher, distiller = built(adversarial=adversarial, vertex_weight=1e-3, critic_lr=0.01)
    critic, own, said = (copy.deepcopy(one) for one in (distiller.adversary.critic, student, distiller.paraphrasers))
    start = copy.deepcopy(critic)
    images, labels = batch(4)
    labels[1::2] = IGNORE
    torch.manual_seed(7)
    terms = distiller.train_step(state(student, teacher, distiller, step=4), images, labels)

    torch.manual_seed(7)
    theirs, ours = outputs(teacher, images), outputs(own, images)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(ours.logits[::2], labels[::2])
    far = graph_flow((ours.taps["shallow"], ours.taps["deep"]), tuple(said[role](theirs.taps[role]).detach() for role in TAPS))
    p, q = theirs.logits.softmax(1), ours.logits.log_softmax(1)
    loss = loss + 1e-3 * far[0] + 1e-9 * far[1] + (p * (p.log() - q)).mean() - 0.1 * critic(ours.logits).mean()
    loss.backward()
    optimizer.step()
    second = torch.optim.Adam(critic.parameters(), lr=0.01 * 0.6**0.9, betas=(0.9, 0.99))
    second.zero_grad()
    fake, real = ours.logits.detach(), theirs.logits.detach()
    high, low = critic(real), critic(fake)
    if adversarial == "hinge":
        against = (1 - high).clamp_min(0).mean() + (1 + low).clamp_min(0).mean()
    else:
        against = low.mean() - high.mean() + 10 * gradient_penalty(critic, real, fake)
    against.backward()
    second.step()

    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, own.state_dict()[name], msg=name)
    found, expected, first = (flat(one) for one in (distiller.adversary.critic, critic, start))
    # Adam takes rounding for a direction where a gradient is next to nothing
    assert (found - expected).norm() < 0.05 * (expected - first).norm()
    assert sum(value for name, value in terms.items() if name != "critic") == pytest.approx(loss.item(), rel=1e-4)
    assert terms["critic"] == pytest.approx(against.item(), rel=1e-4)
    assert toy.same_state(said.state_dict(), distiller.paraphrasers.state_dict())


def test_a_critic_that_diverges_is_named():
    student, teacher, distiller = built()
    with torch.no_grad():
        distiller.adversary.critic.layers[-1].weight.fill_(1e21)
    with pytest.raises(TrainingError, match="term 'critic' is"):
        distiller.train_step(state(student, teacher, distiller), *batch())


def test_unlabelled_images_are_half_of_each_batch_where_asked():
    assert built()[2].half_labelled
    assert not built(half_labelled=False)[2].half_labelled


def test_a_stage_with_unlabelled_images(tmp_path):
    """12 of 16 images have no labels: an epoch has all of them and as many labelled ones, in 6 batches of 4."""
    data = toy.scenes(train=16, size_px=SIDE)
    data.train.labels[4:] = IGNORE
    seen, task = [], Segmentation(toy.CLASSES)

    class Watched(Segmentation):
        def loss(self, logits, labels, *rest):
            seen.append((labels != IGNORE).flatten(1).any(1).tolist())
            return task.loss(logits, labels, *rest)

    context = Context(
        compute=ComputeConfig(accelerator="cpu", threads=1),
        task=Watched(toy.CLASSES),
        dataset=data,
        augment=MaskAugmentConfig(flip=True),
        seed=0,
        search=(),
        logs=tmp_path / "logs",
    )
    method = GraphFlowConfig(name="graph_flow", holistic_weight=0, paraphraser_epochs=1)
    (record,) = fit(
        loaded(4),
        TrainConfig(epochs=1, batch_size=4),
        context,
        title="toy",
        work=tmp_path,
        method=method,
        teacher=loaded(6, seed=1),
        task_weight=1.0,
    )
    assert [sum(batch) for batch in seen] == [2] * 6
    assert set(record["terms"]) == {"task", "vertices", "edges", "pixel"}
    assert set(record["statistics"]) == {"not restored of shallow", "not restored of deep"}


# Errors


def uneven():
    return loaded(4, module=Net(4, deep=5))


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (loaded(4, module=toy.Net(), taps={"shallow": "norm1"}), {}, r"of one shape; the student's output is \[2, 4\]"),
        (loaded(4, side=48), {}, "at least 64 x 64; the student's are 48 x 48"),
        (loaded(4), {"layers": [["shallow", "end"]]}, "graph_flow.layers: the student has no tap 'end'"),
        (uneven(), {"layers": [["shallow", "deep"]]}, "as many channels in the student; 'shallow' has 4 and 'deep' has 5"),
        (uneven(), {}, "no two maps of the student have as many channels: shallow 4, deep 5"),
    ],
)
def test_what_does_not_fit(student, options, message):
    with pytest.raises(RecipeError, match=message):
        GraphFlowConfig(name="graph_flow", **options).build(student, loaded(6, side=student.architecture.height_px))


def test_the_first_map_and_the_last_like_it_are_the_default():
    assert built()[2].pairs == [("shallow", "deep")]


def test_a_patch_has_a_middle():
    with pytest.raises(ValidationError, match="its side must be odd; received 4"):
        GraphFlowConfig(name="graph_flow", patch_px=4)


def test_no_pairs_are_no_choice():
    with pytest.raises(ValidationError, match="at least 1 item"):
        GraphFlowConfig(name="graph_flow", layers=[])
