"""One model per family goes to ONNX with a dynamic batch, and ONNX Runtime computes the same."""

import onnxruntime
import pytest
import torch

from edgekd import models
from edgekd.models import ModelConfig

FAMILIES = {"resnet8": {}, "wrn_16_1": {}, "vgg8": {}, "mobilenetv2": {"width": 0.5}, "shufflenetv2": {"width": 0.5}}


# torch.onnx asks torch's own pytree in a way that torch itself deprecates; no caller can avoid it
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_export_agrees_with_onnxruntime(name):
    torch.manual_seed(0)
    model = models.build(ModelConfig(name=name, arguments=FAMILIES[name]), num_classes=10, in_channels=3).eval()
    program = torch.onnx.export(
        model, (torch.randn(2, 3, 16, 16),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 16, 16)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-3, atol=1e-4)
