"""What a distillation method is."""

from __future__ import annotations

from torch import Tensor, nn

from edgekd._config import Config
from edgekd.errors import RecipeError, nearest
from edgekd.nn.adversary import Adversary
from edgekd.nn.critics import ATTENTION_SIDE_PX
from edgekd.nn.taps import tap_shapes
from edgekd.train.checkpoint import Loaded
from edgekd.train.loop import Setting
from edgekd.train.step import StepInputs, TrainState, critic_step, train_step


def needs_teacher(method: Config) -> bool:
    """Whether a method's section asks for a teacher. One that does not has ``needs_teacher: ClassVar[bool] = False``.

    Such a method is built, prepared and trained with None in the teacher's place, whether the recipe has one or not.
    """
    return bool(getattr(method, "needs_teacher", True))


class Distiller(nn.Module):
    """A method at work: it says which taps it wants and gives weighted, named terms.

    Adapters, critics and memory banks are submodules, so they are trained and saved with it. The methods below are all there is
    to override; a method class derives from this one directly.
    """

    student_taps: tuple[str, ...] = ()
    """Roles of the student's tensors that ``losses`` reads."""
    teacher_taps: tuple[str, ...] = ()
    """Roles of the teacher's tensors that ``losses`` reads."""
    half_labelled: bool = False
    """Where the data has unlabelled images: every batch has as many of them as of labelled ones."""

    def __init__(self) -> None:
        super().__init__()
        self.adversary: Adversary | None = None
        """A critic that learns after every step of the student, from what was judged in it."""

    def prepare(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> None:
        """Run once before the first epoch: warm-ups, selections, prototypes. Does nothing by default.

        Everything is on its device, the teacher frozen. What it finds belongs into parameters and buffers: a training that goes
        on loads them and does not run it again.
        """

    def losses(self, step: StepInputs) -> dict[str, Tensor]:
        """Named scalars, already weighted. The loop adds the task loss as the term ``task``."""
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def statistics(self, student: nn.Module, teacher: nn.Module, setting: Setting) -> dict[str, float]:  # noqa: ARG002
        """What is worth knowing of the method's own parts after the last epoch: name -> value. Nothing by default.

        The student is trained, on the CPU, in eval mode; the method and the teacher are on the setting's device.
        """
        return {}

    def train_step(self, state: TrainState, images: Tensor, labels: Tensor) -> dict[str, float]:
        """One optimizer step of the student, then one of the critic, if any; data-free and online methods replace it whole."""
        terms = train_step(state, images, labels)
        return terms if self.adversary is None else terms | critic_step(state, self.adversary)


def map_channels(
    student: Loaded,
    teacher: Loaded,
    layers: list[str] | None,
    *,
    method: str,
    last: int | None = None,
    option: str = "layers",
) -> dict[str, tuple[int, int]]:
    """The maps that a method compares one to one: role -> channels in the student and in the teacher, in the order of execution.

    Args:
        student: Gives the roles and the order.
        teacher: Must have the same roles.
        layers: The roles; None takes every map [B, C, H, W] that both have, each place once, heads left out.
        method: Its name, for messages.
        last: With ``layers`` None, only so many of the last ones.
        option: What the method calls ``layers``, for messages.

    Raises:
        RecipeError: A role is missing, is no map, or there is none.
    """
    shared = [role for role in student.taps if role in teacher.taps and not role.startswith("head")]
    for role in layers or ():
        for owner, loaded in (("student", student), ("teacher", teacher)):
            if role not in loaded.taps:
                raise RecipeError(
                    f"{method}.{option}: the {owner} has no tap {role!r}{nearest(role, list(loaded.taps))}",
                    hint=f"taps of both: {', '.join(shared) or 'none'}",
                )
    roles = list(layers) if layers is not None else shared
    ours = tap_shapes(student.module, {role: student.taps[role] for role in roles}, student.architecture.example())
    theirs = tap_shapes(teacher.module, {role: teacher.taps[role] for role in roles}, teacher.architecture.example())
    found: dict[str, tuple[int, int]] = {}
    places: set[str] = set()
    for role, shape in ours.items():
        if len(shape) != 4 or len(theirs[role]) != 4:
            if layers is not None:
                raise RecipeError(
                    f"{method}.{option}: {role!r} is no map [B, C, H, W]: {list(shape)}", hint="leave it out, or choose another"
                )
        elif layers is not None or student.taps[role] not in places:
            found[role] = (shape[1], theirs[role][1])
            places.add(student.taps[role])
    if not found:
        raise RecipeError(
            f"{method}: student and teacher have no map in common; their taps: {', '.join(student.taps) or 'none'}; "
            f"{', '.join(teacher.taps) or 'none'}",
            hint="give both models the same roles with the models' taps",
        )
    return dict(list(found.items())[-last:]) if layers is None and last is not None else found


def map_pairs(
    student: Loaded, teacher: Loaded, layers: list[tuple[str, str]] | None, *, method: str
) -> tuple[list[tuple[str, str]], dict[str, tuple[int, int]]]:
    """The pairs of maps within a network that a method relates, and what :func:`map_channels` says of each of their roles.

    Args:
        student: Has as many channels in both maps of a pair.
        teacher: Must have the same roles.
        layers: Pairs of roles, shallow and deep; None takes the student's first map that has one like it, and the last like it.
        method: Its name, for messages.

    Raises:
        RecipeError: As :func:`map_channels`, or a pair differs in channels, or there is none.
    """
    roles = None if layers is None else list(dict.fromkeys(role for pair in layers for role in pair))
    channels = map_channels(student, teacher, roles, method=method)
    pairs = layers or [_alike(channels, method)]
    for shallow, deep in pairs:
        if channels[shallow][0] != channels[deep][0]:
            counts = " and ".join(f"{role!r} has {channels[role][0]}" for role in (shallow, deep))
            raise RecipeError(
                f"{method}.layers: both taps of a pair need as many channels in the student; {counts}",
                hint="pair a stage of the encoder with one of the decoder at the same resolution",
            )
    return pairs, {role: channels[role] for pair in pairs for role in pair}


def output_shapes(student: Loaded, teacher: Loaded) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of what both models answer with."""
    ours, theirs = (tap_shapes(one.module, {"output": ""}, one.architecture.example())["output"] for one in (student, teacher))
    return ours, theirs


def score_maps(student: Loaded, teacher: Loaded, *, method: str, critic: bool, least_px: int = ATTENTION_SIDE_PX) -> int:
    """The number of classes of models that answer with a score for every class at every place.

    Args:
        student: Its output must have the shape of the teacher's.
        teacher: The other.
        method: Its name, for messages.
        critic: A critic is to see them.
        least_px: The shortest side that it takes.

    Raises:
        RecipeError: The outputs are no score maps [B, K, H, W] of one shape with K at least 2, or too small for the critic.
    """
    ours, theirs = output_shapes(student, teacher)
    if len(ours) != 4 or ours != theirs:
        raise RecipeError(
            f"{method} compares score maps [B, K, H, W] of one shape; the student's output is {list(ours)}, the teacher's "
            f"{list(theirs)}",
            hint="it is a method for the task segmentation",
        )
    if ours[1] < 2:
        raise RecipeError(
            f"{method} compares classes at every place, and the models give one map",
            hint="it is a method for the task segmentation",
        )
    if critic and min(ours[2:]) < least_px:
        raise RecipeError(
            f"{method}: the critic needs score maps of at least {least_px} x {least_px}; the student's are {ours[2]} x {ours[3]}",
            hint="raise data.size_px, or set the weight of the critic's term to 0",
        )
    return ours[1]


def _alike(channels: dict[str, tuple[int, int]], method: str) -> tuple[str, str]:
    """The first map and the last one that has as many channels in the student."""
    roles = list(channels)
    for shallow in roles:
        deep = [role for role in roles[roles.index(shallow) + 1 :] if channels[role][0] == channels[shallow][0]]
        if deep:
            return shallow, deep[-1]
    raise RecipeError(
        f"{method}: no two maps of the student have as many channels: "
        f"{', '.join(f'{role} {ours}' for role, (ours, _) in channels.items())}",
        hint="tap a stage of the encoder and one of the decoder that have, and name both in layers",
    )
