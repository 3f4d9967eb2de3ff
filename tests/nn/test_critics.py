"""Critics: their size, their normalisation, and the losses against hand counts and loops."""

import math

import pytest
import torch
from torch import nn

from edgekd.nn.critics import (
    AttentionCritic,
    PatchCritic,
    SelfAttention,
    SpectralConv2d,
    adversarial_loss,
    gradient_penalty,
    hinge_loss,
    praise,
    score_map,
    wasserstein_loss,
    with_image,
)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_are_those_of_the_specification():
    """Counted in the authors' networks, for two classes, and a grey image beside them."""
    critic = AttentionCritic(2, "tanh")
    assert weights(critic) == 3_174_275
    assert sum(buffer.numel() for buffer in critic.buffers()) == 8_160, "u and v, kept with the critic, trained by nobody"
    assert weights(AttentionCritic(2, "batch")) == 3_174_275 + 2 * 2
    assert weights(PatchCritic(1 + 2)) == 2_764_737


@pytest.mark.parametrize(("side", "scores"), [(64, 1), (65, 1), (79, 1), (80, 2), (224, 11), (256, 13)])
def test_one_score_up_to_79_pixels_then_one_per_16(side, scores):
    assert AttentionCritic(2).to("meta")(torch.empty(1, 2, side, side, device="meta")).shape == (1, 1, scores, scores)


@pytest.mark.parametrize(("side", "scores"), [(24, 1), (32, 2), (64, 6), (256, 30)])
def test_patches(side, scores):
    assert PatchCritic(3).to("meta")(torch.empty(1, 3, side, side, device="meta")).shape == (1, 1, scores, scores)


@pytest.mark.parametrize(("critic", "shape"), [(AttentionCritic, (63, 80)), (PatchCritic, (64, 23))])
def test_maps_that_are_too_small(critic, shape):
    least = {AttentionCritic: 64, PatchCritic: 24}[critic]
    with pytest.raises(ValueError, match=f"at least {least} x {least}; received {shape[0]} x {shape[1]}"):
        critic(2)(torch.zeros(1, 2, *shape))


def power_iteration(matrix, u):
    """One iteration in loops: the new u and v, and the estimate of the largest singular value."""
    rows, columns = len(matrix), len(matrix[0])
    v = [sum(matrix[r][c] * u[r] for r in range(rows)) for c in range(columns)]
    length = math.sqrt(sum(value * value for value in v)) + 1e-12
    v = [value / length for value in v]
    image = [sum(matrix[r][c] * v[c] for c in range(columns)) for r in range(rows)]
    length = math.sqrt(sum(value * value for value in image)) + 1e-12
    u = [value / length for value in image]
    return u, v, sum(a * b for a, b in zip(u, image, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_every_call_does_one_power_iteration_before_it_convolves(training):
    torch.manual_seed(0)
    layer = SpectralConv2d(2, 3, 4, 2, 1).double().train(training)
    values, u = drawn(1, 2, 6, 6, dtype=torch.float64), layer.u.tolist()
    assert math.isclose(sum(value * value for value in u), 1, rel_tol=1e-6)
    for _ in range(3):
        out = layer(values)
        u, v, sigma = power_iteration(layer.weight.detach().flatten(1).tolist(), u)
        torch.testing.assert_close(layer.u, torch.tensor(u, dtype=torch.float64))
        torch.testing.assert_close(layer.v, torch.tensor(v, dtype=torch.float64))
        expected = nn.functional.conv2d(values, layer.weight / sigma, layer.bias, 2, 1)
        torch.testing.assert_close(out, expected)


def test_the_largest_singular_value_becomes_1():
    torch.manual_seed(0)
    layer, values = SpectralConv2d(3, 8, 4, 2, 1).double(), drawn(1, 3, 8, 8, dtype=torch.float64)
    first, second = layer(values), layer(values)
    assert 0 < (first - second).abs().max() < 1, "u has moved"
    for _ in range(300):
        layer(values)
    matrix = layer.weight.detach().flatten(1)
    sigma = layer.u @ matrix @ layer.v
    assert torch.linalg.matrix_norm(matrix / sigma, 2).item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(layer(values), layer(values), rtol=0, atol=1e-6)


def test_the_gradient_of_a_normalised_weight_takes_u_and_v_for_constants():
    torch.manual_seed(0)
    layer, values = SpectralConv2d(1, 2, 4, 1, 0).double(), drawn(1, 1, 4, 4, dtype=torch.float64)
    before = layer.u.clone()

    def scores(weight):
        matrix = weight.flatten(1)
        u, v, _ = power_iteration(layer.weight.detach().flatten(1).tolist(), before.tolist())
        u, v = torch.tensor(u, dtype=torch.float64), torch.tensor(v, dtype=torch.float64)
        return nn.functional.conv2d(values, weight / (u @ matrix @ v), layer.bias)

    (expected,) = torch.autograd.grad(scores(layer.weight).sum(), layer.weight)
    layer(values).sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


def test_calls_before_one_backward_do_not_disturb_each_other():
    layer = SpectralConv2d(1, 2, 4, 1, 0)
    (layer(drawn(1, 1, 5, 5)).mean() - layer(drawn(1, 1, 5, 5, seed=1)).mean()).backward()
    assert layer.weight.grad.isfinite().all()


def test_attention_begins_as_the_identity_and_then_agrees_with_loops():
    torch.manual_seed(0)
    layer, maps = SelfAttention(8).double(), drawn(2, 8, 2, 3, dtype=torch.float64)
    assert torch.equal(layer(maps), maps)
    nn.init.constant_(layer.gamma, 0.7)
    query, key, value = (part(maps).flatten(2).tolist() for part in (layer.query, layer.key, layer.value))
    expected = maps.flatten(2).clone()
    for b in range(2):
        for n in range(6):
            exponents = [math.exp(sum(query[b][c][n] * key[b][c][m] for c in range(1))) for m in range(6)]
            for c in range(8):
                found = sum(e / sum(exponents) * value[b][c][m] for m, e in enumerate(exponents))
                expected[b, c, n] += 0.7 * found
    torch.testing.assert_close(layer(maps), expected.view_as(maps))


def test_losses_by_hand():
    real, fake = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.5], [-3.0]])
    assert praise(fake).item() == 1.25
    assert wasserstein_loss(real, fake).item() == -1.25 - 0.5
    assert wasserstein_loss(fake, real).item() == 1.75, "antisymmetric"
    assert hinge_loss(real, fake).item() == (0 + 2) / 2 + (1.5 + 0) / 2


def test_the_penalty_of_a_linear_critic_is_that_of_its_weight():
    weight = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]])
    assert gradient_penalty(lambda x: (weight * x).sum((1, 2, 3)), drawn(3, 2, 1, 2), drawn(3, 2, 1, 2, seed=1)).item() == 16
    assert gradient_penalty(lambda x: (weight / 5 * x).sum((1, 2, 3)), drawn(3, 2, 1, 2), drawn(3, 2, 1, 2)).item() < 1e-12
    assert gradient_penalty(lambda x: 0 * x.sum((1, 2, 3)), drawn(3, 2, 1, 2), drawn(3, 2, 1, 2)).item() == 1, "a constant"


def test_the_penalty_looks_between_both():
    """For the critic x^2 / 2 the gradient at x is x."""
    real, fake = torch.full((2, 1, 1, 1), 4.0), torch.full((2, 1, 1, 1), -2.0)
    found = gradient_penalty(lambda x: x.square() / 2, real, fake, torch.tensor([1.0, 0.5]))
    assert found.item() == ((4 - 1) ** 2 + (1 - 1) ** 2) / 2


def test_the_penalty_is_drawn_anew_from_the_global_seed():
    real, fake = drawn(4, 1, 2, 2), drawn(4, 1, 2, 2, seed=1)
    torch.manual_seed(5)
    one, other = (gradient_penalty(lambda x: x.square(), real, fake).item() for _ in range(2))
    torch.manual_seed(5)
    assert gradient_penalty(lambda x: x.square(), real, fake).item() == one != other


def test_a_critics_loss_by_hand():
    """The critic 2 x on the constants 4 and 1: its gradient is 2 everywhere."""
    real, fake = torch.full((2, 1, 1, 1), 4.0), torch.full((2, 1, 1, 1), 1.0)
    assert adversarial_loss(lambda x: 2 * x, real, fake, penalty_weight=10).item() == (2 - 8) + 10 * (2 - 1) ** 2
    assert adversarial_loss(lambda x: 2 * x, real, fake, kind="hinge").item() == 3


@pytest.mark.parametrize(("critic", "side"), [(AttentionCritic(2), 64), (AttentionCritic(2, "tanh"), 64), (PatchCritic(2), 24)])
def test_the_penalty_reaches_the_critic_alone(critic, side):
    real, fake = drawn(2, 2, side, side).requires_grad_(), drawn(2, 2, side, side, seed=1).requires_grad_()
    penalty = gradient_penalty(critic, real, fake)
    penalty.backward()
    assert penalty.isfinite()
    assert real.grad is None
    assert fake.grad is None
    layers = [part for part in critic.modules() if isinstance(part, nn.Conv2d)]
    # The keys' and queries' share is 0 as long as gamma is.
    assert sum(bool(part.weight.grad.abs().sum() > 0) for part in layers if part.weight.grad is not None) == 5


def test_the_image_comes_first_at_the_size_of_the_maps():
    images, maps = torch.arange(16.0).view(1, 1, 4, 4), torch.zeros(1, 2, 2, 2)
    joined = with_image(images, maps)
    assert joined[0, 0].tolist() == [[0, 3], [12, 15]], "corners on corners"
    assert torch.equal(joined[:, 1:], maps)


@pytest.mark.parametrize(
    ("shape", "side", "expected"), [((176, 240), 64, (64, 87)), ((64, 80), 64, (64, 80)), ((90, 70), None, (90, 70))]
)
def test_score_maps(shape, side, expected):
    logits = drawn(1, 2, *shape)
    found = score_map(logits, side)
    assert found.shape[2:] == expected
    torch.testing.assert_close(found.mean((2, 3)), logits.mean((2, 3)), rtol=0.1, atol=0.02)


def test_gradients_of_critics_are_right():
    """Once and twice, as the penalty needs them; singular vectors have settled, or the estimate would move between two calls."""
    torch.manual_seed(0)
    conv, attention = SpectralConv2d(2, 8, 3, padding=1).double(), SelfAttention(8).double()
    conv.u, conv.v = conv.u.double(), conv.v.double()
    nn.init.constant_(attention.gamma, 0.5)
    critic = nn.Sequential(conv, nn.Tanh(), attention, nn.Conv2d(8, 1, 3).double())
    maps = drawn(2, 2, 3, 3, dtype=torch.float64)
    for _ in range(2000):
        critic(maps)
    assert torch.autograd.gradcheck(critic, maps.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(critic, maps.clone().requires_grad_())
    fake, shares = drawn(2, 2, 3, 3, seed=1, dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)
    weights = {name: value.detach().clone().requires_grad_() for name, value in critic.named_parameters() if value.dim() == 4}

    def penalty(*values):
        own = dict(zip(weights, values, strict=True))
        return gradient_penalty(lambda given: torch.func.functional_call(critic, own, (given,)), maps, fake, shares)

    del weights["0.weight"]  # the estimate of its norm moves with it, and every call anew
    assert torch.autograd.gradcheck(penalty, tuple(weights.values()))
