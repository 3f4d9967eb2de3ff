"""The part of a recipe that names a model. Checking it builds nothing."""

from __future__ import annotations

import re

from pydantic import Field, JsonValue, field_validator, model_validator

from edgekd._config import Config
from edgekd.errors import nearest

CALLABLE = "callable"
ZOOS = ("timm", "torchvision")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class ModelConfig(Config):
    """Which network: one of edgekd's own, one of a zoo, or the user's."""

    name: str
    """A name that `edgekd.models.names()` lists, `timm:NAME`, `torchvision:NAME`, or `callable` for your own function."""
    call: str | None = None
    """With `name: callable`: import path of a function that returns the model, for instance `my_package.models:build`."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the model's constructor; the numbers of classes and of input channels come from the data."""
    taps: dict[str, str] = Field(default_factory=dict)
    """Role to module path (`stage1: layers.0`), for your own and for zoo models, or to change a model's own taps; `PATH@input` is
    what goes into that module."""
    weights: str | None = None
    """A .safetensors file, or a file that torch.save wrote from a state_dict; random weights where it is not given."""
    backbone_weights: str | None = None
    """Such a file of a classifier, whose trunk is the model's backbone: torchvision's or timm's ResNets, or edgekd's mobilenetv2,
    for models on one."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from edgekd.models import names  # edgekd.models imports this file

        zoo, colon, entry = name.partition(":")
        if colon and zoo in ZOOS:
            if not entry:
                raise ValueError(f"{name!r} names no model of {zoo}; write {zoo}:NAME, for instance {zoo}:resnet18")
            return name
        if name != CALLABLE and name not in names():
            allowed = [*names(), CALLABLE]
            zoos = " and ".join(f"{zoo}:NAME" for zoo in ZOOS)
            raise ValueError(f"unknown model {name!r}{nearest(name, allowed)}; allowed: {', '.join(allowed)}, {zoos}")
        return name

    @field_validator("call")
    @classmethod
    def _import_path(cls, call: str | None) -> str | None:
        if call is not None and not _IMPORT_PATH.fullmatch(call):
            raise ValueError(f"{call!r} is not an import path; write package.module:function, for instance my_models:build")
        return call

    @model_validator(mode="after")
    def _call_belongs_to_callable(self) -> ModelConfig:
        if self.name == CALLABLE and self.call is None:
            raise ValueError("name 'callable' needs call, the import path of your function: package.module:function")
        if self.name != CALLABLE and self.call is not None:
            raise ValueError(f"call belongs to name 'callable', but name is {self.name!r}; remove one of the two")
        return self

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> ModelConfig:
        if self.weights is not None and self.backbone_weights is not None:
            raise ValueError("weights hold the backbone's too; remove backbone_weights, or weights")
        return self
