"""Small data, models and settings for tests that train; the subprocesses that such tests start import it too."""

import copy
import dataclasses

import numpy as np
import torch
from torch import nn

from edgekd.data.augment import AugmentConfig
from edgekd.data.base import IGNORE, Dataset, Split
from edgekd.tasks import Classification
from edgekd.train.hardware import ComputeConfig, make_fabric
from edgekd.train.loop import Setting

CLASSES = 4
RESIZED = {
    *("resnet14", "resnet20", "resnet32", "resnet56", "resnet32x4", "wrn_16_2", "wrn_40_1", "wrn_40_2", "vgg13"),
    *("segformer_b1", "segformer_b2"),
}
"""Models of the table that differ from another one in depth and width alone: tests of what code does take the other."""


def dataset(train=32, size_px=8, channels=3, classes=CLASSES):
    """Noise around one brightness per class: learnt within a few steps."""
    draw = np.random.default_rng(0)

    def split(name, count):
        labels = (np.arange(count) % classes).astype(np.int64)
        levels = 40 + labels * (180 // classes)
        images = np.clip(draw.normal(levels[:, None, None, None], 25, (count, size_px, size_px, channels)), 0, 255)
        return Split(name, images.astype(np.uint8), labels)

    return Dataset(
        train=split("train", train),
        val=split("val", 20),
        test=split("test", 20),
        calib=split("calib", 8),
        classes=tuple(f"class{index}" for index in range(classes)),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        fingerprint="toy",
    )


def scenes(train=32, size_px=32, channels=3, classes=CLASSES):
    """Images whose quarters have a brightness per class, with the masks that say so; a border that does not count."""
    draw = np.random.default_rng(0)

    def split(name, count):
        quarters = draw.integers(0, classes, (count, 2, 2)).astype(np.uint8)
        labels = quarters.repeat(size_px // 2, 1).repeat(size_px // 2, 2)
        levels = 40 + labels[..., None] * (180 // classes)
        images = np.clip(draw.normal(levels, 25, (count, size_px, size_px, channels)), 0, 255)
        labels[:, 0] = IGNORE
        return Split(name, images.astype(np.uint8), labels)

    return dataclasses.replace(
        dataset(channels=channels, classes=classes),
        **{name: split(name, count) for name, count in (("train", train), ("val", 6), ("test", 6), ("calib", 4))},
        fingerprint="toy scenes",
    )


def setting(work, *, compute=None, data=None, augment=None, seed=3, task=None, **callbacks):
    """A Setting on one CPU thread, or where ``compute`` says."""
    return Setting(
        fabric=make_fabric(compute or ComputeConfig(accelerator="cpu", threads=1)),
        task=task or Classification(),
        dataset=data or dataset(),
        augment=augment or AugmentConfig(flip=True, crop_padding_px=1),
        seed=seed,
        work=work,
        log=work / "tensorboard",
        title="toy",
        **callbacks,
    )


class Net(nn.Module):
    """Two convolutions; with batch norm and dropout where asked, because these are what resuming and several processes break."""

    def __init__(self, *, norm=True, dropout=0.0, channels=8, classes=CLASSES):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2)
        self.norm2 = nn.BatchNorm2d(2 * channels) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * channels, classes)

    def forward(self, x):
        x = x.to(self.fc.weight.dtype)  # float64 tells a wrong formula from rounding
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


NET_TAPS = {"stage1": "norm1", "stage2": "norm2", "logits": "fc"}


def net(seed=0, **arguments):
    torch.manual_seed(seed)
    return Net(**arguments)


def same_state(first, second):
    """Every value of two state dicts is equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_state(first[name], second[name]) for name in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(same_state(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def state_of(module):
    return copy.deepcopy(module.state_dict())
