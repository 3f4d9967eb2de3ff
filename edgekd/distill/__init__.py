"""The distillation methods. A new one is its own file, one import, and one member of the union and of ``METHODS``."""

from typing import Annotated

from pydantic import Field

from edgekd._config import Config
from edgekd.distill.afd import AfdConfig
from edgekd.distill.coco_distillnet import CocoDistillnetConfig
from edgekd.distill.fakd import FakdConfig
from edgekd.distill.generalizable_msan import GeneralizableMsanConfig
from edgekd.distill.graph_flow import GraphFlowConfig
from edgekd.distill.hcl import HclConfig
from edgekd.distill.idd import IddConfig
from edgekd.distill.kd_scfnet import KdScfnetConfig
from edgekd.distill.logits import LogitsConfig
from edgekd.distill.ost import OstConfig
from edgekd.distill.raw_output import RawOutputConfig
from edgekd.distill.scrm import ScrmConfig
from edgekd.distill.slimseg import SlimsegConfig
from edgekd.distill.structured_kd import StructuredKdConfig
from edgekd.distill.transkd import TranskdConfig

METHODS: tuple[type[Config], ...] = (
    LogitsConfig,
    RawOutputConfig,
    OstConfig,
    AfdConfig,
    ScrmConfig,
    HclConfig,
    StructuredKdConfig,
    SlimsegConfig,
    GeneralizableMsanConfig,
    KdScfnetConfig,
    GraphFlowConfig,
    TranskdConfig,
    FakdConfig,
    IddConfig,
    CocoDistillnetConfig,
)

MethodConfig = Annotated[
    LogitsConfig
    | RawOutputConfig
    | OstConfig
    | AfdConfig
    | ScrmConfig
    | HclConfig
    | StructuredKdConfig
    | SlimsegConfig
    | GeneralizableMsanConfig
    | KdScfnetConfig
    | GraphFlowConfig
    | TranskdConfig
    | FakdConfig
    | IddConfig
    | CocoDistillnetConfig,
    Field(discriminator="name"),
]
"""What a distillation method is."""
