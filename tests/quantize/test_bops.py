"""Size and bit operations, against every figure of the specification and against hand counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgekd.errors import TrainingError
from edgekd.models.superyolo import superyolo, superyolo_small
from edgekd.nn.shapes import shapes_only
from edgekd.quantize import bops

EXAMPLE = "8 8 8 8 8 8 7 7 8 7 8 8 7 8 7 8 7 6 7 6 7 7 6 7 6 7 6 5 6 5 5 6 6 6 4 6 6 6 6 7 6 7 7 7 8 8 7 6 7 7 7 7 6 5 6 6 6 6 5"


def _rows(heads: int, classes: int, channels: int) -> list[bops.Row]:
    build = superyolo if heads == 3 else superyolo_small
    with shapes_only():
        model = build(num_classes=classes, in_channels=channels)
    return bops.rows(model, torch.empty(1, channels, 512, 512, device="meta"))


@pytest.fixture(scope="module")
def tables() -> dict[str, list[bops.Row]]:
    return {"nwpu": _rows(3, 10, 3), "dota": _rows(3, 15, 3), "dior": _rows(3, 20, 3), "vedai": _rows(1, 8, 4)}


def _uniform(table: list[bops.Row], bits: int) -> dict[str, int]:
    return {row.path: bits for row in table if not row.path.startswith("heads")}


def test_sums_of_operations(tables: dict[str, list[bops.Row]]) -> None:
    sums = {name: sum(row.macs for row in table) / 1e9 for name, table in tables.items()}
    assert sums == {
        "nwpu": pytest.approx(20.2568, abs=1e-4),
        "dota": pytest.approx(20.3122, abs=1e-4),
        "dior": pytest.approx(20.3676, abs=1e-4),
        "vedai": pytest.approx(16.6248, abs=1e-4),
    }
    assert [sum(row.path in _uniform(table, 8) for row in table) for table in tables.values()] == [59, 59, 59, 47]


@pytest.mark.parametrize(
    ("name", "bits", "script", "corrected"),
    [
        ("nwpu", 32, (30.75, 21357), (28.26, 20743)),
        ("nwpu", 8, (9.67, 2114), (7.19, 1499)),
        ("nwpu", 6, (7.91, 1543), (5.43, 929)),
        ("nwpu", 4, (6.16, 1131), (3.67, 517)),
        ("nwpu", 2, (4.40, 879), (1.92, 264)),
        ("dota", 8, (9.68, 2146), (7.24, 1556)),
        ("dior", 8, (9.69, 2179), (7.30, 1613)),
        ("dior", 32, (30.76, 21422), (28.37, 20856)),
        *(
            ("vedai", bits, figures, figures)
            for bits, figures in {
                32: (19.28, 17024),
                8: (4.83, 1201),
                7: (4.23, 948),
                6: (3.63, 727),
                5: (3.03, 539),
                4: (2.43, 383),
                3: (1.83, 260),
                2: (1.22, 169),
            }.items()
        ),
    ],
)
def test_uniform_bits_give_the_published_and_the_corrected_figures(
    tables: dict[str, list[bops.Row]], name: str, bits: int, script: tuple[float, float], corrected: tuple[float, float]
) -> None:
    table = tables[name]
    plan = _uniform(table, bits)
    assert bops.size_paper_bytes(table, plan) / 1e6 == pytest.approx(script[0], abs=0.006)
    assert bops.bops_paper(table, plan) / 1e9 == pytest.approx(script[1], abs=0.6)
    assert bops.size_bytes(table, plan) / 1e6 == pytest.approx(corrected[0], abs=0.006)
    assert bops.bops_dataflow(table, plan) / 1e9 == pytest.approx(corrected[1], abs=0.6)


def test_the_published_list_of_bits(tables: dict[str, list[bops.Row]]) -> None:
    table = tables["nwpu"]
    paths = [row.path for row in table if not row.path.startswith("heads")]
    plan = dict(zip(paths, map(int, EXAMPLE.split()), strict=True))
    assert bops.size_paper_bytes(table, plan) / 1e6 == pytest.approx(7.49, abs=0.006)
    assert bops.bops_paper(table, plan) / 1e9 == pytest.approx(1726, abs=0.6)
    assert bops.size_bytes(table, plan) / 1e6 == pytest.approx(5.01, abs=0.006)
    assert bops.bops_dataflow(table, plan) / 1e9 == pytest.approx(1153, abs=0.6)


def test_the_list_is_in_the_published_order(tables: dict[str, list[bops.Row]]) -> None:
    paths = [row.path.removeprefix("blocks.").removesuffix(".conv") for row in tables["nwpu"]]
    assert paths[:9] == ["0", "1", "2.cv1", "2.cv2", "2.cv3", "2.m.0.cv1", "2.m.0.cv2", "3", "4.cv1"]
    assert paths[-4:] == ["23.m.0.cv2", "heads.0", "heads.1", "heads.2"]


def test_full_precision_is_1024_times_the_operations(tables: dict[str, list[bops.Row]]) -> None:
    for table in tables.values():
        assert bops.bops_dataflow(table, {}) == 1024 * sum(row.macs for row in table)


class _Net(nn.Module):
    """Two branches that are added, one of them joined with the input of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(4, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        out: Tensor = self.c(torch.cat([nn.functional.max_pool2d(a + self.b(a), 2), nn.functional.max_pool2d(a, 2)], 1))
        return out


def test_data_flow_by_hand() -> None:
    table = bops.rows(_Net(), torch.zeros(1, 3, 4, 4))
    assert [(row.path, row.params, row.macs, row.producers, row.reads_image) for row in table] == [
        ("a", 6, 16 * 6, (), True),
        ("b", 38, 16 * 2 * 18 + 16 * 2, ("a",), False),
        ("c", 4, 4 * 4, ("a", "b"), False),
    ]
    plan = {"a": 3, "b": 5, "c": 2}
    assert bops.bops_dataflow(table, plan) == 96 * 3 * 32 + 608 * 5 * 3 + 16 * 2 * 5  # the larger of a and b arrives at c
    assert bops.bops_paper(table, plan) == 96 * 3 * 32 + 608 * 5 * 3 + 16 * 2 * 5
    assert bops.bops_dataflow(table, {"b": 5}) == 96 * 1024 + 608 * 5 * 32 + 16 * 1024
    assert bops.size_bytes(table, plan) == (6 * 3 + 38 * 5 + 4 * 2) / 8


def test_who_reads_whom_in_the_detector(tables: dict[str, list[bops.Row]]) -> None:
    """Written from the specification's table of blocks, not from the code."""
    found = {
        row.path.removeprefix("blocks.").removesuffix(".conv"): {
            source.removeprefix("blocks.").removesuffix(".conv") for source in row.producers
        }
        for row in tables["nwpu"]
    }
    expected = {
        "1": {"0"},
        "2.cv2": {"1"},
        "2.m.0.cv1": {"2.cv1"},
        "2.cv3": {"2.cv1", "2.m.0.cv2", "2.cv2"},  # the shortcut adds cv1's result
        "4.m.2.cv1": {"4.cv1", "4.m.0.cv2", "4.m.1.cv2"},
        "8.cv2": {"8.cv1"},
        "9.cv3": {"9.m.0.cv2", "9.cv2"},  # no shortcut
        "13.cv1": {"10", "6.cv3"},
        "13.cv2": {"10", "6.cv3"},
        "17.cv1": {"14", "4.cv3"},
        "20.cv1": {"18", "14"},
        "23.cv1": {"21", "10"},
        "heads.0": {"17.cv3"},
        "heads.1": {"20.cv3"},
        "heads.2": {"23.cv3"},
    }
    assert {path: found[path] for path in expected} == expected
    assert [row.path for row in tables["nwpu"] if row.reads_image] == ["blocks.0.conv"]


class _Sizes(nn.Module):
    """Asks for the sizes of the image and of a map that a layer is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 2, 3, 2, 1, bias=False)
        self.c, self.fc = nn.Conv2d(2, 1, 1, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        b = nn.functional.interpolate(torch.relu(self.b(a)), size=a.shape[-2:])
        out: Tensor = self.fc(torch.relu(self.c(b)).view(x.size(0), -1))
        return out


def test_a_size_is_not_read_from_its_tensor() -> None:
    table = bops.rows(_Sizes(), torch.zeros(1, 3, 4, 4))
    assert [(row.path, row.producers, row.reads_image) for row in table] == [
        ("a", (), True),
        ("b", ("a",), False),
        ("c", ("b",), False),
        ("fc", ("c",), False),
    ]
    # 16 x 4 products and 4 additions of the bias
    assert (table[-1].params, table[-1].macs) == (68, 68)


class _Shared(nn.Module):
    """A layer in groups that is called twice, the second time on its own result beside the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.Conv2d(8, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.cat([self.a(torch.relu(self.a(x))), x], 1))
        return out


def test_a_layer_that_is_called_twice_reads_what_both_calls_read() -> None:
    table = bops.rows(_Shared(), torch.zeros(1, 4, 3, 3))
    assert [(row.path, row.params, row.macs, row.producers, row.reads_image) for row in table] == [
        ("a", 8, 2 * 9 * 8, ("a",), True),
        ("b", 16, 9 * 16, ("a",), True),
    ]
    assert bops.bops_dataflow(table, {"a": 4, "b": 2}) == 144 * 4 * 32 + 144 * 2 * 32  # the image is wider than 4 bits


def test_the_scripts_float_entries_begin_too_early() -> None:
    """Five quantized entries and three heads: the script counts entries 3, 4 and 5 of eight in float, and heads 6 and 7 never."""
    table = [bops.Row(str(index), 10**index, 10**index, (), False) for index in range(8)]
    plan = dict.fromkeys("01234", 8)
    float_entries = 10**3 + 10**4 + 10**5
    assert bops.size_paper_bytes(table, plan) == 11_111 * 8 / 8 + float_entries * 32 / 8
    assert bops.bops_paper(table, plan) == 1 * 8 * 32 + 11_110 * 8 * 8 + float_entries * 1024
    one_head = table[:6]
    assert bops.size_paper_bytes(one_head, plan) == bops.size_bytes(one_head, plan)


def test_a_model_that_cannot_be_traced_says_so() -> None:
    class Chooses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TrainingError):
        bops.rows(Chooses(), torch.zeros(1, 3, 4, 4))
