"""Critics: networks that score maps, high for a teacher's and low for a student's, and the losses that they are trained with.

Arjovsky, Chintala, Bottou: Wasserstein GAN. ICML 2017, arXiv 1701.07875.
Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville: Improved Training of Wasserstein GANs. NIPS 2017, arXiv 1704.00028.
Miyato, Kataoka, Koyama, Yoshida: Spectral Normalization for Generative Adversarial Networks. ICLR 2018, arXiv 1802.05957.
Zhang, Goodfellow, Metaxas, Odena: Self-Attention Generative Adversarial Networks. ICML 2019, arXiv 1805.08318.
Isola, Zhu, Zhou, Efros: Image-to-Image Translation with Conditional Adversarial Networks. CVPR 2017, arXiv 1611.07004.

A critic exists only while a student is trained, so it has no evaluation mode: every call normalises, and every call moves the
singular vectors. All of it can be differentiated twice, for the gradient penalty. Call it outside autocast: neither singular
vectors nor the norm of a gradient survive 16 bits.

Shape letters: B images, C channels, H rows, W columns, N = H * W places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.nn.precision import exact
from edgekd.nn.relations import resized

EPSILON = 1e-12
PATCH_SIDE_PX = 24
"""The shortest side that PatchCritic takes: its last norm needs 2 x 2 places."""
ATTENTION_SIDE_PX = 64
"""The shortest side that AttentionCritic takes, and the one that it gives one score for."""


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight, as a matrix [Cout, Cin * kh * kw], is divided by an estimate of its largest singular value.

    The estimate is u W v, where u and v are kept between calls: every call does one power iteration, v first, and takes what it
    gives for constants. The bias is not divided.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        self.u: Tensor
        self.v: Tensor
        self.register_buffer("u", _scaled(torch.randn(out_channels)))
        self.register_buffer("v", _scaled(torch.randn(self.weight[0].numel())))

    def forward(self, input: Tensor) -> Tensor:
        """[B, Cin, H, W] to [B, Cout, H', W']."""
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            # New tensors: graphs of earlier calls hold the old ones.
            self.v = _scaled(matrix.t() @ self.u)
            self.u = _scaled(matrix @ self.v)
        sigma = self.u @ (matrix @ self.v)
        return self._conv_forward(input, self.weight / sigma, self.bias)


class SelfAttention(nn.Module):
    """Adds to every place what it finds at all others, times gamma, which begins at 0: [B, C, H, W] to the same shape.

    Args:
        channels: C, a multiple of 8; queries and keys have an eighth of it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, channels // 8, 1), nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, maps: Tensor) -> Tensor:
        """The map with what was found."""
        query_BCN, key_BCN, value_BCN = (part(maps).flatten(2) for part in (self.query, self.key, self.value))
        shares_BNN = torch.softmax(query_BCN.transpose(1, 2) @ key_BCN, dim=-1)
        found_BCN = value_BCN @ shares_BNN.transpose(1, 2)
        return self.gamma * found_BCN.view_as(maps) + maps


class BatchStatistics(nn.Module):
    """Batch norm by the statistics of the present batch, with a gain and a bias; over the images of its own process.

    Not torch's layer: the one that several processes share there cannot be differentiated twice.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        return F.batch_norm(maps, None, None, self.weight, self.bias, training=True)


class AttentionCritic(nn.Module):
    """Five convolutions, all but the last with spectral norms, and two self-attentions: [B, C, H, W] to scores [B, 1, H', W'].

    Sides of 64 to 79 give one score, larger ones a score for every 16th place.

    Args:
        channels: C.
        input_norm: What is done to the maps first: a batch norm, tanh, or nothing.
    """

    def __init__(self, channels: int, input_norm: Literal["batch", "tanh", "none"] = "batch") -> None:
        super().__init__()
        norms: dict[str, Callable[[], nn.Module]] = {
            "batch": lambda: BatchStatistics(channels),
            "tanh": nn.Tanh,
            "none": nn.Identity,
        }
        self.norm = norms[input_norm]()
        self.layers = nn.Sequential(
            *_halving(channels, 64),
            *_halving(64, 128),
            *_halving(128, 256),
            SelfAttention(256),
            *_halving(256, 512),
            SelfAttention(512),
            nn.Conv2d(512, 1, 4),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """The scores.

        Raises:
            ValueError: A side is too short.
        """
        _check_sides(maps, ATTENTION_SIDE_PX, type(self).__name__)
        scores: Tensor = self.layers(self.norm(maps))
        return scores


class PatchCritic(nn.Module):
    """Five convolutions, the inner three with instance norms: [B, C, H, W] to a score for every patch of 70 x 70, [B, 1, H', W'].

    Args:
        channels: C, with those of the image where the critic sees it: see :func:`with_image`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers += [nn.Conv2d(before, after, 4, stride, 1), nn.InstanceNorm2d(after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """The scores.

        Raises:
            ValueError: A side is too short.
        """
        _check_sides(maps, PATCH_SIDE_PX, type(self).__name__)
        scores: Tensor = self.layers(maps)
        return scores


def score_map(logits_BKHW: Tensor, side_px: int | None) -> Tensor:
    """Logits in float32 at least, averaged down until the shorter side has ``side_px``; None leaves them as they are.

    The ratio of the sides stays. A critic of full-resolution logits costs more than the student that it teaches.
    """
    logits, (height, width) = exact(logits_BKHW), logits_BKHW.shape[2:]
    if side_px is None or min(height, width) <= side_px:
        return logits
    return resized(logits, [round(side * side_px / min(height, width)) for side in (height, width)])


def with_image(images_BCHW: Tensor, maps_BKHW: Tensor) -> Tensor:
    """What a conditional critic sees: the image, brought to the maps' size, and the maps: [B, C + K, H, W]."""
    images = F.interpolate(images_BCHW, size=maps_BKHW.shape[2:], mode="bilinear", align_corners=True)
    return torch.cat([images.to(maps_BKHW.dtype), maps_BKHW], 1)


def praise(fake_scores: Tensor) -> Tensor:
    """What the student lowers: minus the mean score of its own maps."""
    return -fake_scores.mean()


def wasserstein_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """What the critic lowers: the mean score of the student's maps minus that of the teacher's; with :func:`gradient_penalty`."""
    return fake_scores.mean() - real_scores.mean()


def hinge_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """What the critic lowers instead, without a penalty: how far the teacher's scores are under 1 and the student's over -1."""
    return F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()


def adversarial_loss(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    kind: Literal["wgan-gp", "hinge"] = "wgan-gp",
    penalty_weight: float = 10.0,
) -> Tensor:
    """What a critic lowers in one step; it is called for the teacher's maps, for the student's, then for those in between.

    Args:
        critic: Maps to scores.
        real: The teacher's maps, [B, C, H, W]; no gradient flows into them.
        fake: The student's, the same.
        kind: :func:`wasserstein_loss` with ``penalty_weight`` times :func:`gradient_penalty`, or :func:`hinge_loss` alone.
        penalty_weight: lambda of the penalty.
    """
    scores = critic(real.detach()), critic(fake.detach())
    if kind == "hinge":
        return hinge_loss(*scores)
    return wasserstein_loss(*scores) + penalty_weight * gradient_penalty(critic, real, fake)


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, shares_B: Tensor | None = None) -> Tensor:
    """The mean over images of (the norm of the critic's gradient - 1)^2, between the teacher's and the student's maps.

    Args:
        critic: Maps to scores; the gradient is that of their sum, with respect to what it is given.
        real: [B, C, H, W], a constant.
        fake: The same shape, a constant.
        shares_B: [B], how much of each point is real; None draws them evenly from 0 to 1.

    Returns:
        A scalar; only the critic gets a gradient from it.

    Reference:
        arXiv 1704.00028, equation 3, without its factor lambda.
    """
    if shares_B is None:
        shares_B = torch.rand(len(real), dtype=real.dtype, device=real.device)
    shares = shares_B.view(-1, *[1] * (real.ndim - 1))
    between = (shares * real.detach() + (1 - shares) * fake.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def _scaled(vector: Tensor) -> Tensor:
    return vector / (vector.norm() + EPSILON)


def _halving(before: int, after: int) -> tuple[nn.Module, nn.Module]:
    """Halves both sides."""
    return SpectralConv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.1)


def _check_sides(maps: Tensor, least: int, who: str) -> None:
    height, width = maps.shape[2:]
    if min(height, width) < least:
        raise ValueError(f"{who} needs maps of at least {least} x {least}; received {height} x {width}")
