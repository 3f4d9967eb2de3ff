"""Capturing tensors by role."""

import gc

import pytest
import torch
from torch import nn

from edgekd.errors import RecipeError
from edgekd.nn.taps import capture, replace, resolve, run_until


class Twice(nn.Module):
    """Uses one layer twice, and has a part that returns a pair."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.pair = nn.LSTM(2, 2)

    def forward(self, x):
        x = self.layer(self.layer(x))
        return self.pair(x)[0]


def test_resolve_keeps_the_order_and_nothing_else():
    available = {"stem": "a", "stage1": "b", "logits": "c"}
    assert list(resolve(["logits", "stem"], available).items()) == [("logits", "c"), ("stem", "a")]


def test_resolve_names_the_nearest_and_all():
    with pytest.raises(RecipeError, match=r"no tap 'stage11' \(did you mean 'stage1'\?\); it has: stem, stage1, logits"):
        resolve(["stage11"], {"stem": "a", "stage1": "b", "logits": "c"})
    with pytest.raises(RecipeError, match="it has: none"):
        resolve(["stem"], {})


def test_capture_outputs_and_inputs_and_leaves_no_trace():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = [dict(vars(module)) for module in model.modules()]
    x = torch.randn(5, 3)
    with capture(model, {"hidden": "1", "head_in": "2@input", "before": "0", "all": ""}) as taps:
        assert taps == {}
        logits = model(x)
    hidden = model[1](model[0](x))
    assert torch.equal(taps["hidden"], hidden)
    assert torch.equal(taps["head_in"], hidden)
    assert torch.equal(taps["before"], model[0](x))
    assert torch.equal(taps["all"], logits)
    after = [dict(vars(module)) for module in model.modules()]
    assert after == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    taps.clear()
    model(x)
    assert taps == {}


def test_gradients_flow_through_a_tap():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with capture(model, {"hidden": "0"}) as taps:
        model(torch.randn(5, 3))
    taps["hidden"].sum().backward()
    assert model[0].weight.grad is not None
    assert model[1].weight.grad is None


def test_each_forward_replaces_the_last():
    model = nn.Sequential(nn.Linear(3, 4))
    with capture(model, {"out": "0"}) as taps:
        model(torch.zeros(1, 3))
        model(torch.zeros(7, 3))
    assert taps["out"].shape == (7, 4)


def test_hooks_go_even_when_the_block_fails():
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(RuntimeError, match="stop"), capture(model, {"out": "0"}):
        raise RuntimeError("stop")
    assert not model[0]._forward_hooks


def test_module_called_twice_leaves_its_last_call():
    model = Twice()
    x = torch.randn(4, 2)
    with capture(model, {"out": "layer", "in": "layer@input"}) as taps:
        model(x)
    assert torch.equal(taps["in"], model.layer(x))
    assert torch.equal(taps["out"], model.layer(model.layer(x)))


def test_what_is_no_tensor_is_refused():
    model = Twice()
    with (
        capture(model, {"both": "pair"}),
        pytest.raises(RecipeError, match="tap 'both' at 'pair' must be one tensor; it is tuple"),
    ):
        model(torch.randn(4, 2))


def test_missing_module_is_refused_before_any_forward():
    with pytest.raises(RecipeError, match="no module 'layr'"), capture(Twice(), {"out": "layr"}):
        pass


def test_works_inside_distributed_data_parallel(tmp_path):
    def run():
        inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        model = nn.parallel.DistributedDataParallel(inner)
        with capture(inner, {"hidden": "1"}) as taps:
            loss = model(torch.randn(5, 3)).sum() + taps["hidden"].sum()
        loss.backward()
        assert taps["hidden"].shape == (5, 4)
        assert inner[0].weight.grad is not None

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run()
        # a model that is the last to let go of the group waits, now and then for ever, for threads that wait for Python's lock
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()


def test_replaced_outputs_reach_what_follows_and_nothing_else():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    x, other = torch.randn(5, 3), torch.randn(5, 4, requires_grad=True)
    with replace(model, {"1": other}), capture(model, {"seen": "2@input"}) as taps:
        logits = model(x)
    assert torch.equal(taps["seen"], other)
    torch.testing.assert_close(logits, model[2](other))
    logits.sum().backward()
    assert other.grad is not None
    assert model[2].weight.grad is not None
    assert model[0].weight.grad is None
    assert model[1].weight.grad is None
    assert torch.equal(model(x), model[2](model[1](model[0](x)))), "no hook is left"


def test_a_run_ends_at_its_tap():
    called = []
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].register_forward_hook(lambda *_: called.append(1))
    x = torch.randn(5, 3)
    assert torch.equal(run_until(model, "0", x), model[0](x))
    assert torch.equal(run_until(model, "1@input", x), model[0](x))
    assert not called
    assert not model[0]._forward_hooks
    run_until(model, "1", x).sum().backward()
    assert model[0].weight.grad is not None
    with pytest.raises(RecipeError, match="no module 'one'"):
        run_until(model, "one", x)


def test_a_run_that_does_not_come_by_says_so():
    model = Twice()
    model.idle = nn.Linear(2, 2)
    with pytest.raises(RecipeError, match="does not call 'idle'"):
        run_until(model, "idle", torch.randn(4, 2))


def test_replace_refuses_inputs_and_unknown_places():
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(RecipeError, match="is an input; only outputs"), replace(model, {"0@input": torch.zeros(1, 3)}):
        pass
    with pytest.raises(RecipeError, match="no module 'one'"), replace(model, {"one": torch.zeros(1, 3)}):
        pass
