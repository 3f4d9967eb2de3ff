"""Slimmable layers: the rules of the specification, on a small net and against ordinary layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgekd.errors import RecipeError
from edgekd.nn.slimmable import (
    SlimConv2d,
    SwitchableBatchNorm2d,
    at_width,
    channels_at,
    checked_widths,
    make_slimmable,
    plain_state,
    widths_of,
)

WIDTHS = (1.0, 0.75, 0.5, 0.25)


class Net(nn.Module):
    """Two branches, joined; the branches have different sizes, so that cutting the joined map as a whole would be wrong."""

    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.a = SlimConv2d([3], 8, 3, widths, fixed_inputs=True)
        self.b = SlimConv2d([3], 4, 3, widths, fixed_inputs=True)
        self.norm = SwitchableBatchNorm2d(8, widths)
        self.join = SlimConv2d([8, 4], 8, 3, widths)
        self.deep = SlimConv2d([8], 8, 3, widths, depthwise=True, bias=True)
        self.head = SlimConv2d([8], 5, 1, widths, bias=True, fixed_outputs=True)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        joined = torch.cat([torch.relu(self.norm(self.a(x))), torch.relu(self.b(x))], 1)
        return self.head(torch.relu(self.deep(self.join(joined)))) * self.scale


class Plain(nn.Module):
    """The same net at one width, of ordinary layers."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, a, 3, padding=1, bias=False), nn.Conv2d(3, b, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(a)
        self.join = nn.Conv2d(a + b, a, 3, padding=1, bias=False)
        self.deep = nn.Conv2d(a, a, 3, padding=1, groups=a)
        self.head = nn.Conv2d(a, 5, 1)
        self.scale = nn.Parameter(torch.tensor(0.0))

    forward = Net.forward


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():
        for width in WIDTHS:  # each width's running statistics become its own
            with at_width(made, width):
                made(torch.randn(4, 3, 6, 6) * (1 + width))
    return made.eval()


def images(seed=1):
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def run(net, width, x=None):
    with at_width(net, width):
        return net(images() if x is None else x)


def test_counts_of_channels():
    assert [channels_at(width, 8) for width in WIDTHS] == [8, 6, 4, 2]
    assert channels_at(0.25, 3) == 1, "at least one"
    assert channels_at(0.29, 100) == 29, "28.999999999999996 in floating point"
    assert channels_at(0.35, 10) == 3, "rounded down"


@pytest.mark.parametrize("widths", [[], [0.5], [1, 1], [1, 0], [1, -0.5], [1.5, 1]])
def test_widths_that_cannot_be(widths):
    with pytest.raises(ValueError, match="1 must be one of them"):
        checked_widths(widths)


def test_a_width_is_an_ordinary_net(net):
    """Bit for bit, at every width; the widest is the layers as they are."""
    for width, (a, b) in zip(WIDTHS, [(8, 4), (6, 3), (4, 2), (2, 1)], strict=True):
        plain = Plain(a, b)
        plain.load_state_dict(plain_state(net, width))
        assert torch.equal(plain.eval()(images()), run(net, width))


def test_joined_maps_are_cut_each_for_itself(net):
    """An independent reference for the layer behind a concatenation."""
    weight, bias = net.join.block(0.5)
    assert bias is None
    expected = torch.stack([net.join.weight[out, [0, 1, 2, 3, 8, 9]] for out in range(4)])
    assert torch.equal(weight, expected)
    x = torch.randn(1, 6, 3, 3)
    with at_width(net, 0.5):
        assert torch.equal(net.join(x), F.conv2d(x, expected, padding=1))


def test_images_and_classes_keep_their_channels(net):
    assert net.a.block(0.25)[0].shape == (2, 3, 3, 3)
    assert net.head.block(0.25)[0].shape == (5, 2, 1, 1)
    assert all(run(net, width).shape == (2, 5, 6, 6) for width in WIDTHS)
    assert torch.equal(net.head.block(0.25)[1], net.head.bias), "classes share their bias"


def test_what_lies_outside_the_block_does_not_matter(net):
    before = run(net, 0.5)
    with torch.no_grad():
        net.a.weight[4:] += 1
        net.join.weight[:, 4:8] += 1
        net.join.weight[:, 10:] += 1
        net.join.weight[4:] += 1
        net.deep.weight[4:] += 1
        net.deep.bias[4:] += 1
        net.head.weight[:, 4:] += 1
        for index in (0, 1, 3):
            net.norm.norms[index].running_mean += 1
            net.norm.norms[index].weight += 1
    assert torch.equal(run(net, 0.5), before)


def test_a_narrow_width_trains_its_block_and_its_norm_alone(net):
    net.train()
    others = [index for index, width in enumerate(WIDTHS) if width != 0.5]
    before = [net.norm.norms[index].running_mean.clone() for index in range(4)]
    run(net, 0.5).square().sum().backward()
    assert net.join.weight.grad[:4, [0, 1, 2, 3, 8, 9]].abs().min() > 0
    outside = net.join.weight.grad.clone()
    outside[:4, [0, 1, 2, 3, 8, 9]] = 0
    assert not outside.any()
    assert not net.a.weight.grad[4:].any()
    assert not net.deep.bias.grad[4:].any()
    for index in others:
        assert net.norm.norms[index].weight.grad is None
        assert torch.equal(net.norm.norms[index].running_mean, before[index])
    assert net.norm.norms[2].weight.grad is not None
    assert not torch.equal(net.norm.norms[2].running_mean, before[2])


def test_gradients_of_widths_add_up(net):
    gradients = []
    for width in WIDTHS:
        net.zero_grad()
        run(net, width).square().sum().backward()
        gradients.append(net.join.weight.grad.clone())
    net.zero_grad()
    for width in WIDTHS:
        run(net, width).square().sum().backward()
    torch.testing.assert_close(net.join.weight.grad, torch.stack(gradients).sum(0))


def test_no_width_remembers_another(net):
    alone = run(net, 0.25)
    run(net, 1.0)
    run(net, 0.5)
    assert torch.equal(run(net, 0.25), alone)


def test_the_width_is_the_full_one_outside(net):
    assert torch.equal(net(images()), run(net, 1.0))
    with pytest.raises(ZeroDivisionError), at_width(net, 0.5):
        raise ZeroDivisionError
    assert torch.equal(net(images()), run(net, 1.0))
    with at_width(net, 0.5):
        inner = run(net, 0.25)
        assert torch.equal(net(images()), run(net, 0.5)), "the block before it"
    assert not torch.equal(inner, run(net, 0.5))


def test_channels_last_and_float64_gradients(net):
    last = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(run(last, 0.5, images().to(memory_format=torch.channels_last)), run(net, 0.5))
    double = Net().double()
    x = torch.randn(1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: run(double, 0.75, x), x)


def test_what_a_net_has_and_has_not(net):
    assert widths_of(net) == WIDTHS
    assert widths_of(nn.Conv2d(3, 3, 1)) == ()
    with pytest.raises(RecipeError, match=r"Net has no width 0\.3") as caught, at_width(net, 0.3):
        pass
    assert "1, 0.75, 0.5, 0.25" in caught.value.hint
    with pytest.raises(RecipeError, match="no width 1") as caught, at_width(nn.Conv2d(3, 3, 1), 1.0):
        pass
    assert "not slimmable" in caught.value.hint
    net.norm.widths = (1.0, 0.5)
    with pytest.raises(RecipeError, match="different widths"):
        widths_of(net)
    with pytest.raises(ValueError, match="as many outputs as inputs"):
        SlimConv2d([4], 8, 3, WIDTHS, depthwise=True)


def test_a_depthwise_convolution_of_joined_maps_with_stride_and_dilation():
    """Its outputs are joined as its inputs are; an independent reference picks the rows by hand."""
    torch.manual_seed(0)
    conv = SlimConv2d([8, 4], 12, 3, WIDTHS, stride=2, dilation=2, bias=True, depthwise=True)
    x, rows = torch.randn(2, 6, 9, 9), [0, 1, 2, 3, 8, 9]
    with at_width(conv, 0.5):
        expected = F.conv2d(x, conv.weight[rows], conv.bias[rows], stride=2, padding=2, dilation=2, groups=6)
        assert torch.equal(conv(x), expected)


def test_an_ordinary_net_becomes_slimmable_and_keeps_its_weights():
    torch.manual_seed(0)
    plain = Plain(8, 4).eval()
    expected = plain(images())
    before = {name: value.data_ptr() for name, value in plain.named_parameters()}
    make_slimmable(plain, WIDTHS, first="a", last="head", joined={"join": [8, 4]})
    assert isinstance(plain.b, SlimConv2d)
    assert not plain.b.fixed_inputs, "one convolution reads images; Plain has a second one that does"
    plain.b.fixed_inputs = True
    assert torch.equal(plain(images()), expected)
    assert all(value.data_ptr() == before[name] for name, value in plain.named_parameters() if "norm" not in name)
    narrow = Plain(4, 2).eval()
    narrow.load_state_dict(plain_state(plain, 0.5))
    assert torch.equal(narrow(images()), run(plain, 0.5))


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Conv2d(4, 4, 3), r"0: padding \(0, 0\) is not that"),
        (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), "0: kernel_size"),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), "as many outputs as inputs"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), "0: groups 2 is not that"),
    ],
)
def test_convolutions_that_cannot_be_slimmed(conv, message):
    with pytest.raises(ValueError, match=message):
        make_slimmable(nn.Sequential(conv), WIDTHS, first="", last="", joined={})
