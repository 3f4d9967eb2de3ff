"""A critic with its own optimizer: who trains it, and what of it is kept."""

import pytest
import torch
import toy
from torch import nn

from edgekd.nn.adversary import Adversary, stage_parameters
from edgekd.train.hardware import ComputeConfig, make_fabric
from edgekd.train.loop import train
from edgekd.train.optim import TrainConfig
from edgekd.train.step import TrainState, forward, train_step


def adversary(seed=0):
    torch.manual_seed(seed)
    return Adversary(nn.Linear(toy.CLASSES, 1), lambda owned: torch.optim.Adam(owned, lr=0.1))


class Contest(nn.Module):
    """The student wants the critic's praise, the critic to give it to the labels' own one-hot vectors."""

    student_taps = teacher_taps = ()

    def __init__(self):
        super().__init__()
        self.adversary = adversary()
        self.scale = nn.Parameter(torch.ones(()))
        self.progress = []

    def losses(self, step):
        self.progress.append(step.progress)
        self.logits = step.student.logits
        with self.adversary.fixed():
            return {"praise": -self.scale * self.adversary(self.logits).mean()}

    def train_step(self, state: TrainState, images, labels):
        terms = train_step(state, images, labels)
        true = nn.functional.one_hot(labels, toy.CLASSES).float()
        loss = (self.adversary(self.logits.detach()) - self.adversary(true)).mean()
        self.adversary.update(loss, state.fabric, rate=1 - state.progress)
        return {**terms, "critic": loss.item()}


def test_the_stage_trains_all_but_the_critic():
    contest = Contest()
    assert list(stage_parameters(contest)) == [contest.scale]
    assert len(list(contest.parameters())) == 3, "it is a part of the method all the same: placed and saved with it"


def test_fixed_gives_the_critic_no_gradient():
    opponent, values = adversary(), torch.randn(5, toy.CLASSES, requires_grad=True)
    with opponent.fixed():
        praise = opponent(values).mean()
    praise.backward()  # outside: what counts is where it was computed
    assert values.grad.abs().sum() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in opponent.parameters())


def test_what_was_judged_is_what_the_critic_learns_from():
    """Two parts of a batch; then nothing is left of them."""
    opponent = adversary()
    ours = [torch.randn(count, toy.CLASSES, requires_grad=True) for count in (2, 3)]
    theirs = [torch.randn(count, toy.CLASSES) for count in (2, 3)]
    terms = [opponent.judge(one, other) for one, other in zip(ours, theirs, strict=True)]
    assert terms[1].item() == pytest.approx(-opponent(ours[1]).mean().item())
    sum(terms).backward()
    assert all(one.grad.abs().sum() > 0 for one in ours)
    assert all(parameter.grad is None for parameter in opponent.parameters())
    student, teacher = opponent.shown()
    assert torch.equal(student, torch.cat(ours))
    assert torch.equal(teacher, torch.cat(theirs))
    assert not student.requires_grad
    opponent.judge(ours[0], theirs[0])
    assert len(opponent.shown()[0]) == 2


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_the_rate_scales_the_step(rate):
    opponent = Adversary(nn.Linear(2, 1), lambda owned: torch.optim.SGD(owned, lr=0.5))
    before, values = opponent.critic.weight.detach().clone(), torch.tensor([[1.0, -2.0]])
    opponent.update(opponent(values).sum(), make_fabric(ComputeConfig(accelerator="cpu", threads=1)), rate=rate)
    assert torch.allclose(before - opponent.critic.weight, 0.5 * rate * values)
    assert opponent.critic.weight.grad is None


def test_an_interrupted_contest_goes_on_with_its_optimizer(tmp_path):
    """Adam without its moments would take other steps."""
    config = TrainConfig(epochs=3, batch_size=8, lr=0.05)

    def run(folder, stop=None):
        student, contest = toy.net(1), Contest()

        def after(record):
            if record["epoch"] == stop:
                raise KeyboardInterrupt

        train(student=student, objective=contest, config=config, setting=toy.setting(folder, on_epoch=after))
        return student, contest

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=2)
    resumed = run(tmp_path / "cut")
    for one, other in zip(whole, resumed, strict=True):
        assert toy.same_state(one.state_dict(), other.state_dict())
    assert whole[1].progress == [step / 12 for step in range(12)]
    assert resumed[1].progress == [step / 12 for step in range(8, 12)]


def test_progress_is_seen_by_the_terms():
    contest = Contest()
    fabric = make_fabric(ComputeConfig(accelerator="cpu", threads=1))
    net = toy.net(1)
    wrapped, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    common = {"fabric": fabric, "task": None, "student": wrapped, "inner": net, "teacher": None, "objective": contest}
    state = TrainState(**common, student_taps={}, teacher_taps={}, optimizer=optimizer, step=3, total_steps=4)
    assert forward(state, torch.zeros(2, 3, 8, 8), torch.zeros(2)).progress == 0.75
