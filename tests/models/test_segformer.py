"""SegFormer: the published counts, its equations, and what it refuses; engines are in test_segmenters.py."""

import pytest
import torch
import torch.nn.functional as F

from edgekd import models
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.models.segformer import Attention, DropPath, MixFFN, SegFormer
from edgekd.nn.flops import layer_macs, parameters
from edgekd.nn.taps import capture
from edgekd.prune.importance import prune

SMALL = {"width": 4, "depths": [1, 1, 2, 1], "decoder": 8}


def build(name="segformer_b0", classes=20, **arguments):
    torch.manual_seed(0)
    return models.build(ModelConfig(name=name, arguments=arguments), num_classes=classes, in_channels=3)


@pytest.mark.parametrize(("name", "millions"), [("segformer_b0", 3.72), ("segformer_b2", 27.36)])
def test_the_published_sizes(name, millions):
    """With 20 classes, as in TransKD's table."""
    assert parameters(build(name)) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_published_operations():
    """13.67 billion at 512 x 1024, which count neither attention's products nor, as here, norms to the last digit."""
    assert sum(layer_macs(build(), (3, 512, 1024)).values()) / 1e9 == pytest.approx(13.67, rel=0.01)


def test_b1_has_the_channels_of_b2_and_the_blocks_of_b0():
    module = build("segformer_b1", width=8)
    assert [len(getattr(module, f"stage{n}").blocks) for n in (1, 2, 3, 4)] == [2, 2, 2, 2]
    assert build("segformer_b1").stage4.patches.out_channels == 512


@pytest.mark.parametrize("sides", [(64, 96), (50, 70)])
def test_every_pixel_gets_logits_and_every_weight_a_gradient(sides):
    module, images = build(classes=5, **SMALL), torch.randn(2, 3, *sides)
    logits = module.train()(images)
    assert logits.shape == (2, 5, *sides)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_taps_and_a_trace():
    config = ModelConfig(name="segformer_b0", arguments=SMALL)
    module = build(classes=5, **SMALL).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad(), capture(module, models.taps(config, module)) as found:
        expected = module(images)
    for number, (channels, height, width) in enumerate([(4, 16, 24), (8, 8, 12), (20, 4, 6), (32, 2, 3)], 1):
        assert found[f"embed{number}"].shape == (1, height * width, channels)
        assert found[f"stage{number}"].shape == (1, channels, height, width)
    assert found["top"].shape == (1, 8, 16, 24)
    enlarged = F.interpolate(module.head(found["top"]), size=(64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged, expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(module)(images), expected)


def test_tokens_are_rows_of_the_map():
    """Row by row, and normalised."""
    stage, images = build(**SMALL).stage1, torch.randn(1, 3, 32, 64)
    with torch.no_grad(), capture(stage, {"embed": "embed"}) as found:
        stage(images)
        patches = stage.patches(images)
    place = patches[0, :, 3, 5]
    expected = (place - place.mean()) / (place.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(found["embed"][0, 3 * 16 + 5], expected)


def test_attention_agrees_with_loops_over_heads():
    torch.manual_seed(0)
    part, tokens = Attention(8, 2, 2).double(), torch.randn(2, 16, 8, dtype=torch.float64)
    grid = tokens.transpose(1, 2).reshape(2, 8, 4, 4)
    fewer = F.conv2d(grid, part.shrink.weight, part.shrink.bias, stride=2).reshape(2, 8, 4).transpose(1, 2)
    fewer = F.layer_norm(fewer, (8,), part.norm.weight, part.norm.bias)
    q, kv = part.q(tokens), part.kv(fewer)
    heads = []
    for head in range(2):
        here = slice(4 * head, 4 * head + 4)
        k, v = kv[..., :8][..., here], kv[..., 8:][..., here]
        heads.append(F.scaled_dot_product_attention(q[..., here], k, v))
    torch.testing.assert_close(part(tokens, 4, 4), part.out(torch.cat(heads, -1)))


def test_the_feed_forward_part_sees_neighbours_alone():
    part, tokens = MixFFN(4), torch.randn(1, 25, 4, requires_grad=True)
    part(tokens, 5, 5)[0, 12].sum().backward()
    seen = tokens.grad[0].abs().sum(1).reshape(5, 5) > 0
    assert seen[1:4, 1:4].all()
    assert seen.sum() == 9


def test_branches_are_left_out_with_their_mean_kept():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    dropped = drop(torch.ones(4000, 1, 2))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(dropped[:, 0, 0], dropped[:, 0, 1]), "whole images"
    assert drop.eval()(torch.ones(3, 1, 2)).eq(1).all()
    rates = [part.rate for part in build(drop_path=0.1, **SMALL).modules() if isinstance(part, DropPath)]
    assert rates[::2] == rates[1::2] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])


def test_what_is_pruned_still_trains():
    module = build(classes=5, width=8, depths=[1, 1, 1, 1], decoder=16)
    small = prune(module, torch.randn(2, 3, 64, 96), ratio=0.4, round_to=4, scope="layer")
    assert parameters(small) < 0.7 * parameters(module)
    assert isinstance(small, SegFormer)
    assert small.train()(torch.randn(2, 3, 64, 96)).shape == (2, 5, 64, 96)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "at least 1; received 0, 256"),
        ({"depths": [2, 2]}, r"4 depths must be at least 1; received 32, 256 and \[2, 2\]"),
        ({"drop_path": 1}, "drop_path must be at least 0 and below 1"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(RecipeError, match=message):
        build(**arguments)
