"""What every distillation method must do, asked of every member of ``METHODS``; and what must exist beside it.

Each method is built with its defaults and what its row of ``PAIRINGS`` adds, for two models of the table that differ in width,
and trained by the real loop.
"""

import dataclasses
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from ruamel.yaml import YAML

from edgekd import models
from edgekd.data.augment import AugmentConfig
from edgekd.data.augment_masks import MaskAugmentConfig
from edgekd.data.base import Dataset
from edgekd.distill import METHODS
from edgekd.errors import RecipeError
from edgekd.models import ModelConfig
from edgekd.tasks import Classification, Saliency, Segmentation
from edgekd.tasks.base import Task
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.hardware import ComputeConfig
from edgekd.train.loop import train
from edgekd.train.optim import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Pairing:
    """What a method is tried on."""

    student: ModelConfig
    teacher: ModelConfig | None
    task: Task
    data: Callable[[], Dataset]
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the method: only to make it small."""
    idle: tuple[str, ...] = ()
    """Parameters that no gradient can reach."""


def unet(width):
    return ModelConfig(name="unet", arguments={"width": width})


def scfnet(width, channels):
    return ModelConfig(name="scfnet", arguments={"backbone": "resnet18", "width": width, "channels": channels})


def segformer(width):
    return ModelConfig(name="segformer_b0", arguments={"width": width, "depths": [1, 1, 1, 1], "decoder": 8})


CLASSES = Pairing(
    ModelConfig(name="resnet8"), ModelConfig(name="wrn_16_2"), Classification(), lambda: toy.dataset(train=32, size_px=16)
)
MASKS = Pairing(unet(4), unet(8), Segmentation(toy.CLASSES), toy.scenes)
CRITICIZED = dataclasses.replace(MASKS, data=lambda: toy.scenes(size_px=64))  # the smallest that AttentionCritic reads
SALIENT = Pairing(scfnet(0.125, 4), scfnet(0.25, 8), Saliency(), lambda: toy.scenes(classes=2))
PAIRINGS: dict[str, Pairing] = {
    "structured_kd": CRITICIZED,
    "graph_flow": dataclasses.replace(
        CRITICIZED,
        arguments={"paraphraser_epochs": 1, "paraphraser_batch_size": 16},
        # what is added to all scores, and what a query's softmax does not see
        idle=tuple(f"adversary.critic.layers.{part}bias" for part in ("10.", "6.key.", "9.key.")),
    ),
    "generalizable_msan": dataclasses.replace(
        MASKS, arguments={"length": 16, "views": 2, "autoencoder_width": 4, "autoencoder_epochs": 1, "alignment_epochs": 1}
    ),
    "kd_scfnet": SALIENT,
    "slimseg": dataclasses.replace(
        MASKS, student=ModelConfig(name="slim_unet", arguments={"width": 4, "widths": [1, 0.5]}), teacher=None
    ),
    "transkd": Pairing(segformer(2), segformer(4), Segmentation(toy.CLASSES), toy.scenes, arguments={"variant": "ea"}),
    "fakd": MASKS,
    "coco_distillnet": dataclasses.replace(
        MASKS,
        arguments={"paraphraser_epochs": 1, "paraphraser_batch_size": 16},
        # what an instance norm takes away, and what is added to all scores
        idle=tuple(f"adversary.critic.layers.{part}.bias" for part in (2, 5, 8, 11)),
    ),
    "idd": dataclasses.replace(MASKS, arguments={"position_epochs": 1}),
}
"""Method -> what it is tried on, where that is not two classifiers."""


def name_of(config):
    (name,) = typing.get_args(config.model_fields["name"].annotation)
    return name


EVERY = pytest.mark.parametrize("method", METHODS, ids=name_of)


def loaded(config, module, size_px):
    return Loaded(
        module, models.taps(config, module), Architecture(config.model_dump(mode="json"), toy.CLASSES, 3, size_px, size_px)
    )


class Pair:
    """A student, a teacher and the method between them, all from seeds."""

    def __init__(self, method, work, *, precision="32-true"):
        self.pairing = pairing = PAIRINGS.get(name_of(method), CLASSES)
        data = pairing.data()
        torch.manual_seed(1)
        self.student = models.build(pairing.student, num_classes=toy.CLASSES, in_channels=3)
        torch.manual_seed(2)
        self.teacher = pairing.teacher and models.build(pairing.teacher, num_classes=toy.CLASSES, in_channels=3)
        self.setting = toy.setting(
            work,
            compute=ComputeConfig(accelerator="cpu", threads=1, precision=precision),
            data=data,
            task=pairing.task,
            augment=AugmentConfig(flip=True, crop_padding_px=1) if pairing is CLASSES else MaskAugmentConfig(flip=True),
        )
        torch.manual_seed(3)
        config = method(name=name_of(method), **pairing.arguments)
        self.distiller = config.build(
            loaded(pairing.student, self.student, data.height),
            self.teacher and loaded(pairing.teacher, self.teacher, data.height),
        )

    def taps(self, owner):
        """Role -> module path of the student or the teacher."""
        return models.taps(getattr(self.pairing, owner), getattr(self, owner)) if getattr(self, owner) is not None else {}

    def train(self, **given):
        config = TrainConfig(epochs=1, batch_size=16, lr=0.01, momentum=0, weight_decay=0)
        return train(
            student=self.student,
            objective=self.distiller,
            config=config,
            setting=self.setting,
            teacher=self.teacher,
            student_taps=given.pop("student_taps", self.taps("student")),
            teacher_taps=given.pop("teacher_taps", self.taps("teacher")),
            prepare=lambda: self.distiller.prepare(self.student, self.teacher, self.setting),
            **given,
        )


@EVERY
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_all_terms_are_finite(method, precision, tmp_path):
    pair = Pair(method, tmp_path, precision=precision)
    (record,) = pair.train()
    assert set(record["terms"]) > {"task"}, "a method gives at least one term of its own"
    assert all(value.isfinite().all() for value in pair.student.state_dict().values())


@EVERY
def test_student_and_learned_parts_learn_from_the_method_alone(method, tmp_path):
    """With the task switched off, what changes is the method's doing."""
    pair = Pair(method, tmp_path)
    student = {name: value.detach().clone() for name, value in pair.student.named_parameters()}
    own = {name: value.detach().clone() for name, value in pair.distiller.named_parameters() if value.requires_grad}
    pair.train(task_weight=0.0)
    moved = [name for name, value in pair.student.named_parameters() if not torch.equal(value, student[name])]
    assert moved, "no gradient reaches the student"
    still = [name for name, value in pair.distiller.named_parameters() if name in own and torch.equal(value, own[name])]
    still = [name for name in still if name not in pair.pairing.idle]
    assert not still, f"these parts of the method never learn: {still}"


@EVERY
def test_the_teacher_is_left_alone(method, tmp_path):
    pair = Pair(method, tmp_path)
    if pair.teacher is None:
        pytest.skip(f"{name_of(method)} has no teacher")
    before = toy.state_of(pair.teacher)
    pair.train()
    assert toy.same_state(pair.teacher.state_dict(), before)
    assert all(parameter.grad is None for parameter in pair.teacher.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pair.teacher.modules())
    shared = {id(parameter) for parameter in pair.teacher.parameters()}
    assert not [name for name, parameter in pair.distiller.named_parameters() if id(parameter) in shared], "would be trained"


@EVERY
def test_one_seed_gives_one_result(method, tmp_path):
    results = []
    for folder in ("a", "b"):
        pair = Pair(method, tmp_path / folder)
        (record,) = pair.train()
        results.append((record["terms"], pair.student.state_dict(), pair.distiller.state_dict()))
    assert results[0][0] == results[1][0]
    assert toy.same_state(results[0][1], results[1][1])
    assert toy.same_state(results[0][2], results[1][2])


@EVERY
def test_its_state_round_trips(method, tmp_path):
    """A resumed training builds the method anew and loads what it had learnt."""
    trained = Pair(method, tmp_path / "a")
    trained.train()
    other = Pair(method, tmp_path / "b")
    other.distiller.load_state_dict(trained.distiller.state_dict())
    assert toy.same_state(other.distiller.state_dict(), trained.distiller.state_dict())


@EVERY
def test_the_students_structure_is_left_alone(method, tmp_path):
    pair = Pair(method, tmp_path)
    names = list(pair.student.state_dict())
    pair.train()
    assert list(pair.student.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pair.student.modules())


@EVERY
@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_a_tap_that_is_not_there_fails_well(method, owner, tmp_path):
    pair = Pair(method, tmp_path)
    wanted = getattr(pair.distiller, f"{owner}_taps")
    if not wanted:
        pytest.skip(f"{name_of(method)} reads no taps of the {owner}")
    missing = {role: place for role, place in pair.taps(owner).items() if role != wanted[0]}
    with pytest.raises(RecipeError, match=f"no tap '{wanted[0]}'") as caught:
        pair.train(**{f"{owner}_taps": missing})
    assert all(role in caught.value.message for role in missing)


@EVERY
def test_its_options_say_what_they_are(method):
    assert method.__doc__
    for name, field in method.model_fields.items():
        if name != "name":
            assert field.description, f"{name} has no sentence that says what it is, with symbol and unit"
            assert not field.is_required(), f"{name} has no default: the paper's"
    assert method.model_config["extra"] == "forbid"


def test_names_are_unique():
    names = [name_of(method) for method in METHODS]
    assert len(set(names)) == len(names)


def methods_in_recipes():
    """Method name -> recipes with a stage that uses it."""
    found = {}
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        for stage in YAML(typ="safe").load(path)["stages"]:
            if stage.get("method"):
                found.setdefault(stage["method"]["name"], set()).add(path.name)
    return found


@EVERY
def test_a_method_is_complete(method):
    """A method is done when it has, beside its file, a test of its own, a recipe to start from, and a row in the table.

    Deliberately without exceptions: a method that nobody can find or run is not there.
    """
    name = name_of(method)
    assert method.__module__ == f"edgekd.distill.{name}", f"the method {name!r} belongs into edgekd/distill/{name}.py"
    test = ROOT / "tests" / "distill" / f"test_distill_{name}.py"
    assert test.is_file(), f"add {test.relative_to(ROOT)}"
    recipes = methods_in_recipes().get(name)
    assert recipes, f"add a recipe under recipes/ with a stage whose method is {{name: {name}}}"
    row = re.search(rf"^\| `{re.escape(name)}` \|(.*)\|$", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    assert row, f"add a row for `{name}` to docs/methods.md"
    cells = [cell.strip() for cell in row[1].split("|")]
    assert len(cells) == 4, f"the row of `{name}` has {len(cells) + 1} columns instead of 5"
    assert all(cells), f"the row of `{name}` has an empty column"
    assert f"{name}.py" in cells[2]
    assert any(recipe in cells[3] for recipe in recipes), f"the row of `{name}` names none of the recipes {sorted(recipes)}"
