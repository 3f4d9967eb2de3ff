"""Models of the zoos through the stages: distilled, pruned, quantized, exported."""

import json

import pytest
import torch
import toy

from edgekd import models
from edgekd.data.augment import AugmentConfig
from edgekd.distill import stage as distill_stage
from edgekd.distill.stage import DistillConfig
from edgekd.models import ModelConfig
from edgekd.nn.channels import apply_channel_plan, channel_plan
from edgekd.nn.flops import macs
from edgekd.prune.importance import prune_to_macs
from edgekd.tasks import Classification
from edgekd.train.checkpoint import Architecture, build_float
from edgekd.train.hardware import ComputeConfig
from edgekd.train.stage import Context

SHAPE = (3, 64, 64)


def loaded(name, arguments=None, size_px=32):
    torch.manual_seed(0)
    section = {"name": name, "arguments": arguments or {}}
    return build_float(Architecture(section, classes=toy.CLASSES, channels=3, height_px=size_px, width_px=size_px))


def test_a_timm_student_learns_from_a_torchvision_teacher(tmp_path):
    teacher, student = loaded("torchvision:resnet18"), loaded("timm:mobilenetv3_small_050")
    before = toy.state_of(teacher.module), toy.state_of(student.module)
    context = Context(
        compute=ComputeConfig(accelerator="cpu", threads=1),
        task=Classification(),
        dataset=toy.dataset(train=32, size_px=32),
        augment=AugmentConfig(),
        seed=0,
        search=(),
        logs=tmp_path / "logs",
        teacher=lambda: teacher,
    )
    config = DistillConfig(kind="distill", method={"name": "logits"}, train={"epochs": 1, "batch_size": 16, "lr": 0.01})
    result = distill_stage.run(config, student, context, title="distill", work=tmp_path / "work")
    assert set(result.history[0]["terms"]) == {"task", "kd"}
    assert toy.same_state(teacher.module.state_dict(), before[0])
    assert not toy.same_state(result.loaded.module.state_dict(), before[1])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("timm:resnet18", {}),
        ("timm:mobilenetv3_small_050", {}),
        ("timm:regnetx_002", {}),
        ("timm:convnext_atto", {}),
        ("timm:vit_tiny_patch16_224", {"img_size": 64}),
        ("torchvision:resnet18", {}),
        ("torchvision:mobilenet_v2", {}),
    ],
)
def test_zoo_models_prune_and_are_rebuilt(name, arguments):
    model = loaded(name, arguments, 64).module
    pruned, _ = prune_to_macs(model, torch.zeros(2, *SHAPE), share=0.6, round_to=8, scope="model")
    assert 0.5 * macs(model, SHAPE) < macs(pruned, SHAPE) <= 0.6 * macs(model, SHAPE)
    torch.manual_seed(1)
    again = models.build(ModelConfig(name=name, arguments=arguments), num_classes=toy.CLASSES, in_channels=3).eval()
    apply_channel_plan(again, channel_plan(pruned))
    again.load_state_dict(pruned.state_dict())
    images = torch.randn(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(again(images), pruned(images))


RECIPE = """
name: zoo
task: {kind: classification}
data: {kind: digits, size_px: 32, channels: 3}
teacher:
  model: {name: "torchvision:resnet18"}
  train: {epochs: 1, batch_size: 16, lr: 0.01}
student:
  model: {name: "timm:resnet18"}
stages:
  - kind: distill
    method: {name: logits}
    train: {epochs: 1, batch_size: 16, lr: 0.01}
  - kind: prune
    macs: 0.5
    train: {epochs: 1, batch_size: 16, lr: 0.01}
  - kind: quantize
    train: {epochs: 1, batch_size: 16, lr: 0.001}
deploy:
  - backend: {name: onnxruntime, threads: 1}
    precision: [float32, int8]
"""


def test_resnet18_goes_all_the_way_to_int8(tmp_path):
    """The whole pipeline, two steps per training: the int8 engine holds a quarter of the float one's bytes."""
    from edgekd import pipeline
    from edgekd.display import Display
    from edgekd.recipe import load_recipe, preflight, smoke

    (tmp_path / "zoo.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "zoo.yaml")
    preflight(recipe)
    recipe = type(recipe)(smoke(recipe.recipe), recipe.document, recipe.search)
    outcome = pipeline.compress(recipe, out=tmp_path / "run", smoke=True, display=Display(quiet=True), command="edgekd compress")
    assert outcome.failures == []
    engines = {engine["precision"]: engine for engine in outcome.report["engines"]}
    assert {engine["status"] for engine in engines.values()} == {"measured"}, json.dumps(outcome.report["engines"])
    assert engines["int8"]["size_bytes"] < 0.35 * engines["float32"]["size_bytes"]
