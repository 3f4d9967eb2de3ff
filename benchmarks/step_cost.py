"""What a training step costs beyond its arithmetic: structured_kd with all its terms against the same step written out by hand.

The networks are the shipped recipe's, the images random ones of its size. The hand-written loop shares the networks (student,
teacher, critic) and nothing else with edgekd: it runs the same forward passes, computes the same task, pixel, pair-wise and
holistic losses, the critic's loss and its gradient penalty, steps the same optimizers and keeps the same moving average of the
weights. Both begin with equal weights and draw the same numbers; that they do the same work is checked before anything is timed:
their terms, and what a step changes, agree.

The loops take turns in one run, one step each, in an order that rotates, because absolute times drift. The hand-written loop runs
twice per round: the ratio of the two is the noise that the other ratio has to be read with. Exits with 1 where edgekd misses its
limit.

    python benchmarks/step_cost.py [--rounds 30] [--threads 1]

Writes results/step_cost.json with every sample.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd import __version__, models
from edgekd.artifacts import write_json
from edgekd.bench import host, sensors
from edgekd.bench.stats import ratio_of_medians
from edgekd.data.masks import MasksConfig
from edgekd.distill.structured_kd import StructuredKdConfig, StructuredKdDistiller
from edgekd.nn.adversary import Adversary
from edgekd.nn.taps import resolve
from edgekd.recipe import load_recipe
from edgekd.tasks import Segmentation
from edgekd.train.checkpoint import Architecture, Loaded
from edgekd.train.hardware import ComputeConfig, make_fabric
from edgekd.train.optim import Average, TrainConfig, make_optimizer
from edgekd.train.step import TrainState

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).parent / "results" / "step_cost.json"
RECIPE = "recipes/segmentation/structured_kd.yaml"
CLASSES, WEIGHTS = 11, (0.5, 1.0, 1.5, 0.2, 0.9, 1.0, 2.0, 1.0, 0.4, 5.0, 10.0)
"""CamVid's classes; weights of the size that ``balanced`` gives."""
IGNORED = 255
LIMIT = 1.05
"""Largest allowed ratio to the hand-written loop."""
AGREEING = 2
"""Steps in which both loops are compared, before any is timed."""
TOTAL_STEPS = 1000
Batch = tuple[Tensor, Tensor]
Step = Callable[[int, Batch], None]


def fresh(net: nn.Module) -> nn.Module:
    """A copy in the layout that trainings use."""
    return copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's annotation


class Bare:
    """The step as one would write it for this method alone."""

    def __init__(self, student: nn.Module, teacher: nn.Module, critic: nn.Module, config: TrainConfig) -> None:
        self.student, self.teacher, self.critic = (fresh(net) for net in (student, teacher, critic))
        self.student.train()
        self.teacher.eval().requires_grad_(False)
        self.maps: dict[str, Tensor] = {}
        for name, net in (("student", self.student), ("teacher", self.teacher)):
            net.get_submodule("decoder.0.blocks").register_forward_hook(
                lambda _, __, out, name=name: self.maps.__setitem__(name, out)
            )
        weights = [value for value in self.student.parameters() if value.ndim >= 2]
        others = [value for value in self.student.parameters() if value.ndim < 2]
        groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr)
        self.critic_optimizer = torch.optim.SGD(self.critic.parameters(), lr=4e-4, momentum=0.9, weight_decay=5e-4)
        self.decay = config.ema_decay or 0.0
        self.average = copy.deepcopy(self.student)
        self.class_weights = torch.tensor(WEIGHTS)
        self.values: list[float] = []

    def step(self, number: int, batch: Batch) -> None:
        """The student, the critic, the moving average."""
        images, labels = batch
        with torch.no_grad():
            theirs = self.teacher(images)
        ours = self.student(images)
        self.optimizer.zero_grad(set_to_none=True)
        task = F.cross_entropy(ours, labels.long(), weight=self.class_weights, ignore_index=IGNORED)
        pixel = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="sum", log_target=True)
        pixel = 10 * pixel / (ours.shape[0] * ours.shape[2] * ours.shape[3])
        pair = 0.5 * F.mse_loss(self._cosines(self.maps["student"]), self._cosines(self.maps["teacher"]))
        size = (64, round(64 * ours.shape[3] / ours.shape[2]))
        fake, real = F.adaptive_avg_pool2d(ours, size), F.adaptive_avg_pool2d(theirs, size)
        self.critic.requires_grad_(False)
        holistic = -0.1 * self.critic(fake).mean()
        (task + pixel + pair + holistic).backward()
        self.optimizer.step()

        self.critic.requires_grad_(True)
        fake = fake.detach()
        scores = self.critic(real).mean(), self.critic(fake).mean()
        share = torch.rand(len(real)).view(-1, 1, 1, 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        against = 0.1 * (scores[1] - scores[0]) + 0.1 * 10 * penalty
        self.critic_optimizer.zero_grad(set_to_none=True)
        against.backward()
        for group in self.critic_optimizer.param_groups:
            group["lr"] = 4e-4 * (1 - number / TOTAL_STEPS) ** 0.9
        self.critic_optimizer.step()

        decay = min(self.decay, (2 + number) / (11 + number))
        with torch.no_grad():
            for mine, value in zip(self.average.state_dict().values(), self.student.state_dict().values(), strict=True):
                if value.is_floating_point():
                    mine.lerp_(value, 1 - decay)
                else:
                    mine.copy_(value)
        self.values = [term.item() for term in (task, pixel, pair, holistic, against)]

    @staticmethod
    def _cosines(maps: Tensor) -> Tensor:
        half = (maps.shape[2] // 2, maps.shape[3] // 2)
        nodes = F.max_pool2d(maps, half, half, ceil_mode=True).flatten(2)
        nodes = nodes / (nodes.norm(dim=1, keepdim=True).detach() + 1e-8)
        return nodes.transpose(1, 2) @ nodes


class Ours:
    """The step as edgekd's training loop takes it."""

    def __init__(
        self, student: Loaded, teacher: Loaded, method: StructuredKdDistiller, config: TrainConfig, threads: int
    ) -> None:
        fabric = make_fabric(ComputeConfig(accelerator="cpu", threads=threads))
        self.student = fresh(student.module)
        self.method = copy.deepcopy(method)
        given = self.method.adversary
        assert given is not None
        options: dict[str, Any] = {"weight": given.weight, "kind": given.kind, "penalty_weight": given.penalty_weight}
        self.method.adversary = Adversary(given.critic, method._optimizer, **options)  # of the copy's parameters
        wrapped, optimizer = fabric.setup(self.student, make_optimizer([self.student, self.method], config))
        wrapped.train()
        self.state = TrainState(
            fabric=fabric,
            task=Segmentation(CLASSES, class_weights=WEIGHTS),
            student=wrapped,
            inner=self.student,
            teacher=fresh(teacher.module).eval().requires_grad_(False),
            objective=self.method,
            student_taps=resolve(self.method.student_taps, student.taps),
            teacher_taps=resolve(self.method.teacher_taps, teacher.taps),
            optimizer=optimizer,
            task_weight=1.0,
            clip_norm=config.clip_norm,
            accumulate=config.accumulate,
            total_steps=TOTAL_STEPS,
        )
        self.average = Average(self.student, config.ema_decay or 0.0)
        self.values: list[float] = []

    def step(self, number: int, batch: Batch) -> None:
        """What the loop does with one batch."""
        self.state.step = number
        terms = self.method.train_step(self.state, *batch)
        self.average.update(self.student)
        self.values = list(terms.values())


def networks(recipe: Any) -> tuple[Loaded, Loaded]:
    """The recipe's student and teacher with random weights."""
    data = recipe.data
    assert isinstance(data, MasksConfig)
    found = []
    for seed, config in enumerate((recipe.student.model, recipe.teacher.model)):
        torch.manual_seed(seed)
        module = models.build(config, num_classes=CLASSES, in_channels=data.channels)
        shape = Architecture(config.model_dump(mode="json"), CLASSES, data.channels, *data.size_px)
        found.append(Loaded(module, models.taps(config, module), shape))
    return found[0], found[1]


def batches(shape: tuple[int, int], size: int, count: int) -> list[Batch]:
    """Random images in the loop's memory format, and labels of which a few do not count."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        images = torch.randn(size, 3, *shape, generator=draw).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, CLASSES, (size, *shape), generator=draw, dtype=torch.uint8)
        labels[torch.rand(labels.shape, generator=draw) < 0.03] = IGNORED
        found.append((images, labels))
    return found


def same_work(ours: Ours, bare: Bare, batches: list[Batch]) -> dict[str, float]:
    """Take two steps with both, and see that they do the same: the terms of both steps, and what the first step changed.

    Two steps, because Adam takes rounding for a direction where a gradient is next to nothing: later ones drift apart.

    Returns:
        Relative differences: the largest of a term in the first and in the second step, and that of the first step's changes.

    Raises:
        SystemExit: They do not do the same.
    """
    assert ours.method.adversary is not None
    pairs = [
        (ours.student.state_dict(), bare.student.state_dict()),
        (ours.average.values, bare.average.state_dict()),
        (dict(ours.method.adversary.critic.named_parameters()), dict(bare.critic.named_parameters())),
    ]
    starts = [flat(theirs) for _, theirs in pairs]
    found: dict[str, float] = {}
    for number, (name, most) in enumerate((("first_terms", 1e-5), ("second_terms", 1e-3))):
        for step in (ours.step, bare.step):
            timed(step, number, batches[number])
        found[name] = max(abs(a - b) / abs(b) for a, b in zip(ours.values, bare.values, strict=True))
        if not number:
            changes = [(flat(one), flat(two), at) for (one, two), at in zip(pairs, starts, strict=True)]
            found["first_changes"] = max(float((one - two).norm() / (two - at).norm()) for one, two, at in changes)
        if not found[name] < most or not found["first_changes"] < 1e-3:
            sys.exit(f"the two loops do not do the same work: relative differences {found}")
    return found


def flat(values: Mapping[str, Tensor]) -> Tensor:
    """All numbers of a state, in one row."""
    return torch.cat([value.detach().double().flatten() for value in values.values()])


def timed(step: Step, number: int, batch: Batch) -> tuple[int, int]:
    """Nanoseconds of one step: by the wall's clock, and of this process's cores, which neighbours disturb less."""
    torch.manual_seed(number)
    start, start_cpu = time.perf_counter_ns(), time.process_time_ns()
    step(number, batch)
    return time.perf_counter_ns() - start, time.process_time_ns() - start_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="samples of each loop (default: 30)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = load_recipe(ROOT / RECIPE).recipe
    stage = recipe.stages[0]
    if stage.kind != "distill" or stage.method != StructuredKdConfig(name="structured_kd") or stage.task_weight != 1:
        sys.exit(f"{RECIPE} has other options than the hand-written loop")
    assert isinstance(recipe.data, MasksConfig)
    student, teacher = networks(recipe)
    torch.manual_seed(2)
    method = stage.method.build(student, teacher)
    assert method.adversary is not None
    ours = Ours(student, teacher, method, stage.train, given.threads)
    bare, again = (Bare(student.module, teacher.module, method.adversary.critic, stage.train) for _ in range(2))
    arms: dict[str, Step] = {"edgekd": ours.step, "by hand": bare.step, "by hand (again)": again.step}
    pool = batches(recipe.data.size_px, stage.train.batch_size, 4)
    differences = same_work(ours, bare, pool)
    for number in range(AGREEING):
        timed(again.step, number, pool[number])  # it has to be warm too

    samples: dict[str, list[tuple[int, int]]] = {name: [] for name in arms}
    gc.collect()
    before, cpu_before = sensors.read(), sensors.cpu_time()
    for number in range(AGREEING, AGREEING + given.rounds):
        names = list(arms)
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            samples[name].append(timed(arms[name], number, pool[number % len(pool)]))
    cpu_after, after = sensors.cpu_time(), sensors.read()

    machine = host.describe(backends=())
    others = sensors.neighbours(cpu_before, cpu_after)
    warnings, valid = sensors.judge(before, after, others, threads=given.threads, cores=machine["cpu"]["cores_usable"])
    wall, cores = ({name: [pair[kind] for pair in found] for name, found in samples.items()} for kind in (0, 1))
    ratio, interval = ratio_of_medians(wall["edgekd"], wall["by hand"])
    noise, noise_interval = ratio_of_medians(wall["by hand (again)"], wall["by hand"])
    cpu_ratio, cpu_interval = ratio_of_medians(cores["edgekd"], cores["by hand"])
    result = {
        "what": "wall time of training steps, interleaved; ratios of medians with a bootstrap interval of 95 %",
        "edgekd": __version__,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "recipe": RECIPE,
        "batch": stage.train.batch_size,
        "size_px": list(recipe.data.size_px),
        "threads": given.threads,
        "rounds": given.rounds,
        "ratio": ratio,
        "ratio_interval": list(interval),
        "noise_floor": {"ratio": noise, "interval": list(noise_interval)},
        "cpu_time": {"ratio": cpu_ratio, "interval": list(cpu_interval)},
        "limit": LIMIT,
        "ok": ratio <= LIMIT,
        "valid": valid,
        "warnings": warnings,
        "relative_differences": differences,
        "loops": [
            {"loop": name, "median_ms": statistics.median(wall[name]) / 1e6, "samples_ns": wall[name], "cpu_ns": cores[name]}
            for name in arms
        ],
        "load_average": os.getloadavg()[0],
        "host": machine,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, result)
    for loop in result["loops"]:
        print(f"{loop['loop']:<16} {loop['median_ms']:8.0f} ms a step")
    low, high = interval
    print(f"edgekd / by hand: {ratio:.3f} [{low:.3f}, {high:.3f}], at most {LIMIT}: {'ok' if result['ok'] else 'MISSED'}")
    print(f"in time of the cores: {cpu_ratio:.3f} [{cpu_interval[0]:.3f}, {cpu_interval[1]:.3f}]")
    print(f"by hand / itself: {noise:.3f} [{noise_interval[0]:.3f}, {noise_interval[1]:.3f}]", *warnings, sep="\n")
    if not result["ok"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
