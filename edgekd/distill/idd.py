"""Inter-class distance distillation: how far classes are from each other, and what a map knows of where its pixels are.

Zhang, Zhou, Tu: Distilling Inter-Class Distance for Semantic Segmentation. IJCAI 2022, arXiv 2205.03650. There is no official
code, and of the paper only the abstract, the beginning and a figure's caption were read: a graph with classes for nodes and their
distances for edges is distilled, because a small student's classes lie closer together than its teacher's; a second module
distils the position that features encode. All formulas, weights and layers are our reading.

The distance term compares, image by image, the distances between the mean features of all pairs of classes. The position term
reads rows and columns out of both maps by one small network (of Islam, Jia, Bruce: How Much Position Information Do Convolutional
Neural Networks Encode? ICLR 2020, arXiv 2001.08248, as in its official code: a 3x3 convolution without padding, since padding
itself tells positions, a batch norm and a sigmoid), which is trained on the teacher's map before the student is, and then fixed.
The student should seem to be where the teacher seems to be.

Our reading, beside the formulas:
- The third term is the divergence of pixels as the IFVD code has it, a mean over all values (weight 10). The fourth, the critic
  of structured_kd, is off.
- The weights of the first two depend on the map's scale. Where they are null, they begin with constants (0.05, or 1 for distances
  without a scale; 1) and are changed once, in step 100, to what makes each term half the task's loss in that step.
- The reading network is trained with a learning rate of 0.1 for any batch; its paper's code scales it by B / 256.
- The student's map is brought to the teacher's channels by a 1x1 convolution for the position term alone. The teacher's map is
  resized (bilinear) where they differ in size.

Shape letters: B images, C channels, H rows, W columns, K classes, E pairs of classes, V values of a set of classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from edgekd._config import Config
from edgekd.data.batches import draw_from, epoch_batches, epoch_length
from edgekd.distill.base import Distiller, map_channels, score_maps
from edgekd.errors import RecipeError, TrainingError
from edgekd.nn.adversary import Adversary
from edgekd.nn.class_statistics import bins, class_sums, nearest_labels, pixels
from edgekd.nn.critics import ATTENTION_SIDE_PX, AttentionCritic, score_map
from edgekd.nn.divergences import pixel_divergence
from edgekd.nn.precision import exact
from edgekd.nn.relations import EPSILON, stretched
from edgekd.nn.taps import capture, tap_shapes
from edgekd.train.checkpoint import Loaded
from edgekd.train.loop import Setting, epoch_seed
from edgekd.train.step import StepInputs, TrainState

Metric = Literal["l2", "cosine"]
EdgeNorm = Literal["none", "mean"]
Scope = Literal["image", "batch"]
READ_PX = 3
"""Sides of the reading network's window: the outermost places of a map have no answer."""
CALIBRATED = 100
"""The step whose task loss decides the weights that are null, counted from 1."""
HALF = 0.5
"""Of the task's loss: what a calibrated term is in that step."""
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
READER_DECAY, STREAM = 1e-4, 11
"""The reading network's weight decay; and what is added to the seed: not the order of the student's epochs."""


class IddConfig(Config):
    """Distances between classes, and positions (IDD, 2022)."""

    name: Literal["idd"]
    layer: str | None = None
    """Tap whose maps are compared; null takes the last one that student and teacher share."""
    distance_weight: float | None = Field(None, ge=0, le=10_000)
    """l_id: weight of the distance term; 0 leaves it out. null begins with 0.05 (1 where metric or edge_norm takes the scale
    away) and takes, in step 100, what makes the term half the task's loss."""
    metric: Metric = "l2"
    """d: the length of the difference of two classes' means, or 1 - the cosine between them."""
    edge_norm: EdgeNorm = "none"
    """mean divides all distances of an image by their mean, in each network."""
    scope: Scope = "image"
    """A graph for every image, or one for all that are computed at once: a batch, or a process's or train.accumulate's part."""
    least_pixels: int = Field(1, ge=1, le=1_000_000)
    """n_min: pixels that a class needs for a node, at the map's size."""
    position_weight: float | None = Field(None, ge=0, le=10_000)
    """l_pi: weight of the position term; 0 leaves it out. null begins with 1 and takes, in step 100, what makes the term half the
    task's loss."""
    position_target: Literal["teacher", "ramp"] = "teacher"
    """The student's positions should be those that are read from the teacher's map, or the true ones."""
    position_output: Literal["sigmoid", "linear"] = "sigmoid"
    """How the reading network ends."""
    position_epochs: int = Field(10, ge=1, le=10_000)
    """Epochs of the reading network's training: of 2975 street scenes in batches of 8 they are 3,700 steps."""
    position_batch_size: int = Field(8, ge=1, le=4096)
    """Images of such a step."""
    position_lr: float = Field(0.1, gt=0, le=10)
    """Its learning rate; SGD with momentum 0.9 and weight decay 0.0001."""
    pixel_weight: float = Field(10.0, ge=0, le=10_000)
    """l_kd: weight of the divergence of pixels, a mean over B K H W; 0 leaves it out."""
    holistic_weight: float = Field(0.0, ge=0, le=10_000)
    """Weight of a critic's term; 0.001 was used with it elsewhere. 0: there is no critic."""
    critic_weight: float = Field(0.1, gt=0, le=10_000)
    """Weight of the critic's own loss, WGAN with a gradient penalty of 10."""
    critic_lr: float = Field(4e-4, gt=0, le=1)
    """The critic's learning rate at the first step; SGD with momentum 0.9 and weight decay 0.0005."""
    score_side_px: int | None = Field(ATTENTION_SIDE_PX, ge=ATTENTION_SIDE_PX, le=2048)
    """Shorter side of the score maps that the critic sees, in pixels: larger ones are averaged down; null leaves them."""

    def build(self, student: Loaded, teacher: Loaded) -> IddDistiller:
        """The Distiller, with a reading network that knows nothing yet.

        Raises:
            RecipeError: The outputs are no score maps of one size, the critic cannot read them, or the layer does not fit.
        """
        classes = score_maps(student, teacher, method=self.name, critic=self.holistic_weight > 0)
        layers = None if self.layer is None else [self.layer]
        ((role, channels),) = map_channels(student, teacher, layers, method=self.name, last=1, option="layer").items()
        shape = tap_shapes(student.module, {role: student.taps[role]}, student.architecture.example())[role]
        size = (shape[2], shape[3])
        if self.position_weight != 0 and min(size) < READ_PX:
            raise RecipeError(
                f"{self.name}: positions are read from {READ_PX} x {READ_PX} places; the student's map {role!r} has "
                f"{size[0]} x {size[1]}",
                hint="choose a finer map in layer, or set position_weight to 0",
            )
        return IddDistiller(self, role, channels, size, teacher.taps[role], classes)


def class_means(maps_BCHW: Tensor, labels_BHW: Tensor, classes: int, scope: Scope = "image") -> tuple[Tensor, Tensor]:
    """The mean of each class's pixels: [B, K, C], and how many pixels it has, [B, K]; B is 1 for the scope ``batch``.

    Args:
        maps_BCHW: [B, C, H, W].
        labels_BHW: Of the maps' size; what is no class does not count.
        classes: K.
        scope: Means of each image, or of all images together.
    """
    places = bins(labels_BHW, classes)
    graphs = len(maps_BCHW) if scope == "image" else 1
    offsets = torch.arange(graphs, device=places.device)[:, None, None] * classes
    places = torch.where(places < classes, places + offsets, -1)
    counts, sums = class_sums(pixels(maps_BCHW), places.flatten(), graphs * classes)
    means = sums / counts.clamp_min(1)[:, None]
    return means.view(graphs, classes, -1), counts.view(graphs, classes)


def edges(nodes_VC: Tensor, metric: Metric = "l2", edge_norm: EdgeNorm = "none") -> Tensor:
    """The distances of all pairs of nodes: [E].

    Args:
        nodes_VC: [V, C], two nodes at least.
        metric: The length of their difference (the root of its square and 1e-12), or 1 - the cosine of the angle between them.
        edge_norm: mean divides by the mean of all.
    """
    one, other = torch.triu_indices(len(nodes_VC), len(nodes_VC), 1, device=nodes_VC.device)
    first, second = nodes_VC.index_select(0, one), nodes_VC.index_select(0, other)
    if metric == "l2":
        distances = ((first - second).square().sum(1) + EPSILON).sqrt()
    else:
        distances = 1 - F.cosine_similarity(first, second, dim=1, eps=EPSILON)
    return distances / distances.mean().clamp_min(EPSILON) if edge_norm == "mean" else distances


def inter_class_distance(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    labels_Bhw: Tensor,
    classes: int,
    *,
    metric: Metric = "l2",
    edge_norm: EdgeNorm = "none",
    scope: Scope = "image",
    least_pixels: int = 1,
) -> Tensor:
    """L_id: the mean over images with two classes at least of the mean over their pairs of (d_teacher - d_student)^2; a scalar.

    Args:
        student_BCHW: [B, C, H, W].
        teacher_BCHW: [B, C', H', W']; no gradient flows into it.
        labels_Bhw: [B, h, w] of any size; pixels that are no class do not count.
        classes: K.
        metric: See :func:`edges`.
        edge_norm: The same.
        scope: A graph for every image, or one for all.
        least_pixels: n_min: classes of fewer pixels in a graph are no nodes.
    """
    size = (student_BCHW.shape[2], student_BCHW.shape[3])
    labels = nearest_labels(labels_Bhw, size)
    ours, counts = class_means(exact(student_BCHW), labels, classes, scope)
    theirs, _ = class_means(stretched(exact(teacher_BCHW.detach()), size), labels, classes, scope)
    found = []
    for own, other, there in zip(ours, theirs, counts >= least_pixels, strict=True):
        if there.sum() >= 2:
            found.append(F.mse_loss(edges(own[there], metric, edge_norm), edges(other[there], metric, edge_norm)))
    # not 0 times the sum: of a map in 16 bits that is infinite
    return torch.stack(found).mean() if found else (0 * student_BCHW).sum()


def ramps(height: int, width: int, like: Tensor) -> Tensor:
    """How far right and how far down each place is, from 0 to 1, without the outermost places: [2, H - 2, W - 2].

    Args:
        height: H.
        width: W.
        like: Gives device and dtype.
    """
    down, right = (torch.linspace(0, 1, side, device=like.device, dtype=like.dtype)[1:-1] for side in (height, width))
    return torch.stack([right.expand(height - 2, -1), down[:, None].expand(-1, width - 2)])


class PositionReader(nn.Module):
    """G: reads from every 3x3 window of a map where it is: [B, C, H, W] to [B, 2, H - 2, W - 2].

    Args:
        channels: C.
        sigmoid: End with a sigmoid.
    """

    def __init__(self, channels: int, *, sigmoid: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, 2, READ_PX)
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one
        self.layers = nn.Sequential(conv, nn.BatchNorm2d(2), nn.Sigmoid() if sigmoid else nn.Identity())

    def forward(self, maps: Tensor) -> Tensor:
        """Columns and rows as :func:`ramps` has them."""
        positions: Tensor = self.layers(maps)
        return positions


class IddDistiller(Distiller):
    """The terms ``distance``, ``position``, ``pixel`` and ``holistic``; the critic's loss is reported as ``critic``.

    Args:
        config: The method's section.
        role: The tap that is compared.
        channels: Of the student's and the teacher's map.
        size: Rows and columns of the student's map.
        place: The teacher's module path of the tap.
        classes: K.
    """

    def __init__(
        self, config: IddConfig, role: str, channels: tuple[int, int], size: tuple[int, int], place: str, classes: int
    ) -> None:
        super().__init__()
        self.config, self.role, self.size, self.place, self.classes = config, role, size, place, classes
        self.student_taps = self.teacher_taps = (role,)
        free = config.metric == "cosine" or config.edge_norm == "mean"
        distance = config.distance_weight if config.distance_weight is not None else 1.0 if free else 0.05
        position = config.position_weight if config.position_weight is not None else 1.0
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor([distance, position]))
        self.reader: PositionReader | None = None
        self.adapter: nn.Module = nn.Identity()
        if position:
            self.reader = PositionReader(channels[1], sigmoid=config.position_output == "sigmoid").requires_grad_(False).eval()
            self.adapter = nn.Conv2d(*channels, 1) if channels[0] != channels[1] else nn.Identity()
            self.unread: Tensor
            self.register_buffer("unread", torch.ones(2))
        if config.holistic_weight:
            self.adversary = Adversary(AttentionCritic(classes), self._optimizer, weight=config.critic_weight)

    def prepare(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> None:  # noqa: ARG002
        """Train the reading network on the teacher's map. Every process does the same, from the same seed.

        Raises:
            TrainingError: Its loss is not finite.
        """
        if self.reader is None:
            return
        self.reader.requires_grad_(True).train()
        optimizer = torch.optim.SGD(
            self.reader.parameters(), lr=self.config.position_lr, momentum=MOMENTUM, weight_decay=READER_DECAY
        )
        true = ramps(*self.size, like=self.unread)
        errors = []
        for images in self._images(setting):
            with torch.no_grad(), setting.fabric.autocast(), capture(teacher, {self.role: self.place}) as maps:
                teacher(images.to(setting.fabric.device))
            read = self.reader(stretched(exact(maps[self.role]), self.size))
            loss = F.mse_loss(read, true.expand_as(read))
            if not loss.isfinite():
                raise TrainingError(f"the loss of reading positions is {loss.item()}", hint="lower method.position_lr")
            errors.append((read.detach() - true).square().mean((0, 2, 3)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        self.reader.requires_grad_(False).eval()
        for parameter in self.reader.parameters():
            parameter.grad = None
        last = torch.stack(errors[-max(1, len(errors) // 10) :]).mean(0)
        self.unread.copy_(last / true.var((1, 2), unbiased=False))

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The student's terms; the reading network and the critic are constants in them."""
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        config, terms = self.config, {}
        ours, theirs = step.student.taps[self.role], step.teacher.taps[self.role]
        with torch.autocast(step.images.device.type, enabled=False):
            if config.distance_weight != 0:
                terms["distance"] = self.weights[0] * inter_class_distance(
                    ours,
                    theirs,
                    step.labels,
                    self.classes,
                    metric=config.metric,
                    edge_norm=config.edge_norm,
                    scope=config.scope,
                    least_pixels=config.least_pixels,
                )
            if self.reader is not None:
                terms["position"] = self.weights[1] * self._position(exact(ours), exact(theirs.detach()))
            if config.pixel_weight:
                logits = (step.student.logits, step.teacher.logits)
                terms["pixel"] = config.pixel_weight * pixel_divergence(*logits, reduction="mean_element")
            if self.adversary is not None:
                seen = (score_map(outputs.logits, config.score_side_px) for outputs in (step.student, step.teacher))
                terms["holistic"] = config.holistic_weight * self.adversary.judge(*seen)
        return terms

    def train_step(self, state: TrainState, images: Tensor, labels: Tensor) -> dict[str, float]:
        """The steps of the student and of the critic; after step 100 the weights are set."""
        terms = super().train_step(state, images, labels)
        if state.step + 1 == CALIBRATED:
            self._calibrate(terms, state)
        return terms

    def statistics(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> dict[str, float]:  # noqa: ARG002
        """The weights that were used last, and the share of columns' and rows' variance that the reading network left unread."""
        found = dict(zip(("distance_weight", "position_weight"), self.weights.tolist(), strict=True))
        if self.reader is not None:
            found.update(zip(("unread_columns", "unread_rows"), self.unread.tolist(), strict=True))
        return found

    def _position(self, ours: Tensor, theirs: Tensor) -> Tensor:
        assert self.reader is not None  # there is no term without it
        read = self.reader(self.adapter(ours))
        if self.config.position_target == "ramp":
            true = ramps(ours.shape[2], ours.shape[3], like=read).expand_as(read)
        else:
            with torch.no_grad():
                true = self.reader(stretched(theirs, (ours.shape[2], ours.shape[3])))
        return F.mse_loss(read, true)

    def _calibrate(self, terms: dict[str, float], state: TrainState) -> None:
        """Make each term whose weight is null half the task's loss of this step, over all processes."""
        given = (self.config.distance_weight, self.config.position_weight)
        values = torch.tensor([terms.get(name, 0.0) for name in ("task", "distance", "position")], device=self.weights.device)
        if state.fabric.world_size > 1:
            state.fabric.all_reduce(values, reduce_op="mean")  # in place
        for index, weight in enumerate(given):
            if weight is None and values[index + 1] > 0 and values[0] > 0:
                self.weights[index] *= HALF * values[0] / values[index + 1]

    def _images(self, setting: Setting) -> Iterator[Tensor]:
        """Batches for the reading network, augmented as the student's will be."""
        data = setting.dataset
        pools = draw_from(data.train, "all")
        size = min(self.config.position_batch_size, epoch_length(pools))
        for epoch in range(self.config.position_epochs):
            batches = epoch_batches(
                data.train,
                size,
                generator=torch.Generator().manual_seed(epoch_seed(setting.seed + STREAM, epoch)),
                augment=setting.augment,
                mean=data.mean,
                std=data.std,
                drop_last=True,
                pools=pools,
            )
            yield from (images for images, _ in batches)

    def _optimizer(self, owned: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(owned, lr=self.config.critic_lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
