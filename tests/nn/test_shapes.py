import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import edgekd
from edgekd.nn.shapes import shapes_only


class Initialised(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(3, 4), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MultiheadAttention(8, 2), nn.LSTM(3, 4)]
        )
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        nn.init.trunc_normal_(self.token, std=0.02)
        nn.init.orthogonal_(self.layers[0].weight)
        nn.init.kaiming_normal_(tensor=self.layers[1].weight)
        self.gain = nn.init.calculate_gain("relu")
        self.layers[0].bias.data.uniform_(-0.1, 0.1)


def test_shapes_are_those_of_a_real_model_and_nothing_is_allocated():
    real = Initialised()
    with shapes_only():
        empty = Initialised()
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {
        name: tensor.shape for name, tensor in real.state_dict().items()
    }
    assert empty.gain == real.gain
    assert not torch.zeros(1).is_meta  # outside nothing has changed
    assert float(nn.init.normal_(torch.zeros(100)).std()) > 0


def test_the_random_numbers_of_others_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with shapes_only():
        Initialised()
    assert torch.equal(torch.get_rng_state(), before)


def test_torchs_compiler_is_not_imported():
    code = """
import sys
from edgekd import models
from edgekd.nn.shapes import shapes_only
for name in models.names():
    with shapes_only():
        models.build(models.ModelConfig(name=name), num_classes=10, in_channels=3)
assert "torch._dynamo" not in sys.modules
"""
    root = str(Path(edgekd.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
