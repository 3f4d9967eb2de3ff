"""Generalizable distillation: what a student learns of one set of images is to hold on another.

Qi et al.: Exploring Generalizable Distillation for Efficient Medical Image Segmentation. IEEE JBHI 2024, arXiv 2207.12995.
Official code: XingqunQi-lab/GKD-Framework, which has the networks and no training code. Our reading: the layers of MSAN, what is
frozen when, and which prediction is compared with which are the authors'; all formulas of losses, their weights, and the numbers
of epochs are ours, since the paper's text was not to be had.

A small net beside each network (MSAN: TAN beside the teacher, SAN beside the student) makes a vector of the coarsest map, and a
map of such a vector. Before the student learns (``prepare``), these two are trained and nothing else is (ACT): the map is to come
back (rec), the decoder is to make the right masks of it (task), photometric views of an image are to have its vector (cons), and
the vector is to be that of a mask autoencoder (P-SAE) for the mask (align). Then they are frozen, and the student learns from
- DCGD: the angles between the vectors of an image and its views, and among those of the views, are to be the teacher's;
- DICD: with the vectors exchanged, the teacher's decoder behind the student's vector, and the student's decoder behind the
  teacher's, are both to predict what the teacher predicts. The first teaches the student's encoder, the second its decoder.

The student should be trained when this begins, as the authors' is: put a finetune stage before it. Train on one set of images and
test on another: the Frechet distance of the vectors of val's images (the source) and test's (the target) is reported for the
teacher, the student before and the student after; lower is less of a difference between the domains. It trains nothing.

Differs from the authors' networks: maps are averaged to ``student_grid`` or ``teacher_grid`` squared places first, so that images
may have any size; linear layers give all vectors one length; P-SAE is an autoencoder of the masks, with selective kernels of two
branches. Views and vectors exchanged do not enter the student's running statistics.

Shape letters: B images, K views, V = K + 1, D length of a vector, C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from edgekd._config import Config
from edgekd.data.base import IGNORE, Split, kind_of
from edgekd.data.batches import draw_from, epoch_batches, eval_batch_size, eval_batches
from edgekd.data.views import make_views
from edgekd.distill.base import Distiller, map_channels, score_maps
from edgekd.errors import RecipeError
from edgekd.nn.alignment import AlignmentNet, MaskAutoencoder
from edgekd.nn.batch_norm import untracked
from edgekd.nn.divergences import pixel_divergence
from edgekd.nn.frechet import frechet_distance
from edgekd.nn.taps import INPUT, replace, run_until
from edgekd.train.checkpoint import Loaded
from edgekd.train.loop import Setting
from edgekd.train.step import StepInputs

TEMPERATURE = 0.1
"""Of the graphs' rows, where they are compared as distributions."""
WEIGHT_DECAY = 2e-4
NETWORKS = ("teacher", "student before")
"""Whose distance between the domains is known before the student learns."""


class GeneralizableMsanConfig(Config):
    """Generalizable distillation with MSAN, P-SAE, DCGD and DICD (2024)."""

    name: Literal["generalizable_msan"]
    dcgd_weight: float = Field(1.0, ge=0, le=10_000)
    """alpha: weight of the graphs of views."""
    dicd_weight: float = Field(1.0, ge=0, le=10_000)
    """beta: weight of the predictions from exchanged vectors."""
    layer: str = "bottom"
    """Tap of the coarsest map, which the decoder begins with, in student and teacher."""
    views: int = Field(4, ge=2, le=16)
    """K: changed copies of each image; every second one is flipped, turned and scaled, too."""
    length: int = Field(512, ge=2, le=4096)
    """D: numbers of a vector."""
    student_grid: int = Field(8, ge=1, le=64)
    """g_S: rows and columns that the student's map is averaged to."""
    teacher_grid: int = Field(16, ge=1, le=64)
    """g_T: the same of the teacher's map."""
    scope: Literal["image", "batch"] = "image"
    """What the graph of views connects: the views of one image, or of all images of a batch."""
    form: Literal["squared", "kl"] = "squared"
    """How graphs are compared: squared differences of the cosines, or the divergence of their rows' softmax at 0.1."""
    psae: bool = True
    """Align the vectors with those of a mask autoencoder (P-SAE)."""
    autoencoder_width: int = Field(64, ge=1, le=256)
    """Channels of its finest map."""
    autoencoder_epochs: int = Field(15, ge=1, le=1000)
    """Epochs of the autoencoder, and as many of its alignment net."""
    alignment_epochs: int = Field(15, ge=1, le=1000)
    """Epochs of the student's and of the teacher's alignment net (ACT)."""
    batch_size: int = Field(16, ge=1, le=4096)
    """Images of a batch of these trainings; with the views K + 1 times as many."""
    lr: float = Field(0.003, gt=0, le=10)
    """Learning rate of these trainings (Adam)."""

    def build(self, student: Loaded, teacher: Loaded) -> GeneralizableMsanDistiller:
        """The Distiller, with the alignment nets of both.

        Raises:
            RecipeError: The models' outputs are no score maps of one shape, or they have no such layer that can be exchanged.
        """
        score_maps(student, teacher, method=self.name, critic=False)
        return GeneralizableMsanDistiller(self, student, teacher)


def consistency(vectors_VBD: Tensor) -> Tensor:
    """L_cons: the mean, over images and views, of the squared distance of a view's unit vector from its image's.

    Args:
        vectors_VBD: [V, B, D]: the image's first; gradients flow through both.
    """
    units = F.normalize(vectors_VBD, dim=2)
    return (units[1:] - units[:1]).square().sum(2).mean()


def alignment(vectors_BD: Tensor, semantic_BD: Tensor) -> Tensor:
    """L_align: the mean of the squared distance of unit vectors from the autoencoder's, into which no gradient flows."""
    return (F.normalize(vectors_BD, dim=1) - F.normalize(semantic_BD.detach(), dim=1)).square().sum(1).mean()


def graphs(vectors_VBD: Tensor, scope: Literal["image", "batch"] = "image") -> tuple[Tensor, Tensor]:
    """Cosines between an image and its views, [B, K], and among views without those of a view with itself, [G, n, n - 1].

    Args:
        vectors_VBD: [V, B, D]: the image's first.
        scope: Among the views of one image (G = B, n = K), or of all (G = 1, n = B K).
    """
    units_BVD = F.normalize(vectors_VBD, dim=2).transpose(0, 1)
    intra_BK = (units_BVD[:, :1] * units_BVD[:, 1:]).sum(2)
    views = units_BVD[:, 1:] if scope == "image" else units_BVD[:, 1:].flatten(0, 1)[None]
    with torch.autocast(views.device.type, enabled=False):  # 16 bits would round what the views differ by
        inter = views @ views.transpose(1, 2)
    count = inter.shape[1]
    others = ~torch.eye(count, dtype=torch.bool, device=inter.device)
    return intra_BK, inter[:, others].view(-1, count, count - 1)


def dcgd(
    student_VBD: Tensor,
    teacher_VBD: Tensor,
    *,
    scope: Literal["image", "batch"] = "image",
    form: Literal["squared", "kl"] = "squared",
) -> Tensor:
    """L_DCGD: how far the student's two graphs are from the teacher's, both added; their vectors may differ in length.

    Args:
        student_VBD: [V, B, D]: the image's first.
        teacher_VBD: [V, B, D'], of the same views; no gradient flows into it.
        scope: As for :func:`graphs`.
        form: ``squared``: the mean squared difference of cosines; ``kl``: the mean over rows of KL(teacher || student) of their
            softmax at 0.1.
    """
    parts = []
    for ours, theirs in zip(graphs(student_VBD, scope), graphs(teacher_VBD.detach(), scope), strict=True):
        if form == "squared":
            parts.append((ours - theirs).square().mean())
        else:
            rows = [(values.flatten(0, -2) / TEMPERATURE).log_softmax(1) for values in (ours, theirs)]
            parts.append(F.kl_div(rows[0], rows[1], reduction="batchmean", log_target=True))
    return parts[0] + parts[1]


def dicd(crossed_encoder_BKHW: Tensor, crossed_decoder_BKHW: Tensor, teacher_BKHW: Tensor) -> Tensor:
    """L_DICD: KL(teacher || crossed prediction), a mean over pixels, of both crossed predictions.

    Args:
        crossed_encoder_BKHW: Logits of the teacher's decoder behind the student's vector.
        crossed_decoder_BKHW: Logits of the student's decoder behind the teacher's vector.
        teacher_BKHW: The teacher's logits; no gradient flows into them.
    """
    return pixel_divergence(crossed_encoder_BKHW, teacher_BKHW) + pixel_divergence(crossed_decoder_BKHW, teacher_BKHW)


class GeneralizableMsanDistiller(Distiller):
    """The terms ``dcgd`` and ``dicd``; the alignment nets are trained in :meth:`prepare` and constant afterwards."""

    def __init__(self, config: GeneralizableMsanConfig, student: Loaded, teacher: Loaded) -> None:
        super().__init__()
        self.config = config
        ((ours, theirs),) = map_channels(student, teacher, [config.layer], method=config.name, option="layer").values()
        self.student_taps = self.teacher_taps = (config.layer,)
        self.student_place, self.teacher_place = student.taps[config.layer], teacher.taps[config.layer]
        for place in (self.student_place, self.teacher_place):
            if place.endswith(INPUT):
                raise RecipeError(
                    f"{config.name}.layer: {config.layer!r} is an input, {place}; only a module's output can be exchanged",
                    hint="tap the module before it, or choose another layer",
                )
        self.san = AlignmentNet(ours, config.student_grid, config.length)
        self.tan = AlignmentNet(theirs, config.teacher_grid, config.length)
        self.eval().requires_grad_(False)
        self.mean: Tensor
        self.std: Tensor
        self.distances: Tensor
        self.register_buffer("mean", torch.zeros(student.architecture.channels))
        self.register_buffer("std", torch.ones(student.architecture.channels))
        self.register_buffer("distances", torch.zeros(len(NETWORKS), dtype=torch.float64))

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The terms."""
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        assert step.student_net is not None
        assert step.teacher_net is not None
        views = make_views(step.images, step.labels, self.config.views, self.mean, self.std)
        flat, layer = views.images.flatten(0, 1), self.config.layer
        our_maps, their_maps = step.student.taps[layer], step.teacher.taps[layer]
        with torch.no_grad():
            theirs = self._vectors(self.tan, their_maps, step.teacher_net, self.teacher_place, flat)
        with untracked(step.student_net):
            ours = self._vectors(self.san, our_maps, step.student_net, self.student_place, flat)
            swapped = self.san.decode(theirs[0], (our_maps.shape[2], our_maps.shape[3])).to(our_maps.dtype)
            with replace(step.student_net, {self.student_place: swapped}):
                crossed_decoder = step.student_net(step.images)
        swapped = self.tan.decode(ours[0], (their_maps.shape[2], their_maps.shape[3])).to(their_maps.dtype)
        # with gradients: they pass through the frozen header and decoder into the student's encoder
        with replace(step.teacher_net, {self.teacher_place: swapped}):
            crossed_encoder = step.teacher_net(step.images)
        alike = dcgd(ours, theirs, scope=self.config.scope, form=self.config.form)
        return {
            "dcgd": self.config.dcgd_weight * alike,
            "dicd": self.config.dicd_weight * dicd(crossed_encoder, crossed_decoder, step.teacher.logits),
        }

    def _vectors(self, aligner: AlignmentNet, maps: Tensor, net: nn.Module, place: str, views: Tensor) -> Tensor:
        """[V, B, D]: of the images, whose maps are known, and of their views, [K B, C, H, W]."""
        anchor = aligner.encode(maps)
        others = aligner.encode(run_until(net, place, views))
        return torch.cat([anchor[None], others.unflatten(0, (self.config.views, len(anchor)))])

    def prepare(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> None:
        """Train the autoencoder of masks and both alignment nets, and measure the distance between the domains.

        Every process does the same, from the same seed.

        Raises:
            RecipeError: The labels are no masks.
        """
        data, config = setting.dataset, self.config
        if kind_of(data.train.labels) != "masks":
            raise RecipeError(f"{config.name} needs masks as labels", hint="use the task segmentation, or another method")
        self.mean.copy_(torch.tensor(data.mean))
        self.std.copy_(torch.tensor(data.std))
        torch.manual_seed(setting.seed)
        semantic = self._autoencoder(setting) if config.psae else None
        for net, place, aligner in ((teacher, self.teacher_place, self.tan), (student, self.student_place, self.san)):
            with _constant(net):
                self._align(net, place, aligner, semantic, setting)
        pairs = ((teacher, self.teacher_place, self.tan), (student, self.student_place, self.san))
        self.distances.copy_(torch.tensor([self._distance(*pair, setting) for pair in pairs]))

    def _autoencoder(self, setting: Setting) -> Callable[[Tensor], Tensor]:
        """Train P-SAE; what it gives maps masks [B, H, W] to vectors [B, D]."""
        classes, config, device = setting.dataset.num_classes, self.config, setting.fabric.device
        net = MaskAutoencoder(len(_planes(torch.zeros(1, 1, 1), classes)[0]), config.autoencoder_width).to(device)
        aligner = AlignmentNet(net.channels, config.teacher_grid, config.length).to(device)
        for part in (net, aligner):
            optimizer = self._optimizer(part)
            net.train(part is net).requires_grad_(part is net)
            for epoch in range(config.autoencoder_epochs):
                for _, labels in self._batches(setting, epoch):
                    planes = _planes(labels, classes)
                    maps = net.encode(planes)
                    back = maps if part is net else aligner(maps)[1]
                    loss = _mask_loss(net.decode(back), planes, labels)
                    _descend(optimizer, loss if part is net else loss + F.mse_loss(back, maps))
        aligner.eval().requires_grad_(False)
        return lambda labels: aligner.encode(net.encode(_planes(labels, classes)))

    def _align(
        self,
        net: nn.Module,
        place: str,
        aligner: AlignmentNet,
        semantic: Callable[[Tensor], Tensor] | None,
        setting: Setting,
    ) -> None:
        """ACT: train one alignment net, its network frozen."""
        aligner.train().requires_grad_(True)
        optimizer = self._optimizer(aligner)
        for epoch in range(self.config.alignment_epochs):
            for images, labels in self._batches(setting, epoch):
                views = make_views(images, labels, self.config.views, self.mean, self.std)
                every = torch.cat([images[None], views.images]).flatten(0, 1)
                masks = torch.cat([labels[None], views.labels]).flatten(0, 1)
                terms = self._act(net, place, aligner, every, masks, setting)
                z, colours = terms.pop("z"), [0, *(1 + at for at, moved in enumerate(views.moved) if not moved)]
                terms["cons"] = consistency(z.unflatten(0, (-1, len(images)))[colours])
                if semantic is not None:
                    with torch.no_grad():
                        given = semantic(masks)
                    terms["align"] = alignment(z, given)
                _descend(optimizer, torch.stack(list(terms.values())).sum())
        aligner.eval().requires_grad_(False)

    @staticmethod
    def _act(
        net: nn.Module, place: str, aligner: AlignmentNet, images: Tensor, labels: Tensor, setting: Setting
    ) -> dict[str, Tensor]:
        """The terms ``rec`` and ``task`` of images and their views, and their vectors ``z``."""
        with torch.no_grad():
            maps = run_until(net, place, images)
        z, back = aligner(maps)
        with replace(net, {place: back.to(maps.dtype)}):
            logits = net(images)
        return {"rec": F.mse_loss(back, maps), "task": setting.task.loss(logits, labels), "z": z}

    def _batches(self, setting: Setting, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        data, device = setting.dataset, setting.fabric.device
        generator = torch.Generator().manual_seed(setting.seed * 1_009 + epoch)
        for images, labels in epoch_batches(
            data.train,
            self.config.batch_size,
            generator=generator,
            augment=setting.augment,
            mean=data.mean,
            std=data.std,
            drop_last=False,
            pools=draw_from(data.train, "labelled"),  # the others would be aligned with the vector of an empty mask
        ):
            yield images.to(device), labels.to(device)

    def _optimizer(self, part: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(part.parameters(), lr=self.config.lr, weight_decay=WEIGHT_DECAY)

    @torch.no_grad()
    def _distance(self, net: nn.Module, place: str, aligner: AlignmentNet, setting: Setting) -> float:
        """FSD: between the images of val and those of test."""
        data, device = setting.dataset, setting.fabric.device

        def vectors(split: Split) -> Tensor:
            batches = eval_batches(split, eval_batch_size(split, 250), mean=data.mean, std=data.std)
            return torch.cat([aligner.encode(run_until(net, place, images.to(device))) for images, _ in batches])

        with _constant(net):
            return frechet_distance(vectors(data.val), vectors(data.test))

    def statistics(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> dict[str, float]:  # noqa: ARG002
        """The Frechet semantic distance (FSD) between val's and test's images, in each network."""
        student.to(setting.fabric.device)
        after = self._distance(student, self.student_place, self.san, setting)
        student.to("cpu")
        known = dict(zip(NETWORKS, self.distances.tolist(), strict=True))
        return {f"FSD val to test, {net}": value for net, value in {**known, "student after": after}.items()}


@contextmanager
def _constant(net: nn.Module) -> Iterator[None]:
    """Inside, a network is in eval mode and takes no gradients; afterwards it is as it was."""
    training, learning = net.training, [parameter for parameter in net.parameters() if parameter.requires_grad]
    net.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        net.train(training)
        for parameter in learning:
            parameter.requires_grad_(True)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _planes(labels: Tensor, classes: int) -> Tensor:
    """Masks as the autoencoder reads them: the foreground where there are two classes, else a plane a class; 0 where ignored."""
    wanted = [1] if classes == 2 else range(classes)
    return torch.stack([labels == value for value in wanted], 1).float()


def _mask_loss(logits: Tensor, planes: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, a mean over the pixels that count."""
    counted = (labels != IGNORE)[:, None].expand_as(planes)
    each = F.binary_cross_entropy_with_logits(logits, planes, reduction="none")
    return (each * counted).sum() / counted.sum().clamp_min(1)
