"""One width of a slimmable network as an ordinary network."""

from __future__ import annotations

from dataclasses import replace

from edgekd import models
from edgekd.nn.slimmable import plain_state
from edgekd.train.checkpoint import Loaded, build_float


def cut(loaded: Loaded, width: float) -> Loaded:
    """The ordinary network that one of edgekd's slimmable ones is at a width: the same outputs, bit for bit.

    Args:
        loaded: The slimmable one, left as it is.
        width: One of its widths.
    """
    config = models.at_width(loaded.architecture.config(), width)
    plain = build_float(replace(loaded.architecture, model=config.model_dump(mode="json")))
    plain.module.load_state_dict(plain_state(loaded.module, width))
    return plain
