"""Building: arguments that do not fit, taps that do not exist, and the user's own functions."""

import sys

import pytest
import torch

from edgekd import models
from edgekd.errors import MissingDependency, RecipeError
from edgekd.models import ModelConfig
from edgekd.nn.taps import capture

USERS_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels, hidden=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(in_channels, hidden, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))

def build(num_classes, in_channels, hidden=4):
    return Net(num_classes, in_channels, hidden)

def fixed():
    return Net(5, 3)

def open_ended(**given):
    return Net(**given)

def in_place():
    conv = nn.Conv2d(3, 4, 1, bias=False)
    nn.init.ones_(conv.weight)
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

def wrong(num_classes):
    return {"classes": num_classes}

def failing(num_classes):
    raise KeyError("layer7")

number = 3
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "my_models_for_a_test.py").write_text(USERS_FILE)
    (tmp_path / "my_broken_module.py").write_text("import numpy\nraise OSError('no licence file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_models_for_a_test"
    sys.modules.pop("my_models_for_a_test", None)


def build(num_classes=10, in_channels=3, **section):
    return models.build(ModelConfig(**section), num_classes=num_classes, in_channels=in_channels)


@pytest.mark.parametrize(
    ("section", "message", "hint"),
    [
        (
            {"name": "resnet8", "arguments": {"widht": 2}},
            r"'resnet8' has no argument 'widht' \(did you mean 'width'\?\)",
            "width",
        ),
        ({"name": "vgg8", "arguments": {"width": 2}}, "'vgg8' has no argument 'width'", "none"),
        ({"name": "resnet8", "arguments": {"num_classes": 2}}, "num_classes follows from the data", "remove num_classes"),
        ({"name": "resnet8", "arguments": {"width": "wide"}}, "cannot be built with arguments.*'wide'", "width"),
        ({"name": "resnet8", "arguments": {"width": 0}}, "width must be above 0, got 0", "width"),
        ({"name": "mobilenetv2", "arguments": {"width": -1}}, "width must be above 0, got -1", "width"),
        ({"name": "shufflenetv2", "arguments": {"width": 0.7}}, "width must be one of 0.5, 1.0, 1.5, 2.0, got 0.7", "width"),
        ({"name": "shufflenetv2", "arguments": {"width": [1]}}, "cannot be built with arguments", "width"),
    ],
)
def test_arguments_that_do_not_fit(section, message, hint):
    with pytest.raises(RecipeError, match=message) as caught:
        build(**section)
    assert hint in caught.value.hint


def test_user_function_gets_arguments_and_what_the_data_says(users_module):
    model = build(num_classes=6, in_channels=2, name="callable", call=f"{users_module}:build", arguments={"hidden": 7})
    assert model(torch.zeros(1, 2, 8, 8)).shape == (1, 6)
    assert model.head.in_features == 7


def test_user_function_that_takes_nothing_is_given_nothing(users_module):
    assert build(num_classes=6, name="callable", call=f"{users_module}:fixed").head.out_features == 5


def test_open_ended_function_and_a_class_work(users_module):
    assert build(num_classes=6, name="callable", call=f"{users_module}:open_ended").head.out_features == 6
    assert build(num_classes=6, name="callable", call=f"{users_module}:Net").head.out_features == 6


def test_in_place_activations_are_switched_off(users_module):
    """A tap in front of one would silently hold what the activation made of it."""
    section = {"name": "callable", "call": f"{users_module}:in_place"}
    model = build(**section)
    with capture(model, {"before": "0"}) as taps:
        model(torch.full((1, 3, 4, 4), -1.0))
    assert taps["before"].min() < 0


def test_users_arguments_win_over_the_data(users_module):
    assert build(name="callable", call=f"{users_module}:build", arguments={"num_classes": 3}).head.out_features == 3


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("no_such_module_anywhere:build", {}, "'no_such_module_anywhere'.*cannot be imported: ModuleNotFoundError"),
        ("my_broken_module:build", {}, "cannot be imported: OSError: no licence file"),
        ("my_models_for_a_test:biuld", {}, r"has no 'biuld' \(did you mean 'build'\?\)"),
        ("my_models_for_a_test:number", {}, "is no function but int"),
        ("my_models_for_a_test:wrong", {}, "must return a torch.nn.Module; it returned dict"),
        ("my_models_for_a_test:failing", {}, "failed: KeyError: 'layer7'"),
        ("my_models_for_a_test:build", {"hiden": 1}, "cannot be called with .*hiden"),
        ("my_models_for_a_test:build", {"hidden": "x"}, "failed: TypeError"),
    ],
)
def test_user_functions_that_fail(users_module, call, arguments, message):
    with pytest.raises(RecipeError, match=message) as caught:
        build(name="callable", call=call, arguments=arguments)
    assert caught.value.hint
    if "Error:" in message:
        assert caught.value.__cause__ is not None


def test_user_taps(users_module):
    section = {"name": "callable", "call": f"{users_module}:build"}
    model = build(**section)
    assert models.taps(ModelConfig(**section), model) == {}
    config = ModelConfig(**section, taps={"stage1": "layers", "pool": "head@input"})
    assert models.taps(config, model) == {"stage1": "layers", "pool": "head@input"}


@pytest.mark.parametrize("place", ["layer.1", "layer.1@input"])
def test_tap_that_does_not_exist(users_module, place):
    section = {"name": "callable", "call": f"{users_module}:build"}
    with pytest.raises(
        RecipeError, match=r"tap 'stage1': the model has no module 'layer.1' \(did you mean 'layers.1'\?\)"
    ) as caught:
        models.taps(ModelConfig(**section, taps={"stage1": place}), build(**section))
    assert "layers, head" in caught.value.hint


def test_recipe_taps_win_over_the_familys():
    config = ModelConfig(name="resnet8", taps={"stage1": "stage1.0.relu1", "mine": "stem.0"})
    taps = models.taps(config, build(name="resnet8"))
    assert taps["stage1"] == "stage1.0.relu1"
    assert taps["mine"] == "stem.0"
    assert taps["stage2"] == "stage2"


@pytest.mark.parametrize("zoo", ["timm", "torchvision"])
def test_missing_zoo_says_how_to_install_it(zoo, monkeypatch):
    monkeypatch.setitem(sys.modules, zoo, None)  # what Python itself does for a module that must not be found
    with pytest.raises(MissingDependency) as caught:
        build(name=f"{zoo}:resnet18")
    assert "edgekd[zoo]" in caught.value.hint
