"""Models without memory: only the shapes of their parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_RANDOM = {"normal_", "uniform_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_", "random_"}


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Modules that are built inside live on torch's meta device and are not initialised."""
    with torch.device("meta"), _NotInitialised():
        yield


class _NotInitialised(TorchFunctionMode):
    """Skips what fills tensors with random numbers: on the meta device that imports torch's compiler, which takes a second."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return the tensor as it is, or call what is no initialisation."""
        named, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in _RANDOM or (name.endswith("_") and getattr(func, "__module__", None) == torch.nn.init.__name__):
            return args[0] if args else named["tensor"]
        return func(*args, **named)
