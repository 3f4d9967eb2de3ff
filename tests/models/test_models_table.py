"""Every model of the table, under the same questions; a new entry is covered once EXPECTED knows its numbers."""

import copy

import pytest
import safetensors.torch
import torch
import torch_pruning

from edgekd import models
from edgekd.models import ModelConfig
from edgekd.models.shufflenet_v2 import Unit
from edgekd.nn.flops import parameters
from edgekd.nn.taps import capture

# name: (arguments, millions of parameters for 100 classes, channels of stem, stages and pool, downscale of stem and stages).
# Parameters: He et al. 2016 table 6 and the model tables of the distillation literature (Tian et al. 2020, Chen et al. 2021).
NARROW, WIDE2, TIMES4 = (16, 16, 32, 64, 64), (16, 32, 64, 128, 128), (32, 64, 128, 256, 256)
THREE = (1, 1, 2, 4)
EXPECTED = {
    "resnet8": ({}, 0.08, NARROW, THREE),
    "resnet14": ({}, 0.18, NARROW, THREE),
    "resnet20": ({}, 0.28, NARROW, THREE),
    "resnet32": ({}, 0.47, NARROW, THREE),
    "resnet56": ({}, 0.86, NARROW, THREE),
    "resnet8x4": ({}, 1.23, TIMES4, THREE),
    "resnet32x4": ({}, 7.43, TIMES4, THREE),
    "wrn_16_1": ({}, 0.18, NARROW, THREE),
    "wrn_16_2": ({}, 0.70, WIDE2, THREE),
    "wrn_40_1": ({}, 0.57, NARROW, THREE),
    "wrn_40_2": ({}, 2.26, WIDE2, THREE),
    "vgg8": ({}, 3.97, (64, 64, 128, 256, 512, 512, 512), (1, 1, 2, 4, 8, 8)),
    "vgg13": ({}, 9.46, (64, 64, 128, 256, 512, 512, 512), (1, 1, 2, 4, 8, 8)),
    "mobilenetv2": ({"width": 0.5}, 0.81, (16, 12, 16, 48, 160, 1280), (2, 2, 4, 8, 16)),
    "shufflenetv2": ({}, 1.36, (24, 116, 232, 464, 1024), (1, 2, 4, 8)),
}
FAMILIES = {"resnet8": {}, "wrn_16_1": {}, "vgg8": {}, "mobilenetv2": {"width": 0.5}, "shufflenetv2": {"width": 0.5}}


def test_every_model_is_tested():
    others = {
        *(
            "superyolo",
            "superyolo_small",
            "unet",
            "slim_unet",
            "slim_pspnet",
            "slim_deeplabv3plus",
            "sk_unet",
            "mobile_unet",
            "fanet",
            "scfnet",
            "pspnet",
            "deeplabv3plus",
        ),
        *(f"segformer_b{size}" for size in range(3)),
    }
    assert set(models.names()) - set(EXPECTED) == others, "these have tests of their own"


def build(name, arguments, num_classes=100, in_channels=3):
    config = ModelConfig(name=name, arguments=arguments)
    torch.manual_seed(0)
    return config, models.build(config, num_classes=num_classes, in_channels=in_channels)


@pytest.fixture(scope="module", params=list(EXPECTED))
def built(request):
    """One model of the table for all the tests of this file: they leave it in evaluation mode, weights unchanged."""
    config, model = build(request.param, EXPECTED[request.param][0])
    return request.param, config, model.eval()


def test_size_is_the_literatures(built):
    name, _, model = built
    assert round(parameters(model) / 1e6, 2) == EXPECTED[name][1]


def test_forward_and_taps_have_the_declared_shapes(built):
    name, config, model = built
    _, _, channels, scales = EXPECTED[name]
    taps = models.taps(config, model)
    roles = ["stem", *(f"stage{index}" for index in range(1, len(scales)))]
    assert list(taps) == [*roles, "pool", "logits"]
    with torch.no_grad(), capture(model, taps) as captured:
        logits = model(torch.randn(2, 3, 32, 24))
    assert logits.shape == (2, 100)
    assert torch.equal(captured["logits"], logits)
    assert captured["pool"].shape == (2, channels[-1])
    for role, count, scale in zip(roles, channels[:-1], scales, strict=True):
        # a padded stride rounds up: 24 pixels by 16 are 2
        assert captured[role].shape == (2, count, -(-32 // scale), -(-24 // scale)), role
        if name != "mobilenetv2" or role == "stem":  # its stages end with linear bottlenecks
            assert captured[role].min() >= 0, f"{role} is tapped before its activation"


def test_smallest_image(built):
    with torch.no_grad():
        assert built[2](torch.randn(1, 3, 8, 8)).isfinite().all()


def test_backward_reaches_every_parameter(built):
    model = copy.deepcopy(built[2]).train()
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3])).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        if parameter.ndim > 1:
            assert parameter.grad.abs().sum() > 0, path


def test_images_do_not_see_each_other(built):
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(built[2](images)[1:2], built[2](images[1:2]), rtol=1e-4, atol=1e-4)


def test_channels_last_gives_the_same(built):
    images = torch.randn(2, 3, 16, 16)
    model = copy.deepcopy(built[2]).to(memory_format=torch.channels_last)
    with torch.no_grad():
        actual = model(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(actual, built[2](images), rtol=1e-3, atol=1e-3)


def test_fx_traces_to_the_same_function(built):
    traced = torch.fx.symbolic_trace(built[2])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(traced(images), built[2](images))
    uses = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert len(uses) == len(set(uses)), "a module is used twice; a quantizer belongs to one place"


def test_no_activation_works_in_place(built):
    assert not [path for path, module in built[2].named_modules() if getattr(module, "inplace", False)]


def test_weights_round_trip(built, tmp_path):
    _, config, model = built
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.manual_seed(1)
    other = models.build(config, num_classes=100, in_channels=3).eval()
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(other(images), model(images))
        models.load_weights(other, tmp_path / "w.safetensors")
        assert torch.equal(other(images), model(images))


def test_gray_images_and_few_classes(built):
    model = models.build(built[1], num_classes=7, in_channels=1).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)


def test_resnet20_for_ten_classes_has_the_papers_size():
    # He et al. 2016, table 6: 0.27 M.
    assert round(parameters(build("resnet20", {}, num_classes=10)[1]) / 1e6, 2) == 0.27


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
def test_width_multiplies_the_channels(name):
    full, half = (build(name, {"width": width})[1].stem[0].out_channels for width in (1.0, 0.5))
    assert full == 2 * half


@pytest.mark.parametrize("width", [0.5, 1.0, 1.5, 2.0])
def test_shufflenet_widths(width):
    with torch.no_grad():
        assert build("shufflenetv2", {"width": width})[1].eval()(torch.randn(1, 3, 8, 8)).shape == (1, 100)


@pytest.mark.parametrize("channels", [48, 116, 176, 232, 244, 464])
def test_shufflenet_mixes_channels_as_the_paper_does(channels):
    """Of the channels that each unit made, each later unit transforms as many as with the paper's shuffle: the same network."""
    units = 8

    class Recorder(torch.nn.Module):
        def __init__(self, label, log):
            super().__init__()
            self.label, self.log = label, log

        def forward(self, x):
            self.log.append(x.flatten().int().bincount(minlength=units + 2).tolist())
            return torch.full_like(x, self.label)

    half = torch.full((1, channels // 2, 1, 1), 0.0)
    made = torch.cat((half, half + 1), dim=1)  # labels: 0 and 1 for the branches of the first unit, then one per unit

    ours, x = [], made
    for index in range(units):
        unit = Unit(channels)
        unit.branch = Recorder(index + 2, ours)
        x = unit(x)

    papers, x = [], made
    for index in range(units):
        shuffled = x.view(2, channels // 2).t().reshape(-1)  # groups interleaved
        kept, transformed = shuffled[: channels // 2], shuffled[channels // 2 :]
        x = torch.cat((kept, Recorder(index + 2, papers)(transformed)))
    assert ours == papers


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("whole_model", [False, True], ids=["layer", "model"])
def test_torch_pruning_halves_the_channels(name, whole_model):
    _, model = build(name, FAMILIES[name], num_classes=10)
    model.eval()
    images, before = torch.randn(2, 3, 16, 16), parameters(model)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        images,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=whole_model,
        pruning_ratio=0.5,
        max_pruning_ratio=0.9,
        ignored_layers=[model.fc, *models.fixed_channels(model)],
    )
    pruner.step()
    assert model(images).shape == (2, 10)
    assert parameters(model) < 0.75 * before
    with capture(model, models.taps(ModelConfig(name=name), model)) as captured:
        model.train()(images).sum().backward()
    assert captured["pool"].shape[1] == model.fc.in_features
