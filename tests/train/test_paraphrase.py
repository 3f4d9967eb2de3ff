"""The training of paraphrasers: what they see, and that they learn to restore."""

import pytest
import torch
import toy
from torch import nn

from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.data.base import IGNORE
from edgekd.errors import TrainingError
from edgekd.nn.paraphraser import Paraphraser
from edgekd.train.paraphrase import fit_paraphrasers, rate


class Teacher(nn.Module):
    """Two maps; remembers how many images it saw."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1, stride=2)
        self.images = 0

    def forward(self, images):
        self.images += len(images)
        return self.second(torch.relu(self.first(images)))


def fitted(work, *, epochs=3, lr=0.1, unlabelled=0, batch_size=8, **options):
    torch.manual_seed(0)
    teacher = Teacher().eval().requires_grad_(False)
    paraphrasers = {"a": Paraphraser(6, 3), "b": Paraphraser(4, 2)}
    data = toy.scenes(train=24, size_px=16)
    data.train.labels[24 - unlabelled :] = IGNORE
    setting = toy.setting(work, data=data, augment=MaskAugmentConfig(flip=True))
    places = {"a": "first", "b": "second"}
    left = fit_paraphrasers(paraphrasers, teacher, places, setting, epochs=epochs, batch_size=batch_size, lr=lr, **options)
    return teacher, paraphrasers, left


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_they_learn_to_restore(loss, tmp_path):
    _, _, before = fitted(tmp_path, epochs=1, lr=1e-9, loss=loss)
    _, _, after = fitted(tmp_path, epochs=10, lr=0.3, loss=loss)
    assert set(after) == {"a", "b"}
    assert all(after[role] < min(0.97, 0.9 * before[role]) for role in after), "noise has little that can be said shorter"


def test_two_trainings_agree(tmp_path):
    _, one, left = fitted(tmp_path)
    _, other, again = fitted(tmp_path)
    assert left == again
    assert all(toy.same_state(one[role].state_dict(), other[role].state_dict()) for role in one)


@pytest.mark.parametrize(("unlabelled", "seen"), [(0, 24), (16, 8), (20, 4)])
def test_images_without_labels_are_left_out(unlabelled, seen, tmp_path):
    """And fewer images than a batch are a batch."""
    teacher, _, _ = fitted(tmp_path, epochs=2, unlabelled=unlabelled)
    assert teacher.images == 2 * seen


def test_the_teacher_is_left_alone_and_they_are_constants(tmp_path):
    teacher, paraphrasers, _ = fitted(tmp_path)
    assert all(value.grad is None for value in teacher.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())
    assert not any(value.requires_grad or value.grad is not None for part in paraphrasers.values() for value in part.parameters())


def test_the_schedule():
    """200 epochs of 10 steps."""
    assert rate(0, 2000, 1000) == 1
    assert rate(999, 2000, 1000) == pytest.approx((1001 / 2000) ** 0.9)
    assert rate(1000, 2000, 1000) == pytest.approx(0.01 * 0.5**0.9)
    assert 0 < rate(1999, 2000, 1000) < 1e-4


def test_a_rate_that_is_too_large_is_named(tmp_path):
    with pytest.raises(TrainingError, match="the paraphrasers' loss is") as caught:
        fitted(tmp_path, lr=1e6)
    assert "paraphraser_lr" in caught.value.hint
