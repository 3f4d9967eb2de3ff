"""The distillation methods. A new one is its own file, one import and one member of ``METHODS``."""

from typing import Annotated

from pydantic import Field

from edgekd._config import Config
from edgekd.distill.logits import LogitsConfig

METHODS: tuple[type[Config], ...] = (LogitsConfig,)

# With the second method this becomes a union: LogitsConfig | SecondConfig, discriminated by ``name``.
MethodConfig = Annotated[LogitsConfig, Field()]
