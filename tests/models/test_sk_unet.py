"""The U-Net of selective kernels is what the specification counts, and its parts are what their papers say."""

import typing

import pytest
import torch
import torch.nn.functional as F

from edgekd import models
from edgekd.distill.base import map_pairs
from edgekd.distill.coco_distillnet import CocoDistillnetConfig
from edgekd.distill.graph_flow import GraphFlowConfig
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.models.sk_unet import SelectiveKernels, StripAttention
from edgekd.nn.flops import parameters
from edgekd.nn.taps import capture
from edgekd.train.checkpoint import Architecture, Loaded


def build(**arguments):
    torch.manual_seed(0)
    config = ModelConfig(name="sk_unet", arguments=arguments)
    return config, models.build(config, num_classes=2, in_channels=1)


def settled(module, images):
    """In evaluation mode, with running statistics that are not the first ones."""
    with torch.no_grad():
        for _ in range(3):
            module.train()(images)
    return module.eval()


def test_it_has_the_specified_size():
    assert parameters(build(up="transposed")[1]) == 38_292_162


@pytest.mark.parametrize("up", ["nearest", "transposed"])
def test_maps_have_the_declared_shapes(up):
    config, module = build(width=8, up=up)
    taps = models.taps(config, module)
    with torch.no_grad(), capture(module.eval(), taps) as found:
        logits = module(torch.randn(2, 1, 48, 80))
    assert logits.shape == (2, 2, 48, 80)
    expected = {"stage1": (8, 1), "stage2": (16, 2), "stage3": (32, 4), "bottom": (64, 8)}
    expected |= {"up1": (32, 4), "up2": (16, 2), "up3": (8, 1), "attention1": (32, 4), "attention2": (16, 2)}
    expected |= {"attention3": (8, 1), "top": (8, 1), "head": (2, 1)}
    assert {role: tuple(found[role].shape) for role in taps} == {
        role: (2, channels, 48 // scale, 80 // scale) for role, (channels, scale) in expected.items()
    }


def test_selective_kernels_are_a_softmax_over_two_branches():
    torch.manual_seed(0)
    images = torch.randn(4, 6, 8, 8)
    module = settled(SelectiveKernels(6), images)
    with torch.no_grad():
        large, small = module.large(images), module.small(images)
        asked = module.squeeze((large + small).mean((2, 3), keepdim=True))
        weights = torch.stack([module.for_large(asked), module.for_small(asked)]).softmax(0)
        assert weights.std() > 0.01, "they choose"
        torch.testing.assert_close(module(images), weights[0] * large + weights[1] * small)


@pytest.mark.parametrize("gated", [False, True])
def test_strips_are_the_published_ones(gated):
    """Against the specification's steps, each strip enlarged before it is added."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 9, 14).relu()
    module = settled(StripAttention(6, (2, 4), gated), x)
    with torch.no_grad():
        p, q = module.near(x), module.far(x)
        size = x.shape[2:]
        s0, (s1, s2) = (
            module.place(p),
            (
                F.interpolate(part[1:](F.adaptive_avg_pool2d(p, n)), size, mode="nearest")
                for part, n in zip(module.averages, (2, 4), strict=True)
            ),
        )
        h = F.interpolate(module.row(F.adaptive_avg_pool2d(q, (1, size[1]))), size, mode="nearest")
        v = F.interpolate(module.column(F.adaptive_avg_pool2d(q, (size[0], 1))), size, mode="nearest")
        a = module.mix_near(torch.relu(torch.cat([s0, s1, s2], 1) if gated else s0 + s1 + s2))
        b = module.mix_far(torch.relu(h + v))
        b = b * x if gated else b
        torch.testing.assert_close(module(x), torch.relu(x + module.mix(torch.cat([a, b], 1))))


@pytest.mark.parametrize("method", [GraphFlowConfig, CocoDistillnetConfig])
def test_it_teaches_the_published_student(method):
    """By the maps that the methods' specifications name: of 256 and of 24 channels, at a quarter of the sides."""
    loaded = []
    for name, taps in (("mobile_unet", {}), ("sk_unet", {"stage2": "encoder.2", "up3": "decoder.0.enlarge"})):
        config = ModelConfig(name=name, taps=taps)
        module = models.build(config, num_classes=2, in_channels=1)
        architecture = Architecture(config.model_dump(mode="json"), 2, 1, 64, 64)
        loaded.append(Loaded(module, models.taps(config, module), architecture))
    (name,) = typing.get_args(method.model_fields["name"].annotation)
    built = method(name=name, layers=[("stage2", "up3")]).build(*loaded)
    assert {"stage2", "up3"} <= set(built.student_taps)
    _, channels = map_pairs(*loaded, [("stage2", "up3")], method=name)
    assert channels == {"stage2": (24, 256), "up3": (24, 256)}


@pytest.mark.parametrize("arguments", [{"width": 0}, {"up": "bilinear"}])
def test_arguments_that_cannot_be(arguments):
    with pytest.raises(RecipeError, match="width must be at least 1, up nearest or transposed"):
        build(**arguments)
