"""Batch norms that normalise and do not remember."""

import pytest
import torch
import toy
from torch import nn

from edgekd.nn.batch_norm import CpuSyncBatchNorm, untracked


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, CpuSyncBatchNorm])
def test_untracked_normalises_by_the_batch_and_remembers_nothing(kind):
    norm, images = kind(3), torch.randn(4, 3, 5, 5) * 2 + 1
    before = toy.state_of(norm)
    with untracked(norm):
        out = norm(images)
    assert toy.same_state(norm.state_dict(), before)
    torch.testing.assert_close(out, nn.BatchNorm2d(3)(images))
    norm.train()(images)
    assert not toy.same_state(norm.state_dict(), before), "it remembers again"


def test_untracked_leaves_evaluation_and_untracking_norms_alone():
    model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3, track_running_stats=False))
    images = torch.randn(4, 3, 5, 5)
    with untracked(model):
        torch.testing.assert_close(model[0](images), images, rtol=1e-4, atol=1e-4)
    assert model[0].track_running_stats
    assert not model[1].track_running_stats
