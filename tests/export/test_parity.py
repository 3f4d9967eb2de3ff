"""The gate between torch and ONNX lets equal models through and stops others, with the numbers."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgekd.errors import ParityError
from edgekd.export import parity
from edgekd.export.float16 import to_float16
from edgekd.export.onnx import export
from edgekd.tasks.classification import Classification

TASK = Classification()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(100, 3, 12, 12)  # not a multiple of the batch that parity uses


def written(model, path, images):
    proto = export(model, images[:2], output_names=["logits"], opset=20)
    onnx.save(proto, path)
    return proto


def measured(module, file, images):
    expected = parity.torch_outputs(module, images, TASK.output_names)
    return parity.compare(expected, parity.file_outputs(file, images.numpy()), TASK)


def check(found, **limits):
    return parity.check(found, None, parity.Limits(**limits))


def test_the_same_model_passes(model, images, tmp_path):
    written(model, tmp_path / "m.onnx", images)
    found = measured(model, tmp_path / "m.onnx", images)
    result = check(found, max_error=1e-3, max_changed=0.0)
    (output,) = result["outputs"]
    assert output["output"] == "logits"
    assert output["images"] == 100
    assert output["max_error"] < 1e-5
    assert output["cosine"] == pytest.approx(1)
    assert output["changed"] == 0


def test_another_model_is_stopped_with_the_numbers(model, images, tmp_path):
    written(model, tmp_path / "m.onnx", images)
    other = nn.Sequential(*model[:-1], nn.Linear(8, 10)).eval()
    found = measured(other, tmp_path / "m.onnx", images)
    with pytest.raises(ParityError, match=r"'logits' on 100 images: max error .* % of the decisions changed|allowed") as caught:
        check(found, max_error=1e-3, max_changed=0.5)
    assert "1e-03" in str(caught.value)


def test_one_borderline_image_of_a_small_split_does_not_stop_it():
    check([parity.OutputParity("logits", 20, max_error=0.0, cosine=1.0, changed=0.05)], max_error=0.1, max_changed=0.02)
    with pytest.raises(ParityError):
        check([parity.OutputParity("logits", 20, max_error=0.0, cosine=1.0, changed=0.1)], max_error=0.1, max_changed=0.02)


def test_changed_decisions_alone_stop_it():
    found = [parity.OutputParity("logits", 100, max_error=0.0, cosine=1.0, changed=0.03)]
    check(found, max_error=0.1, max_changed=0.03)
    with pytest.raises(ParityError, match=r"3\.00%"):
        check(found, max_error=0.1, max_changed=0.02)


def test_a_value_that_is_not_finite_stops_it():
    broken = parity._compare("logits", np.ones((2, 3)), np.array([[1.0, np.nan, 1], [1, 1, 1]]), TASK)
    with pytest.raises(ParityError):
        check([broken], max_error=1e9, max_changed=1.0)


def test_the_numbers_by_hand():
    expected, received = np.array([[4.0, 0.0], [0.0, 2.0]]), np.array([[4.0, 1.0], [3.0, 2.0]])
    found = parity._compare("logits", expected, received, TASK)
    assert found.max_error == pytest.approx(3 / 4)
    assert found.changed == 0.5
    assert found.cosine == pytest.approx((16 + 4) / (np.sqrt(20) * np.sqrt(16 + 1 + 9 + 4)))


def test_of_a_map_some_values_may_lie_on_the_edge():
    """One pixel in a thousand may; more may not, nor may one of an output that is no map, nor what is not finite."""
    expected = np.ones((4, 1, 50, 50))
    maps = expected.copy()
    maps[0, 0, 0, :9] = -1
    found = parity._compare("logits", expected, maps, None, outliers=1e-3)
    assert found.max_error == 0
    assert found.worst.received == -1, "it is told all the same"
    assert parity._compare("logits", expected, maps, None).max_error == 2, "in floats every value counts"
    boxes = [values.reshape(4, -1, 5) for values in (expected, maps)]
    assert parity._compare("predictions", *boxes, None, outliers=1e-3).max_error == 0, "boxes to choose from are like pixels"
    maps[0, 0, 0, :11] = -1
    assert parity._compare("logits", expected, maps, None, outliers=1e-3).max_error == 2
    flat = parity._compare("logits", expected.reshape(4, -1), maps.reshape(4, -1), None, outliers=1e-3)
    assert flat.max_error == 2
    maps[...] = 1
    maps[0, 0, 0, 0] = np.nan
    assert not parity._compare("logits", expected, maps, None, outliers=1e-3).max_error <= 1


def test_a_damaged_file(model, images, tmp_path):
    written(model, tmp_path / "m.onnx", images)
    (tmp_path / "m.onnx").write_bytes((tmp_path / "m.onnx").read_bytes()[:100])
    with pytest.raises(ParityError, match="cannot run"):
        measured(model, tmp_path / "m.onnx", images)


def test_other_outputs(model, images, tmp_path):
    onnx.save(export(model, images[:2], output_names=["scores"], opset=20), tmp_path / "m.onnx")
    with pytest.raises(ParityError, match="gives the outputs scores; expected logits"):
        measured(model, tmp_path / "m.onnx", images)


def test_float16_agrees_more_coarsely(model, images, tmp_path):
    proto, _ = to_float16(written(model, tmp_path / "m.onnx", images), images.numpy(), parity.run_once)
    onnx.save(proto, tmp_path / "half.onnx")
    kinds = {tensor.data_type for tensor in proto.graph.initializer if tensor.dims}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    (found,) = measured(model, tmp_path / "half.onnx", images)
    assert 1e-6 < found.max_error < 1e-2
