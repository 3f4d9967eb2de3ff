"""The model section of a recipe: what is refused, and in which words."""

import pytest
from pydantic import ValidationError

from edgekd.models.config import ModelConfig


@pytest.mark.parametrize(
    "name", ["resnet20", "shufflenetv2", "timm:resnet18", "torchvision:mobilenet_v2", "timm:anything_at_all"]
)
def test_accepts_known_names_without_building(name):
    assert ModelConfig(name=name).name == name


@pytest.mark.parametrize(
    ("section", "location", "words"),
    [
        ({"name": "resnet200"}, ("name",), ["resnet200", "did you mean 'resnet20'", "wrn_40_2", "callable", "timm:NAME"]),
        ({"name": "timm:"}, ("name",), ["no model of timm"]),
        ({"name": "keras:resnet50"}, ("name",), ["unknown model 'keras:resnet50'"]),
        ({"name": ""}, ("name",), ["unknown model ''"]),
        ({"name": "callable"}, (), ["needs call"]),
        ({"name": "resnet8", "call": "a.b:c"}, (), ["call belongs to name 'callable'", "resnet8"]),
        ({"name": "callable", "call": "a.b.c"}, ("call",), ["'a.b.c' is not an import path", "package.module:function"]),
        ({"name": "callable", "call": "a:b:c"}, ("call",), ["not an import path"]),
        ({"name": "callable", "call": "../a:b"}, ("call",), ["not an import path"]),
        ({"name": "callable", "call": "a:b()"}, ("call",), ["not an import path"]),
        ({"name": "resnet8", "argument": {}}, ("argument",), ["Extra inputs"]),
        ({"name": "resnet8", "arguments": {"width": object()}}, ("arguments", "width"), ["JSON"]),
        ({"name": "resnet8", "taps": {"stem": 1}}, ("taps", "stem"), ["string"]),
        ({}, ("name",), ["required"]),
    ],
)
def test_refuses(section, location, words):
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(section)
    (error,) = caught.value.errors()
    assert error["loc"] == location
    for word in words:
        assert word in error["msg"]


def test_is_frozen_and_survives_json():
    config = ModelConfig(
        name="callable", call="a.b:c", arguments={"sizes": [1, 2]}, taps={"stem": "layers.0"}, weights="w.safetensors"
    )
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "resnet8"
