"""The fallback ladder, on a classifier whose last layer is hard to quantize."""

import dataclasses

import pytest
import torch
from torch import nn
from toy import CLASSES, dataset

from edgekd.artifacts import Store
from edgekd.data.augment import AugmentConfig
from edgekd.quantize import qat
from edgekd.quantize import stage as quantize_stage
from edgekd.quantize.ladder import FallbackConfig, failure, rank_layers, refusal
from edgekd.quantize.ptq import PtqConfig, run
from edgekd.quantize.qat import QuantizerConfig
from edgekd.tasks import Classification
from edgekd.train.checkpoint import Architecture, Loaded, save
from edgekd.train.hardware import ComputeConfig
from edgekd.train.optim import TrainConfig
from edgekd.train.stage import Context

SIZE = 4


class Hard(nn.Module):
    """A linear classifier behind a layer that hands on its input, and one constant that is ``spread`` times as large.

    The constant is worth nothing and costs the activation that ``last`` reads all of its codes.
    """

    def __init__(self, spread, inputs=3 * SIZE * SIZE):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, inputs + 1), nn.Linear(inputs + 1, CLASSES)
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([torch.eye(inputs), torch.zeros(1, inputs)]))
            self.first.bias.copy_(torch.tensor([3.0] * inputs + [spread]))
            self.last.weight[:, -1] = 0

    def forward(self, x):
        return self.last(self.first(x.flatten(1)).relu())


def classifier(data, spread):
    """Fitted to the data by least squares: nothing has to be trained."""
    net = Hard(spread)
    images = torch.from_numpy(data.train.images).permute(0, 3, 1, 2).float()
    images = ((images / 255 - 0.5) / 0.25).flatten(1) + 3
    wanted = nn.functional.one_hot(torch.from_numpy(data.train.labels), CLASSES).float()
    design = torch.cat([images, torch.ones(len(images), 1)], 1).double()
    solution = torch.linalg.solve(design.T @ design + 10 * torch.eye(design.shape[1]), design.T @ wanted.double()).float()
    with torch.no_grad():
        net.last.weight[:, :-1] = solution[:-1].T
        net.last.bias.copy_(solution[-1])
    return net.eval()


@pytest.fixture
def context(tmp_path):
    data = dataset(train=256, size_px=SIZE)
    # every split alike: what is measured is the ladder, not the generalisation
    data = dataclasses.replace(data, val=data.train, calib=data.train)
    return Context(
        compute=ComputeConfig(accelerator="cpu", threads=1),
        task=Classification(),
        dataset=data,
        augment=AugmentConfig(),
        seed=0,
        search=(),
        logs=tmp_path / "logs",
    )


def source(context, spread):
    architecture = Architecture({"name": "none"}, CLASSES, 3, SIZE, SIZE)
    return Loaded(classifier(context.dataset, spread), {}, architecture)


def climb(context, tmp_path, spread, *, equalization=False, **fallback):
    config = PtqConfig(kind="ptq", equalization=equalization, fallback=FallbackConfig(**fallback))
    trained = run(config, source(context, spread), context, title="ptq", work=tmp_path / "work")
    return trained, trained.evidence["ladder"]


def test_an_easy_model_ends_at_the_first_step(context, tmp_path):
    trained, ladder = climb(context, tmp_path, 3.0, max_drop=2)
    assert ladder["float"] > 0.75
    assert [(step["name"], step["kept"], step["int8_macs"], step["within"]) for step in ladder["steps"]] == [
        ("int8", [], 1.0, True)
    ]
    assert (ladder["reached"], ladder["precision"], ladder["ranking"]) == (True, "int8", [])
    assert {row["path"]: row["weight_bits"] for row in trained.layers} == {"first": 8, "last": 8}
    assert failure(trained.evidence) is None
    assert refusal(trained.evidence) is None


def test_exactly_the_hard_layer_stays_in_float(context, tmp_path):
    told = []
    context.say = told.append
    trained, ladder = climb(context, tmp_path, 1e4, max_drop=2, max_float=0.5)
    first, second = ladder["steps"]
    assert first["drop"] > 20
    assert not first["within"]
    assert (second["name"], second["kept"], second["within"]) == ("keep in float", ["last"], True)
    inputs = 3 * SIZE * SIZE
    assert second["int8_macs"] == pytest.approx(inputs / (inputs + CLASSES))
    assert [entry["path"] for entry in ladder["ranking"]] == ["last", "first"]
    assert ladder["ranking"][0]["divergence"] > 100 * ladder["ranking"][1]["divergence"]
    assert {row["path"]: row["weight_bits"] for row in trained.layers} == {"first": 8, "last": 32}
    assert trained.loaded.architecture.quantization["config"]["skip"] == ["last"]
    assert [line.split(":")[0].strip() for line in told] == [
        "int8",
        "ranking 2 layers by what int8 does to the outputs",
        "keep in float last",
    ]
    # what was judged is what is stored
    found = context.dataset.val
    images = ((torch.from_numpy(found.images).permute(0, 3, 1, 2).float() / 255) - 0.5) / 0.25
    with torch.no_grad():
        accuracy = float((trained.loaded.module(images).argmax(1).numpy() == found.labels).mean())
    assert accuracy == pytest.approx(second["metric"])


def test_the_result_is_rebuilt_from_its_plan(context, tmp_path, monkeypatch):
    trained, _ = climb(context, tmp_path, 1e4, max_drop=2)
    monkeypatch.setattr(
        quantize_stage, "build_float", lambda architecture: Loaded(Hard(1.0).eval(), {}, architecture)
    )  # the toy is in no table
    with Store(tmp_path / "run", print).draft(
        id="0" * 64, order=1, kind="checkpoint", stage="ptq", role="student", parents=(), config={}, environment={}
    ) as draft:
        save(draft.folder, trained.loaded.module, trained.loaded.architecture, [])
    again = quantize_stage.load(Store(tmp_path / "run", print).find("0" * 64))
    images = torch.randn(5, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(again.module(images), trained.loaded.module(images))


def test_float16_where_no_int8_model_is_near_enough(context, tmp_path):
    trained, ladder = climb(context, tmp_path, 1e4, max_drop=2, max_float=0)
    assert [(step["name"], step["within"]) for step in ladder["steps"]] == [("int8", False), ("float16", True)]
    assert ladder["steps"][1]["int8_macs"] == 0
    assert (ladder["reached"], ladder["precision"]) == (True, "float16")
    assert trained.loaded.architecture.quantization is not None  # the stage still gives its best quantized model
    assert refusal(trained.evidence) == (
        "no int8 model is within 2 points of the float model's accuracy on the validation split; float16 is"
    )
    assert failure(trained.evidence) is None


def test_none_reached_says_so_and_gives_its_best(context, tmp_path):
    trained, ladder = climb(context, tmp_path, 1e4, max_drop=2, max_float=0, float16=False)
    assert (ladder["reached"], ladder["precision"]) == (False, "int8")
    assert refusal(trained.evidence) is None
    drop = ladder["steps"][0]["drop"]
    assert failure(trained.evidence) == (
        "precision ladder: no step is within 2 points of the float model's accuracy on the validation split; "
        f"the nearest, int8, is {drop:.2f} points below"
    )


def test_training_goes_on_from_the_best_step(context, tmp_path):
    budget = TrainConfig(epochs=2, batch_size=64, lr=1e-4)
    trained, ladder = climb(context, tmp_path, 1e4, max_drop=0, max_float=0, float16=False, train=budget)
    assert [step["name"] for step in ladder["steps"]][:2] == ["int8", "train"]
    best = min(ladder["steps"], key=lambda step: step["drop"])
    assert len(trained.history) == (2 if best["name"] == "train" else 0)
    assert {row["weight_bits"] for row in trained.layers} == {8}
    # a metric of the untrained step that the training did not change in place
    assert ladder["steps"][0]["metric"] < ladder["float"]


def test_no_step_keeps_every_layer_or_more_than_allowed(context, tmp_path):
    _, ladder = climb(context, tmp_path, 1e4, max_drop=0, max_float=0.01, float16=False)
    assert [step["name"] for step in ladder["steps"]] == ["int8"]  # the smaller layer has 8 % of the MACs
    assert len(ladder["ranking"]) == 2


def test_ranking_leaves_out_what_is_skipped_already(context):
    quantizer = QuantizerConfig(skip=["last"])
    start = source(context, 1e4)
    quantized = qat.prepare(start.module, {}, quantizer, torch.zeros(2, 3, SIZE, SIZE))
    images = torch.randn(16, 3, SIZE, SIZE)
    assert [path for path, _ in rank_layers(quantizer, start, quantized, images)] == ["first"]


def test_the_divergence_of_a_layer_by_hand(context):
    start = source(context, 3.0)
    quantized = qat.prepare(start.module, {}, QuantizerConfig(), torch.zeros(2, 3, SIZE, SIZE))
    images = torch.randn(16, 3, SIZE, SIZE)
    found = dict(rank_layers(QuantizerConfig(), start, quantized, images))
    alone = qat.prepare(start.module, {}, QuantizerConfig(skip=["first"]), torch.zeros(2, 3, SIZE, SIZE))
    qat.calibrate(alone, [images])
    with torch.no_grad():
        expected, received = start.module(images), alone.eval()(images)
    assert found["last"] == pytest.approx(float((received - expected).square().sum() / expected.square().sum()), rel=1e-4)


def test_equalization_that_finds_nothing_says_so(context, tmp_path):
    lines = []
    context.warn = lines.append
    lonely = Loaded(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES)), {}, source(context, 1.0).architecture)
    run(PtqConfig(kind="ptq", equalization=True), lonely, context, title="ptq", work=tmp_path)
    assert lines == ["ptq: equalization found no two layers with nothing but a ReLU between them, and changed nothing"]


def test_a_model_that_does_not_run_in_float16_says_so(context, tmp_path):
    class Single(Hard):
        def forward(self, x):
            return self.last(self.first(x.flatten(1).float()).relu())

    lines = []
    context.warn = lines.append
    start = source(context, 1e4)
    single = Single(1e4).eval()
    single.load_state_dict(start.module.state_dict())
    config = PtqConfig(kind="ptq", fallback=FallbackConfig(max_drop=2, max_float=0))
    trained = run(config, Loaded(single, {}, start.architecture), context, title="ptq", work=tmp_path)
    assert len(lines) == 1
    assert lines[0].startswith("precision ladder: Single does not run in float16: ")
    assert trained.evidence["ladder"]["reached"] is False
    assert [step["name"] for step in trained.evidence["ladder"]["steps"]] == ["int8"]
