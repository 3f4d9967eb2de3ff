"""Checkpoints: weights and the data to rebuild their model, and no pickle."""

import json
import pickletools

import pytest
import torch
import toy

from edgekd.artifacts import Store
from edgekd.errors import ArtifactError
from edgekd.nn.channels import channel_plan
from edgekd.nn.flops import macs
from edgekd.prune.importance import prune
from edgekd.train.checkpoint import (
    METRICS,
    MODEL,
    WEIGHTS,
    Architecture,
    build_float,
    load_float,
    read_architecture,
    save,
)


def architecture(name="resnet8", **section):
    return Architecture({"name": name, **section}, classes=5, channels=3, height_px=16, width_px=12)


def store(folder, module, form, history=()):
    with Store(folder).draft(
        id="0" * 64, order=1, kind="checkpoint", stage="finetune", role="student", parents=(), config={}, environment={}
    ) as draft:
        save(draft.folder, module, form, list(history))
    return Store(folder).find("0" * 64)


def test_round_trip_gives_the_same_model(tmp_path):
    torch.manual_seed(0)
    loaded = build_float(architecture())
    with torch.no_grad():
        for value in loaded.module.state_dict().values():
            value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.tensor(7))
    checkpoint = store(tmp_path, loaded.module, loaded.architecture, [{"epoch": 1, "val": 0.5}, {"epoch": 2, "val": 0.75}])
    again = load_float(checkpoint)
    assert toy.same_state(again.module.state_dict(), loaded.module.state_dict())
    assert again.architecture == loaded.architecture
    assert again.taps == loaded.taps
    assert not again.module.training
    history = [json.loads(line) for line in checkpoint.file(METRICS).read_text().splitlines()]
    assert [record["val"] for record in history] == [0.5, 0.75]


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv2"])
def test_pruned_models_are_rebuilt_from_their_channel_plan(tmp_path, name):
    torch.manual_seed(0)
    loaded = build_float(architecture(name))
    example = loaded.architecture.example()
    pruned = prune(loaded.module, example, ratio=0.4, round_to=4, scope="model")
    form = loaded.architecture.with_plans(channel_plan=channel_plan(pruned))
    checkpoint = store(tmp_path, pruned, form)
    again = load_float(checkpoint)
    images = torch.randn(2, 3, 16, 12)
    with torch.no_grad():
        assert torch.equal(again.module(images), pruned(images))
    shape = (3, 16, 12)
    assert macs(again.module, shape) == macs(pruned, shape) < macs(loaded.module, shape)
    # pruning it again, as a second prune stage would, goes on from the smaller model
    twice = prune(again.module, example, ratio=0.4, round_to=4, scope="model")
    assert macs(twice, shape) < macs(pruned, shape)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    loaded = build_float(architecture())
    checkpoint = store(tmp_path, loaded.module, loaded.architecture)
    assert sorted(checkpoint.files) == [METRICS, MODEL, WEIGHTS]
    json.loads(checkpoint.file(MODEL).read_text())
    with pytest.raises(ValueError, match=r"opcode|pickle"):
        list(pickletools.genops(checkpoint.file(WEIGHTS).read_bytes()))


def test_weights_in_channels_last_and_shared_ones_are_stored_plainly(tmp_path):
    module = build_float(architecture()).module.to(memory_format=torch.channels_last)
    module.stage1[0].conv2.weight = module.stage1[0].conv1.weight  # safetensors itself refuses tensors that share memory
    checkpoint = store(tmp_path, module, architecture())
    again = load_float(checkpoint).module
    assert all(value.is_contiguous() for value in again.state_dict().values())
    assert toy.same_state(again.state_dict(), module.state_dict())


def test_example_has_the_recorded_shape():
    assert architecture().example(3).shape == (3, 3, 16, 12)


def test_quantized_checkpoints_are_not_taken_for_float_ones(tmp_path):
    loaded = build_float(architecture())
    checkpoint = store(tmp_path, loaded.module, loaded.architecture.with_plans(quantization={"weights": 8}))
    with pytest.raises(ArtifactError, match="is quantized; a float model was expected"):
        load_float(checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"modell": {}}', "modell"), ("{", "Expecting"), ("[1]", "mapping"), ('{"model": {"name": "resnet8"}}', "classes")],
)
def test_a_model_json_that_is_not_one(tmp_path, content, message):
    loaded = build_float(architecture())
    checkpoint = store(tmp_path, loaded.module, loaded.architecture)
    checkpoint.file(MODEL).write_text(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_architecture(checkpoint)
    assert MODEL in caught.value.message


def test_a_channel_plan_of_another_model(tmp_path):
    plan = channel_plan(build_float(architecture("vgg8")).module)
    with pytest.raises(ArtifactError, match="the channel plan names"):
        build_float(architecture().with_plans(channel_plan=plan))


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"junk" * 50])
def test_damaged_weights_are_an_error_with_the_files_name(tmp_path, damage):
    loaded = build_float(architecture())
    checkpoint = store(tmp_path, loaded.module, loaded.architecture)
    checkpoint.file(WEIGHTS).write_bytes(damage(checkpoint.file(WEIGHTS).read_bytes()))
    with pytest.raises(ArtifactError, match=WEIGHTS):
        load_float(checkpoint)


def test_weights_of_another_model_are_an_error(tmp_path):
    loaded = build_float(architecture())
    checkpoint = store(tmp_path, loaded.module, architecture("resnet14"))
    with pytest.raises(ArtifactError, match="do not fit"):
        load_float(checkpoint)
