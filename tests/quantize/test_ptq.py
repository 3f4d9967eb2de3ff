"""Quantization without training, on a network that has learnt something."""

import dataclasses

import pytest
import torch
from toy import CLASSES, dataset

from edgekd.data.augment import AugmentConfig
from edgekd.models.config import ModelConfig
from edgekd.quantize import qat
from edgekd.quantize.ptq import PtqConfig, run
from edgekd.quantize.stage import calibration_batches
from edgekd.tasks import Classification
from edgekd.train.checkpoint import Architecture, build_float
from edgekd.train.hardware import ComputeConfig
from edgekd.train.stage import Context


@pytest.fixture
def context(tmp_path):
    return Context(
        compute=ComputeConfig(accelerator="cpu", threads=1),
        task=Classification(),
        dataset=dataset(size_px=16),
        augment=AugmentConfig(),
        seed=0,
        search=(),
        logs=tmp_path,
    )


def loaded(name="resnet8"):
    torch.manual_seed(0)
    source = build_float(Architecture(ModelConfig(name=name).model_dump(mode="json"), CLASSES, 3, 16, 16))
    with torch.no_grad():
        for _ in range(5):
            source.module.train()(torch.randn(16, 3, 16, 16))
    source.module.eval()
    return source


@pytest.mark.parametrize("calibration", ["mse", "minmax", "percentile", "entropy"])
def test_every_calibration_gives_a_model_near_the_float_one(calibration, context, tmp_path):
    source = loaded()
    config = PtqConfig(kind="ptq", quantizer={"calibration": calibration})
    trained = run(config, source, context, title="ptq", work=tmp_path)
    images = next(calibration_batches(context.dataset))
    with torch.no_grad():
        expected, received = source.module(images), trained.loaded.module(images)
    assert 0 < float((received - expected).norm() / expected.norm()) < 0.15
    assert trained.history == []
    assert trained.evidence == {}
    assert {row["weight_bits"] for row in trained.layers} == {8}
    assert trained.loaded.architecture.quantization["config"]["calibration"] == calibration


def test_ranges_are_those_of_the_calibration_split(context, tmp_path):
    source = loaded()
    config = PtqConfig(kind="ptq", quantizer={"calibration": "minmax"}, bias_correction=False)
    module = run(config, source, context, title="ptq", work=tmp_path).loaded.module
    name, quantizer = next(iter(qat.named_quantizers(module).items()))  # of the images themselves
    images = torch.cat(list(calibration_batches(context.dataset)))
    assert name == "x"
    assert float(quantizer.scale().detach()) * 127 == pytest.approx(float(images.abs().amax()))


@pytest.mark.parametrize(("outliers", "percentile", "warned"), [(0, 99.99, False), (1, 99.99, True), (1, 80, False)])
def test_a_range_that_is_for_few_images_is_told(context, tmp_path, outliers, percentile, warned):
    source, said = loaded(), []
    images = context.dataset.calib.images.copy()
    images[outliers:] = 128 + (images[outliers:] - 128.0) / 20  # all but these have little contrast
    heard = dataclasses.replace(
        context,
        dataset=dataclasses.replace(context.dataset, calib=dataclasses.replace(context.dataset.calib, images=images)),
        warn=said.append,
    )
    config = PtqConfig(kind="ptq", quantizer={"calibration": "percentile", "percentile": percentile})
    run(config, source, heard, title="ptq", work=tmp_path)
    assert bool(said) == warned
    if warned:
        assert len(said) == 1
        assert "calibration: the range of 'x' ends at " in said[0]
        assert "percentile: 99" in said[0]


def test_equalization_and_bias_correction_help_a_mobilenet(context, tmp_path):
    source = loaded("mobilenetv2")
    images = torch.cat(list(calibration_batches(context.dataset)))
    with torch.no_grad():
        for part in source.module.modules():  # channels that differ as those of a trained one do
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.copy_(torch.logspace(-1.5, 1, len(part.weight))[torch.randperm(len(part.weight))])
        expected = source.module(images)

    def error(**options):
        trained = run(PtqConfig(kind="ptq", **options), source, context, title="ptq", work=tmp_path)
        with torch.no_grad():
            return float((trained.loaded.module(images) - expected).norm() / expected.norm())

    plain = error(bias_correction=False)
    assert error(equalization=True, bias_correction=True) < 0.8 * plain


def test_calibration_images_are_spread_over_the_split():
    data = dataset()
    split = dataclasses.replace(data.train, labels=data.train.labels)
    data = dataclasses.replace(data, calib=split)
    whole = torch.cat(list(calibration_batches(data)))
    few = torch.cat(list(calibration_batches(data, 3)))
    assert torch.equal(few, whole[[0, 16, 31]])
    assert len(torch.cat(list(calibration_batches(data, 1000)))) == len(split)


def test_entropy_does_not_clip_the_images(context, tmp_path):
    dark = context.dataset.calib.images.copy()
    dark[:, 2:, 2:] = 90  # most pixels have one value, and some lie beyond it
    context.dataset = dataclasses.replace(context.dataset, calib=dataclasses.replace(context.dataset.calib, images=dark))
    config = PtqConfig(kind="ptq", quantizer={"calibration": "entropy"})
    module = run(config, loaded(), context, title="ptq", work=tmp_path).loaded.module
    images = torch.cat(list(calibration_batches(context.dataset)))
    assert float(qat.named_quantizers(module)["x"].scale().detach()) * 127 == pytest.approx(float(images.abs().amax()))
