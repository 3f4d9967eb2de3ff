"""Imports of packages that only some installations have."""

from __future__ import annotations

import importlib
from types import ModuleType

from edgekd.errors import MissingDependency

INSTALL = {
    "onnxruntime": "pip install onnxruntime",
    "openvino": "pip install 'edgekd[openvino]'",
    "pycuda.driver": "pip install 'edgekd[tensorrt]'",
    "tensorrt": "pip install 'edgekd[tensorrt]'",
    "tensorrt_rtx": "pip install 'edgekd[tensorrt-rtx]'",
    "timm": "pip install 'edgekd[zoo]'",
    "torchvision": "pip install 'edgekd[zoo]'",
}


def require(name: str) -> ModuleType:
    """Import a package, or say how to install it.

    Args:
        name: The import name, for instance ``openvino``.

    Raises:
        MissingDependency: The package is not installed, or its own imports fail; the hint is the install command.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        # OSError: a wheel whose shared library needs a driver that this machine lacks.
        raise MissingDependency(
            f"the Python package {name!r} cannot be imported here: {error}",
            hint=f"run: {INSTALL.get(name, f'pip install {name}')}",
        ) from error
