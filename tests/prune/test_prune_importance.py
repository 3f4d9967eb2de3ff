"""Cutting channels: every model of the table, targets from below, rounding, and models that cannot be cut."""

import gc
import weakref

import pytest
import torch
from torch import nn
from toy import RESIZED

from edgekd import models
from edgekd.errors import TrainingError
from edgekd.models import ModelConfig
from edgekd.nn.channels import apply_channel_plan, channel_plan
from edgekd.nn.flops import macs
from edgekd.nn.layers import output_channels
from edgekd.prune.importance import LARGEST, prune, prune_to_macs

SHAPE = (3, 16, 16)
EXAMPLE = torch.zeros(2, *SHAPE)
WIDER = (3, 32, 32)
"""For models whose first reduction spans more than 16 places."""
SHALLOW = {"width": 16, "depths": [1, 1, 1, 1], "decoder": 64}
NARROW = {
    "mobilenetv2": {"width": 0.5},
    "shufflenetv2": {"width": 0.5},
    "segformer_b0": SHALLOW,
    "pspnet": {"width": 0.5},
    "sk_unet": {"width": 16},
    "deeplabv3plus": {"backbone": "resnet18", "width": 0.5},
}
LEFT_OUT = {*RESIZED, *models.UNPRUNABLE, "slim_unet", "slim_pspnet", "slim_deeplabv3plus"}
"""A slimmable net is cut as one of its widths, an ordinary net."""
FAMILIES = ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv2"]


def build(name):
    torch.manual_seed(0)
    return models.build(ModelConfig(name=name, arguments=NARROW.get(name, {})), num_classes=10, in_channels=3).eval()


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", [name for name in models.names() if name not in LEFT_OUT])
def test_every_model_meets_a_macs_target_from_below(name):
    model = build(name)
    shape = WIDER if name.startswith("segformer") else SHAPE
    example = torch.zeros(2, *shape)
    before, whole, fixed = weights(model), macs(model, shape), set(map(id, models.fixed_channels(model)))
    pruned, ratio = prune_to_macs(model, example, share=0.6, round_to=8, scope="model")
    assert macs(pruned, shape) <= 0.6 * whole
    assert 0 < ratio < LARGEST
    less = prune(model, example, ratio=ratio - 0.001, round_to=8, scope="model")
    assert macs(less, shape) > 0.6 * whole, "a smaller cut would have done"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the original was changed"

    old, new = output_channels(model), output_channels(pruned)
    held = {path for path, part in model.named_modules() if id(part) in fixed}
    for path, channels in new.items():
        if channels != old[path]:
            assert channels % 8 == 0, path
        if path in held:
            assert channels == old[path], path
    images = torch.randn(3, *shape)
    assert pruned(images).shape == model(images).shape
    pruned.train()(images).sum().backward()

    # rebuilt from data, it is the same function, and goes through the exporter's first step with a free batch size
    again = build(name)
    apply_channel_plan(again, channel_plan(pruned))
    again.load_state_dict(pruned.state_dict())
    pruned.eval(), again.eval()
    program = torch.export.export(again, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        expected = pruned(images)
        assert torch.equal(again(images), expected)
        torch.testing.assert_close(program.module()(images), expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_larger_ratio_never_gives_a_larger_model(name, scope):
    """torch-pruning's own rounding did: a layer that was to keep fewer channels than one multiple was kept whole."""
    model = build(name)
    left = [macs(model, SHAPE)]
    for ratio in (0.05, 0.3, 0.6, 0.8, LARGEST):
        left.append(macs(prune(model, EXAMPLE, ratio=ratio, round_to=8, scope=scope), SHAPE))
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.45 * left[0]


def test_a_layer_of_weak_channels_keeps_one_multiple_and_is_not_spared():
    """All but 3 of 256 channels are almost zero: 3 would stay, which the library rounds to none, and then to all."""
    model = build("vgg8")
    convolutions = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.Conv2d)]
    (path, weak), (_, following) = convolutions[2:4]
    assert weak.out_channels == following.in_channels == 256
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    with torch.no_grad():
        for tensor in (weak.weight, norms[2].weight):
            tensor[3:] *= 1e-3
        following.weight[:, 3:] *= 1e-3
    pruned = prune(model, EXAMPLE, ratio=0.2, round_to=8, scope="model")
    assert pruned.get_submodule(path).out_channels == 8
    assert torch.equal(pruned.get_submodule(path).weight[:3, 0], weak.weight[:3, 0])


class Plain(nn.Module):
    """Two layers between which ``channels`` can go."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.second(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("channels", "ratio", "round_to", "stay"),
    [
        (32, 0.5, 8, 16),
        (32, 0.4, 8, 16),  # 19.2 is nearer to 16
        (32, 0.3, 8, 24),  # 22.4 is nearer to 24
        (32, 0.1, 8, 32),  # 28.8 is nearer to 32: nothing goes
        (32, 0.9, 8, 8),  # 3.2 would be 0
        (32, 0.9, 1, 3),  # 3.2
        (12, 0.1, 8, 8),  # 16 is more than there are
        (6, 0.5, 8, 6),  # fewer than one multiple: left whole
    ],
)
def test_rounding(channels, ratio, round_to, stay):
    torch.manual_seed(0)
    pruned = prune(Plain(channels), EXAMPLE, ratio=ratio, round_to=round_to, scope="layer")
    assert pruned.first.out_channels == stay
    assert pruned.fc.out_features == 5


def test_the_weakest_channels_go_and_the_others_stay_as_they_are():
    torch.manual_seed(0)
    model = Plain(8)
    weak = [1, 4, 6]
    with torch.no_grad():
        model.first.weight[weak] *= 0.01
        model.second.weight[:, weak] *= 0.01
    pruned = prune(model, EXAMPLE, ratio=3 / 8, round_to=1, scope="layer")
    strong = [index for index in range(8) if index not in weak]
    assert torch.equal(pruned.first.weight, model.first.weight[strong])
    assert pruned.second.in_channels == 5


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_cutting_twice_gives_the_same(scope):
    """An interrupted stage cuts again and must go on with the same channels."""
    model = build("mobilenetv2")
    first, second = (prune(model, EXAMPLE, ratio=0.4, round_to=4, scope=scope) for _ in range(2))
    assert channel_plan(first) == channel_plan(second)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_plan_survives_json():
    import json

    pruned = prune(build("resnet8"), EXAMPLE, ratio=0.4, round_to=4, scope="model")
    plan = json.loads(json.dumps(channel_plan(pruned)))
    again = build("resnet8")
    apply_channel_plan(again, plan)
    again.load_state_dict(pruned.state_dict())
    assert channel_plan(again) == channel_plan(pruned)


def test_a_target_out_of_reach_says_what_can_be_reached():
    with pytest.raises(
        TrainingError, match=r"to 2.0% of the original's: at most 95% .* multiples of 8, which leaves \d+\.\d%"
    ) as caught:
        prune_to_macs(build("resnet8"), EXAMPLE, share=0.02, round_to=8, scope="model")
    assert "lower round_to" in caught.value.hint


class Backwards(nn.Module):
    """Its last layer is made first, so the order of modules does not say where outputs come from."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 5)
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3))

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_outputs_are_kept_whatever_the_order_of_the_modules():
    model = Backwards()
    pruned = prune(model, EXAMPLE, ratio=0.5, round_to=4, scope="layer")
    assert (pruned.head.out_features, pruned.body[0].out_channels, pruned.body[2].out_channels) == (5, 16, 8)
    assert not any(module._forward_hooks for module in pruned.modules())


class Groups(nn.Module):
    """A size written into the code: with fewer channels it no longer runs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)).view(-1, 4, 8).softmax(2).view(-1, 32))


class Auxiliary(nn.Module):
    """What it returns has the channels of another layer than the one that runs last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.fc, self.extra = nn.Linear(32, 16), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        logits = self.fc(self.conv(x).mean((2, 3)))
        self.extra(x)
        return logits


class Interrupted(Plain):
    """Ctrl-C while the library traces it."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        if self.calls > 1:
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [(Groups, "Groups cannot be pruned: "), (Auxiliary, "Auxiliary cannot be pruned: its outputs would no longer be")],
)
def test_models_that_cannot_be_pruned_say_so(model, message):
    with pytest.raises(TrainingError, match=message) as caught:
        prune(model(), EXAMPLE, ratio=0.5, round_to=8, scope="layer")
    assert "remove the prune stage" in caught.value.hint


def test_ctrl_c_is_not_taken_for_a_model_that_cannot_be_pruned():
    with pytest.raises(KeyboardInterrupt):
        prune(Interrupted(32), EXAMPLE, ratio=0.5, round_to=8, scope="layer")


def test_a_try_leaves_no_copy_behind():
    """Without the collector's help: copies of a large model, one per try, would fill the memory before it comes."""
    model = build("resnet8")
    gc.collect()
    gc.disable()
    try:
        pruned = prune(model, EXAMPLE, ratio=0.5, round_to=8, scope="model")
        copies = [weakref.ref(part) for part in pruned.modules()]
        del pruned
        assert not any(copy() is not None for copy in copies)
    finally:
        gc.enable()
