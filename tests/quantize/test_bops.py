"""Size and bit operations, against every figure of the specification and against hand counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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
