"""Feature-augmented distillation: the loss expected where the student's last features vary as their class does.

Yuan, Phan, Liu, Liu: FAKD: Feature Augmented Knowledge Distillation for Semantic Segmentation. WACV 2024, arXiv 2208.14143.
There is no official code, and of the paper only the abstract was read: features are augmented along semantic directions, and an
upper bound of the expected loss is lowered in place of drawing samples. Everything else is our reading, after what the paper
builds on: Wang et al., Implicit Semantic Data Augmentation (ISDA), NeurIPS 2019, arXiv 1909.12220, and its official code; and Shu
et al., Channel-wise Knowledge Distillation, ICCV 2021, arXiv 2011.13256.

A pixel's features a, of which the last layer makes z = W a + b, are taken for one draw of a + e, e ~ N(0, lambda diag(Var_k)):
Var_k is the variance of the student's features of the pixel's class k over all of this stage so far, this step included. lambda
grows linearly, from lambda_0 / T in the first of T steps to lambda_0 in the last. The difference z_j - z_c then has the variance
2 Q_k[j, c], and Jensen's inequality gives a bound of the expected loss in closed form, which takes the place of the loss of the
logits as they are. It is not 0 where student and teacher agree: what varies within a class should move the logits little.

Our reading, beside the formulas:
- ISDA's update of mean and variance, without decay. Several processes share them; there each keeps its own.
- An image without any label takes the teacher's classes. In others, pixels that do not count have no part in the statistics and
  in the bounds of pixels, and do not vary (Q = 0) where whole maps are needed (``isda_logits``, ``channel``).
- The bound of the distance between features, which would regularise an adapter alone, is left out. So is ISDA within the task's
  loss.
- The teacher's logits are resized (bilinear) where they differ in size from the features.

Shape letters: B images, D channels of the features, H rows, W columns, N pixels that count, K classes, C the same once more.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from edgekd._config import Config
from edgekd.data.base import IGNORE
from edgekd.distill.base import Distiller, score_maps
from edgekd.errors import RecipeError, nearest
from edgekd.nn.class_statistics import ClassStatistics, bins, nearest_labels, pixels
from edgekd.nn.divergences import pixel_divergence
from edgekd.nn.precision import exact
from edgekd.nn.taps import capture
from edgekd.train.checkpoint import Loaded
from edgekd.train.step import StepInputs

Surrogate = Literal["full", "refmean", "ref0", "isda_logits", "channel"]
PixelBound = Literal["full", "refmean", "ref0"]
DEFAULTS: dict[str, tuple[float, float, float]] = {
    "full": (1.0, 1.0, 2.5),
    "refmean": (1.0, 1.0, 2.5),
    "ref0": (1.0, 1.0, 2.5),
    "isda_logits": (1.0, 1.0, 7.5),
    "channel": (3.0, 4.0, 7.5),
}
"""Surrogate -> weight, temperature, lambda_0."""


class FakdConfig(Config):
    """Distillation with virtually augmented features: a bound of the loss expected over all augmentations (2024)."""

    name: Literal["fakd"]
    surrogate: Surrogate = "full"
    """What is lowered. full, refmean and ref0 bound the divergence of pixels: by the variances of the differences between all
    pairs of classes, from the teacher's mean class, or of the logits themselves; refmean is never above full. channel bounds
    the channel-wise divergence. isda_logits adds variances to the logits as ISDA does for labels: no bound for soft answers."""
    weight: float | None = Field(None, ge=0, le=10_000)
    """alpha: weight of the term; null is 1 for pixels and 3 for channel."""
    temperature: float | None = Field(None, gt=0, le=100)
    """tau: both logits are divided by it, and the term is multiplied by its square; null is 1 for pixels and 4 for channel."""
    strength: float | None = Field(None, ge=0, le=1000)
    """lambda_0: the augmentation's variance in the last step, as a multiple of the class's; null is 2.5 for the bounds of pixels
    and 7.5 for isda_logits and channel. 0 is distillation without augmentation."""
    features: str = "top"
    """The student's tap that its last layer, a 1x1 convolution, reads: an output, or an input, `PATH@input`, behind a dropout."""
    detach_weights: bool = False
    """Take the last layer's weights for constants in the variances: they then cannot shrink to make the bound small."""

    def build(self, student: Loaded, teacher: Loaded) -> FakdDistiller:
        """The Distiller.

        Raises:
            RecipeError: The outputs are no score maps of one size, or no 1x1 convolution to them reads the features.
        """
        classes = score_maps(student, teacher, method=self.name, critic=False)
        head = classifier(student, self.features, classes, method=self.name)
        return FakdDistiller(self, head, classes, student.module.get_submodule(head).in_channels)  # type: ignore[arg-type]


def classifier(student: Loaded, role: str, classes: int, *, method: str) -> str:
    """The module path of the 1x1 convolution that makes logits of what stands at a tap.

    Args:
        student: Not changed.
        role: The tap.
        classes: K, the channels that the layer gives.
        method: Its name, for messages.

    Raises:
        RecipeError: There is no such tap, or no such layer.
    """
    if role not in student.taps:
        raise RecipeError(
            f"{method}.features: the student has no tap {role!r}{nearest(role, list(student.taps))}",
            hint=f"its taps: {', '.join(student.taps) or 'none'}",
        )
    shell = copy.deepcopy(student.module).to("meta").train()  # a dropout that does nothing would pass for none
    read: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        return lambda module, args, output: read.__setitem__(path, args[0])  # noqa: ARG005  the hook's signature

    for path, module in shell.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.out_channels == classes:
            module.register_forward_hook(hook(path))
    with torch.no_grad(), capture(shell, {role: student.taps[role]}) as taps:
        shell(torch.empty(student.architecture.example().shape, device="meta"))
    found = [path for path, tensor in read.items() if tensor is taps[role]]
    if not found:
        raise RecipeError(
            f"{method}.features: no 1x1 convolution to {classes} classes reads what stands at the student's tap {role!r}",
            hint="name the tap that the last layer reads; the student's `taps: {features: LAYER@input}` makes one of its input",
        )
    return found[-1]


def ramp(step: int, total_steps: int, strength: float) -> float:
    """lambda: lambda_0 t / T.

    Args:
        step: t - 1: the steps before this one.
        total_steps: T, of the stage.
        strength: lambda_0.
    """
    return strength * (step + 1) / total_steps


def pair_variances(variance_KD: Tensor, weights_CD: Tensor, strength: float) -> Tensor:
    """Q_k[j, c] = lambda / 2 sum_d Var_kd (w_jd - w_cd)^2: [K, C, C], symmetric, at least 0, with a diagonal of 0.

    Args:
        variance_KD: Var, [K, D].
        weights_CD: w, [C, D].
        strength: lambda.
    """
    gaps_CCD = weights_CD[:, None] - weights_CD[None]
    return strength / 2 * torch.einsum("kd,jcd->kjc", variance_KD, gaps_CCD.square())


def own_variances(variance_KD: Tensor, weights_CD: Tensor, strength: float) -> Tensor:
    """v_k[c] = lambda / 2 sum_d Var_kd w_cd^2: [K, C], for the arguments of :func:`pair_variances`."""
    return strength / 2 * variance_KD @ weights_CD.square().t()


def soft_cross_entropy_bound(
    logits_NC: Tensor,
    probabilities_NC: Tensor,
    classes_N: Tensor,
    variance_KD: Tensor,
    weights_CD: Tensor,
    strength: float,
    *,
    temperature: float = 1.0,
    form: PixelBound = "full",
) -> Tensor:
    """U: for each pixel a bound of the cross-entropy expected over its augmentations, [N].

    Args:
        logits_NC: z, the student's, of features as they are.
        probabilities_NC: p, the teacher's, at that temperature; constants.
        classes_N: k, int64 within 0 .. K - 1.
        variance_KD: Var.
        weights_CD: w, of the layer that makes z of the features.
        strength: lambda.
        temperature: tau.
        form: sum_c p_c log sum_j exp((z_j - z_c) / tau + Q_k[j, c] / tau^2), or, for one reference r = the mean of w over p
            (refmean) or 0 (ref0), log sum_j exp(z_j / tau + lambda / (2 tau^2) sum_d Var_kd (w_jd - r_d)^2) - p z / tau.
    """
    z_NC, scale = logits_NC / temperature, strength / temperature**2
    if form == "full":
        return _full_bound(z_NC, probabilities_NC, classes_N, pair_variances(variance_KD, weights_CD, scale))
    # (w_j - r)^2 = w_j^2 - 2 w_j r + r^2, each a product of small matrices: no N x C x D.
    own_KC = own_variances(variance_KD, weights_CD, scale)
    added_NC = own_KC.index_select(0, classes_N)
    if form == "refmean":
        mean_ND = probabilities_NC @ weights_CD
        varied_ND = variance_KD.index_select(0, classes_N) * mean_ND
        added_NC = added_NC - scale * varied_ND @ weights_CD.t() + (scale / 2 * (varied_ND * mean_ND).sum(1))[:, None]
    return torch.logsumexp(z_NC + added_NC, 1) - (probabilities_NC * z_NC).sum(1)


def _full_bound(z_NC: Tensor, probabilities_NC: Tensor, classes_N: Tensor, pairs_KCC: Tensor) -> Tensor:
    """The bound as one product of matrices per class, in float64: products of exponentials leave float32's range."""
    order = (classes_N.byte() if len(pairs_KCC) <= 256 else classes_N).argsort(stable=True)  # bytes are sorted by counting
    counts = torch.bincount(classes_N, minlength=len(pairs_KCC)).tolist()
    z, pairs = z_NC.index_select(0, order).double(), pairs_KCC.double()
    rows, columns = z.detach().amax(1, keepdim=True), pairs.detach().amax(1, keepdim=True)
    parts = (z - rows).exp().split(counts)
    products = torch.cat([part @ table for part, table in zip(parts, (pairs - columns).exp(), strict=True)])
    tops = torch.cat([column.expand(count, -1) for column, count in zip(columns, counts, strict=True)])
    sums = products.clamp_min(torch.finfo(products.dtype).tiny).log() + rows + tops
    bound = (probabilities_NC.index_select(0, order) * (sums - z)).sum(1)
    return torch.empty_like(bound).index_copy(0, order, bound).to(z_NC.dtype)


def channel_bound(student_BCHW: Tensor, teacher_BCHW: Tensor, variances_BCHW: Tensor, temperature: float = 1.0) -> Tensor:
    """U_B: a bound of the channel-wise divergence expected over the augmentations, each pixel's for itself; a scalar.

    tau^2 / (B C) sum_bc [log sum_i exp(z_i / tau + v_i / tau^2) - sum_i q_i z_i / tau + sum_i q_i log q_i], with q the teacher's
    softmax over the places i of a channel.

    Args:
        student_BCHW: z.
        teacher_BCHW: The same shape; no gradient flows into it.
        variances_BCHW: v, of :func:`own_variances` for the pixel's class; 0 where a pixel does not vary.
        temperature: tau.
    """
    z, v = (student_BCHW / temperature).flatten(2), (variances_BCHW / temperature**2).flatten(2)
    log_q = (teacher_BCHW.detach() / temperature).flatten(2).log_softmax(2)
    less = z - torch.logsumexp(z + v, 2, keepdim=True)  # within the sum, whose parts cancel: log q is as far from z as this is
    far = (log_q.exp() * (log_q - less)).sum(2)
    return temperature**2 * far.mean()


def isda_logits(logits_BCHW: Tensor, labels_BHW: Tensor, pairs_KCC: Tensor) -> Tensor:
    """z_j + Q_y[j, y], y the pixel's class; pixels that do not count stay as they are: [B, C, H, W].

    Args:
        logits_BCHW: z.
        labels_BHW: y.
        pairs_KCC: Q.
    """
    own_KC = torch.diagonal(pairs_KCC, dim1=0, dim2=2).t()
    return logits_BCHW + per_pixel(own_KC, labels_BHW)


def per_pixel(table_KC: Tensor, labels_BHW: Tensor) -> Tensor:
    """Each pixel's row of a table, and zeros for pixels that do not count: [B, C, H, W]."""
    table = torch.cat([table_KC, table_KC.new_zeros(1, table_KC.shape[1])])
    rows = table.index_select(0, bins(labels_BHW.flatten(), len(table_KC)))
    return rows.view(*labels_BHW.shape, -1).movedim(-1, 1)


def known_classes(labels_BHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """The labels; of images without any, the teacher's classes."""
    unlabelled = (labels_BHW == IGNORE).flatten(1).all(1)
    if not unlabelled.any():
        return labels_BHW
    return torch.where(unlabelled[:, None, None], teacher_BCHW.argmax(1).to(labels_BHW.dtype), labels_BHW)


class FakdDistiller(Distiller):
    """The term ``fakd``.

    Args:
        config: The method's section.
        head: Module path of the student's last layer.
        classes: K.
        channels: D, of the features that it reads.
    """

    def __init__(self, config: FakdConfig, head: str, classes: int, channels: int) -> None:
        super().__init__()
        self.config, self.head = config, head
        self.student_taps = (config.features,)
        weight, temperature, strength = DEFAULTS[config.surrogate]
        self.weight = weight if config.weight is None else config.weight
        self.temperature = temperature if config.temperature is None else config.temperature
        self.strength = strength if config.strength is None else config.strength
        self.seen = ClassStatistics(classes, channels)

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """The term, after the statistics have taken this batch in."""
        assert step.teacher is not None  # the stage always has one: checked with the recipe
        assert step.student_net is not None  # the loop gives it
        head = step.student_net.get_submodule(self.head)
        assert isinstance(head, nn.Conv2d)  # classifier() has looked
        with torch.autocast(step.images.device.type, enabled=False):
            features = exact(step.student.taps[self.config.features])
            teacher = exact(step.teacher.logits.detach())
            labels = nearest_labels(known_classes(step.labels, teacher), (features.shape[2], features.shape[3]))
            if teacher.shape[2:] != features.shape[2:]:
                teacher = F.interpolate(teacher, features.shape[2:], mode="bilinear", align_corners=False)
            self.seen.update(features, labels)
            weights = head.weight.to(features.dtype).flatten(1)
            logits = head(features)  # by the weights that it uses: quantized ones, where it has them
            far = self._distance(logits, teacher, labels, weights, ramp(step.step, step.total_steps, self.strength))
        return {"fakd": self.weight * far}

    def _distance(self, logits: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor, strength: float) -> Tensor:
        tau, surrogate, variance = self.temperature, self.config.surrogate, self.seen.variance.to(logits.dtype)
        weights = weights.detach() if self.config.detach_weights else weights
        if surrogate == "channel":
            return channel_bound(logits, teacher, per_pixel(own_variances(variance, weights, strength), labels), tau)
        if surrogate == "isda_logits":
            return pixel_divergence(isda_logits(logits, labels, pair_variances(variance, weights, strength)), teacher, tau)
        places = bins(labels.flatten(), len(variance))
        (counted,) = torch.nonzero(places < len(variance), as_tuple=True)
        if not len(counted):
            return logits.sum() * 0.0
        theirs = pixels(teacher).index_select(0, counted) / tau
        p_log = theirs - theirs.logsumexp(1, keepdim=True)  # log_softmax is slow on short rows
        bound = soft_cross_entropy_bound(
            pixels(logits).index_select(0, counted),
            p_log.exp(),
            places.index_select(0, counted),
            variance,
            weights,
            strength,
            temperature=tau,
            form=surrogate,
        )
        return tau**2 * (bound + (p_log.exp() * p_log).sum(1)).mean()
