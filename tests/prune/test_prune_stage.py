"""The stage: cut, then train what is left."""

import pytest
import torch
import toy
from pydantic import ValidationError

from edgekd.data.augment import AugmentConfig
from edgekd.errors import TrainingError
from edgekd.nn.channels import channel_plan
from edgekd.nn.flops import macs
from edgekd.prune import stage
from edgekd.prune.stage import PruneConfig, cut
from edgekd.tasks import Classification
from edgekd.train.checkpoint import Architecture, build_float
from edgekd.train.hardware import ComputeConfig
from edgekd.train.stage import Context

SHAPE = (3, 16, 16)


def config(**arguments):
    train = {"epochs": 2, "batch_size": 16, "lr": 0.02}
    return PruneConfig(**{"kind": "prune", "train": train, "macs": 0.6, **arguments})


def source(name="resnet8", seed=1):
    torch.manual_seed(seed)
    return build_float(Architecture({"name": name}, classes=toy.CLASSES, channels=3, height_px=16, width_px=16))


def context(tmp_path, **given):
    return Context(
        compute=ComputeConfig(accelerator="cpu", threads=1),
        task=Classification(),
        dataset=toy.dataset(train=64, size_px=16),
        augment=AugmentConfig(),
        seed=0,
        search=(),
        logs=tmp_path / "logs",
        **given,
    )


def run(tmp_path, configuration, loaded, **given):
    return stage.run(configuration, loaded, context(tmp_path, **given), title="prune", work=tmp_path / "work")


def test_what_comes_out_is_small_trained_and_described(tmp_path):
    loaded = source()
    before = toy.state_of(loaded.module)
    result = run(tmp_path, config(), loaded)
    pruned = result.loaded
    assert macs(pruned.module, SHAPE) <= 0.6 * macs(loaded.module, SHAPE)
    assert toy.same_state(loaded.module.state_dict(), before), "the source was trained"
    assert [record["epoch"] for record in result.history] == [1, 2]
    untrained = cut(config(), loaded)
    assert not toy.same_state(pruned.module.state_dict(), untrained.state_dict())
    assert pruned.taps == loaded.taps

    rebuilt = build_float(pruned.architecture)
    rebuilt.module.load_state_dict(pruned.module.state_dict())
    images = torch.randn(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(rebuilt.module(images), pruned.module(images))

    assert any(row["channels"] < row["channels_before"] for row in result.layers)
    for row in result.layers:
        assert row["channels"] <= row["channels_before"]
    assert result.layers[-1]["channels"] == toy.CLASSES


def test_it_can_recover_under_a_teacher(tmp_path):
    teacher = source("wrn_16_1", seed=2)
    result = run(tmp_path, config(method={"name": "logits"}), source(), teacher=lambda: teacher)
    assert set(result.history[0]["terms"]) == {"task", "kd"}


def test_without_a_method_the_teacher_is_not_even_loaded(tmp_path):
    result = run(tmp_path, config(), source(), teacher=lambda: pytest.fail("loaded"))
    assert set(result.history[0]["terms"]) == {"task"}


def test_an_interrupted_recovery_goes_on_with_the_same_channels(tmp_path):
    class Stopped(Exception):  # noqa: N818  it is no error
        pass

    def stop(title, epochs, record):
        assert (title, epochs) == ("prune", 2)
        raise Stopped

    whole = run(tmp_path / "whole", config(), source())
    with pytest.raises(Stopped):
        run(tmp_path / "parts", config(), source(), on_epoch=stop)
    parts = run(tmp_path / "parts", config(), source())
    assert toy.same_state(parts.loaded.module.state_dict(), whole.loaded.module.state_dict())
    assert parts.loaded.architecture == whole.loaded.architecture


def test_a_ratio_cuts_that_share():
    loaded = source("vgg8")
    pruned = cut(config(macs=None, ratio=0.5, round_to=8, scope="layer"), loaded)
    plans = channel_plan(loaded.module), channel_plan(pruned)
    for path, entry in plans[0].items():
        if "out_channels" in entry["attributes"]:
            assert plans[1][path]["attributes"]["out_channels"] == entry["attributes"]["out_channels"] // 2


def test_a_second_prune_counts_from_what_the_first_left(tmp_path):
    first = run(tmp_path / "1", config(round_to=4), source())
    second = run(tmp_path / "2", config(round_to=4), first.loaded)
    assert macs(second.loaded.module, SHAPE) <= 0.6 * macs(first.loaded.module, SHAPE)
    rebuilt = build_float(second.loaded.architecture)
    rebuilt.module.load_state_dict(second.loaded.module.state_dict())


def test_a_target_out_of_reach_fails_before_training(tmp_path):
    with pytest.raises(TrainingError, match=r"pruning cannot bring the MACs to 1\.0%"):
        run(tmp_path, config(macs=0.01), source(), on_step=lambda *_: pytest.fail("trained"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.5}, "exactly one of ratio and macs"),
        ({"macs": None}, "exactly one of ratio and macs"),
        ({"macs": 1.0}, "less than 1"),
        ({"macs": None, "ratio": 0.95}, "less than 0.95"),
        ({"round_to": 0}, "greater than or equal to 1"),
        ({"scope": "global"}, "'model' or 'layer'"),
        ({"importance": "l1"}, "Extra inputs"),
    ],
)
def test_stages_that_cannot_be(arguments, message):
    with pytest.raises(ValidationError, match=message):
        config(**arguments)
