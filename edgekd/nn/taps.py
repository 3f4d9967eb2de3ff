"""Intermediate tensors of a model, by role.

A tap is a role (``stage3``) and a place in the model. The place is a module path (``layers.2``), meaning that module's output, or
a module path with ``@input`` (``fc@input``), meaning its first positional argument: pooled features often exist only there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import RecipeError, nearest

INPUT = "@input"


def resolve(roles: Iterable[str], available: Mapping[str, str]) -> dict[str, str]:
    """Pick the wanted roles out of a model's taps.

    Args:
        roles: What a method asks for.
        available: Role -> place, from ``edgekd.models.taps``.

    Raises:
        RecipeError: A role that the model does not have; the message lists those that it has.
    """
    wanted = {}
    for role in roles:
        if role not in available:
            has = ", ".join(available) or "none"
            raise RecipeError(
                f"the model has no tap {role!r}{nearest(role, list(available))}; it has: {has}",
                hint=f"ask for one of these, or add `{role}: MODULE_PATH` to the model's taps",
            )
        wanted[role] = available[role]
    return wanted


def check_paths(model: nn.Module, places: Mapping[str, str]) -> None:
    """Check that every tap's module exists.

    Raises:
        RecipeError: One does not; the message names the role and the nearest path.
    """
    modules = dict(model.named_modules())
    for role, place in places.items():
        path = place.removesuffix(INPUT)
        if path not in modules:
            children = ", ".join(name for name, _ in model.named_children())
            raise RecipeError(
                f"tap {role!r}: the model has no module {path!r}{nearest(path, list(modules))}",
                hint=f"paths are those of model.named_modules(); at the top there are: {children}",
            )


@contextmanager
def capture(model: nn.Module, wanted: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Record tensors of every forward inside the ``with`` block.

    The hooks live on the model only inside the block, and the tensors only in the yielded dict: role -> tensor of the latest
    forward, as the module made it (not detached). A module that one forward calls twice leaves its last call. Around a
    DistributedDataParallel model, give the inner ``.module``.

    Args:
        model: The model that will be called.
        wanted: Role -> place.

    Raises:
        RecipeError: A module does not exist, or, during the forward, what stands at the place is no tensor.
    """
    check_paths(model, wanted)
    captured: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for role, place in wanted.items():
            module = model.get_submodule(place.removesuffix(INPUT))
            if place.endswith(INPUT):
                handle = module.register_forward_pre_hook(_store_input(captured, role, place))
            else:
                handle = module.register_forward_hook(_store_output(captured, role, place))
            hooks.callback(handle.remove)
        yield captured


def run_until(model: nn.Module, place: str, images: Tensor) -> Tensor:
    """What stands at a tap's place, without running what the model does behind it.

    Args:
        model: Called as it is, with gradients where they are on.
        place: Module path; the first time that the module is called counts.
        images: [B, C, H, W].

    Raises:
        RecipeError: The module does not exist, gives no tensor, or the forward does not come by.
    """
    check_paths(model, {place: place})
    try:
        handle = model.get_submodule(place.removesuffix(INPUT)).register_forward_hook(_leave(place))
        try:
            model(images)
        finally:
            handle.remove()
    except _ReachedError as reached:
        return reached.tensor
    raise RecipeError(f"the model's forward does not call {place!r}", hint="tap a module that it calls")


class _ReachedError(Exception):
    """Leaves a forward with the tensor that was wanted."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


@contextmanager
def replace(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the place of modules' outputs in every forward inside the ``with`` block.

    The modules still run; what they give is thrown away, so no gradient reaches what only they depend on.

    Args:
        model: The model that will be called.
        tensors: Module path -> what takes the place of its output; the same shape, or one that the rest of the model takes.

    Raises:
        RecipeError: A module does not exist, or the place is an input.
    """
    check_paths(model, {place: place for place in tensors})
    with ExitStack() as hooks:
        for place, tensor in tensors.items():
            if place.endswith(INPUT):
                raise RecipeError(f"{place!r} is an input; only outputs can be replaced", hint="tap the module before it")
            hooks.callback(model.get_submodule(place).register_forward_hook(_give(tensor)).remove)
        yield


def tap_shapes(model: nn.Module, wanted: Mapping[str, str], example: Tensor) -> dict[str, tuple[int, ...]]:
    """Role -> shape of the tensor at its place, in the order of execution; nothing is computed.

    Args:
        model: Left as it is.
        wanted: Role -> place.
        example: An input, [B, C, H, W]; only its shape counts.

    Raises:
        RecipeError: As :func:`capture`.
    """
    shell = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), capture(shell, wanted) as found:
        shell(torch.empty(example.shape, device="meta"))
    return {role: tuple(tensor.shape) for role, tensor in found.items()}


def _leave(place: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001  the hook's signature
        raise _ReachedError(_tensor((args[0] if args else None) if place.endswith(INPUT) else output, place, place))

    return hook


def _give(tensor: Tensor) -> Callable[[nn.Module, Any, Any], Tensor]:
    def hook(module: nn.Module, args: Any, output: Any) -> Tensor:  # noqa: ARG001  the hook's signature
        return tensor

    return hook


def _store_output(captured: dict[str, Tensor], role: str, place: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001  the hook's signature
        captured[role] = _tensor(output, role, place)

    return hook


def _store_input(captured: dict[str, Tensor], role: str, place: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:  # noqa: ARG001  the hook's signature
        captured[role] = _tensor(args[0] if args else None, role, place)

    return hook


def _tensor(value: Any, role: str, place: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise RecipeError(
            f"tap {role!r} at {place!r} must be one tensor; it is {type(value).__name__}",
            hint="tap a module inside or behind it that gives one tensor",
        )
    return value
