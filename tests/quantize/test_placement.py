"""Where quantizers go, rule by rule."""

import pytest
import torch
from torch import nn

from edgekd.errors import TrainingError
from edgekd.quantize.qat import QuantizerConfig, calibrate, named_quantizers, prepare

EXAMPLE = torch.zeros(2, 3, 8, 8)


def conv(inputs=8, outputs=8, groups=1):
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


class Model(nn.Module):
    """Layers by name, and a forward given as a function."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.body(self, x)


def calls(model, taps=None, **config):
    """What the quantized graph calls, in order: (name of the node's target, targets of its inputs)."""
    quantized = prepare(model.eval(), taps or {}, QuantizerConfig(**config), EXAMPLE)
    return quantized, {node.name: [str(part.target) for part in node.all_input_nodes] for node in quantized.graph.nodes}


def reads_quantized(quantized, path):
    """Whether every input of the node at this target is a quantizer's output."""
    nodes = [node for node in quantized.graph.nodes if str(node.target) == path]
    assert nodes, f"{path} is not in the graph"
    return all(str(part.target).startswith("quantizers.") for node in nodes for part in node.all_input_nodes)


def test_a_residual_block():
    """Convolutions, both inputs of the addition and its result: only so does ONNX Runtime run all of it on integers."""

    def forward(self, x):
        x = self.relu0(self.bn0(self.stem(x)))
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.head(self.relu2(out + x))

    layers = {"stem": conv(3), "conv1": conv(), "conv2": conv(), "head": conv()}
    norms = {f"bn{index}": nn.BatchNorm2d(8) for index in range(3)}
    relus = {f"relu{index}": nn.ReLU() for index in range(3)}
    quantized, _ = calls(Model(forward, **layers, **norms, **relus))
    assert set(named_quantizers(quantized)) == {"x", "relu0", "relu1", "bn2", "relu2"}
    signed = {name: part.signed for name, part in named_quantizers(quantized).items()}
    assert signed == {"x": True, "relu0": False, "relu1": False, "bn2": True, "relu2": False}
    for path in (*layers, "<built-in function add>"):
        assert reads_quantized(quantized, path), path
    # nothing stands between a convolution, its batch norm and its ReLU
    assert [str(user.target) for node in quantized.graph.nodes if node.target == "conv1" for user in node.users] == ["bn1"]


def test_the_models_output_stays_in_float():
    quantized, _ = calls(Model(lambda self, x: self.last(self.first(x)), first=conv(3), last=conv()))
    output = next(node for node in quantized.graph.nodes if node.op == "output")
    assert [str(part.target) for part in output.all_input_nodes] == ["last"]


def test_an_output_that_a_layer_reads_too_is_quantized():
    def forward(self, x):
        a = self.first(x)
        return a, self.last(a)

    model = Model(lambda self, x: torch.cat(forward(self, x), 1), first=conv(3), last=conv())
    quantized, _ = calls(model)
    assert reads_quantized(quantized, "last")


def test_a_concatenation_shares_one_quantizer():
    def forward(self, x):
        x = self.relu(self.stem(x))
        both = torch.cat([self.relu1(self.left(x)), self.right(x)], 1)
        return self.head(both)

    model = Model(forward, stem=conv(3), left=conv(), right=conv(), head=conv(16), relu=nn.ReLU(), relu1=nn.ReLU())
    quantized, _ = calls(model)
    targets = {}
    for node in quantized.graph.nodes:
        if str(node.target).startswith("quantizers."):
            targets[str(node.all_input_nodes[0].target)] = node.target
    joined = {targets["relu1"], targets["right"], next(target for name, target in targets.items() if "cat" in name)}
    assert len(joined) == 1
    assert named_quantizers(quantized)[joined.pop().removeprefix("quantizers.")].signed  # one of the two may be negative
    assert reads_quantized(quantized, "head")


@pytest.mark.parametrize(
    "move",
    [
        lambda x: nn.functional.max_pool2d(x, 2),
        lambda x: x.reshape(x.shape[0], 8, -1, 4),
        lambda x: nn.functional.interpolate(x, scale_factor=2, mode="nearest"),
        lambda x: x.permute(0, 1, 3, 2),
        lambda x: x.chunk(2, 2)[1],
    ],
)
def test_what_moves_values_shares_their_quantizer(move):
    model = Model(lambda self, x: self.head(move(self.relu(self.stem(x)))), stem=conv(3), head=conv(), relu=nn.ReLU())
    quantized, _ = calls(model)
    assert set(named_quantizers(quantized)) == {"x", "relu"}
    assert reads_quantized(quantized, "head")


def test_a_dropout_s_result_is_not_cut_off_in_training():
    """Its values are scaled up by 1 / (1 - p), beyond the range that the shared quantizer was calibrated for."""
    model = Model(
        lambda self, x: self.fc(self.drop(self.relu(x)).flatten(1)), relu=nn.ReLU(), drop=nn.Dropout(0.5), fc=nn.Linear(192, 4)
    )
    quantized, _ = calls(model)
    images = torch.rand(64, 3, 8, 8)
    calibrate(quantized, [images])
    seen = []
    quantized.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    quantized.train()(images)
    assert float(seen[0].detach().mean()) == pytest.approx(0.5, abs=0.02)
    assert reads_quantized(quantized, "drop")


def test_an_entry_of_a_tuple_is_a_value_of_its_own():
    """A quantizer cannot stand at the tuple."""
    model = Model(lambda self, x: self.fc(x.max(2)[0].flatten(1)), fc=nn.Linear(24, 4))
    quantized, _ = calls(model)
    calibrate(quantized, [torch.randn(4, 3, 8, 8)])
    assert set(named_quantizers(quantized)) == {"getitem"}


def test_a_slice_of_a_tensor_shares_its_quantizer():
    model = Model(lambda self, x: self.head(self.relu(self.stem(x))[:, :, 1:]), stem=conv(3), head=conv(), relu=nn.ReLU())
    quantized, _ = calls(model)
    assert set(named_quantizers(quantized)) == {"x", "relu"}
    assert reads_quantized(quantized, "head")


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.last(self.first(x).add_(x.repeat(1, 3, 1, 1)[:, :8])),
        lambda self, x: self.last(self.first(x).relu_()),
        lambda self, x: self.last(nn.functional.relu(self.first(x), inplace=True) + self.first(x)),
        lambda self, x: self.last(self.relu(self.norm(self.first(x)))),
    ],
)
def test_operations_in_place_do_not_break_training(forward):
    model = Model(forward, first=conv(3), last=conv(), relu=nn.ReLU(inplace=True), norm=nn.BatchNorm2d(8))
    quantized, _ = calls(model)
    images = torch.randn(4, 3, 8, 8)
    calibrate(quantized, [images])
    quantized.train()(images).square().mean().backward()
    assert quantized.first.weight.grad.abs().sum() > 0


class NormAct(nn.BatchNorm2d):
    """As timm writes a norm with its activation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_a_norm_with_an_activation_is_one_with_its_convolution():
    model = Model(lambda self, x: self.last(self.norm(self.first(x))), first=conv(3), last=conv(), norm=NormAct(8))
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
        model.norm.running_mean.uniform_(-1, 1)
    quantized, _ = calls(model)
    (name,) = set(named_quantizers(quantized)) - {"x"}
    assert not named_quantizers(quantized)[name].signed  # behind the activation
    assert torch.equal(quantized.norm.get_submodule("0").weight, model.norm.weight)


def test_what_only_moves_before_the_output_leaves_it_in_float():
    model = Model(lambda self, x: self.last(self.first(x)).flatten(1), first=conv(3), last=conv())
    assert set(named_quantizers(calls(model)[0])) == {"x", "first"}


def test_bilinear_upsampling_makes_new_values():
    model = Model(
        lambda self, x: self.head(nn.functional.interpolate(self.stem(x), scale_factor=2, mode="bilinear")),
        stem=conv(3),
        head=conv(),
    )
    assert len(named_quantizers(calls(model)[0])) == 3


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.LayerNorm(8)])
def test_other_activations_stay_in_float_between_two_quantizers(activation):
    model = Model(lambda self, x: self.head(self.act(self.stem(x))), stem=conv(3), head=conv(), act=activation)
    quantized, _ = calls(model)
    assert set(named_quantizers(quantized)) == {"x", "stem", "act"}
    assert named_quantizers(quantized)["act"].signed


def test_an_average_is_a_new_tensor_and_keeps_its_sign():
    def forward(self, x):
        return self.fc(self.pool(self.relu(self.stem(x))).flatten(1))

    quantized, _ = calls(Model(forward, stem=conv(3), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(8, 4)))
    assert {name: part.signed for name, part in named_quantizers(quantized).items()} == {"x": True, "relu": False, "pool": False}
    assert reads_quantized(quantized, "fc")


def test_additions_that_no_convolution_feeds_stay_in_float():
    """A transformer's residual stream: quantizing it costs accuracy, and no engine gains from it."""

    def forward(self, x):
        x = x.flatten(1)
        x = x + self.one(x)
        return self.two(x)

    quantized, _ = calls(Model(forward, one=nn.Linear(192, 192), two=nn.Linear(192, 4)))
    assert not reads_quantized(quantized, "<built-in function add>")
    assert reads_quantized(quantized, "one")
    assert reads_quantized(quantized, "two")


def test_a_batch_norm_that_two_read_is_not_folded_away():
    def forward(self, x):
        out = self.bn(self.stem(x))
        return self.head(self.relu(out) + out)

    quantized, _ = calls(Model(forward, stem=conv(3), bn=nn.BatchNorm2d(8), relu=nn.ReLU(), head=conv()))
    assert set(named_quantizers(quantized)) == {"x", "bn", "relu", "add"}


def test_skipped_layers_stay_in_float():
    model = Model(lambda self, x: self.last(self.first(x)), first=conv(3), last=conv())
    quantized, _ = calls(model, skip=["fir*"])
    assert type(quantized.first) is nn.Conv2d
    assert type(quantized.last) is not nn.Conv2d
    assert set(named_quantizers(quantized)) == {"first"}


@pytest.mark.parametrize(
    ("keep", "floats"),
    [
        ([], set()),
        (["first"], {"first"}),
        (["last"], {"fc"}),
        (["depthwise"], {"deep"}),
        (["first", "last", "depthwise"], {"first", "deep", "fc"}),
    ],
)
def test_layers_stay_in_float_by_their_place_or_kind(keep, floats):
    """The order is that of execution, and not that in which the model names its layers."""

    def forward(self, x):
        return self.fc(self.grouped(self.deep(self.first(x))).mean((2, 3)))

    model = Model(forward, fc=nn.Linear(8, 4), grouped=conv(groups=2), deep=conv(groups=8), first=conv(3))
    quantized, _ = calls(model, keep_float=keep)
    kinds = (nn.Conv2d, nn.Linear)
    assert {path for path, part in quantized.named_modules() if type(part) in kinds} == floats


def test_there_must_be_a_depthwise_convolution_to_keep():
    with pytest.raises(TrainingError, match="no depthwise convolution"):
        calls(Model(lambda self, x: self.only(x), only=conv(3)), keep_float=["depthwise"])


def test_transposed_convolutions_are_layers_unless_they_have_groups():
    def forward(self, x):
        return self.head(self.two(self.relu(self.one(x))))

    parts = {"one": nn.ConvTranspose2d(3, 8, 2, stride=2), "two": nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)}
    quantized, _ = calls(Model(forward, relu=nn.ReLU(), head=conv(), **parts))
    assert type(quantized.one) is not nn.ConvTranspose2d
    assert type(quantized.two) is nn.ConvTranspose2d
    assert set(named_quantizers(quantized)) == {"x", "relu", "two"}


def test_a_bilinear_upsampling_of_what_is_not_negative_is_not():
    """Else the concatenation would be signed, and ONNX Runtime keep the convolution before the ReLU in float."""

    def forward(self, x):
        x = self.relu(self.stem(x))
        return self.head(torch.cat([x, self.up(self.down(x))], 1))

    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    model = Model(forward, stem=conv(3), relu=nn.ReLU(), down=nn.MaxPool2d(2), up=up, head=nn.Conv2d(16, 4, 1))
    quantized, _ = calls(model)
    assert {name: part.signed for name, part in named_quantizers(quantized).items()} == {"x": True, "relu": False}


def test_taps_are_in_the_path():
    model = Model(lambda self, x: self.last(self.relu(self.first(x))), first=conv(3), last=conv(), relu=nn.ReLU())
    quantized, _ = calls(model, taps={"features": "relu", "given": "last@input", "logits": "last"})
    nodes = {str(node.target): node for node in quantized.graph.nodes}
    assert "taps.features" in nodes
    assert [str(part.target) for part in nodes["output"].all_input_nodes] == ["taps.logits"]
    seen = []
    quantized.taps.features.register_forward_hook(lambda module, args, output: seen.append(output))
    quantized(EXAMPLE)
    assert seen[0].shape == (2, 8, 8, 8)


def test_a_forward_that_looks_at_values_is_refused():
    with pytest.raises(TrainingError, match="cannot trace"):
        calls(Model(lambda self, x: self.a(x) if x.sum() > 0 else self.a(x) * 2, a=conv(3)))


def test_a_tap_that_is_never_called_is_refused():
    with pytest.raises(TrainingError, match="tap 'idle'"):
        calls(Model(lambda self, x: self.a(x), a=conv(3), b=conv(3)), taps={"idle": "b"})


def test_codes_behind_a_relu6_end_before_six():
    """Also where the u8 encoding halves the step: 255 * step / 2 may not reach 6."""
    model = nn.Sequential(
        conv(3), nn.ReLU6(), conv(), nn.ReLU(), conv(), nn.ReLU6(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), conv()
    )
    quantized = prepare(model.eval(), {}, QuantizerConfig(calibration="minmax"), EXAMPLE)
    calibrate(quantized, [torch.randn(4, 3, 8, 8) * 1e3])
    limits = {name: part.limit for name, part in named_quantizers(quantized).items()}
    assert list(limits.values()).count(6.0) == 3  # two ReLU6, of which one is moved, and the average of one
    for part in named_quantizers(quantized).values():
        if part.limit is not None:
            with torch.no_grad():
                part.log_scale.fill_(10.0)  # as far as a training might carry it
            assert 5.999 < part.scale().item() * 127.5 < 6


def test_a_concatenation_with_more_than_a_relu6_has_no_end():
    def forward(self, x):
        one = self.relu6(self.conv1(x))
        return self.conv3(torch.cat([one, self.relu(self.conv2(x))], 1))

    layers = {"conv1": conv(3), "conv2": conv(3), "conv3": conv(16), "relu6": nn.ReLU6(), "relu": nn.ReLU()}
    quantized, _ = calls(Model(forward, **layers))
    assert [part.limit for part in named_quantizers(quantized).values()] == [None] * len(named_quantizers(quantized))
