"""The one pydantic base of every section of a recipe."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A part of a recipe: unknown keys are refused, and a validated value never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)
