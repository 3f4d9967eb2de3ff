"""How many bits are enough."""

import pytest
import torch

from edgekd.nn.precision import exact


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_32_bits_at_least(given, kept):
    values = torch.tensor([1.5, -2.0], dtype=given, requires_grad=True)
    assert exact(values).dtype == kept
    assert exact(values).tolist() == [1.5, -2.0]
    exact(values).sum().backward()
    assert values.grad.dtype == given
