"""Models of timm and torchvision, without their downloads: weights come from a local file, like every model's.

Taps of timm models follow timm's own feature info; those of torchvision models follow the two layouts that most of its
classifiers have. Where neither fits, the recipe's ``taps:`` names the modules.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from edgekd._optional import require
from edgekd.errors import RecipeError, nearest
from edgekd.nn.taps import INPUT

REFUSED = {
    *("num_classes", "in_chans", "features_only"),
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights", "progress"),
}
"""Constructor arguments that are edgekd's to give, or that make a zoo fetch or unpickle a file."""


def build(name: str, arguments: dict[str, Any], *, num_classes: int, in_channels: int) -> nn.Module:
    """Construct ``timm:NAME`` or ``torchvision:NAME`` with random weights.

    Raises:
        MissingDependency: The package is not installed.
        RecipeError: It has no such model, or the model does not take the arguments.
    """
    zoo, _, entry = name.partition(":")
    package = require(zoo)
    known: list[str] = package.list_models() if zoo == "timm" else package.models.list_models(module=package.models)
    if entry not in known:
        raise RecipeError(
            f"{zoo} {package.__version__} has no classification model {entry!r}{nearest(entry, known)}",
            hint=f"list its {len(known)} models with {zoo}{'' if zoo == 'timm' else '.models'}.list_models()",
        )
    for argument in sorted(REFUSED & set(arguments)):
        raise RecipeError(
            f"{name} takes no {argument!r} in arguments: classes and channels follow from the data, and nothing is downloaded",
            hint=f"remove {argument}; pretrained weights come from a local file, `weights: PATH`",
        )
    try:
        if zoo == "timm":
            return package.create_model(entry, pretrained=False, num_classes=num_classes, in_chans=in_channels, **arguments)
        if in_channels != 3:
            raise RecipeError(
                f"torchvision's models take 3 input channels; the data has {in_channels}",
                hint=f"use a timm model (timm:{entry} may exist), which takes any number",
            )
        return package.models.get_model(entry, weights=None, num_classes=num_classes, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"{name} cannot be built with arguments {arguments}: {error}", hint="see its constructor") from error


def taps(name: str, model: nn.Module) -> dict[str, str]:
    """Role -> place for a model that ``build`` made; empty where its layout is not known."""
    return _timm_taps(model) if name.startswith("timm:") else _torchvision_taps(model)


def _timm_taps(model: nn.Module) -> dict[str, str]:
    """Per resolution, the module where timm says it ends; the first is the stem where it is of another kind than the second."""
    info: Any = getattr(model, "feature_info", None) or []
    places = [level["module"] for level in info]
    found = {}
    if len(places) > 1 and _kind(places[0]) != _kind(places[1]):
        found["stem"] = places.pop(0)
    found |= {f"stage{index}": place for index, place in enumerate(places, start=1)}
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(classifier, str):  # some have two heads and give a tuple
        found |= {"pool": classifier + INPUT, "logits": classifier}
    return found


def _kind(place: str) -> str:
    return re.sub(r"\d.*", "", place)


def _torchvision_taps(model: nn.Module) -> dict[str, str]:
    children = dict(model.named_children())
    if "layer4" in children:  # resnet, resnext, wide_resnet
        return {"stem": "relu"} | {f"stage{n}": f"layer{n}" for n in range(1, 5)} | {"pool": f"fc{INPUT}", "logits": "fc"}
    features, classifier = children.get("features"), children.get("classifier")
    if not isinstance(features, nn.Sequential) or classifier is None:
        return {}
    # vgg, mobilenet, efficientnet, convnext, densenet: a stage ends where the next child lowers the resolution
    ends: list[str] = []
    previous = None
    for child, module in features.named_children():
        if previous is not None and _strided(module):
            ends.append(previous)
        previous = child
    if previous is not None and not isinstance(features[-1], nn.MaxPool2d):
        ends.append(previous)
    found = {f"stage{index}": f"features.{end}" for index, end in enumerate(ends, start=1)}
    linear = [path for path, module in classifier.named_modules(prefix="classifier") if isinstance(module, nn.Linear)]
    if linear:
        first = next(classifier.children(), classifier)
        whole = isinstance(first, nn.Linear | nn.Dropout)  # the dropout in front of a linear layer is not part of the features
        found |= {"pool": ("classifier" if whole else linear[-1]) + INPUT, "logits": linear[-1]}
    return found


def _strided(module: nn.Module) -> bool:
    return any(getattr(part, "stride", 1) not in (1, (1, 1)) for part in module.modules())
