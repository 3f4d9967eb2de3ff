"""The training of paraphrasers, before a student is taught: each learns to restore one of the teacher's maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.data.batches import draw_from, epoch_batches, epoch_length
from edgekd.errors import TrainingError
from edgekd.nn.paraphraser import Paraphraser
from edgekd.nn.taps import capture
from edgekd.train.loop import Setting, epoch_seed

MOMENTUM, WEIGHT_DECAY, POWER = 0.9, 2e-4, 0.9
SECOND_HALF = 0.01
"""Factor of the learning rate in the second half of the epochs."""
STREAM = 7
"""Added to the recipe's seed: not the order of the student's epochs."""


def rate(step: int, total_steps: int, half: int) -> float:
    """The factor of the learning rate: 1, then a hundredth from the step ``half`` on, times (1 - step / total)^0.9.

    Args:
        step: Steps done so far.
        total_steps: Of the whole training.
        half: The first step of the second half.
    """
    return (1.0 if step < half else SECOND_HALF) * (1 - step / total_steps) ** POWER


def fit_paraphrasers(
    paraphrasers: Mapping[str, Paraphraser],
    teacher: nn.Module,
    places: Mapping[str, str],
    setting: Setting,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    loss: Literal["mse", "l1"] = "mse",
) -> dict[str, float]:
    """Train paraphrasers in place on the images that have labels, augmented as the student's will be; labels are not looked at.

    SGD with momentum 0.9 and weight decay 0.0002, and the schedule of :func:`rate`. Afterwards they are constants.

    Args:
        paraphrasers: Role -> paraphraser, on the setting's device.
        teacher: Frozen, in eval mode.
        places: Role -> module path in the teacher.
        setting: Data, seed, devices.
        epochs: Passes over those images.
        batch_size: Images of a step, over all processes; all there are, where these are fewer.
        lr: The learning rate at the first step.
        loss: What is between a map and its restored form, averaged over all values.

    Returns:
        Role -> the share of the map's variance that was not restored in the last epoch: 0 is perfect, 1 no better than a mean.

    Raises:
        TrainingError: The loss is not finite.
    """
    fabric, data = setting.fabric, setting.dataset
    pools = draw_from(data.train, "labelled")
    batch_size = min(batch_size, epoch_length(pools) // fabric.world_size * fabric.world_size)
    steps = epoch_length(pools) // batch_size
    parameters = [value.requires_grad_(True) for part in paraphrasers.values() for value in part.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    distance = F.mse_loss if loss == "mse" else F.l1_loss
    left: dict[str, Tensor] = {}
    for epoch in range(epochs):
        batches = epoch_batches(
            data.train,
            batch_size,
            generator=torch.Generator().manual_seed(epoch_seed(setting.seed + STREAM, epoch)),
            augment=setting.augment,
            mean=data.mean,
            std=data.std,
            drop_last=True,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            pools=pools,
        )
        left = {role: torch.zeros(2, device=fabric.device) for role in paraphrasers}
        for number, (images, _) in enumerate(batches):
            with torch.no_grad(), fabric.autocast(), capture(teacher, places) as maps:
                teacher(images.to(fabric.device))
            terms = []
            for role, paraphraser in paraphrasers.items():
                true = maps[role].float()
                restored = paraphraser.restored(true)
                terms.append(distance(restored, true))
                left[role] += torch.stack([(restored.detach() - true).square().mean(), true.var(unbiased=False)])
            total = torch.stack(terms).sum()
            if not total.isfinite():
                raise TrainingError(
                    f"the paraphrasers' loss is {total.item()} in epoch {epoch + 1}", hint="lower method.paraphraser_lr"
                )
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if fabric.world_size > 1:
                for value in parameters:
                    if value.grad is not None:
                        fabric.all_reduce(value.grad, reduce_op="mean")  # in place
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(epoch * steps + number, epochs * steps, epochs * steps // 2)
            optimizer.step()
    for value in parameters:
        value.requires_grad_(False).grad = None
    if fabric.world_size > 1:
        for sums in left.values():
            fabric.all_reduce(sums, reduce_op="mean")  # in place
    return {role: float(error / variance.clamp_min(1e-12)) for role, (error, variance) in left.items()}
