"""Feature-augmented distillation: bounds against loops, against samples, and against what they become without augmentation."""

import math

import pytest
import torch
import toy
from torch import nn

from edgekd.distill.fakd import (
    FakdConfig,
    channel_bound,
    isda_logits,
    known_classes,
    own_variances,
    pair_variances,
    per_pixel,
    ramp,
    soft_cross_entropy_bound,
)
from edgekd.errors import RecipeError
from edgekd.nn.divergences import channel_divergence, pixel_divergence
from edgekd.nn.taps import capture
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.step import Outputs, StepInputs

FORMS = ["full", "refmean", "ref0"]
PIXELS, CLASSES, CHANNELS = 7, 4, 3


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem():
    """z, p, k, Var, w of seven pixels; of class 2 there is none."""
    probabilities = (2 * drawn(PIXELS, CLASSES, seed=1)).softmax(1)
    classes = torch.tensor([3, 0, 1, 3, 0, 0, 1])
    return (
        drawn(PIXELS, CLASSES),
        probabilities,
        classes,
        drawn(CLASSES, CHANNELS, seed=2).square(),
        drawn(CLASSES, CHANNELS, seed=3),
    )


def bound(form="full", strength=1.5, temperature=2.0, **changed):
    names = ("logits", "probabilities", "classes", "variance", "weights")
    given = dict(zip(names, problem(), strict=True)) | changed
    return soft_cross_entropy_bound(*given.values(), strength, temperature=temperature, form=form)


# The bound of pixels


def test_a_bound_by_hand():
    """w = (1, -1) and a variance of 3: with lambda = 0.5, Q of the two classes is 0.25 * 3 * 4 = 3."""
    given = torch.tensor([[2.0, 0.5]]), torch.tensor([[0.75, 0.25]]), torch.tensor([1]), torch.tensor([[9.0], [3.0]])
    value = soft_cross_entropy_bound(*given, torch.tensor([[1.0], [-1.0]]), 0.5)
    expected = 0.75 * math.log(1 + math.exp(0.5 - 2 + 3)) + 0.25 * math.log(1 + math.exp(2 - 0.5 + 3))
    assert value.item() == pytest.approx(expected)


def slow_bound(form, z, p, k, variance, weights, strength, tau):
    out = []
    for pixel in range(len(z)):
        v = variance[k[pixel]]

        def spread(one, other, v=v):
            return strength / (2 * tau**2) * sum(v[d] * (one[d] - other[d]) ** 2 for d in range(len(v)))

        classes = range(len(weights))
        if form == "full":
            value = 0.0
            for c in classes:
                inner = sum(math.exp((z[pixel][j] - z[pixel][c]) / tau + spread(weights[j], weights[c])) for j in classes)
                value += p[pixel][c] * math.log(inner)
        else:
            mean = [sum(p[pixel][c] * weights[c][d] for c in classes) for d in range(len(v))]
            reference = mean if form == "refmean" else [0.0] * len(v)
            inner = sum(math.exp(z[pixel][j] / tau + spread(weights[j], reference)) for j in classes)
            value = math.log(inner) - sum(p[pixel][c] * z[pixel][c] / tau for c in classes)
        out.append(value)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_bounds_agree_with_loops(form):
    expected = slow_bound(form, *(part.tolist() for part in problem()), 1.5, 2.0)
    torch.testing.assert_close(bound(form), torch.tensor(expected, dtype=torch.float64))


def cross_entropy(logits, tau=2.0):
    return -(problem()[1] * (logits / tau).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("form", FORMS)
def test_without_augmentation_it_is_the_cross_entropy(form):
    logits, _, _, variance, _ = problem()
    torch.testing.assert_close(bound(form, strength=0.0), cross_entropy(logits))
    torch.testing.assert_close(bound(form, variance=torch.zeros_like(variance)), cross_entropy(logits))


def test_the_order_of_bounds():
    """full >= refmean >= the mean over samples >= the plain cross-entropy; ref0 is a bound too."""
    logits, _, classes, variance, weights = problem()
    noise = drawn(20_000, PIXELS, CHANNELS, seed=9) * (1.5 * variance[classes]).sqrt()
    sampled = cross_entropy(logits + noise @ weights.t()).mean(0)
    assert (bound("full") >= bound("refmean")).all()
    assert (bound("refmean") > sampled).all()
    assert (bound("ref0") > sampled).all()
    assert (sampled > cross_entropy(logits)).all()


@pytest.mark.parametrize("form", FORMS)
def test_more_augmentation_is_never_less(form):
    values = torch.stack([bound(form, strength=strength) for strength in (0.0, 0.1, 1.0, 10.0, 100.0)])
    if form == "ref0":
        values = values[[0, -1]]  # alone without an order between neighbours
    assert (values.diff(dim=0) >= 0).all()


def test_for_labels_it_is_isda():
    logits, _, classes, variance, weights = problem()
    one_hot = nn.functional.one_hot(classes, CLASSES).double()
    full, mean = (bound(form, temperature=1.0, probabilities=one_hot) for form in ("full", "refmean"))
    torch.testing.assert_close(full, mean)
    pairs = pair_variances(variance, weights, 1.5)
    augmented = isda_logits(logits.t()[None, ..., None], classes[None, :, None], pairs)[0, ..., 0].t()
    torch.testing.assert_close(full, nn.functional.cross_entropy(augmented, classes, reduction="none"))


def test_pairs():
    _, _, _, variance, weights = problem()
    pairs = pair_variances(variance, weights, 1.5)
    torch.testing.assert_close(pairs, pairs.transpose(1, 2))
    assert (pairs.diagonal(dim1=1, dim2=2) == 0).all()
    assert (pairs >= 0).all()
    torch.testing.assert_close(pair_variances(variance, weights + drawn(1, CHANNELS, seed=5), 1.5), pairs)
    torch.testing.assert_close(bound(weights=weights + 7.0), bound())


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_bounds(form):
    logits, _, _, _, weights = problem()
    assert torch.autograd.gradcheck(
        lambda z, w: bound(form, logits=z, weights=w), (logits.requires_grad_(), weights.requires_grad_())
    )


def test_wide_ranges_stay_finite():
    """Logits 100 apart and variances to match: products of float32's exponentials would be 0."""
    logits, probabilities, classes, variance, weights = (part.float() if part.is_floating_point() else part for part in problem())
    logits, weights = (40 * logits).requires_grad_(), (4 * weights).requires_grad_()
    value = soft_cross_entropy_bound(logits, probabilities, classes, variance, weights, 2.0)
    expected = slow_bound("full", *(part.tolist() for part in (logits, probabilities, classes, variance, weights)), 2.0, 1.0)
    torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-4, atol=1e-3)
    value.sum().backward()
    assert logits.grad.isfinite().all()
    assert weights.grad.isfinite().all()


# The bound of channels, and ISDA's logits


def test_channels_agree_with_loops():
    student, teacher, variances = drawn(2, 3, 2, 2), drawn(2, 3, 2, 2, seed=1), drawn(2, 3, 2, 2, seed=2).square()
    total, tau = 0.0, 3.0
    for z, t, v in zip(*(part.reshape(6, 4).tolist() for part in (student, teacher, variances)), strict=True):
        shares = [math.exp(value / tau) for value in t]
        shares = [value / sum(shares) for value in shares]
        total += math.log(sum(math.exp(a / tau + b / tau**2) for a, b in zip(z, v, strict=True)))
        total += sum(q * math.log(q) - q * a / tau for q, a in zip(shares, z, strict=True))
    assert channel_bound(student, teacher, variances, tau).item() == pytest.approx(tau**2 * total / 6)
    plain = channel_bound(student, teacher, torch.zeros_like(variances), tau)
    torch.testing.assert_close(plain, channel_divergence(student, teacher, tau))


def test_channels_bound_the_mean_over_samples():
    student, teacher = drawn(1, CLASSES, 2, 3), drawn(1, CLASSES, 2, 3, seed=1)
    _, _, _, variance, weights = problem()
    labels = torch.tensor([[[0, 3, 1], [255, 2, 0]]])
    v = per_pixel(own_variances(variance, weights, 0.8), labels)
    assert (v[0, :, 1, 0] == 0).all(), "a pixel that does not count does not vary"
    spread = torch.cat([variance, torch.zeros(1, CHANNELS)])[labels.where(labels < CLASSES, CLASSES)]  # [1, 2, 3, D]
    noise = (drawn(4000, 2, 3, CHANNELS, seed=4) * (0.8 * spread).sqrt()) @ weights.t()
    sampled = sum(channel_divergence(student + one.movedim(-1, 0)[None], teacher, 2.0) for one in noise) / len(noise)
    assert channel_bound(student, teacher, v, 2.0) > sampled > channel_divergence(student, teacher, 2.0)


def test_isda_adds_the_variances_of_the_own_class():
    _, _, _, variance, weights = problem()
    pairs = pair_variances(variance, weights, 1.5)
    logits, labels = drawn(1, CLASSES, 1, 2), torch.tensor([[[2, 255]]])
    added = isda_logits(logits, labels, pairs) - logits
    torch.testing.assert_close(added[0, :, 0, 0], pairs[2, :, 2])
    assert (added[0, :, 0, 1] == 0).all()


def test_images_without_labels_take_the_teachers_classes():
    labels = torch.tensor([[[255, 255]], [[1, 255]]], dtype=torch.uint8)
    teacher = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]], [[[9.0, 9.0]], [[0.0, 0.0]]]])
    assert known_classes(labels, teacher).tolist() == [[[0, 1]], [[1, 255]]]


def test_the_ramp_begins_with_its_first_part_and_ends_at_its_full_height():
    assert ramp(0, 10, 5.0) == 0.5
    assert ramp(9, 10, 5.0) == 5.0


# The distiller


class Net(nn.Module):
    """A map, dropout, a last layer, and where asked an enlargement of what it gives."""

    def __init__(self, channels, *, dropout=0.0, stride=1, kernel=1):
        super().__init__()
        self.body = nn.Conv2d(3, channels, 3, padding=1, stride=stride)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.head = nn.Conv2d(channels, toy.CLASSES, kernel, padding=kernel // 2)
        self.enlarge = nn.Upsample(scale_factor=stride) if stride > 1 else nn.Identity()

    def forward(self, images):
        maps = self.body(images)
        return self.enlarge(self.head(maps if self.dropout is None else self.dropout(maps)))


def loaded(channels=4, seed=0, taps=None, **arguments):
    torch.manual_seed(seed)
    return Loaded(Net(channels, **arguments), taps or {"top": "body"}, Architecture({}, toy.CLASSES, 3, 8, 8))


def built(student=None, **options):
    """Student, teacher, distiller."""
    student, teacher = student or loaded(), loaded(6, seed=1)
    return student.module, teacher.module, FakdConfig(name="fakd", **options).build(student, teacher)


def inputs(student, teacher, labels=None, step=0, total_steps=1):
    images = drawn(2, 3, 8, 8, dtype=torch.float32)
    if labels is None:
        labels = torch.randint(0, toy.CLASSES, (2, 8, 8), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    with capture(student, {"top": "body"}) as taps:
        ours = Outputs(student(images), taps)
    return StepInputs(
        images, labels, ours, Outputs(teacher(images)), step, 0, student_net=student, teacher_net=teacher, total_steps=total_steps
    )


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, lambda a, b: pixel_divergence(a, b)),
        ({"surrogate": "refmean", "weight": 2, "temperature": 3}, lambda a, b: 2 * pixel_divergence(a, b, 3.0)),
        ({"surrogate": "ref0"}, lambda a, b: pixel_divergence(a, b)),
        ({"surrogate": "isda_logits"}, lambda a, b: pixel_divergence(a, b)),
        ({"surrogate": "channel"}, lambda a, b: 3 * channel_divergence(a, b, 4.0)),
    ],
)
def test_without_augmentation_it_is_what_it_bounds(options, plain):
    student, teacher, distiller = built(strength=0, **options)
    step = inputs(student, teacher)
    (term,) = distiller.losses(step).values()
    torch.testing.assert_close(term, plain(step.student.logits, step.teacher.logits))


def test_the_term_is_the_bound_over_the_pixels_that_count():
    """Step 2 of 8 with lambda_0 = 2.5, statistics of this very batch."""
    student, teacher, distiller = built(temperature=2)
    labels = torch.randint(0, toy.CLASSES, (2, 8, 8), generator=torch.Generator().manual_seed(6)).to(torch.uint8)
    labels[:, :3] = 255
    step = inputs(student, teacher, labels, step=1, total_steps=8)
    (term,) = distiller.losses(step).values()
    rows = [part.detach().movedim(1, -1)[:, 3:].reshape(-1, part.shape[1]) for part in (step.student.logits, step.teacher.logits)]
    features = step.student.taps["top"].detach().movedim(1, -1)[:, 3:].reshape(-1, 4)
    classes = labels[:, 3:].flatten().long()
    variance = torch.stack([features[classes == index].var(0, unbiased=False) for index in range(toy.CLASSES)])
    p = (rows[1] / 2).softmax(1)
    weights = student.head.weight.detach().flatten(1)
    expected = slow_bound("full", *(part.tolist() for part in (rows[0], p, classes, variance, weights)), 2.5 * 2 / 8, 2.0)
    expected = 4 * (sum(expected) / len(expected) + (p * p.log()).sum(1).mean().item())
    assert term.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("surrogate", [*FORMS, "isda_logits", "channel"])
def test_gradients_reach_the_student_alone(surrogate):
    student, teacher, distiller = built(surrogate=surrogate)
    step = inputs(student, teacher)
    distiller.losses(step)["fakd"].backward()
    assert all(
        value.grad is not None and value.grad.abs().sum() > 0 for name, value in student.named_parameters() if "bias" not in name
    )
    assert all(value.grad is None for value in teacher.parameters())
    assert not list(distiller.parameters())


def test_equal_nets_still_learn():
    """No minimum where both agree: what varies within a class should not move the logits."""
    student = loaded()
    _, _, distiller = built(student)
    images = inputs(student.module, student.module)
    (term,) = distiller.losses(images).values()
    assert term > 1e-3
    (received,) = torch.autograd.grad(term, images.student.taps["top"])
    assert received.abs().max() > 0


def test_constant_weights_have_no_gradient_through_the_variances():
    gradients = []
    for detach in (True, False):
        student, teacher, distiller = built(surrogate="isda_logits", detach_weights=detach)
        distiller.losses(inputs(student, teacher))["fakd"].backward()
        gradients.append(student.head.weight.grad)
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[1].norm()


def test_pixels_that_do_not_count_have_no_part():
    student, teacher, distiller = built()
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    labels[:, 4:] = 255
    step = inputs(student, teacher, labels)
    (received,) = torch.autograd.grad(distiller.losses(step)["fakd"], step.student.taps["top"])
    assert (received[:, :, 4:] == 0).all()
    assert distiller.seen.count.tolist() == [64, 0, 0, 0]


def test_a_small_map_has_labels_and_teacher_of_its_size():
    student, teacher, distiller = built(loaded(stride=2), strength=0)
    step = inputs(student, teacher)
    step.labels[:, ::2, ::2] = 1
    (term,) = distiller.losses(step).values()
    assert distiller.seen.count.tolist() == [0, 32, 0, 0]
    theirs = nn.functional.interpolate(step.teacher.logits, (4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(term, pixel_divergence(student.head(step.student.taps["top"]), theirs))


class Coarse(nn.Conv2d):
    """Convolves with other weights than those that are trained, as quantized layers do."""

    def forward(self, input):
        return self._conv_forward(input, (4 * self.weight).round() / 4, self.bias)


def test_logits_are_those_of_the_layer_as_it_computes():
    student = loaded()
    student.module.head = Coarse(4, toy.CLASSES, 1)
    _, teacher, distiller = built(student, strength=0)
    step = inputs(student.module, teacher)
    torch.testing.assert_close(distiller.losses(step)["fakd"], pixel_divergence(step.student.logits, step.teacher.logits))


def test_behind_a_dropout_the_input_is_the_tap():
    student = loaded(dropout=0.5, taps={"top": "body", "last": "head@input"})
    config = FakdConfig(name="fakd", features="last")
    assert config.build(student, loaded(6)).head == "head"
    with pytest.raises(RecipeError, match="no 1x1 convolution to 4 classes reads what stands at the student's tap 'top'"):
        FakdConfig(name="fakd").build(student, loaded(6))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (loaded(kernel=3), "no 1x1 convolution to 4 classes reads"),
        (loaded(taps={"stage1": "body"}), "fakd.features: the student has no tap 'top'"),
        (Loaded(toy.Net(), {"top": "norm1"}, Architecture({}, toy.CLASSES, 3, 8, 8)), "score maps"),
    ],
)
def test_what_does_not_fit(student, message):
    with pytest.raises(RecipeError, match=message):
        FakdConfig(name="fakd").build(student, loaded(6))


def test_gradients_of_channels_and_of_shifted_logits():
    z, teacher, variances = drawn(2, 3, 2, 2).requires_grad_(), drawn(2, 3, 2, 2, seed=1), drawn(2, 3, 2, 2, seed=2).square()
    assert torch.autograd.gradcheck(
        lambda z, v: channel_bound(z, teacher, v, 2.0), (z, variances.requires_grad_()), check_undefined_grad=False
    )
    labels = torch.tensor([[[0, 1], [2, 255]], [[1, 1], [0, 2]]], dtype=torch.uint8)
    pairs = drawn(3, 3, 3, seed=3).square().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, pairs: isda_logits(z, labels, pairs).square().mean(), (z, pairs))
