"""CoCo DistillNet: similarities of places against loops, what the term does not see, who learns, and the critic's view."""

import copy
import dataclasses

import pytest
import torch
import toy
from pydantic import ValidationError
from torch import nn

from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.distill.coco_distillnet import CocoDistillnetConfig, correlation_loss, place_vectors
from edgekd.errors import RecipeError, TrainingError
from edgekd.nn.critics import gradient_penalty
from edgekd.nn.taps import capture
from edgekd.tasks import Segmentation
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.hardware import ComputeConfig, make_fabric
from edgekd.train.step import Outputs, StepInputs, TrainState

SIDE = 32
TAPS = {"shallow": "first", "deep": "second"}
KINDS = pytest.mark.parametrize("kind", ["cross", "selfcorr"])


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
    return one.module, other.module, CocoDistillnetConfig(name="coco_distillnet", **options).build(one, other)


def outputs(module, images):
    with capture(module, TAPS) as taps:
        logits = module(images)
    return Outputs(logits, taps)


def inputs(student, teacher, batch=2):
    images = drawn(batch, 3, SIDE, SIDE, dtype=torch.float32)
    return StepInputs(images, torch.zeros(batch, SIDE, SIDE), outputs(student, images), outputs(teacher, images), 0, 0)


def four(ours=3, theirs=5, size=(4, 3), batch=2):
    """The student's two maps and the teacher's."""
    shapes = [(batch, ours, *size)] * 2 + [(batch, theirs, *size)] * 2
    maps = [drawn(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    return (maps[0], maps[1]), (maps[2], maps[3])


# The correlation


def by_hand(vectors, normalise):
    """[C][N] to [N][C], one place after the other."""
    places = [list(place) for place in zip(*vectors, strict=True)]
    if normalise == "l2":
        return [[x / sum(y * y for y in place) ** 0.5 for x in place] for place in places]
    return [[x / len(place) ** 0.5 for x in place] for place in places] if normalise == "channels" else places


def dot(one, other):
    return sum(x * y for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("normalise", ["l2", "none", "channels"])
@KINDS
def test_it_agrees_with_loops(kind, normalise):
    student, teacher = four()
    count, total = 12, 0.0
    for b in range(2):
        found = []
        for maps in (student, teacher):
            shallow, deep = (by_hand(one[b].flatten(1).tolist(), normalise) for one in maps)
            if kind == "cross":
                found.append([[dot(p, q) for q in deep] for p in shallow])
            else:
                within = [[[dot(p, q) for q in one] for p in one] for one in (shallow, deep)]
                columns = list(zip(*within[1], strict=True))
                found.append([[dot(row, column) / count for column in columns] for row in within[0]])
        total += sum((found[1][i][j] - found[0][i][j]) ** 2 for i in range(count) for j in range(count))
    assert correlation_loss(student, teacher, kind=kind, normalise=normalise).item() == pytest.approx(total / (2 * count**2))


def test_it_by_hand():
    """One place: the student's two vectors point the same way, the teacher's are at right angles, then opposite."""
    one, across, back = (torch.tensor(vector).view(1, 2, 1, 1) for vector in ([3.0, 4.0], [-4.0, 3.0], [-3.0, -4.0]))
    assert correlation_loss((one, 2 * one), (one, across)).item() == pytest.approx(1)
    assert correlation_loss((one, 2 * one), (one, back)).item() == pytest.approx(4), "the largest there is"
    assert correlation_loss((one, 2 * one), (one, across), normalise="none").item() == pytest.approx(50**2)
    assert correlation_loss((one, 2 * one), (one, across), normalise="channels").item() == pytest.approx(25**2)


@KINDS
def test_it_is_zero_for_equal_networks_alone(kind):
    student, teacher = four(theirs=3)
    assert correlation_loss(teacher, teacher, kind=kind).item() == pytest.approx(0, abs=1e-15)
    for mixed in ((teacher[0], student[1]), (student[0], teacher[1])):
        assert correlation_loss(mixed, teacher, kind=kind) > 1e-3, "one layer alone is not enough"
    small = tuple(one.float() for one in student)
    almost = tuple(one + 1e-5 * drawn(*one.shape, seed=9, dtype=torch.float32) for one in small)
    assert 1e-12 < correlation_loss(almost, small, kind=kind) < 1e-9, "a small difference is not lost among large sums"


@KINDS
def test_channels_can_be_turned_in_both_layers_of_a_network(kind):
    student, teacher = four()
    turn = torch.linalg.qr(drawn(3, 3, seed=8))[0]
    turned = tuple(torch.einsum("dc,bchw->bdhw", turn, one) for one in student)
    plain = correlation_loss(student, teacher, kind=kind, normalise="none")
    torch.testing.assert_close(correlation_loss(turned, teacher, kind=kind, normalise="none"), plain)
    torch.testing.assert_close(correlation_loss(turned, teacher, kind=kind), correlation_loss(student, teacher, kind=kind))
    if kind == "cross":
        assert abs(correlation_loss((turned[0], student[1]), teacher) - correlation_loss(student, teacher)) > 1e-4


@KINDS
def test_the_strength_of_a_place_is_not_seen(kind):
    student, teacher = four()
    scaled = tuple(one * (drawn(2, 1, 4, 3, seed=5 + n).abs() + 0.1) for n, one in enumerate(student))
    plain = correlation_loss(student, teacher, kind=kind)
    torch.testing.assert_close(correlation_loss(scaled, teacher, kind=kind), plain)
    torch.testing.assert_close(correlation_loss(student, (100 * teacher[0], teacher[1]), kind=kind), plain)


def test_places_may_be_permuted_and_layers_swapped_in_both_networks():
    student, teacher = four()
    plain = correlation_loss(student, teacher)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    (ours, theirs) = (one.flatten(2)[..., order].view_as(one) for one in (student[0], teacher[0]))
    torch.testing.assert_close(correlation_loss((ours, student[1]), (theirs, teacher[1])), plain)
    torch.testing.assert_close(correlation_loss(student[::-1], teacher[::-1]), plain)
    assert abs(correlation_loss((ours, student[1]), teacher) - plain) > 1e-4, "in one network alone it is seen"


def test_images_are_averaged():
    student, teacher = four()
    each = [correlation_loss(tuple(o[b : b + 1] for o in student), tuple(o[b : b + 1] for o in teacher)) for b in range(2)]
    torch.testing.assert_close(correlation_loss(student, teacher), torch.stack(each).mean())


def test_sides_are_averaged_down_layer_by_layer():
    pool = nn.functional.adaptive_avg_pool2d
    student, teacher = (drawn(1, 2, 8, 8), drawn(1, 2, 4, 6, seed=1)), (drawn(1, 3, 6, 9, seed=2), drawn(1, 3, 5, 5, seed=3))
    fit = [(pool(ours, a), pool(theirs, a)) for ours, theirs, a in zip(student, teacher, [(6, 8), (4, 5)], strict=True)]
    expected = correlation_loss((fit[0][0], fit[1][0]), (fit[0][1], fit[1][1]))
    torch.testing.assert_close(correlation_loss(student, teacher), expected)
    for options, size in (({"kind": "selfcorr"}, [(4, 5)] * 2), ({"max_side": 5}, [(5, 5), (4, 5)])):
        small = [tuple(pool(one, a) for one, a in zip(maps, size, strict=True)) for maps in (student, teacher)]
        torch.testing.assert_close(correlation_loss(student, teacher, **options), correlation_loss(*small, **options))


@KINDS
@pytest.mark.parametrize("normalise", ["l2", "none"])
def test_gradients(kind, normalise):
    student, teacher = four(2, 3, size=(2, 3))
    student, teacher = (tuple(one.requires_grad_() for one in maps) for maps in (student, teacher))
    loss = correlation_loss(student, teacher, kind=kind, normalise=normalise)
    loss.backward()
    assert all(one.grad is None for one in teacher)
    assert all((one.grad.abs().sum(1) > 0).all() for one in student), "every place of both layers"
    fixed = tuple(one.detach() for one in teacher)
    assert torch.autograd.gradcheck(lambda a, b: correlation_loss((a, b), fixed, kind=kind, normalise=normalise), student)


def test_places_where_nothing_is():
    """As behind a ReLU: like nothing, without a gradient, and nothing is not a number."""
    student, teacher = four()
    for maps in (*student, *teacher):
        maps[0, :, 1, 1] = 0
    maps = torch.zeros(2, 3, 4, 3, requires_grad=True)
    assert correlation_loss((maps, maps), (maps, maps)) == 0
    ours = tuple(one.requires_grad_() for one in student)
    correlation_loss(ours, teacher).backward()
    for one in ours:
        assert one.grad.isfinite().all()
        assert (one.grad[0, :, 1, 1] == 0).all()
        assert one.grad.abs().max() < 10
    torch.testing.assert_close(place_vectors(ours[0])[0, :, 4], torch.zeros(3, dtype=torch.float64))


def test_half_precision_is_read_as_it_is():
    student, teacher = (tuple(one.bfloat16() for one in maps) for maps in four())
    exact = correlation_loss(tuple(one.float() for one in student), tuple(one.float() for one in teacher))
    found = correlation_loss(student, teacher)
    assert found.dtype == torch.float32
    assert found == exact


# The student's terms


def test_terms_are_weighted():
    student, teacher, distiller = built(correlation_weight=2, holistic_weight=0.2)
    before = copy.deepcopy(distiller.adversary.critic)
    step = inputs(student, teacher)
    terms = distiller.losses(step)
    assert list(terms) == ["correlation", "holistic"]
    said = tuple(distiller.paraphrasers[role](step.teacher.taps[role]) for role in TAPS)
    assert said[0].shape[1] == 4, "in the student's channels"
    ours = (step.student.taps["shallow"], step.student.taps["deep"])
    torch.testing.assert_close(terms["correlation"], 2 * correlation_loss(ours, said))
    seen = torch.cat([step.images, step.student.logits], 1)
    torch.testing.assert_close(terms["holistic"], -0.2 * before(seen).mean(), msg="the image first, then raw logits")


def test_without_paraphrasers_the_teachers_own_maps_are_compared():
    student, teacher, distiller = built(paraphraser=False, holistic_weight=0)
    step = inputs(student, teacher)
    ours, theirs = ((one.taps["shallow"], one.taps["deep"]) for one in (step.student, step.teacher))
    assert theirs[0].shape[1] == 6
    terms = distiller.losses(step)
    assert list(terms) == ["correlation"]
    assert terms["correlation"] == correlation_loss(ours, theirs)
    assert not list(distiller.parameters())
    distiller.prepare(student, teacher, None)
    assert distiller.statistics(student, teacher, None) == {}


def test_several_pairs_are_added():
    student, teacher, distiller = built(layers=[["shallow", "deep"], ["deep", "shallow"]], holistic_weight=0)
    step = inputs(student, teacher)
    one = built(layers=[["shallow", "deep"]], holistic_weight=0)[2]
    one.load_state_dict(distiller.state_dict())
    torch.testing.assert_close(distiller.losses(step)["correlation"], 2 * one.losses(step)["correlation"])


def test_the_options_reach_the_correlation():
    given = {"kind": "selfcorr", "normalise": "none", "max_side": 3}
    student, teacher, distiller = built(paraphraser=False, holistic_weight=0, **given)
    step = inputs(student, teacher)
    ours, theirs = ((one.taps["shallow"], one.taps["deep"]) for one in (step.student, step.teacher))
    assert distiller.losses(step)["correlation"] == correlation_loss(ours, theirs, **given)


def test_the_students_terms_reach_the_student_alone():
    student, teacher, distiller = built()
    torch.stack(list(distiller.losses(inputs(student, teacher)).values())).sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in student.parameters())
    assert all(value.grad is None for value in [*teacher.parameters(), *distiller.parameters()])
    assert not any(value.requires_grad for value in distiller.paraphrasers.parameters()), "no optimizer takes them"


def test_the_critic_can_see_less():
    student, teacher, distiller = built(score_side_px=24)
    step = inputs(student, teacher)
    seen = nn.functional.adaptive_avg_pool2d(torch.cat([step.images, step.student.logits], 1), 24)
    expected = -0.1 * copy.deepcopy(distiller.adversary.critic)(seen).mean()
    torch.testing.assert_close(distiller.losses(step)["holistic"], expected)


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
    """Against the same step written out."""
    student, teacher, distiller = built(adversarial=adversarial, critic_lr=0.01)
    critic, own, said = (copy.deepcopy(one) for one in (distiller.adversary.critic, student, distiller.paraphrasers))
    start = copy.deepcopy(critic)
    images, labels = batch(4)
    torch.manual_seed(7)
    terms = distiller.train_step(state(student, teacher, distiller, step=4), images, labels)

    torch.manual_seed(7)
    theirs, ours = outputs(teacher, images), outputs(own, images)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    fake, real = (torch.cat([images, one.logits], 1) for one in (ours, theirs))
    far = correlation_loss(tuple(ours.taps[role] for role in TAPS), tuple(said[role](theirs.taps[role]) for role in TAPS))
    loss = nn.functional.cross_entropy(ours.logits, labels) + far - 0.1 * critic(fake).mean()
    loss.backward()
    optimizer.step()
    second = torch.optim.Adam(critic.parameters(), lr=0.01 * 0.6**0.9, betas=(0.9, 0.99))
    second.zero_grad()
    fake, real = fake.detach(), real.detach()
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


def test_a_critic_that_knows_nothing_pays_the_whole_penalty():
    student, teacher, distiller = built()
    with torch.no_grad():
        distiller.adversary.critic.layers[-1].weight.zero_()
    terms = distiller.train_step(state(student, teacher, distiller), *batch())
    assert terms["critic"] == pytest.approx(10)


def test_a_critic_that_diverges_is_named():
    student, teacher, distiller = built()
    with torch.no_grad():
        distiller.adversary.critic.layers[-1].weight.fill_(1e21)
    with pytest.raises(TrainingError, match="term 'critic' is"):
        distiller.train_step(state(student, teacher, distiller), *batch())


# Errors


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (
            loaded(4, module=toy.Net(), taps={"shallow": "norm1"}),
            loaded(6),
            {},
            r"of one shape; the student's output is \[2, 4\]",
        ),
        (loaded(4, side=16), loaded(6, side=16), {}, "at least 24 x 24; the student's are 16 x 16"),
        (loaded(4), loaded(6), {"layers": [["shallow", "end"]]}, "coco_distillnet.layers: the student has no tap 'end'"),
        (loaded(4, module=Net(4, deep=5)), loaded(6), {}, "no two maps of the student have as many channels: shallow 4, deep 5"),
        (
            loaded(4),
            loaded(6, module=Net(6, deep=7)),
            {"paraphraser": False},
            "without paraphrasers a pair .* in the teacher; 'shallow' has 6 and 'deep' has 7",
        ),
    ],
)
def test_what_does_not_fit(student, teacher, options, message):
    with pytest.raises(RecipeError, match=message):
        CocoDistillnetConfig(name="coco_distillnet", **options).build(student, teacher)


def test_paraphrasers_let_the_teachers_maps_differ():
    other = loaded(6, module=Net(6, deep=7))
    distiller = CocoDistillnetConfig(name="coco_distillnet").build(loaded(4), other)
    assert distiller.losses(inputs(loaded(4).module, other.module))["correlation"].isfinite()


def test_grey_images_give_a_critic_as_published():
    grey = [
        dataclasses.replace(one, architecture=dataclasses.replace(one.architecture, channels=1)) for one in (loaded(4), loaded(6))
    ]
    for one in grey:
        one.module.first = nn.Conv2d(1, one.module.first.out_channels, 3, padding=1, stride=4)
    distiller = CocoDistillnetConfig(name="coco_distillnet").build(*grey)
    assert distiller.adversary.critic.layers[0].in_channels == 1 + toy.CLASSES


def test_no_pairs_are_no_choice():
    with pytest.raises(ValidationError, match="at least 1 item"):
        CocoDistillnetConfig(name="coco_distillnet", layers=[])
