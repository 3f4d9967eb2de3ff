"""Networks between maps and vectors."""

import pytest
import torch
import torch.nn.functional as F

from edgekd.nn.alignment import AlignmentNet, MaskAutoencoder, SelectiveKernel


def net(*arguments, seed=0):
    torch.manual_seed(seed)
    return AlignmentNet(*arguments)


def test_by_hand():
    """C = D = 1, g = 1: both perceptrons have one input and one output."""
    one = net(1, 1, 1).double().eval()
    x = torch.tensor([[[[0.7]]]], dtype=torch.float64)
    z, back = one(x)
    first, _, last = one.encoder
    hidden = F.gelu(first.weight[:, 0] * 0.7 + first.bias)
    assert z.item() == pytest.approx(((last.weight[0] * hidden).sum() + last.bias[0]).item())
    first, _, last = one.header
    hidden = F.gelu(first.weight[:, 0] * z.item() + first.bias)
    expected = ((last.weight[0] * hidden).sum() + last.bias[0]) / (1 + one.norm.eps) ** 0.5
    assert back.item() == pytest.approx(expected.item())


@pytest.mark.parametrize(("size", "channels"), [((4, 4), 16), ((6, 10), 16), ((2, 2), 8), ((9, 4), 24)])
def test_takes_and_gives_maps_of_any_size(size, channels):
    one = net(channels, 4, 16)
    maps = torch.randn(2, channels, *size)
    z, back = one(maps)
    assert z.shape == (2, 16)
    assert back.shape == maps.shape


def test_headers_take_each_others_vectors():
    one, other = net(8, 4, 16), net(24, 2, 16)
    z = one.encode(torch.randn(2, 8, 4, 4))
    assert other.decode(z, (6, 6)).shape == (2, 24, 6, 6)
    assert [name for name, _ in net(16, 4, 16).named_parameters() if "en.weight" in name] == [], "nothing to lengthen"


def test_one_perceptron_for_all_channels():
    """With as many channels as numbers, swapped channels are swapped numbers."""
    one, maps = net(6, 3, 6), torch.randn(2, 6, 3, 3)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(one.encode(maps[:, order]), one.encode(maps)[:, order])


def test_computes_in_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, back = net(8, 4, 16)(torch.randn(2, 8, 4, 4).bfloat16())
    assert z.dtype == back.dtype == torch.float32


def test_selective_kernels_share_a_channel_out():
    """With equal branches the weights, which add up to 1, do not matter."""
    torch.manual_seed(0)
    layer = SelectiveKernel(3, 4).eval()
    for one, other in zip(layer.branches[0].parameters(), layer.branches[1].parameters(), strict=True):
        other.data.copy_(one.data)
    flat = torch.randn(1, 3, 1, 1).expand(2, 3, 9, 9)
    inner = layer.branches[0](flat)[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(layer(flat)[:, :, 2:-2, 2:-2], inner)


def test_the_autoencoder_restores_the_sides_and_learns_a_mask():
    torch.manual_seed(0)
    net = MaskAutoencoder(1, 4)
    masks = torch.zeros(2, 1, 16, 24)
    masks[:, :, 4:12, 8:16] = 1
    assert net.encode(masks).shape == (2, net.channels, 2, 3)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = F.binary_cross_entropy_with_logits(net(masks), masks)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
