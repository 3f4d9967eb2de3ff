"""Generalizable distillation: the terms against loops, and who learns from what."""

import dataclasses
import math
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import toy

from edgekd import models
from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.data.base import IGNORE
from edgekd.distill.generalizable_msan import (
    GeneralizableMsanConfig,
    GeneralizableMsanDistiller,
    alignment,
    consistency,
    dcgd,
    dicd,
    graphs,
)
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.nn.taps import capture
from edgekd.tasks import Segmentation
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.step import Outputs, StepInputs

SMALL = {"length": 12, "views": 2, "autoencoder_width": 2, "autoencoder_epochs": 1, "alignment_epochs": 1, "batch_size": 8}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(one, other):
    dot, lengths = sum(a * b for a, b in zip(one, other, strict=True)), [math.sqrt(sum(a * a for a in v)) for v in (one, other)]
    return dot / (lengths[0] * lengths[1])


def pairs_of(vectors, scope):
    """The rows of both graphs, from lists [V][B][D]."""
    views, batch = len(vectors), len(vectors[0])
    intra = [[cosine(vectors[0][b], vectors[k][b]) for k in range(1, views)] for b in range(batch)]
    groups = [[vectors[k][b] for k in range(1, views)] for b in range(batch)]
    groups = groups if scope == "image" else [[one for group in groups for one in group]]
    inter = [[cosine(group[j], group[k]) for k in range(len(group)) if k != j] for group in groups for j in range(len(group))]
    return intra, inter


def squared_by_hand(ours, theirs):
    apart = [(a - b) ** 2 for p, q in zip(ours, theirs, strict=True) for a, b in zip(p, q, strict=True)]
    return sum(apart) / len(apart)


def kl_by_hand(ours, theirs):
    total = 0.0
    for p, q in zip(ours, theirs, strict=True):
        mine, other = ([math.exp(value / 0.1) for value in row] for row in (p, q))
        for a, b in zip(mine, other, strict=True):
            total += b / sum(other) * math.log(b / sum(other) / (a / sum(mine)))
    return total / len(ours)


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize(("form", "rows"), [("squared", squared_by_hand), ("kl", kl_by_hand)])
def test_dcgd_agrees_with_loops(scope, form, rows):
    student, teacher = drawn(4, 3, 5), drawn(4, 3, 7, seed=1)
    ours, theirs = pairs_of(student.tolist(), scope), pairs_of(teacher.tolist(), scope)
    expected = rows(ours[0], theirs[0]) + rows(ours[1], theirs[1])
    assert dcgd(student, teacher, scope=scope, form=form).item() == pytest.approx(expected)


def test_dcgd_is_the_same_in_mixed_precision():
    student, teacher = drawn(4, 3, 5).float(), drawn(4, 3, 7, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = dcgd(student, teacher)
    assert torch.equal(found, dcgd(student, teacher))


def test_dcgd_by_hand():
    """Views at right angles to their image and to each other, against views that are the image: every cosine is off by 1."""
    student = torch.eye(3)[:, None]
    teacher = torch.tensor([1.0, 0.0]).expand(3, 1, 2)
    assert dcgd(student, teacher).item() == pytest.approx(2.0)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_dcgd_is_blind_to_turns_scales_and_the_order_of_views(scope):
    teacher = drawn(4, 3, 6)
    turn = torch.linalg.qr(drawn(6, 6, seed=1)).Q
    scales = drawn(4, 3, 1, seed=2).abs() + 0.1
    assert dcgd(scales * teacher @ turn, teacher, scope=scope).item() == pytest.approx(0, abs=1e-12)
    student, order = drawn(4, 3, 6, seed=3), [0, 3, 1, 2]
    torch.testing.assert_close(dcgd(student[order], teacher[order], scope=scope), dcgd(student, teacher, scope=scope))
    intra = graphs(student, scope)[0]
    torch.testing.assert_close(graphs(student[order], scope)[0], intra[:, [2, 0, 1]])


def test_consistency_and_alignment_by_hand():
    z = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]], [[5.0, 0.0]]])
    assert consistency(z).item() == pytest.approx((2 + 0) / 2)
    given = torch.tensor([[0.0, 1.0], [-4.0, 0.0]])
    assert alignment(torch.tensor([[0.0, 7.0], [1.0, 0.0]]), given).item() == pytest.approx((0 + 4) / 2)


def test_dicd_by_hand_and_zero_for_the_teachers_own():
    """One pixel, two classes: a teacher at 3 to 1 against even odds, twice."""
    teacher, even = torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert dicd(even, even, teacher).item() == pytest.approx(2 * expected)
    maps = torch.randn(2, 3, 4, 4)
    assert dicd(maps, maps, maps).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", ["squared", "kl"])
def test_gradients(form):
    student, teacher = drawn(3, 2, 4).requires_grad_(), drawn(3, 2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: dcgd(z, teacher.detach(), form=form), student)
    assert torch.autograd.gradcheck(consistency, student)
    assert torch.autograd.gradcheck(lambda z: alignment(z, teacher[0].detach()), student[0].detach().requires_grad_())
    (dcgd(student, teacher, form=form) + alignment(student[0], teacher[0])).backward()
    assert teacher.grad is None
    maps, frozen = drawn(1, 3, 2, 2).requires_grad_(), drawn(1, 3, 2, 2, seed=1).requires_grad_()
    dicd(maps, maps, frozen).backward()
    assert frozen.grad is None


def unet(width, seed):
    torch.manual_seed(seed)
    config = ModelConfig(name="unet", arguments={"width": width})
    module = models.build(config, num_classes=toy.CLASSES, in_channels=3)
    return Loaded(module, models.taps(config, module), Architecture(config.model_dump(mode="json"), toy.CLASSES, 3, 32, 32))


class Trio:
    """A student, a teacher, and the method between them."""

    def __init__(self, work, **options):
        self.student, self.teacher = unet(2, 0), unet(3, 1)
        self.teacher.module.eval().requires_grad_(False)
        torch.manual_seed(2)
        self.method = GeneralizableMsanConfig(name="generalizable_msan", **{**SMALL, **options}).build(self.student, self.teacher)
        self.setting = toy.setting(
            work, data=toy.scenes(train=8), task=Segmentation(toy.CLASSES), augment=MaskAugmentConfig(flip=True)
        )

    def prepare(self):
        self.method.prepare(self.student.module, self.teacher.module, self.setting)
        return self

    def step(self):
        data = self.setting.dataset.train
        images = torch.from_numpy(data.images[:4]).permute(0, 3, 1, 2) / 127.5 - 1
        net, other = self.student.module.train(), self.teacher.module
        with capture(net, {"bottom": "bottom"}) as ours:
            student = Outputs(net(images), ours)
        with torch.no_grad(), capture(other, {"bottom": "bottom"}) as theirs:
            teacher = Outputs(other(images), theirs)
        return StepInputs(images, torch.from_numpy(data.labels[:4].copy()), student, teacher, 0, 0, 0.0, net, other)


def learning(module):
    return {name for name, value in module.named_parameters() if value.grad is not None and bool(value.grad.any())}


def test_preparing_trains_the_alignment_nets_and_nothing_else(tmp_path):
    trio = Trio(tmp_path)
    before = [toy.state_of(part.module) for part in (trio.student, trio.teacher)]
    nets = toy.state_of(trio.method)
    trio.prepare()
    for part, state in zip((trio.student, trio.teacher), before, strict=True):
        assert toy.same_state(part.module.state_dict(), state), "running statistics included"
        assert all(parameter.grad is None for parameter in part.module.parameters())
    assert all(parameter.requires_grad for parameter in trio.student.module.parameters())
    moved = {name for name, value in trio.method.state_dict().items() if not torch.equal(value, nets[name])}
    assert moved == set(nets), "every weight of both nets, the data's mean and std, both distances"
    assert not any(part.training for part in (trio.method.san, trio.method.tan))
    assert not any(parameter.requires_grad for parameter in trio.method.parameters())


def test_only_the_student_learns_afterwards(tmp_path):
    trio = Trio(tmp_path).prepare()
    before, kept = toy.state_of(trio.method), toy.state_of(trio.teacher.module)
    step = trio.step()
    running = toy.state_of(trio.student.module)
    terms = trio.method.losses(step)
    assert set(terms) == {"dcgd", "dicd"}
    assert all(value.ndim == 0 and value.isfinite() for value in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    assert toy.same_state(trio.method.state_dict(), before)
    assert toy.same_state(trio.teacher.module.state_dict(), kept)
    assert toy.same_state(trio.student.module.state_dict(), running), "views enter no running statistics"
    for module in (trio.method, trio.teacher.module):
        assert all(parameter.grad is None for parameter in module.parameters())
    assert {name.split(".")[0] for name in learning(trio.student.module)} == {"encoder", "bottom", "decoder", "head"}


def test_which_half_of_dicd_teaches_which_half_of_the_student(tmp_path):
    """The teacher's decoder teaches what makes the vector; the student's own decoder what is not replaced."""
    trio = Trio(tmp_path, dcgd_weight=0).prepare()
    student, method = trio.student.module, trio.method
    step = trio.step()
    vectors = method.san.encode(step.student.taps["bottom"])
    assert vectors.requires_grad
    real = method.san.encode
    method.san.encode = lambda maps: real(maps).detach()  # closes the way through the vector
    method.losses(step)["dicd"].backward()
    found = learning(student)
    assert not [name for name in found if name.startswith("bottom")]
    assert {name.split(".")[0] for name in found} == {"encoder", "decoder", "head"}, "the encoder through its skips alone"
    student.zero_grad()
    method.san.encode = real
    method.losses(trio.step())["dicd"].backward()
    assert [name for name in learning(student) if name.startswith("bottom")]


def test_the_distance_between_domains_is_reported_for_all_three(tmp_path):
    trio = Trio(tmp_path).prepare()
    found = trio.method.statistics(trio.student.module.eval(), trio.teacher.module, trio.setting)
    assert list(found) == [f"FSD val to test, {net}" for net in ("teacher", "student before", "student after")]
    assert found["FSD val to test, student after"] == pytest.approx(found["FSD val to test, student before"], rel=1e-6)
    assert all(value >= 0 for value in found.values())
    data = trio.setting.dataset
    trio.setting.dataset = dataclasses.replace(data, test=data.val)
    again = trio.method.statistics(trio.student.module, trio.teacher.module, trio.setting)
    assert again["FSD val to test, student after"] == pytest.approx(0, abs=1e-6)


def test_no_autoencoder_is_needed(tmp_path):
    trio = Trio(tmp_path, psae=False).prepare()
    assert all(value.isfinite() for value in trio.method.losses(trio.step()).values())


def test_labels_must_be_masks(tmp_path):
    trio = Trio(tmp_path)
    trio.setting.dataset = toy.dataset()
    with pytest.raises(RecipeError, match="needs masks as labels"):
        trio.prepare()


def test_an_unknown_layer_is_explained():
    config = GeneralizableMsanConfig(name="generalizable_msan", layer="botom")
    with pytest.raises(
        RecipeError, match=r"generalizable_msan\.layer: the student has no tap 'botom' \(did you mean 'bottom'\?\)"
    ):
        config.build(unet(2, 0), unet(3, 1))


def test_an_input_can_not_be_exchanged():
    """Said before anything is trained: not when its turn comes."""
    pair = [Loaded(one.module, {**one.taps, "seen": "bottom.conv2@input"}, one.architecture) for one in (unet(2, 0), unet(3, 1))]
    with pytest.raises(RecipeError, match=r"'seen' is an input, bottom\.conv2@input"):
        GeneralizableMsanConfig(name="generalizable_msan", layer="seen").build(*pair)


def test_one_map_has_no_classes_to_compare():
    """A softmax over one map is 1 everywhere: the term would mean nothing, and no one would notice."""
    config = ModelConfig(name="scfnet")
    module = models.build(config, num_classes=2, in_channels=3)
    net = Loaded(module, models.taps(config, module), Architecture(config.model_dump(mode="json"), 2, 3, 64, 64))
    with pytest.raises(RecipeError, match="the models give one map"):
        GeneralizableMsanConfig(name="generalizable_msan", layer="stage4").build(net, net)


def test_alignment_nets_see_labelled_images_alone(tmp_path):
    """What has no mask has no vector to be aligned with: that of an empty mask is another one's."""
    trio = Trio(tmp_path, batch_size=2)
    data = trio.setting.dataset
    labels = data.train.labels.copy()
    labels[::2] = IGNORE
    trio.setting.dataset = dataclasses.replace(data, train=dataclasses.replace(data.train, labels=labels))
    batches = [masks for _, masks in trio.method._batches(trio.setting, 0)]
    assert sum(map(len, batches)) == 4
    assert all((mask != IGNORE).any() for masks in batches for mask in masks)


def test_twins_whose_maps_come_back_teach_each_other_nothing(tmp_path):
    """Where the header undoes the encoder, the exchanged predictions are the teacher's own."""
    trio = Trio(tmp_path, dcgd_weight=0)
    trio.teacher.module = trio.student.module.eval()
    method = trio.method
    method.san = method.tan  # of the student's width; what it computes is replaced
    method.tan.encode, method.tan.decode = (lambda maps: maps.flatten(1)), (lambda vectors, size: vectors.view(-1, 32, *size))
    data = trio.setting.dataset.train
    images, net = torch.from_numpy(data.images[:4]).permute(0, 3, 1, 2) / 127.5 - 1, trio.student.module
    with capture(net, {"bottom": "bottom"}) as taps:
        outputs = Outputs(net(images), taps)
    step = StepInputs(images, torch.from_numpy(data.labels[:4].copy()), outputs, outputs, 0, 0, 0.0, net, net)
    assert method.losses(step)["dicd"].item() == pytest.approx(0, abs=1e-6)


def test_what_alignment_nets_are_trained_with_agrees_with_loops():
    """Rec: how far the rebuilt map is from the network's own. Task: the network's loss when it goes on from the rebuilt one."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(OrderedDict(encode=torch.nn.Conv2d(1, 2, 1), decode=torch.nn.Conv2d(2, 2, 1))).double()
    images, labels = drawn(2, 1, 2, 2), torch.tensor([[[0, 1], [1, 255]], [[1, 0], [255, 0]]], dtype=torch.uint8)
    seen = {}

    def aligner(maps):
        seen["maps"], seen["back"] = maps.tolist(), drawn(2, 2, 2, 2, seed=1)
        return drawn(2, 3, seed=2), seen["back"]

    setting = SimpleNamespace(task=Segmentation(2))
    terms = GeneralizableMsanDistiller._act(net, "encode", aligner, images, labels, setting)
    weight, bias = (part.squeeze().tolist() for part in (net.encode.weight, net.encode.bias))
    heads, offsets = net.decode.weight[:, :, 0, 0].tolist(), net.decode.bias.tolist()
    apart, losses, back = [], [], seen["back"].tolist()
    for b in range(2):
        for y in range(2):
            for x in range(2):
                for c in range(2):
                    own = weight[c] * images[b, 0, y, x].item() + bias[c]
                    assert seen["maps"][b][c][y][x] == pytest.approx(own), "it sees the network's own map"
                    apart.append((back[b][c][y][x] - own) ** 2)
                if (label := int(labels[b, y, x])) != IGNORE:
                    logits = [sum(heads[k][c] * back[b][c][y][x] for c in range(2)) + offsets[k] for k in range(2)]
                    losses.append(math.log(sum(math.exp(value) for value in logits)) - logits[label])
    assert terms["rec"].item() == pytest.approx(sum(apart) / len(apart))
    assert terms["task"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)
