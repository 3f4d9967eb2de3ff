"""Hybrid bits in models: which bits and ranges every quantizer has, calibration, rebuilding, encodings."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from edgekd import models
from edgekd.errors import TrainingError
from edgekd.export.qdq import encode
from edgekd.export.simulate import simulated
from edgekd.models import ModelConfig
from edgekd.quantize import dorefa, hybrid, qat
from edgekd.quantize.fake_quant import QuantLayer
from edgekd.quantize.hybrid import HybridConfig

SIZE = 32


def float_model(name="resnet8", **arguments):
    config = ModelConfig(name=name, arguments=arguments)
    torch.manual_seed(0)
    return models.build(config, num_classes=4, in_channels=3).eval(), config


def images(count=8, seed=0):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def quantized(name="resnet8", **options):
    module, config = float_model(name)
    found = qat.prepare(module, models.taps(config, module), HybridConfig(kind="hybrid", **options), images(2))
    hybrid.recalibrate(found, [images(seed=seed) for seed in range(4)])
    qat.calibrate(found, [images()])
    return found.eval()


def test_ranges_and_bits_by_hand():
    """A convolution and its ReLU, a sum of two ReLUs, a concatenation, and the head that stays in float."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            self.b = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            self.c = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            self.d = nn.Conv2d(4, 6, 1)
            self.e = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            a = self.a(x)
            return self.head(self.e(torch.cat([a + self.b(a), self.c(a)], 1)) + 0 * self.d(a)[:, :4])

    module = Net().eval()
    config = HybridConfig(kind="hybrid", bits=4, ranges="unit")
    bits = {"a.0": 3, "b.0": 4, "c.0": 5, "d": 6, "e.0": 2}
    found = qat.prepare(module, {}, config, images(2), bits)
    assert hybrid.layer_bits(found) == bits, "the head makes the output: it stays in float"
    parts = {name: (part.bits, part.end, part.signed, part.high) for name, part in qat.named_quantizers(found).items()}
    assert parts["x"] == (8, None, True, 127), "the image has its own 8 bits and a learned range"
    assert parts["a_2"] == (3, 1.0, False, 7)
    # a sum of two values up to 1, joined with what c makes: one scale, the most bits of the two
    joined = next(part for name, part in parts.items() if part[1] == 2.0)
    assert joined == (5, 2.0, False, 31)
    assert parts["d"] == (6, None, True, 31), "what may be negative has a learned range"
    found = qat.prepare(module, {}, config.model_copy(update={"ranges": "learned"}), images(2), bits)
    learned = {name: (part.bits, part.end, part.signed, part.high) for name, part in qat.named_quantizers(found).items()}
    assert learned == {name: (bits, None, signed, high) for name, (bits, _, signed, high) in parts.items()}


def test_layers_say_what_they_read():
    rows = {row["path"]: row for row in qat.layers(quantized(bits=3))}
    assert rows["stem.0"] == {"path": "stem.0", "weight_bits": 3, "activation_bits": 8}
    assert rows["stage1.0.conv2"]["activation_bits"] == 3
    official = {row["path"]: row["activation_bits"] for row in qat.layers(quantized(bits=3, placement="official"))}
    assert official["stem.0"] == 32, "the published code leaves the image as it is"
    assert official["stage2.0.conv1"] == 32, "and sums"
    assert official["stage1.0.conv2"] == 3


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "mobilenetv2", "shufflenetv2"])
def test_a_rebuilt_model_is_the_same(name):
    sizes = {"resnet8": 0.05, "vgg8": 2.0, "mobilenetv2": 1.4, "shufflenetv2": 0.8}
    found = quantized(name, budget={"size_mb": sizes[name]})
    assert len(set(hybrid.layer_bits(found).values())) > 1, "bits differ"
    module, config = float_model(name)
    for parameter in module.parameters():
        parameter.data.zero_()  # the bits come from the plan, not from these weights
    again = qat.rebuild(module, models.taps(config, module), qat.plan(found), images(2))
    again.load_state_dict(found.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(images()), found(images()))


def test_a_budget_of_size_and_of_operations():
    module, _config = float_model()
    for budget, key in (({"size_mb": 0.05}, "size_mb"), ({"bops_g": 0.5}, "bops_g")):
        found = qat.prepare(module, {}, HybridConfig(kind="hybrid", budget=budget), images(2))
        account = hybrid.account(module, found, images(2))
        assert account[key] <= next(iter(budget.values()))
        assert 2 <= account["mean_bits"] <= 7
        assert account["bops_g"] < account["bops_float_g"]
    with pytest.raises(TrainingError, match=r"quantizer\.budget\.size_mb: 0.001 cannot be met: 2 bits in every layer cost 0.02"):
        qat.prepare(module, {}, HybridConfig(kind="hybrid", budget={"size_mb": 0.001}), images(2))


def test_the_scale_is_restored_where_no_batch_norm_follows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b, self.c = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.norm(self.a(x))))))

    def restored(**options):
        found = qat.prepare(Net().eval(), {}, HybridConfig(kind="hybrid", bits=4, **options), images(2))
        return {path: part.scheme.restore_scale for path, part in found.named_modules() if isinstance(part, QuantLayer)}

    assert restored() == {"a": False, "b": True}
    assert restored(restore_scale="never") == {"a": False, "b": False}
    assert restored(restore_scale="always", keep_float=[]) == {"a": True, "b": True, "c": True}


def test_recalibration_takes_plain_averages():
    found = quantized(bits=5)
    norms = [part for part in found.modules() if isinstance(part, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    batches = [images(seed=seed) for seed in range(10, 13)]
    assert hybrid.recalibrate(found, batches) == 3
    assert not found.training
    seen = []
    handle = norms[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((0, 2, 3))))
    with torch.no_grad():
        for batch in batches:
            found(batch)
    handle.remove()
    # the first one reads the image through a quantizer that stands aside, or nearly so
    torch.testing.assert_close(norms[0].running_mean, torch.stack(seen).mean(0), rtol=0.05, atol=0.02)
    assert not torch.equal(norms[0].running_mean, before[0])
    assert all(norm.momentum == 0.1 for norm in norms)


def test_gradients_reach_weights_and_learned_ranges():
    found = quantized(bits=4, ranges="unit").train()
    found(images()).square().mean().backward()
    for path, part in found.named_modules():
        if isinstance(part, QuantLayer):
            assert part.weight.grad.abs().sum() > 0, path
    learned = [part for part in qat.named_quantizers(found).values() if part.end is None]
    assert learned
    assert all(part.log_scale.grad is not None for part in learned)
    fixed = [part for part in qat.named_quantizers(found).values() if part.end is not None]
    assert fixed
    assert not any(part.log_scale.requires_grad for part in fixed)


def test_calibrated_ranges_keep_what_the_float_model_knows():
    """Before any training, and though activations go far beyond 1."""
    module, _ = float_model("vgg8")
    module.train()
    for seed in range(30):  # statistics of its own inputs
        module(images(seed=seed))
    module.eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data.mul_(4)
    found = qat.prepare(module, {}, HybridConfig(kind="hybrid", bits=7), images(2))
    hybrid.recalibrate(found, [images(seed=seed) for seed in range(30)])
    qat.calibrate(found, [images()])
    with torch.no_grad():
        one, other = module(images()).flatten(), found.eval()(images()).flatten()
    near = torch.nn.functional.cosine_similarity(one - one.mean(), other - other.mean(), dim=0)
    assert near > 0.9


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "ranges": "unit"},
        {"bits": 2},
        {"bits": 5},
        {"bits": 8},
        {"threshold": 0.5},
        {"bits": 4, "placement": "official"},
    ],
)
def test_the_simulation_is_the_trained_model(options):
    found = quantized("vgg8", **options)
    plain = simulated(found)
    assert not any(isinstance(part, QuantLayer) for part in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(plain(images()), found(images()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("encoding", ["u8", "u7", "s8"])
def test_codes_of_up_to_7_bits_are_the_trained_ones(encoding, bits):
    found = quantized(bits=bits)
    encoded = encode(found, encoding)
    for path, part in found.named_modules():
        if isinstance(part, QuantLayer):
            codes = encoded.get_submodule(path).codes
            assert codes[:, : part.weight.shape[1]].abs().max() <= 2**bits - 1
            values = dorefa.weights(part.weight, bits) * (2**bits - 1)
            signs = codes[:, : part.weight.shape[1]].float() / values.round()
            assert signs.abs().eq(1).all(), "the same codes, but for a batch norm's negative gain"
    pairs = zip(qat.named_quantizers(found).values(), qat.named_quantizers(encoded).values(), strict=True)
    kept = [(one.low, one.high) == (two.low, two.high) for one, two in pairs if one.bits < 8]
    assert kept
    assert all(kept), "the trained grid, not a finer one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "greater than or equal to 2"),
        ({"k_min": 6, "k_max": 5}, "k_min 6 is larger than k_max 5"),
        ({"bits": 4, "budget": {"size_mb": 1}}, "bits gives every layer the same"),
        ({"budget": {}}, "give one of size_mb, bops_g and latency_ms"),
        ({"budget": {"size_mb": 1, "bops_g": 1}}, "give one of size_mb, bops_g and latency_ms"),
        ({"threshold": 0}, "greater than 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValidationError, match=message):
        HybridConfig(kind="hybrid", **options)
