"""What makes a student's tensors comparable with a teacher's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class ChannelAdapters(nn.Module):
    """A learned 1x1 convolution for every map whose channels differ between student and teacher; others pass as they are.

    Args:
        channels: Role -> channels in the student and in the teacher.
    """

    def __init__(self, channels: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {role: nn.Conv2d(ours, theirs, 1, bias=False) for role, (ours, theirs) in channels.items() if ours != theirs}
        )

    def forward(self, role: str, maps: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', H, W], C' the teacher's."""
        return self.layers[role](maps) if role in self.layers else maps
