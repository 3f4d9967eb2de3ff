"""Numbers and names as text, the same in every printer."""

from __future__ import annotations

import re
from typing import Any

NONE = "–"
_SHARES = frozenset(
    {"accuracy", "mAP50", "mAP50_95", "mIoU", "Dice", "pixel accuracy", "max F", "weighted F", "S-measure", "E-measure"}
)
"""Metrics that are shares, shown as percent."""
_ROLES = {"student_alone": "student alone"}
_STAGES = {
    "finetune": "finetuned",
    "distill": "distilled",
    "prune": "pruned",
    "quantize": "quantized",
    "ptq": "quantized after training",
    "width": "cut out of the slimmable net",
}


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, never in exponent notation."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    exponent = int(f"{value:e}".partition("e")[2])
    return f"{value:.{max(digits - 1 - exponent, 0)}f}"


def ms(value: float | None) -> str:
    """Milliseconds."""
    return NONE if value is None else f"{number(value)} ms"


def percent(value: float | None) -> str:
    """A share in 0..1."""
    return NONE if value is None else f"{100 * value:.2f} %"


def metric(value: dict[str, Any] | None) -> str:
    """A metric's value: a share as percent, anything else plain."""
    if value is None:
        return NONE
    return percent(value["value"]) if value["name"] in _SHARES else number(value["value"], 4)


def metric_scale(name: str) -> tuple[float, str]:
    """By what a metric is multiplied to be drawn, and its unit."""
    return (100.0, " %") if name in _SHARES else (1.0, "")


def difference(value: float | None, name: str) -> str:
    """How far one metric is from another; shares differ in percentage points."""
    if value is None:
        return NONE
    text = f"{100 * value:+.2f} points" if name in _SHARES else f"{value:+.4g}"
    return text.replace("-", "−")


def size(size_bytes: int | None) -> str:
    """Bytes as KiB or MiB."""
    if not size_bytes:
        return NONE
    return f"{number(size_bytes / 1024)} KiB" if size_bytes < 2**20 else f"{number(size_bytes / 2**20)} MiB"


def mib(value: float | None) -> str:
    """Memory in MiB."""
    return NONE if value is None else f"{number(value)} MiB"


def joules(value: float | None) -> str:
    """Energy."""
    return NONE if value is None else f"{number(1000 * value)} mJ"


def count(value: float | None) -> str:
    """A count with a k, M or G."""
    if value is None:
        return NONE
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{number(value / limit)} {unit}"
    return f"{value:.0f}"


def ratio(value: float | None) -> str:
    """A factor."""
    return NONE if value is None else f"{number(value)}×"


def interval(ends: list[float] | None, digits: int = 3) -> str:
    """The two ends of an interval of factors."""
    return NONE if ends is None else f"[{number(ends[0], digits)}, {number(ends[1], digits)}]"


def seconds(value: float | None) -> str:
    """A duration."""
    if value is None:
        return NONE
    return f"{value:.1f} s" if value < 120 else f"{int(value // 60)} min {value % 60:.0f} s"


def moment(value: str | None) -> str | None:
    """A time stamp of a run: ``2026-01-02T03:04:05Z`` as ``2026-01-02 03:04 UTC``."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\dZ", value or "")
    return f"{found[1]} {found[2]} UTC" if found else value


def role(name: str) -> str:
    """Whose model; of a student with several widths, which."""
    who, at, width = name.partition("@")
    return _ROLES.get(who, who) + (f" at width {width}" if at else "")


def stage_title(role_name: str, stage: str) -> str:
    """A checkpoint in words: ``student, pruned``."""
    if role_name.partition("@")[0] != "student":
        return role(role_name)
    return f"{role(role_name)}, {_STAGES.get(stage, stage)}"


def plain(value: object) -> str:
    """Any text on one line and without control characters, which could move a terminal's cursor or break a table."""
    visible = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", " ", str(value))
    return " ".join(visible.split())


def listed(value: object) -> str:
    """A value of an option: a list's members side by side."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
