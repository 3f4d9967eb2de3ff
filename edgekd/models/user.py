"""A user's own model: a function found by import path, and called."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from edgekd.errors import RecipeError, nearest


def build(call: str, arguments: dict[str, Any], *, num_classes: int, in_channels: int) -> nn.Module:
    """Call the user's function.

    Args:
        call: ``package.module:function``; the caller has put the user's folders on sys.path.
        arguments: Keyword arguments from the recipe.
        num_classes: Passed on where the function takes it (by name or by ``**kwargs``) and ``arguments`` does not give it.
        in_channels: The same.

    Raises:
        RecipeError: It cannot be imported, does not take the arguments, raised an error (kept as the cause), or returned
            something else than a module.
    """
    function = _find(call)
    given = dict(arguments)
    signature = inspect.signature(function)
    parameters = signature.parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if open_ended or name in parameters:
            given.setdefault(name, value)
    try:
        signature.bind(**given)
    except TypeError as error:
        raise RecipeError(
            f"{call} cannot be called with ({', '.join(given)}): {error}",
            hint=f"its signature is {signature}; give its keyword arguments in `arguments:`",
        ) from error
    try:
        model = function(**given)
    except Exception as error:  # the user's code may raise anything; the cause stays attached
        raise RecipeError(
            f"{call} failed: {type(error).__name__}: {error}", hint=f"called with {given}; call it by hand to see its traceback"
        ) from error
    if not isinstance(model, nn.Module):
        raise RecipeError(f"{call} must return a torch.nn.Module; it returned {type(model).__name__}", hint="return the model")
    return model


def _find(call: str) -> Callable[..., Any]:
    path, name = call.split(":")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # importing runs the user's code
        raise RecipeError(
            f"the module {path!r} of {call!r} cannot be imported: {type(error).__name__}: {error}",
            hint="install it, or start edgekd in the folder that holds it, or put it beside the recipe",
        ) from error
    function = getattr(module, name, None)
    if function is None:
        raise RecipeError(f"{path} has no {name!r}{nearest(name, dir(module))}", hint=f"it was read from {module.__file__}")
    if not callable(function):
        raise RecipeError(f"{call} is no function but {type(function).__name__}", hint="name a function or a class")
    return function
