import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from edgekd.errors import DataError
from edgekd.tasks import Classification, ClassificationConfig, build

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [0.0, 0.0, 3.0], [5.0, 4.0, 3.0]])
LABELS = torch.tensor([0, 2, 2, 0])  # the second one is wrong


def test_built_from_the_recipe():
    task = build(ClassificationConfig.model_validate_json('{"kind": "classification", "label_smoothing": 0.1}'), None)
    assert task == Classification(label_smoothing=0.1)
    assert (task.kind, task.metric_name, task.higher_is_better, task.output_names) == (
        "classification",
        "accuracy",
        True,
        ("logits",),
    )
    for bad in (1.0, -0.1):
        with pytest.raises(ValidationError):
            ClassificationConfig(label_smoothing=bad)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_by_hand(smoothing):
    total = 0.0
    for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        norm = math.log(sum(math.exp(value) for value in row))
        for index, value in enumerate(row):
            weight = (1 - smoothing) * (index == label) + smoothing / 3
            total -= weight * (value - norm)
    loss = build(ClassificationConfig(label_smoothing=smoothing), None).loss(LOGITS, LABELS)
    assert loss.item() == pytest.approx(total / 4, rel=1e-6)
    assert loss.shape == ()


def test_loss_is_float32_under_autocast_and_has_a_gradient():
    logits = LOGITS.to(torch.bfloat16).requires_grad_()
    loss = Classification().loss(logits, LABELS)
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_metric_over_uneven_batches_weighs_images_equally():
    metric = Classification().new_metric()
    metric.update(LOGITS[:3], LABELS[:3])
    metric.update(LOGITS[3:], LABELS[3:])
    assert float(metric.compute()) == pytest.approx(0.75)
    assert float(Classification().evaluate({"logits": LOGITS.numpy()}, LABELS.numpy())) == pytest.approx(0.75)


def test_evaluate_agrees_with_counting_and_takes_read_only_and_half():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(500, 10)).astype(np.float16), rng.integers(0, 10, 500)
    logits.flags.writeable = labels.flags.writeable = False
    expected = sum(int(np.argmax(row) == label) for row, label in zip(logits, labels, strict=True)) / 500
    assert Classification().evaluate({"other": logits, "logits": logits}, labels) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ({"scores": np.zeros((4, 3))}, "expected an output 'logits'; the engine gave scores"),
        ({}, "the engine gave none"),
        ({"logits": np.zeros((3, 3))}, "shape [3, 3]; expected [4 images, at least 3 classes]"),
        ({"logits": np.zeros((4, 2))}, "shape [4, 2]"),
        ({"logits": np.zeros((4, 3, 1))}, "shape [4, 3, 1]"),
        ({"logits": np.full((4, 3), np.nan)}, "12 of 12 values of the output 'logits' are not finite"),
    ],
)
def test_evaluate_errors(outputs, expected):
    with pytest.raises(DataError) as caught:
        Classification().evaluate(outputs, LABELS.numpy())
    assert expected in caught.value.message


def test_changed_decisions():
    logits = LOGITS.numpy()
    other = logits.copy()
    other[1, 2] = 9.0  # image 1: class 2 instead of 1
    assert Classification().changed(logits, logits) == 0
    assert Classification().changed(logits, other) == 0.25


WORKER = """
import sys, torch, torch.distributed as dist
from edgekd.tasks import Classification
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
logits, labels = torch.eye(3)[[0, 1, 2, 0, 0]], torch.tensor([0, 1, 2, 0, 1])
mine = slice(0, 4) if rank == 0 else slice(4, 5)  # 4 right here, 1 wrong there
metric = Classification().new_metric()
metric.update(logits[mine], labels[mine])
alone = Classification().evaluate({"logits": logits[mine].numpy()}, labels[mine].numpy())
print(float(metric.compute()), alone, flush=True)
dist.destroy_process_group()
"""


def test_two_processes_are_added_up_and_engine_outputs_are_not(tmp_path):
    commands = [[sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meet")] for rank in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        found = [[float(word) for word in process.communicate(timeout=60)[0].split()] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert found == [pytest.approx([0.8, 1.0]), pytest.approx([0.8, 0.0])]
