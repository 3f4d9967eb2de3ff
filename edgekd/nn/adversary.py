"""A critic that is trained against the student, with an optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from edgekd.nn.critics import adversarial_loss, praise

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Adversary(nn.Module):
    """A critic whose parameters the stage's optimizer leaves alone.

    The state of its optimizer is part of its own, so an interrupted training goes on with both.

    Args:
        critic: What is trained.
        optimizer: Makes its optimizer of its parameters; the learning rate that it is made with is the base of :meth:`update`'s.
        weight: Of its own loss.
        kind: Of that loss, see :func:`edgekd.nn.critics.adversarial_loss`.
        penalty_weight: The same.
    """

    def __init__(
        self,
        critic: nn.Module,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        weight: float = 1.0,
        kind: Literal["wgan-gp", "hinge"] = "wgan-gp",
        penalty_weight: float = 10.0,
    ) -> None:
        super().__init__()
        self.critic = critic
        self.weight, self.kind, self.penalty_weight = weight, kind, penalty_weight
        self.optimizer = optimizer(list(critic.parameters()))
        self.lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._shown: list[tuple[Tensor, Tensor]] = []

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the critic says."""
        out: Tensor = self.critic(*inputs)
        return out

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Inside, and for the gradients of what was computed inside, the critic is a constant: for the student's own term."""
        owned = [parameter for parameter in self.critic.parameters() if parameter.requires_grad]
        for parameter in owned:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in owned:
                parameter.requires_grad_(True)

    def judge(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's own term, :func:`praise`, in which the critic is a constant; both maps are kept for :meth:`shown`.

        Args:
            student: What the critic is to see of the student.
            teacher: The same of the teacher.
        """
        self._shown.append((student.detach(), teacher.detach()))
        with self.fixed():
            return praise(self(student))

    def shown(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's maps, detached, that were judged since the last call: what the critic learns from."""
        student, teacher = (torch.cat(maps) for maps in zip(*self._shown, strict=True))
        self._shown.clear()
        return student, teacher

    def loss(self) -> Tensor:
        """What the critic is to lower, weighted, on what was :meth:`shown`."""
        student, teacher = self.shown()
        return self.weight * adversarial_loss(self, teacher, student, kind=self.kind, penalty_weight=self.penalty_weight)

    def update(self, loss: Tensor, fabric: Fabric, *, rate: float = 1.0) -> None:
        """One step of the critic towards a smaller loss.

        Args:
            loss: A scalar that was computed outside of :meth:`fixed` and outside of autocast: gradient penalties need float32.
            fabric: Averages the gradients over all processes.
            rate: Factor of the base learning rate, for schedules.
        """
        for group, base in zip(self.optimizer.param_groups, self.lr, strict=True):
            group["lr"] = base * rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if fabric.world_size > 1:
            for parameter in self.critic.parameters():
                if parameter.grad is not None:
                    fabric.all_reduce(parameter.grad, reduce_op="mean")  # in place
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def get_extra_state(self) -> dict[str, Any]:
        """The optimizer's state, for the state dict."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From the state dict; it follows the parameters to their device."""
        self.optimizer.load_state_dict(state)


def stage_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module that the stage's optimizer trains: all but the adversaries'."""
    apart = {id(parameter) for part in module.modules() if isinstance(part, Adversary) for parameter in part.parameters()}
    return (parameter for parameter in module.parameters() if id(parameter) not in apart)
