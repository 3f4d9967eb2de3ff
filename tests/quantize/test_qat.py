"""Quantized models: made, calibrated, trained, stored, rebuilt."""

import copy

import pytest
import torch
from torch import nn
from toy import RESIZED

from edgekd import models
from edgekd.errors import ArtifactError, TrainingError
from edgekd.models.config import ModelConfig
from edgekd.quantize import qat
from edgekd.quantize.qat import QuantizerConfig
from edgekd.train.optim import Average

FAR = {"sk_unet": 0.3}
"""Errors of 8 bits, where not 0.15: through 139 convolutions they grow, untrained as they are, to 0.21."""


def warm(name, channels=3):
    """A model whose batch norms have seen data, and its taps."""
    torch.manual_seed(0)
    config = ModelConfig(name=name)
    module = models.build(config, num_classes=10, in_channels=channels)
    with torch.no_grad():
        for _ in range(5):
            module.train()(torch.randn(8, channels, 32, 32))
    return module.eval(), models.taps(config, module)


def quantized_twin(name, **config):
    module, taps = warm(name)
    images = torch.randn(8, 3, 32, 32)
    quantized = qat.prepare(module, taps, QuantizerConfig(**config), images)
    qat.calibrate(quantized, [images])
    return module, taps, quantized.eval(), images


@pytest.mark.parametrize("name", [name for name in models.names() if name not in RESIZED])
def test_every_model_can_be_quantized_and_rebuilt(name):
    module, taps, quantized, images = quantized_twin(name)
    run = set()  # not the heads that are trained only
    layers = {path: part for path, part in module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)}
    hooks = [part.register_forward_hook(lambda *_, path=path: run.add(path)) for path, part in layers.items()]
    with torch.no_grad():
        expected, received = module(images), quantized(images)
    for hook in hooks:
        hook.remove()
    error = float((received - expected).norm() / expected.norm())
    assert 0 < error < FAR.get(name, 0.15)  # not the float model, and not far from it
    assert {row["path"] for row in qat.layers(quantized)} == run
    again = qat.rebuild(module, taps, qat.plan(quantized), images)
    again.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images), received)


def test_the_source_is_left_alone():
    module, taps = warm("resnet8")
    before = copy.deepcopy(module.state_dict())
    quantized = qat.prepare(module, taps, QuantizerConfig(), torch.zeros(2, 3, 32, 32))
    qat.calibrate(quantized, [torch.randn(4, 3, 32, 32)])
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_calibration_does_not_move_batch_norms_and_keeps_the_mode():
    module, taps = warm("resnet8")
    quantized = qat.prepare(module.train(), taps, QuantizerConfig(), torch.zeros(2, 3, 32, 32))
    before = quantized.stem.get_submodule("1").running_mean.clone()
    qat.calibrate(quantized, [torch.randn(4, 3, 32, 32)])
    assert torch.equal(quantized.stem.get_submodule("1").running_mean, before)
    assert quantized.training


def test_learned_ranges_move_and_calibrated_ones_do_not():
    for ranges, moves in (("learned", True), ("calibrated", False)):
        _, _, quantized, images = quantized_twin("resnet8", ranges=ranges)
        before = {name: float(part.scale().detach()) for name, part in qat.named_quantizers(quantized).items()}
        optimizer = torch.optim.SGD([p for p in quantized.parameters() if p.requires_grad], lr=0.1)
        quantized.train()(images).square().mean().backward()
        optimizer.step()
        after = {name: float(part.scale().detach()) for name, part in qat.named_quantizers(quantized).items()}
        assert (before != after) == moves
        assert all(scale > 0 for scale in after.values())


def test_a_moving_average_of_a_quantized_model_is_one():
    _, _, quantized, images = quantized_twin("resnet8")
    average = Average(quantized, decay=0.9)
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        quantized.train()(images).square().mean().backward()
        optimizer.step()
        average.update(quantized)
    quantized.load_state_dict(average.values)
    assert all(float(part.scale().detach()) > 0 for part in qat.named_quantizers(quantized).values())
    with torch.no_grad():
        assert quantized.eval()(images).isfinite().all()


def test_a_plan_of_another_placement_is_refused():
    module, taps, quantized, images = quantized_twin("resnet8")
    plan = qat.plan(quantized)
    plan["quantizers"].pop(next(iter(plan["quantizers"])))
    with pytest.raises(ArtifactError, match="another version"):
        qat.rebuild(module, taps, plan, images)


def test_a_skip_pattern_that_matches_nothing_is_refused():
    module, taps = warm("resnet8")
    with pytest.raises(TrainingError, match=r"no layer matches 'stage1.0.conv3'.*did you mean 'stage1.0.conv"):
        qat.prepare(module, taps, QuantizerConfig(skip=["stage1.0.conv3"]), torch.zeros(2, 3, 32, 32))


def test_nothing_to_quantize():
    with pytest.raises(TrainingError, match="no convolution or linear layer"):
        qat.prepare(nn.Sequential(nn.Flatten(), nn.Softmax(1)), {}, QuantizerConfig(), torch.zeros(2, 3, 4, 4))


def test_values_that_are_not_finite_are_refused():
    module, taps = warm("resnet8")
    quantized = qat.prepare(module, taps, QuantizerConfig(), torch.zeros(2, 3, 32, 32))
    with pytest.raises(TrainingError, match="not finite"):
        qat.calibrate(quantized, [torch.full((2, 3, 32, 32), float("nan"))])


def test_a_model_whose_trace_differs_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.calls = nn.Conv2d(3, 4, 1), 0

        def forward(self, x):
            self.calls += 1
            return self.conv(x) * self.calls

    with pytest.raises(TrainingError, match="trace gives other values"):
        qat.prepare(Counting().eval(), {}, QuantizerConfig(), torch.ones(2, 3, 4, 4))
