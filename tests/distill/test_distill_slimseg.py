"""SlimSeg's terms against hand-computed values and slow references, its invariances, who learns from what, and its errors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import toy

from edgekd import models
from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.data.base import IGNORE
from edgekd.distill.slimseg import (
    SlimsegConfig,
    at_labels,
    boundary_band,
    boundary_loss,
    downward,
    head_loss,
    sure_borders,
)
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.nn.slimmable import at_width
from edgekd.tasks import Segmentation
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.loop import evaluate, train
from edgekd.train.optim import TrainConfig
from edgekd.train.step import Outputs, StepInputs, TrainState

SLIM = ModelConfig(name="slim_unet", arguments={"width": 4, "widths": [1, 0.5, 0.25]})


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(*shape, classes=3, seed=0):
    """Blocks of two pixels, and some that do not count."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(classes, [shape[0], *(side // 2 for side in shape[1:])], generator=generator)
    found = found.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return found.where(torch.rand(found.shape, generator=generator) > 0.2, IGNORE).to(torch.uint8)


def loaded(config=SLIM, seed=0):
    torch.manual_seed(seed)
    module = models.build(config, num_classes=toy.CLASSES, in_channels=3)
    return Loaded(module, models.taps(config, module), Architecture(config.model_dump(mode="json"), toy.CLASSES, 3, 32, 32))


def test_downward_by_hand():
    """Wide says 3 : 1, narrow says 1 : 1 at one pixel; the other does not count."""
    wide = torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1).repeat(1, 1, 1, 2)
    narrow, labels = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, IGNORE]]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert downward(narrow, wide, labels).item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_downward_against_loops(temperature):
    narrow, wide, labels = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1), labels_of(2, 4, 6)
    total, count = 0.0, 0
    for image in range(2):
        for row in range(4):
            for column in range(6):
                if labels[image, row, column] == IGNORE:
                    continue
                q = [math.exp(value / temperature) for value in narrow[image, :, row, column].tolist()]
                p = [math.exp(value / temperature) for value in wide[image, :, row, column].tolist()]
                total += sum(b / sum(p) * math.log((b / sum(p)) / (a / sum(q))) for a, b in zip(q, p, strict=True))
                count += 1
    assert downward(narrow, wide, labels, temperature).item() == pytest.approx(temperature**2 * total / count)


def test_downward_is_nothing_where_logits_differ_by_a_constant():
    narrow, labels = draw(2, 3, 4, 4), labels_of(2, 4, 4)
    assert downward(narrow, narrow + draw(2, 1, 4, 4, seed=1), labels).item() == pytest.approx(0, abs=1e-12)


def test_downward_gives_the_wider_one_no_gradient():
    narrow, wide = draw(1, 3, 2, 2).requires_grad_(), draw(1, 3, 2, 2, seed=1).requires_grad_()
    labels = labels_of(1, 4, 4)
    downward(narrow, wide, labels).backward()
    assert wide.grad is None
    assert narrow.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda narrow: downward(narrow, wide, labels, 2.0), narrow)


def slow_band(labels, radius):
    band = torch.zeros(labels.shape, dtype=torch.bool)
    images, rows, columns = labels.shape
    for image in range(images):
        for row in range(rows):
            for column in range(columns):
                here = labels[image, row, column].item()
                for down in range(-radius, radius + 1):
                    for across in range(-radius, radius + 1):
                        r, c = row + down, column + across
                        if here == IGNORE or not (0 <= r < rows and 0 <= c < columns):
                            continue
                        there = labels[image, r, c].item()
                        band[image, row, column] |= there not in (here, IGNORE)
    return band


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_the_band_against_loops_and_the_published_identity(radius):
    labels = labels_of(3, 10, 8)
    band = boundary_band(labels, radius)
    assert torch.equal(band, slow_band(labels, radius))
    # one-hot, ignored pixels all zero -> max-pool -> more than one class
    hot = F.one_hot(labels.long().clamp_max(3), 4)[..., :3].movedim(-1, 1).float()
    pooled = F.max_pool2d(hot, 2 * radius + 1, 1, radius)
    assert torch.equal(band, (pooled.sum(1) > 1) & (labels != IGNORE))


def test_the_band_of_two_halves():
    labels = torch.zeros(1, 3, 6, dtype=torch.uint8)
    labels[:, :, 3:] = 7
    assert boundary_band(labels, 1)[0, 0].tolist() == [False, False, True, True, False, False]
    assert boundary_band(labels, 2)[0, 0].tolist() == [False, True, True, True, True, False]


def test_bands_grow_with_the_radius_and_need_two_classes():
    labels = labels_of(2, 12, 12)
    bands = [boundary_band(labels, radius) for radius in (1, 2, 3)]
    assert all((small & ~large).sum() == 0 for small, large in itertools.pairwise(bands))
    one = torch.where(labels == IGNORE, labels, 2)
    assert not boundary_band(one, 3).any(), "pixels that do not count make no border"
    assert boundary_loss(draw(2, 3, 12, 12), one, boundary_band(one)).item() == 0
    large = torch.ones(1, 1, 300, 300, dtype=torch.float16)
    assert boundary_loss(large, torch.zeros(1, 300, 300), torch.zeros(1, 300, 300, dtype=torch.bool)).item() == 0
    nothing = torch.full_like(labels, IGNORE)
    assert not boundary_band(nothing, 1).any()
    assert downward(draw(2, 3, 12, 12), draw(2, 3, 12, 12, seed=1), nothing).item() == 0


def test_the_boundary_loss_by_hand_and_as_the_cross_entropy_where_all_is_border():
    logits, labels = draw(2, 3, 6, 6), labels_of(2, 6, 6)
    band = boundary_band(labels, 1)
    picked = [-F.log_softmax(logits[i, :, r, c], 0)[labels[i, r, c].long()].item() for i, r, c in band.nonzero().tolist()]
    assert boundary_loss(logits, labels, band).item() == pytest.approx(sum(picked) / len(picked))
    everywhere = boundary_loss(logits, labels, torch.ones_like(band))
    assert everywhere.item() == pytest.approx(F.cross_entropy(logits, labels.long(), ignore_index=IGNORE).item())
    assert torch.autograd.gradcheck(lambda logits: boundary_loss(logits, labels, band), logits.requires_grad_())


def test_logits_are_enlarged_to_the_labels():
    logits, labels = draw(1, 3, 3, 3), labels_of(1, 6, 6)
    large = F.interpolate(logits, size=(6, 6), mode="bilinear", align_corners=False)
    assert torch.equal(at_labels(logits, labels), large)
    band = boundary_band(labels)
    assert torch.equal(boundary_loss(logits, labels, band), boundary_loss(large, labels, band))
    assert torch.equal(downward(logits, large, labels), downward(large, large, labels))


def test_the_heads_loss_by_hand():
    """One border among four pixels: weight 3/4 on it, 1/4 on the others."""
    band = torch.tensor([[[True, False], [False, False]]])
    edges = torch.tensor([2.0, -1.0, 0.0, 3.0], dtype=torch.float64).view(1, 1, 2, 2)
    sigmoid = [1 / (1 + math.exp(-value)) for value in (2.0, -1.0, 0.0, 3.0)]
    terms = [0.75 * -math.log(sigmoid[0]), *(0.25 * -math.log(1 - value) for value in sigmoid[1:])]
    assert head_loss(edges, band).item() == pytest.approx(20 * sum(terms) / 4, rel=1e-6)
    assert head_loss(edges, torch.zeros_like(band)).item() == 0, "no borders: the others weigh nothing"
    labels = torch.zeros(1, 2, 2)
    assert sure_borders(edges.requires_grad_(), labels).tolist() == [[[True, False], [False, True]]]


def step_of(distiller, student, images, labels, width, wider=None):
    with at_width(student, width):
        logits = student(images)
        return logits, distiller.losses(StepInputs(images, labels, Outputs(logits), wider, 0, 0))


def test_the_widest_has_no_teacher_and_narrow_ones_have():
    student = loaded()
    distiller = SlimsegConfig(name="slimseg").build(student)
    images, labels = torch.randn(2, 3, 32, 32), labels_of(2, 32, 32)
    logits, terms = step_of(distiller, student.module, images, labels, 1.0)
    assert set(terms) == {"boundary"}
    _, terms = step_of(distiller, student.module, images, labels, 0.5, Outputs(logits.detach()))
    assert set(terms) == {"downward", "boundary"}
    distiller = SlimsegConfig(name="slimseg", narrow_labels=False).build(student)
    assert set(step_of(distiller, student.module, images, labels, 0.5, Outputs(logits.detach()))[1]) == {"downward"}
    distiller = SlimsegConfig(name="slimseg", downward_weight=0, boundary_weight=0).build(student)
    assert not step_of(distiller, student.module, images, labels, 0.5, Outputs(logits.detach()))[1]


def state(student, distiller, *, task_weight=1.0, accumulate=1, tmp_path):
    setting = toy.setting(tmp_path, data=toy.scenes(), task=Segmentation(toy.CLASSES), augment=MaskAugmentConfig())
    optimizer = torch.optim.SGD([*student.module.parameters(), *distiller.parameters()], lr=0.0)
    wrapped, optimizer = setting.fabric.setup(student.module.train(), optimizer)
    taps = {role: student.taps[role] for role in distiller.student_taps}
    fabric, task, inner = setting.fabric, setting.task, student.module
    return TrainState(
        fabric, task, wrapped, inner, None, distiller, taps, {}, optimizer, task_weight=task_weight, accumulate=accumulate
    )


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("narrow_labels", [True, False])
def test_a_step_is_the_sum_over_widths_each_taught_by_the_next_wider_one(narrow_labels, tmp_path):
    """Against the equations, written out; the weight 0 of the learning rate leaves the gradients to look at."""
    torch.manual_seed(5)
    images, labels = torch.randn(4, 3, 32, 32), labels_of(4, 32, 32)
    config = SlimsegConfig(name="slimseg", downward_weight=0.7, boundary_weight=0.3, temperature=2, narrow_labels=narrow_labels)
    ours = loaded()
    distiller = config.build(ours)
    sums = distiller.train_step(state(ours, distiller, task_weight=0.5, tmp_path=tmp_path), images, labels)

    theirs = loaded().module.train()
    band, counted = slow_band(labels, 2), labels != IGNORE
    total, wider, expected = 0.0, None, {"task": 0.0, "downward": 0.0, "boundary": 0.0}
    for width in (1.0, 0.5, 0.25):
        with at_width(theirs, width):
            logits = theirs(images)
        if wider is None or narrow_labels:
            each = -logits.log_softmax(1).gather(1, labels.long().clamp_max(3)[:, None])[:, 0]
            expected["task"] += 0.5 * each[counted].mean()
            expected["boundary"] += 0.3 * each[band].mean()
        if wider is not None:
            p, q = (wider / 2).softmax(1), (logits / 2).softmax(1)
            expected["downward"] += 0.7 * 4 * (p * (p.log() - q.log())).sum(1)[counted].mean()
        wider = logits.detach()
    total = sum(expected.values())
    total.backward()
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value.item(), rel=1e-4), name
    mine, reference = gradients(ours.module), gradients(theirs)
    assert set(mine) == set(reference) == {name for name, _ in theirs.named_parameters()}
    for name, value in reference.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-6)
    for first, second in zip(ours.module.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(first, second)


def test_parts_of_a_batch_add_up(tmp_path):
    """The batch in two equal parts that are alike: the same gradient but for the batch norms' statistics, here equal too."""
    torch.manual_seed(5)
    images, labels = torch.randn(2, 3, 32, 32).repeat(2, 1, 1, 1), labels_of(2, 32, 32).repeat(2, 1, 1)
    found = []
    for accumulate in (1, 2):
        student = loaded()
        distiller = SlimsegConfig(name="slimseg").build(student)
        sums = distiller.train_step(state(student, distiller, accumulate=accumulate, tmp_path=tmp_path), images, labels)
        found.append((sums, gradients(student.module)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-3, atol=1e-5)


def test_the_head_learns_at_every_width_and_teaches_where_it_is_sure(tmp_path):
    student = loaded()
    distiller = SlimsegConfig(name="slimseg", boundary="head").build(student)
    assert distiller.student_taps == ("stage2",)
    sums = distiller.train_step(state(student, distiller, tmp_path=tmp_path), torch.randn(2, 3, 32, 32), labels_of(2, 32, 32))
    assert set(sums) == {"task", "downward", "head", "boundary"}
    assert set(gradients(distiller)) == {name for name, _ in distiller.named_parameters()}
    assert all(parameter.grad is not None for parameter in student.module.parameters())
    assert not [name for name in student.module.state_dict() if "head.0" in name], "the student does not keep it"


def test_all_widths_learn(tmp_path):
    """Quarters of four brightnesses: after a few steps both widths know most of them."""
    student = loaded(ModelConfig(name="slim_unet", arguments={"width": 8, "widths": [1, 0.5]}))
    distiller = SlimsegConfig(name="slimseg").build(student)
    data = toy.scenes(train=48)
    setting = toy.setting(tmp_path, data=data, task=Segmentation(toy.CLASSES), augment=MaskAugmentConfig(flip=True))
    history = train(
        student=student.module,
        objective=distiller,
        config=TrainConfig(epochs=4, batch_size=4, optimizer="adamw", lr=0.02, weight_decay=0.0),
        setting=setting,
    )
    assert history[-1]["terms"]["downward"] >= 0
    for width in (1.0, 0.5):
        with at_width(student.module, width):
            assert evaluate(student.module, data.test, setting) > 0.5, f"width {width}"


def test_what_it_refuses():
    config = SlimsegConfig(name="slimseg")
    with pytest.raises(RecipeError, match="the student has one") as caught:
        config.build(loaded(ModelConfig(name="unet", arguments={"width": 4})))
    assert "slim_unet" in caught.value.hint
    with pytest.raises(RecipeError, match="the student has one"):
        config.build(loaded(ModelConfig(name="slim_unet", arguments={"width": 4, "widths": [1]})))
    with pytest.raises(RecipeError, match="no tap 'stag'"):
        SlimsegConfig(name="slimseg", boundary="head", boundary_layer="stag").build(loaded())
    flat = loaded()
    flat.module = torch.nn.Sequential(flat.module, torch.nn.Flatten())
    with pytest.raises(RecipeError, match="needs score maps"):
        config.build(flat)


def test_gradients_of_the_head():
    edges = draw(2, 1, 3, 3).double().requires_grad_()
    band = boundary_band(labels_of(2, 6, 6), 1)
    assert torch.autograd.gradcheck(lambda edges: head_loss(edges, band), edges)
