"""From a split to normalised batches, the same for one process and for many.

Shape letters: B images of a batch, H rows, W columns, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgekd.data import augment_boxes, augment_masks
from edgekd.data.augment import AugmentConfig, draw, transform
from edgekd.data.augment_boxes import BoxAugmentConfig
from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.data.base import IGNORE, Split
from edgekd.errors import RecipeError

AnyAugment = AugmentConfig | BoxAugmentConfig | MaskAugmentConfig
Pools = tuple[npt.NDArray[Any], ...]
"""The images that an epoch draws from, as indices; of several pools every batch takes alike."""
EVAL_PIXELS = 8 << 20
"""Of all images of a batch that is only evaluated: the activations of larger ones would not fit into memory."""


def normalise(images_BHWC: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std per channel.

    Args:
        images_BHWC: uint8 [B, H, W, C].
        mean: C values in 0..1 units.
        std: C values in 0..1 units.

    Returns:
        float32 [B, C, H, W] in channels_last memory format: the bytes keep their order, and convolutions are faster.
    """
    images_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
    shape = (1, -1, 1, 1)
    return images_BCHW.div_(255).sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


def draw_from(split: Split, images: Literal["all", "labelled", "half labelled"]) -> Pools:
    """The pools of a split.

    Args:
        split: Its unlabelled images are those of whose mask no pixel counts; without masks there are none.
        images: All of them; those with labels; or half of each batch with labels and half without, where there are both.
    """
    every = np.arange(len(split))
    if images == "all" or split.labels.dtype != np.uint8:
        return (every,)
    counted = (split.labels != IGNORE).reshape(len(split), -1).any(axis=1)
    if not counted.any() or counted.all():
        return (every,)
    return (every[counted],) if images == "labelled" else (every[counted], every[~counted])


def epoch_length(pools: Pools) -> int:
    """Images of an epoch: it ends with the largest pool, and takes as many from the others."""
    return len(pools) * max(len(pool) for pool in pools)


def _order(pools: Pools, generator: torch.Generator) -> npt.NDArray[Any]:
    """The indices of an epoch.

    Pools take turns image by image, so that every part of a batch has its share of each; a smaller one begins anew, in another
    order.
    """
    length, drawn = epoch_length(pools) // len(pools), []
    for pool in pools:
        rounds = [pool[torch.randperm(len(pool), generator=generator).numpy()] for _ in range(-(-length // len(pool)))]
        drawn.append(np.concatenate(rounds)[:length])
    return np.stack(drawn, axis=1).reshape(-1)


def epoch_batches(
    split: Split,
    batch_size: int,
    *,
    generator: torch.Generator,
    augment: AnyAugment,
    mean: Sequence[float],
    std: Sequence[float],
    drop_last: bool,
    rank: int = 0,
    world_size: int = 1,
    pools: Pools | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, augmented.

    Every process draws the same order and the same augmentation for the whole batch and keeps its share of it, so that the shares
    of all processes together are exactly the batches of a single one. All processes get equally many batches.

    Args:
        split: What to draw from.
        batch_size: Images per batch over all processes.
        generator: The only source of randomness; in the same state in every process.
        augment: Random changes.
        mean: Per channel, 0..1 units.
        std: Per channel, 0..1 units.
        drop_last: Leave out a last batch that is not full.
        rank: This process.
        world_size: How many processes there are.
        pools: What is drawn from; None draws from all images.

    Yields:
        Images, float32 [B / world_size, C, H, W] in channels_last format, and labels: int64 [B / world_size], boxes, float32
        [B / world_size, M, 6], or masks, uint8 [B / world_size, H, W].

    Raises:
        RecipeError: The batch cannot be shared out evenly, so averaged gradients would weigh images unequally.
    """
    if batch_size % world_size:
        raise RecipeError(
            f"batch_size {batch_size} cannot be shared evenly by {world_size} processes",
            hint=f"use a multiple, for instance {batch_size - batch_size % world_size or world_size}",
        )
    order = _order(pools or draw_from(split, "all"), generator)
    height, width = split.images.shape[1:3]
    for start in range(0, len(order) - batch_size + 1 if drop_last else len(order), batch_size):
        batch = order[start : start + batch_size]
        low, high = _share(len(batch), rank, world_size)
        if isinstance(augment, BoxAugmentConfig):
            boxes = augment_boxes.draw(len(batch), len(split), generator)
            images, labels = augment_boxes.transform(split, batch[low:high], augment, boxes.part(low, high))
        elif isinstance(augment, MaskAugmentConfig):
            masks = augment_masks.draw(len(batch), generator)
            images, labels = augment_masks.transform(split, batch[low:high], augment, masks.part(low, high))
        else:
            choice = draw(len(batch), height, width, augment, generator)
            images = transform(torch.from_numpy(split.images[batch[low:high]]), augment, choice.part(low, high))
            labels = torch.from_numpy(split.labels[batch[low:high]])
        yield normalise(images, mean, std), labels


def eval_batch_size(split: Split, most: int) -> int:
    """Images of a batch that is only evaluated: so many at most, and no more pixels than memory likes."""
    return max(1, min(most, len(split), EVAL_PIXELS // (split.images.shape[1] * split.images.shape[2])))


def eval_batches(
    split: Split, batch_size: int, *, mean: Sequence[float], std: Sequence[float], rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """A whole split in its own order; every process gets its share of each batch, and no empty one.

    Yields:
        Images, float32 [B, C, H, W] in channels_last format, and labels: int64 [B], boxes, float32 [B, M, 6], or masks, uint8 [B,
        H, W].
    """
    for start in range(0, len(split), batch_size):
        low, high = _share(min(batch_size, len(split) - start), rank, world_size)
        if low < high:
            here = slice(start + low, start + high)
            # copies: torch warns of arrays that it may not write to
            yield (
                normalise(torch.from_numpy(np.array(split.images[here])), mean, std),
                torch.from_numpy(np.array(split.labels[here])),
            )


def _share(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The stretch of ``count`` images that belongs to one process."""
    return count * rank // world_size, count * (rank + 1) // world_size
