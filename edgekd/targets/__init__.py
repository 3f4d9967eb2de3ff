"""Places that run jobs. The table below is the whole list."""

from __future__ import annotations

from edgekd.errors import TargetError, nearest
from edgekd.targets.base import Target
from edgekd.targets.local import Local

__all__ = ["Local", "Target", "TARGETS", "target"]

TARGETS: dict[str, type[Local]] = {"local": Local}


def target(name: str) -> Target:
    """The target of this name.

    Raises:
        TargetError: There is none.
    """
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}{nearest(name, list(TARGETS))}; there are {', '.join(TARGETS)}")
    return TARGETS[name]()
