"""Models of timm and torchvision: built without a download, tapped by role, filled from a local file."""

import socket

import pytest
import safetensors.torch
import torch

from edgekd import models
from edgekd.errors import DataError, RecipeError
from edgekd.models import ModelConfig
from edgekd.nn.taps import capture

PYRAMID = ["stage1", "stage2", "stage3", "stage4"]
# name: arguments, roles before pool and logits, (channels, pixels) of the last stage at 64 pixels (None: tokens)
ZOO = {
    "timm:resnet18": ({}, ["stem", *PYRAMID], (512, 2)),
    "timm:mobilenetv3_small_050": ({}, ["stem", *PYRAMID], (288, 2)),
    "timm:regnetx_002": ({}, ["stem", *PYRAMID], (368, 2)),
    "timm:convnext_atto": ({}, PYRAMID, (320, 2)),
    "timm:vit_tiny_patch16_224": ({"img_size": 64}, [f"stage{number}" for number in range(1, 13)], None),
    "torchvision:resnet18": ({}, ["stem", *PYRAMID], (512, 2)),
    "torchvision:mobilenet_v2": ({}, [*PYRAMID, "stage5"], (1280, 2)),
    "torchvision:efficientnet_b0": ({}, [*PYRAMID, "stage5"], (1280, 2)),
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A model that wants a download fails here, and not on the machine of a user without a network."""

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def build(name, arguments=None, classes=7, channels=3, seed=0):
    config = ModelConfig(name=name, arguments=arguments or {})
    torch.manual_seed(seed)
    return config, models.build(config, num_classes=classes, in_channels=channels).eval()


@pytest.mark.parametrize("name", ZOO)
def test_taps_by_role(name):
    arguments, stages, last = ZOO[name]
    config, model = build(name, arguments)
    taps = models.taps(config, model)
    assert list(taps) == [*stages, "pool", "logits"]
    with torch.no_grad(), capture(model, taps) as captured:
        logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7)
    assert torch.equal(captured["logits"], logits)
    assert captured["pool"].ndim == 2
    shapes = [captured[role].shape for role in stages]
    if last is None:
        assert set(shapes) == {(2, 17, 192)}  # 16 patches and the class token
    else:
        sides = [shape[-1] for shape in shapes]
        assert sides == sorted(sides, reverse=True)
        assert len(set(sides[-4:])) == 4, "a stage is a resolution"
        assert tuple(shapes[-1][1:]) == (*last, last[1])


def test_recipe_taps_win_over_the_zoos():
    config = ModelConfig(name="timm:resnet18", taps={"stage1": "layer1.0", "mine": "layer2.0.conv1"})
    _, model = build("timm:resnet18")
    taps = models.taps(config, model)
    assert (taps["stage1"], taps["mine"], taps["stage2"]) == ("layer1.0", "layer2.0.conv1", "layer2")


def test_a_layout_that_is_not_known_has_no_taps_of_its_own():
    config, model = build("torchvision:regnet_x_400mf")
    assert models.taps(config, model) == {}
    own = ModelConfig(name="torchvision:regnet_x_400mf", taps={"stage1": "trunk_output.block1", "pool": "fc@input"})
    assert models.taps(own, model) == {"stage1": "trunk_output.block1", "pool": "fc@input"}


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:mobilenet_v2"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_come_from_a_local_file(name, suffix, tmp_path):
    _, first = build(name)
    path = tmp_path / f"weights.{suffix}"
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(first.state_dict(), path)
    _, second = build(name, seed=1)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(second(images), first(images))
        models.load_weights(second, path)
        assert torch.equal(second(images), first(images))


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "torchvision:resnet50"])
def test_a_resnets_weights_fill_a_segmenters_backbone(name, tmp_path):
    config, classifier = build(name)
    torch.save(classifier.state_dict(), tmp_path / "w.pth")
    arguments = {"backbone": name.partition(":")[2], "output_stride": 32, "decoder": 8}
    module = models.build(ModelConfig(name="pspnet", arguments=arguments), num_classes=5, in_channels=3).eval()
    models.load_backbone(module, tmp_path / "w.pth")
    images, places = torch.randn(1, 3, 64, 64), {"stage4": models.taps(config, classifier)["stage4"]}
    with torch.no_grad(), capture(classifier.eval(), places) as found:
        classifier(images)
        torch.testing.assert_close(module.backbone(images)[3], found["stage4"])


def test_weights_for_other_classes_name_the_classifier(tmp_path):
    torch.save(build("timm:resnet18", classes=1000)[1].state_dict(), tmp_path / "imagenet.pth")
    with pytest.raises(DataError, match=r"2 of another shape: fc.weight \[1000, 512\] instead of \[7, 512\]"):
        models.load_weights(build("timm:resnet18")[1], tmp_path / "imagenet.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet81", r"no classification model 'resnet81' \(did you mean 'resnet18'\?\)"),
        ("timm:mobilenetv3_smal_050", r"did you mean 'mobilenetv3_small_050'\?"),
        ("torchvision:resnet81", r"no classification model 'resnet81' \(did you mean 'resnet18'\?\)"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classification model"),
    ],
)
def test_unknown_names_get_the_nearest(name, message):
    with pytest.raises(RecipeError, match=message) as caught:
        build(name)
    assert "list_models()" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("timm:resnet18", {"pretrained": True}, "takes no 'pretrained'"),
        ("timm:resnet18", {"num_classes": 3}, "takes no 'num_classes'"),
        ("timm:resnet18", {"checkpoint_path": "w.pth"}, "takes no 'checkpoint_path'"),
        ("timm:resnet18", {"features_only": True}, "takes no 'features_only'"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "takes no 'weights'"),
        ("timm:resnet18", {"no_such_argument": 3}, "cannot be built with arguments"),
        ("torchvision:resnet18", {"no_such_argument": 3}, "cannot be built with arguments"),
    ],
)
def test_arguments_that_are_refused(name, arguments, message):
    with pytest.raises(RecipeError, match=message) as caught:
        build(name, arguments)
    assert caught.value.hint


def test_timm_takes_any_number_of_channels_and_torchvision_three():
    _, model = build("timm:resnet18", channels=1)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 7)
    with pytest.raises(RecipeError, match="torchvision's models take 3 input channels; the data has 1") as caught:
        build("torchvision:resnet18", channels=1)
    assert "timm:resnet18" in caught.value.hint
