"""The loop in one process: resuming, damage, what it records, and what it leaves alone."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import resume_program
import torch
import toy
from torch import nn

from edgekd.data.augment import AugmentConfig
from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.data.base import IGNORE
from edgekd.data.batches import eval_batches
from edgekd.distill.logits import LogitsConfig
from edgekd.errors import RecipeError, TrainingError
from edgekd.tasks import Segmentation
from edgekd.train import loop
from edgekd.train.loop import STATE, epoch_seed, evaluate, train
from edgekd.train.optim import TrainConfig
from edgekd.train.step import TaskOnly, train_step

PROGRAM = Path(resume_program.__file__)


class Stopped(Exception):  # noqa: N818  it is no error
    """Ends a training where a kill would."""


def config(**arguments):
    return TrainConfig(**{"epochs": 2, "batch_size": 8, "lr": 0.05, **arguments})


def run(work, student=None, *, training=None, objective=None, **given):
    """Train a new Net; ``given`` goes to the Setting, or to ``train`` where it is one of its arguments."""
    arguments = {name: given.pop(name) for name in ("teacher", "student_taps", "teacher_taps", "task_weight") if name in given}
    student = student if student is not None else toy.net(1)
    history = train(
        student=student,
        objective=objective or TaskOnly(),
        config=training or config(),
        setting=toy.setting(work, **given),
        **arguments,
    )
    return student, history


def stop_after(epoch):
    def on_epoch(record):
        if record["epoch"] == epoch:
            raise Stopped

    return on_epoch


def interrupted(work, training, **given):
    with pytest.raises(Stopped):
        run(work, training=training, on_epoch=stop_after(1), **given)


def test_a_new_process_goes_on_with_the_same_bits(tmp_path):
    """Processes that stop after epoch 1, within epoch 2, after epoch 2, and one that finishes, against one that never stops."""
    for stop in ("epoch:1", "step:6", "epoch:2", "end"):
        command = [sys.executable, PROGRAM, tmp_path / "parts", stop]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for case in resume_program.CASES:
        resume_program.run(case, tmp_path / "whole", "end")
        expected = torch.load(tmp_path / "whole" / f"{case}.pt", weights_only=True)
        actual = torch.load(tmp_path / "parts" / f"{case}.pt", weights_only=True)
        assert toy.same_state(actual, expected), case
        assert all(value.isfinite().all() for value in expected.values()), case


def test_a_finished_training_is_not_trained_again(tmp_path):
    first, history = run(tmp_path)
    again, same = run(tmp_path, toy.net(9), on_step=lambda *_: pytest.fail("trained again"))
    assert toy.same_state(again.state_dict(), first.state_dict())
    assert same == history


DAMAGE = {
    "empty": lambda data: b"",
    "junk": lambda data: b"\x80\x02junk" * 50,
    "cut in half": lambda data: data[: len(data) // 2],
    "its end is missing": lambda data: data[:-30],
    "one bit of a weight": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_state_is_named_and_training_starts_over(tmp_path, damage):
    expected, whole = run(tmp_path / "whole")
    interrupted(tmp_path / "work", config())
    path = tmp_path / "work" / STATE
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    warnings, epochs = [], []
    actual, history = run(tmp_path / "work", warn=warnings.append, on_epoch=lambda record: epochs.append(record["epoch"]))
    assert len(warnings) == 1
    assert f"damaged training state {path}" in warnings[0]
    assert "toy starts over" in warnings[0]
    assert epochs == [1, 2]
    assert toy.same_state(actual.state_dict(), expected.state_dict())
    assert [record["terms"] for record in history] == [record["terms"] for record in whole]


def test_damage_warns_where_nobody_listens(tmp_path):
    (tmp_path / STATE).write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged training state"):
        run(tmp_path)


def test_no_damage_goes_unseen(tmp_path):
    """Cut anywhere, or with any byte changed: torch itself would read many of these, with other values or none of its own."""
    interrupted(tmp_path, config())
    path = tmp_path / STATE
    whole = path.read_bytes()
    warnings = []
    setting = toy.setting(tmp_path, warn=warnings.append)
    assert loop._load(setting) is not None
    positions = torch.randint(0, len(whole), (100,), generator=torch.Generator().manual_seed(0)).tolist()
    variants = [whole[:position] for position in positions[:50]]
    variants += [whole[:p] + bytes([whole[p] ^ 0x55]) + whole[p + 1 :] for p in [*range(40), *positions]]
    for data in variants:
        path.write_bytes(data)
        warnings.clear()
        assert loop._load(setting) is None
        assert len(warnings) == 1


def test_half_written_state_is_not_read(tmp_path):
    (tmp_path / (STATE + ".partial")).write_bytes(b"half")
    _, history = run(tmp_path)  # a warning would be an error
    assert len(history) == 2


class Term(nn.Module):
    """One more term, from a function of the step."""

    student_taps, teacher_taps = (), ()

    def __init__(self, term):
        super().__init__()
        self.term = term

    def losses(self, step):
        return {"extra": self.term(step)}

    def train_step(self, state, images, labels):
        return train_step(state, images, labels)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_not_finite_stops_and_is_named(tmp_path, value):
    def term(step):
        return step.student.logits.mean() * 0 + (value if step.step == 5 else 0.25)

    student = toy.net(1)
    with pytest.raises(TrainingError, match=rf"'extra' is {value} in epoch 2, step 5 \(the others: task ") as caught:
        run(tmp_path, student, objective=Term(term))
    assert "lower train.lr" in caught.value.hint
    assert all(value.isfinite().all() for value in student.state_dict().values()), "the step was done all the same"


def test_task_loss_that_is_not_finite_is_named_too(tmp_path):
    student = toy.net(1)
    with torch.no_grad():
        student.fc.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"'task' is nan in epoch 1, step 0 \(the others: none\)"):
        run(tmp_path, student)


def test_fewer_images_than_one_batch(tmp_path):
    with pytest.raises(TrainingError, match="has 32 images, fewer than one batch of 33") as caught:
        run(tmp_path, training=config(batch_size=33))
    assert "batch_size" in caught.value.hint


def test_a_batch_norm_that_is_given_one_value(tmp_path):
    """PSPNet's, for one, behind its average over the whole image: with one image at a time there is nothing to normalise by."""

    def student():
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, toy.CLASSES)
        )

    run(tmp_path / "two", student(), training=config(accumulate=4, epochs=1))
    with pytest.raises(TrainingError, match="one image at a time") as caught:
        run(tmp_path / "one", student(), training=config(accumulate=8, epochs=1))
    assert "lower train.accumulate" in caught.value.hint
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(("objective", "half", "expected"), [("task", False, 2), ("method", False, 6), ("method", True, 9)])
def test_unlabelled_images_are_for_methods(tmp_path, objective, half, expected):
    """18 of 24 images have no labels: an epoch of plain training has the other 6 alone."""
    data = toy.scenes(train=24)
    data.train.labels[6:] = IGNORE
    steps = []
    setting = toy.setting(
        tmp_path,
        data=data,
        task=Segmentation(toy.CLASSES),
        augment=MaskAugmentConfig(),
        on_step=lambda done, total, images: steps.append((done, total, images)),
    )
    train(
        student=nn.Conv2d(3, toy.CLASSES, 1),
        objective=TaskOnly() if objective == "task" else Term(lambda _: torch.zeros(())),
        config=config(epochs=1, batch_size=4 if half or objective == "method" else 3),
        setting=setting,
        half_labelled=half,
    )
    assert steps[-1] == (expected, expected, expected * (3 if objective == "task" else 4))


def test_one_whole_batch_is_enough(tmp_path):
    _, history = run(tmp_path, training=config(batch_size=32))
    assert len(history) == 2


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_gives_the_whole_batchs_gradient(tmp_path, parts):
    """Without batch norm, whose statistics are of each part."""
    whole, first = run(tmp_path / "1", toy.net(1, norm=False), training=config(optimizer="sgd"))
    cut, second = run(tmp_path / "2", toy.net(1, norm=False), training=config(accumulate=parts))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert second[-1]["terms"]["task"] == pytest.approx(first[-1]["terms"]["task"], rel=1e-4)


def test_ema_is_the_average_of_the_steps_weights(tmp_path):
    student = toy.net(1)
    average = toy.state_of(student)
    count = 0

    def on_step(done, total, images):
        nonlocal count
        count += 1
        keep = min(0.6, (1 + count) / (10 + count))
        for name, value in student.state_dict().items():
            average[name] = keep * average[name] + (1 - keep) * value if value.is_floating_point() else value.clone()

    result, history = run(tmp_path, student, training=config(ema_decay=0.6), on_step=on_step)
    for name, value in result.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)
    raw, _ = run(tmp_path / "raw")
    assert not toy.same_state(raw.state_dict(), result.state_dict())
    # what was validated is what came out
    assert history[-1]["val"] == evaluate(result, toy.dataset().val, toy.setting(tmp_path))


def test_record_of_an_epoch(tmp_path):
    seen = []
    _, history = run(
        tmp_path,
        training=config(warmup_epochs=0.5, epochs=3),
        objective=Term(lambda step: 0.5 + 0 * step.student.logits.sum()),
        on_epoch=seen.append,
    )
    assert seen == history
    assert json.loads(json.dumps(history)) == history
    assert [record["epoch"] for record in history] == [1, 2, 3]
    for record in history:
        assert list(record) == ["epoch", "lr", "terms", "val", "images_per_s", "seconds"]
        assert record["terms"]["extra"] == pytest.approx(0.5)
        assert 0 <= record["val"] <= 1
        assert record["images_per_s"] > 0
    assert history[2]["terms"]["task"] < history[0]["terms"]["task"]
    # the rate of the epoch's last step: 12 steps, 2 of them warm-up
    assert history[0]["lr"] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 1 / 10)))
    assert history[2]["lr"] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 9 / 10)))


def test_steps_are_counted_through_all_epochs(tmp_path):
    steps = []
    run(tmp_path, on_step=lambda *step: steps.append(step))
    assert steps == [(done, 8, 8 * ((done - 1) % 4 + 1)) for done in range(1, 9)]


def test_a_resumed_training_counts_on(tmp_path):
    interrupted(tmp_path, config())
    steps = []
    run(tmp_path, on_step=lambda *step: steps.append(step))
    assert [done for done, _, _ in steps] == [5, 6, 7, 8]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_what_is_prepared_is_not_prepared_again(tmp_path):
    """Neither by a training that goes on, nor by one that is finished; where its state is lost, it is."""

    class Prepared(TaskOnly):
        def __init__(self):
            super().__init__()
            self.register_buffer("found", torch.zeros(()))

        def prepare(self):
            calls.append(len(calls))
            self.found.fill_(7)

    calls, config = [], TrainConfig(epochs=2, batch_size=16, lr=0.01)

    def stop(record):
        if record["epoch"] == 1 and len(calls) == 1:
            raise Stopped

    def run():
        objective = Prepared()
        setting = toy.setting(tmp_path, on_epoch=stop)
        train(student=toy.net(), objective=objective, config=config, setting=setting, prepare=objective.prepare)
        return float(objective.found)

    with pytest.raises(Stopped):
        run()
    assert run() == 7
    assert run() == 7
    assert calls == [0]
    (tmp_path / STATE).unlink()
    assert run() == 7
    assert calls == [0, 1]


def test_tensorboard_shows_each_epoch_once(tmp_path):
    interrupted(tmp_path, config(epochs=3))
    _, history = run(tmp_path, training=config(epochs=3))
    found = events(tmp_path / "tensorboard")
    assert sorted(found) == ["images_per_s", "lr", "train/task", "val"]
    for tag in ("val", "lr"):
        assert found[tag] == [(record["epoch"], pytest.approx(record[tag])) for record in history]
    assert found["train/task"] == [(record["epoch"], pytest.approx(record["terms"]["task"])) for record in history]


def test_the_teacher_stays_as_it_is(tmp_path):
    teacher = toy.net(2, dropout=0.5).train()
    before = toy.state_of(teacher)
    modes = []

    def term(step):
        modes.append((teacher.training, teacher.norm1.training, step.teacher.logits.requires_grad))
        return (step.student.logits - step.teacher.logits).square().mean()

    run(tmp_path, objective=Term(term), teacher=teacher)
    assert set(modes) == {(False, False, False)}
    assert toy.same_state(teacher.state_dict(), before)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_batch_norm_learns_from_training_images_alone(tmp_path):
    student = toy.net(1)
    modes = []
    run(tmp_path, student, objective=Term(lambda step: modes.append(student.norm1.training) or step.student.logits.sum() * 0))
    assert modes == [True] * 8
    assert student.norm1.num_batches_tracked == 8  # and validation added none
    assert not student.norm1.training
    fresh = toy.net(1)
    assert not torch.equal(student.norm1.running_mean, fresh.norm1.running_mean)


def test_the_result_is_on_the_cpu_contiguous_and_in_eval_mode(tmp_path):
    student, _ = run(tmp_path)
    assert not student.training
    assert all(parameter.is_contiguous() and parameter.device.type == "cpu" for parameter in student.parameters())


def test_task_weight_scales_the_task(tmp_path):
    _, whole = run(tmp_path / "1", training=config(epochs=1, lr=1e-9))
    _, half = run(tmp_path / "2", training=config(epochs=1, lr=1e-9), task_weight=0.5)
    assert half[0]["terms"]["task"] == pytest.approx(whole[0]["terms"]["task"] / 2, rel=1e-5)


def test_clipping_bounds_the_step(tmp_path):
    before, student = toy.net(1), toy.net(1)
    run(tmp_path, student, training=config(epochs=1, batch_size=32, lr=1, momentum=0, weight_decay=0, clip_norm=0.01))
    moved = sum((a - b).square().sum() for a, b in zip(student.parameters(), before.parameters(), strict=True)).sqrt()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_another_seed_gives_other_weights(tmp_path):
    first, _ = run(tmp_path / "1")
    same, _ = run(tmp_path / "2")
    other, _ = run(tmp_path / "3", seed=4)
    assert toy.same_state(first.state_dict(), same.state_dict())
    assert not toy.same_state(first.state_dict(), other.state_dict())


def test_epoch_seeds_differ():
    seeds = [epoch_seed(seed, epoch, rank) for seed in range(5) for epoch in range(50) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in [*seeds, epoch_seed(2**31 - 1, 10_000, 1023)])


def test_an_unknown_tap_is_found_before_the_first_step(tmp_path):
    objective = Term(lambda step: pytest.fail("a step was done"))
    objective.student_taps = ("stage11",)
    with pytest.raises(RecipeError, match=r"no tap 'stage11' \(did you mean 'stage1'\?\); it has: stage1, stage2, logits"):
        run(tmp_path, objective=objective, student_taps=toy.NET_TAPS)


def test_evaluate_counts_like_a_reader(tmp_path):
    setting = toy.setting(tmp_path)
    model, data = toy.net(4).train(), setting.dataset
    (images, labels), *rest = eval_batches(data.test, 100, mean=data.mean, std=data.std)
    assert not rest
    accuracy = evaluate(model, data.test, setting, batch_size=7)
    assert model.training, "the mode was changed"
    with torch.no_grad():
        right = model.eval()(images).argmax(1) == labels
    assert accuracy == pytest.approx(sum(right.tolist()) / len(labels))


def test_without_augmentation_an_epoch_sees_each_image_once(tmp_path):
    seen = []

    def term(step):
        seen.extend(image.numpy().tobytes() for image in step.images)
        return 0 * step.student.logits.sum()

    run(tmp_path, training=config(epochs=1), objective=Term(term), augment=AugmentConfig())
    assert len(set(seen)) == len(seen) == 32


def test_a_method_is_trained_along(tmp_path):
    """The whole chain with a real method: its term goes down while the task is switched off."""
    distiller = LogitsConfig(name="logits").build(nn.Module(), nn.Module())
    teacher = toy.net(7)
    _, history = run(tmp_path, training=config(epochs=4), objective=distiller, teacher=teacher, task_weight=0)
    assert set(history[0]["terms"]) == {"task", "kd"}
    assert history[0]["terms"]["task"] == 0
    assert history[-1]["terms"]["kd"] < history[0]["terms"]["kd"]
