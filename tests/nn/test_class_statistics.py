"""Statistics of each class's pixels: against numpy over all that were seen, and however they were cut into batches."""

import numpy as np
import pytest
import torch

from edgekd.nn.class_statistics import ClassStatistics, class_sums, nearest_labels

CLASSES = 4


def drawn(*shape, seed=0, offset=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def labels(*shape, seed=1):
    """Classes 0 to 2 (3 never appears) and 255."""
    found = torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(seed))
    return found.where(found < 3, 255).to(torch.uint8)


@pytest.mark.parametrize("cuts", [(6,), (2, 4), (1, 1, 1, 3)])
def test_all_that_was_seen(cuts):
    """Means far from zero, where squares would cancel; the same for every cut."""
    maps, true = drawn(6, 3, 5, 7, offset=1000.0), labels(6, 5, 7)
    statistics, start = ClassStatistics(CLASSES, 3), 0
    for count in cuts:
        statistics.update(maps[start : start + count], true[start : start + count])
        start += count
    for index in range(CLASSES):
        values = maps.movedim(1, -1).numpy()[true.numpy() == index]
        assert statistics.count[index] == len(values)
        expected = (values.mean(0), values.var(0)) if len(values) else (np.zeros(3), np.zeros(3))
        np.testing.assert_allclose(statistics.mean[index].numpy(), expected[0], rtol=1e-9)
        np.testing.assert_allclose(statistics.variance[index].numpy(), expected[1], rtol=1e-6)


def test_a_batch_without_a_class_leaves_it_as_it_was():
    statistics = ClassStatistics(2, 1)
    statistics.update(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[0, 0]]]))
    statistics.update(torch.tensor([[[[7.0, 9.0]]]]), torch.tensor([[[1, 255]]]))
    assert statistics.count.tolist() == [2, 1]
    assert statistics.mean.tolist() == [[2], [7]]
    assert statistics.variance.tolist() == [[1], [0]]


def test_half_precision_is_summed_in_float32():
    maps, true = drawn(1, 2, 64, 64).bfloat16(), torch.zeros(1, 64, 64)
    statistics = ClassStatistics(1, 2)
    statistics.update(maps, true)
    torch.testing.assert_close(statistics.mean[0], maps.double().mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_it_learns_nothing_and_is_saved():
    statistics, maps = ClassStatistics(2, 1), drawn(1, 1, 2, 2).requires_grad_()
    statistics.update(maps, torch.zeros(1, 2, 2))
    assert not list(statistics.parameters())
    assert set(statistics.state_dict()) == {"count", "mean", "variance"}
    assert not statistics.variance.requires_grad


def test_sums_pass_gradients_to_the_pixels_that_count():
    values, classes = drawn(5, 2).requires_grad_(), torch.tensor([0, 2, 255, 0, -1])
    counts, sums = class_sums(values, classes, 3)
    assert counts.tolist() == [2, 0, 1]
    torch.testing.assert_close(sums[0], values[0] + values[3])
    sums.sum().backward()
    assert values.grad.tolist() == [[1, 1], [1, 1], [0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize(("old", "new"), [((6, 8), (3, 4)), ((7, 5), (3, 2)), ((3, 2), (7, 5)), ((4, 4), (4, 4))])
def test_nearest_labels(old, new):
    true = torch.arange(2 * old[0] * old[1]).view(2, *old)
    found = nearest_labels(true, new)
    for row in range(new[0]):
        for column in range(new[1]):
            expected = true[:, row * old[0] // new[0], column * old[1] // new[1]]
            assert torch.equal(found[:, row, column], expected)
    torch.testing.assert_close(found.double(), torch.nn.functional.interpolate(true[:, None].double(), new)[:, 0])


def test_several_processes_share_them(monkeypatch):
    """Another process with an equal batch: twice as many pixels, the same mean and variance."""
    maps, true = drawn(1, 2, 4, 4), labels(1, 4, 4)
    alone, shared = ClassStatistics(CLASSES, 2), ClassStatistics(CLASSES, 2)
    alone.update(maps, true)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.mul_(2))
    shared.update(maps, true)
    assert torch.equal(shared.count, 2 * alone.count)
    torch.testing.assert_close(shared.mean, alone.mean)
    torch.testing.assert_close(shared.variance, alone.variance)
