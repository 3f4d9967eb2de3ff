"""TransKD: the published counts, every module against its equations, and who learns from what."""

import math

import pytest
import torch
import torch.nn.functional as F
import toy
from pydantic import ValidationError

from edgekd import models
from edgekd.distill.transkd import (
    Channels,
    CrossSelectiveFusion,
    EmbeddingAssistant,
    GlobalLocalMixer,
    TranskdConfig,
    TranskdDistiller,
    embedding_alignment,
    gated_convolution,
    selective_fusion,
)
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.nn.flops import parameters
from edgekd.nn.taps import capture
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.step import Outputs, StepInputs

PUBLISHED = Channels((32, 64, 160, 256), (64, 128, 320, 512))
FEW = Channels((2, 4, 10, 16), (3, 6, 15, 24))
SIDE = 32


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def config(**options):
    return TranskdConfig(name="transkd", **options)


def loaded(width, seed=0, name="segformer_b0", side=SIDE):
    torch.manual_seed(seed)
    arguments = {"width": width} | ({"depths": [1, 1, 1, 1], "decoder": 4} if name == "segformer_b0" else {})
    described = ModelConfig(name=name, arguments=arguments)
    module = models.build(described, num_classes=toy.CLASSES, in_channels=3)
    shape = Architecture(described.model_dump(mode="json"), toy.CLASSES, 3, side, side)
    return Loaded(module.eval(), models.taps(described, module), shape)


def outputs(one, images, roles):
    with capture(one.module, {role: one.taps[role] for role in roles}) as taps:
        logits = one.module(images)
    return Outputs(logits, taps)


class Pair:
    """Student, teacher and distiller."""

    def __init__(self, **options):
        self.student, self.teacher = loaded(2), loaded(3, seed=1)
        torch.manual_seed(2)
        self.distiller = config(**options).build(self.student, self.teacher)

    def step(self, batch=2, seed=0):
        images = drawn(batch, 3, SIDE, SIDE, seed=seed, dtype=torch.float32)
        ours = outputs(self.student, images, self.distiller.student_taps)
        theirs = outputs(self.teacher, images, self.distiller.teacher_taps)
        return StepInputs(images, torch.zeros(batch, SIDE, SIDE), ours, theirs, 0, 0)


def maps(channels, batch=2, seed=0, dtype=torch.float64):
    return [drawn(batch, count, 8 >> n, 8 >> n, seed=seed + n, dtype=dtype) for n, count in enumerate(channels)]


# -- counts


def test_the_published_counts():
    """CSF 650,304, of which 3 x 64 x 32 are the code's second squeeze for batches of one; PEA 193,536; GL 656,130; EA 970,952."""
    base = TranskdDistiller(config(), PUBLISHED, 3)
    assert parameters(base.fusion) == 650_304 - 3 * 64 * 32
    assert parameters(base.align) == 193_536
    assert parameters(base) == parameters(base.fusion) + parameters(base.align)
    assert parameters(TranskdDistiller(config(variant="gl"), PUBLISHED, 3).mixer) == 656_130
    assert parameters(TranskdDistiller(config(variant="ea"), PUBLISHED, 3).assist) == 970_952


# -- cross selective fusion


def test_selection_by_hand():
    """Scores ln 3 and 0: three quarters of the one, one quarter of the other."""
    here, deeper = torch.full((1, 1, 2, 2), 4.0), torch.full((1, 1, 2, 2), 8.0)
    fused = selective_fusion(here, deeper, torch.full((1, 1, 1, 1), math.log(3)), torch.zeros(1, 1, 1, 1))
    torch.testing.assert_close(fused, torch.full((1, 1, 2, 2), 5.0))


def test_shares_add_up_to_one():
    ones = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(selective_fusion(ones, ones, drawn(2, 3, 1, 1) * 9, drawn(2, 3, 1, 1, seed=1) * 9), ones)


def slow_fusion(part, given):
    """Stage by stage, image by image and channel by channel."""

    def normed(x, norm):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        scale = (norm.weight / (var + norm.eps).sqrt())[:, None, None]
        return (x - mean[:, None, None]) * scale + norm.bias[:, None, None]

    entered = [normed(F.conv2d(x, layer[0].weight), layer[1]) for x, layer in zip(given, part.enter, strict=True)]
    fused = {3: entered[3]}
    for number in (2, 1, 0):
        u, select = entered[number], part.select[number]
        v = fused[number + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)
        q = (u + v).sum((2, 3), keepdim=True) / (u.shape[2] * u.shape[3])
        z = normed(F.conv2d(q, select.squeeze.weight), select.norm).clamp_min(0)
        a, b = select.here(z), select.deeper(z)
        g = torch.empty_like(u)
        for image in range(len(u)):
            for channel in range(u.shape[1]):
                x, y = math.exp(a[image, channel, 0, 0]), math.exp(b[image, channel, 0, 0])
                g[image, channel] = (x * u[image, channel] + y * v[image, channel]) / (x + y)
        fused[number] = g
    return [normed(F.conv2d(fused[number], layer[0].weight, padding=1), layer[1]) for number, layer in enumerate(part.leave)]


def fusion(channels=FEW, hidden=4):
    torch.manual_seed(0)
    return CrossSelectiveFusion(channels, hidden).double()


def test_fusion_agrees_with_its_equations():
    part, given = fusion(), maps(FEW.student, batch=3)
    with torch.no_grad():
        for found, expected, count in zip(part(given), slow_fusion(part, given), FEW.teacher, strict=True):
            torch.testing.assert_close(found, expected)
            assert found.shape[:2] == (3, count)


def test_a_map_reaches_the_finer_ones_alone():
    part = fusion().eval()
    for moved in range(4):
        given = [one.requires_grad_() for one in maps(FEW.student)]
        for number, out in enumerate(part(given)):
            (gradient,) = torch.autograd.grad(out.square().sum(), given[moved], retain_graph=True, allow_unused=True)
            assert (gradient is not None and bool(gradient.abs().sum() > 0)) == (moved >= number)


def test_without_scores_both_maps_count_alike():
    part, given = fusion(), maps(FEW.student)
    for select in part.select:
        for layer in (select.here, select.deeper):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    entered = [layer(one) for layer, one in zip(part.enter, given, strict=True)]
    half = entered[3]
    for number in (2, 1, 0):
        half = (entered[number] + F.interpolate(half, scale_factor=2)) / 2
    torch.testing.assert_close(part(given)[0], part.leave[0](half))


def test_one_image_needs_no_variance():
    """Before any larger batch the statistics are 0 and 1, so nothing is normalised."""
    part, given = fusion(), maps(FEW.student, batch=1)
    part.enter.eval()
    u, v = (layer(one) for layer, one in zip(part.enter[2:], given[2:], strict=True))
    select, up = part.select[2], F.interpolate(v, scale_factor=2)
    small = select.squeeze((u + up).mean((2, 3), keepdim=True)).relu() / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(torch.cat(select(u, up)), torch.cat([select.here(small), select.deeper(small)]))
    assert select.norm.num_batches_tracked == 0


# -- embeddings


def test_alignment_is_a_mean_of_squares():
    ours, theirs = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]])
    assert embedding_alignment(ours, theirs).item() == pytest.approx((1 + 4) / 2)


def test_weights_and_layers_of_the_embeddings():
    pair = Pair(feature_weight=0)
    step, expected = pair.step(), 0.0
    for number, weight in enumerate((0.1, 0.1, 0.5, 1.0)):
        layer, role = pair.distiller.align[str(number)], f"embed{number + 1}"
        aligned = step.student.taps[role] @ layer.weight.T + layer.bias
        expected += weight * (aligned - step.teacher.taps[role]).square().mean().item()
    terms = pair.distiller.losses(step)
    assert set(terms) == {"embeddings"}
    assert terms["embeddings"].item() == pytest.approx(expected, rel=1e-5)


def test_an_exact_alignment_costs_nothing():
    pair = Pair(feature_weight=0, embedding_weights=[0, 0, 0, 1])
    step = pair.step()
    with torch.no_grad():
        step.teacher.taps["embed4"] = pair.distiller.align["3"](step.student.taps["embed4"])
    assert pair.distiller.losses(step)["embeddings"].item() == pytest.approx(0, abs=1e-12)
    assert pair.distiller.student_taps == pair.distiller.teacher_taps == ("embed4",)


def test_the_mixer_agrees_with_loops():
    torch.manual_seed(0)
    part, x = GlobalLocalMixer(16, 0.7, residual=False).double(), drawn(2, 5, 16)
    torch.nn.init.constant_(part.near, 0.3)
    q, k, v = (x @ rows.T for rows in part.qkv.weight.split(16))
    heads = []
    for head in range(8):
        here = slice(2 * head, 2 * head + 2)
        weights = torch.softmax(q[..., here] @ k[..., here].transpose(1, 2) / math.sqrt(2), -1)
        heads.append(weights @ v[..., here])
    far = torch.cat(heads, -1) @ part.out.weight.T + part.out.bias
    near = torch.zeros_like(x)
    padded = F.pad(x, (0, 0, 1, 1))
    for place in range(5):
        window = padded[:, place : place + 3].transpose(1, 2)
        value, gate = (torch.einsum("bck,ock->bo", window, one.weight) + one.bias for one in (part.value, part.gate))
        near[:, place] = value * torch.sigmoid(gate)
    torch.testing.assert_close(gated_convolution(x, part.value, part.gate), near)
    torch.testing.assert_close(part(x), 0.7 * far + 0.3 * near)


def test_a_silent_mixer_with_its_residual_is_the_base():
    base, mixed = Pair(), Pair(variant="gl", mixer_start=0, mixer_residual=True)
    mixed.distiller.load_state_dict(base.distiller.state_dict(), strict=False)
    expected, found = base.distiller.losses(base.step()), mixed.distiller.losses(mixed.step())
    assert found["embeddings"].item() == pytest.approx(expected["embeddings"].item())


def test_a_silent_assistant_is_the_base():
    base, assisted = Pair(), Pair(variant="ea")
    assisted.distiller.load_state_dict(base.distiller.state_dict(), strict=False)
    for part in assisted.distiller.assist.values():
        torch.nn.init.ones_(part.own)
        torch.nn.init.zeros_(part.extra)
    expected, found = base.distiller.losses(base.step()), assisted.distiller.losses(assisted.step())
    assert found["embeddings"].item() == pytest.approx(expected["embeddings"].item())


def test_the_assistant_embeds_images_and_maps():
    for number, side, before in ((0, 32, 3), (2, 8, 6)):
        torch.manual_seed(0)
        part = EmbeddingAssistant(before, 5, number).double()
        seen, aligned = drawn(2, before, side, side), drawn(2, (8 if number == 0 else 4) ** 2, 5, seed=1)
        kernel, stride = (7, 4) if number == 0 else (3, 2)
        grid = F.conv2d(seen, part.embed.patches.weight, part.embed.patches.bias, stride, kernel // 2)
        tokens = grid.permute(0, 2, 3, 1).reshape(2, -1, 5)
        expected = (0.1 + 0.1 * number) * aligned + (0.5 + 0.1 * number) * F.layer_norm(tokens, (5,))
        torch.testing.assert_close(part(aligned, seen), expected, rtol=1e-6, atol=1e-6)


# -- terms


@pytest.mark.parametrize("kind", ["hcl", "channel_kl", "pixel_kl"])
def test_maps_are_compared_as_asked(kind):
    pair = Pair(feature_loss=kind, feature_weight=2, embedding_weights=[0] * 4)
    step = pair.step()
    fused = pair.distiller.fusion([step.student.taps[f"stage{n}"] for n in range(1, 5)])
    expected = 0.0
    for number, ours in enumerate(fused, 1):
        theirs = step.teacher.taps[f"stage{number}"]
        if kind == "hcl":
            far, total = F.mse_loss(ours, theirs), 1.0
            for power, side in enumerate((side for side in (4, 2, 1) if side < ours.shape[2]), 1):
                far = far + F.mse_loss(F.adaptive_avg_pool2d(ours, side), F.adaptive_avg_pool2d(theirs, side)) / 2**power
                total += 1 / 2**power
            expected += 2 * (far / total).item()
        else:
            axis, count = ((2, 3), ours.shape[0] * ours.shape[1]) if kind == "channel_kl" else ((1,), ours[:, 0].numel())
            p, q = (x - x.logsumexp(axis, keepdim=True) for x in (theirs, ours))
            expected += 2 * ((p.exp() * (p - q)).sum() / count).item()
    terms = pair.distiller.losses(step)
    assert set(terms) == {"features"}
    assert terms["features"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", ["base", "gl", "ea"])
def test_gradients_reach_the_student_and_the_methods_layers_alone(variant):
    pair = Pair(variant=variant)
    pair.student.module.train()
    torch.stack(list(pair.distiller.losses(pair.step()).values())).sum().backward()
    assert all(parameter.grad is not None for parameter in pair.distiller.parameters())
    assert all(parameter.grad is None for parameter in pair.teacher.module.parameters())
    still = [name for name, parameter in pair.student.module.named_parameters() if parameter.grad is None]
    assert {name.split(".")[0] for name in still} == {"linear", "fuse", "head"}, "the decoder learns from labels alone"


def test_gradients_are_right():
    part = fusion(Channels((1, 1, 2, 2), (2, 1, 1, 1)), hidden=2)
    given = [drawn(2, count, 6 >> n, 6 >> n, seed=n).requires_grad_() for n, count in enumerate((1, 1, 2, 2))]
    given[3] = drawn(2, 2, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *maps_: part(maps_)[1].square().mean(), tuple(given))
    mixer = GlobalLocalMixer(8, 1.0, residual=True).double()
    assert torch.autograd.gradcheck(mixer, drawn(1, 3, 8).requires_grad_())
    assistant = EmbeddingAssistant(2, 4, 1).double()
    aligned, maps = drawn(1, 4, 4).requires_grad_(), drawn(1, 2, 4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(assistant, (aligned, maps))
    assert torch.autograd.gradcheck(lambda one: embedding_alignment(one, drawn(1, 4, 4, seed=2)), aligned)


# -- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_weights": [1, 1, 1]}, "at least 4 items"),
        ({"embedding_weights": [1, -1, 1, 1]}, "must be at least 0"),
        ({"embedding_weights": [0, 0, 0, 0], "feature_weight": 0}, "nothing is taught"),
        ({"embedding_weights": [1, 0, 0, 0], "variant": "gl"}, "its weight is 0"),
        ({"embedding_weights": [0, 0, 0, 0], "variant": "ea"}, "all embedding_weights are 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValidationError, match=message):
        config(**options)


def test_models_that_do_not_fit():
    with pytest.raises(RecipeError, match="of the student, the model has no tap 'embed1'"):
        config().build(loaded(2, name="unet"), loaded(3))
    with pytest.raises(RecipeError, match=r"stage1 is \[8, 8\] in the student and \[16, 16\] in the teacher"):
        config().build(loaded(2), loaded(3, side=64))
    wrong = loaded(3)
    wrong.taps["embed2"] = "stage2"
    with pytest.raises(RecipeError, match=r"embed2 must be tokens .* the teacher's are \[2, 6, 4, 4\]"):
        config().build(loaded(2), wrong)
    odd = loaded(2)
    odd.taps |= {"embed4": "stage3.embed", "stage4": "stage3"}  # 10 channels
    with pytest.raises(RecipeError, match="the mixer has 8 heads"):
        config(variant="gl").build(odd, odd)
