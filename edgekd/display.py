"""What a run shows on the terminal: a line per finished step, and progress bars where the terminal can draw them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


class Display:
    """Told of progress by the pipeline; silent where ``quiet``.

    Args:
        quiet: Show nothing; the processes after the first under torchrun are quiet.
        console: Where to write; standard error, so that standard output stays for results.
    """

    EVERY_S = 20.0
    """Without a terminal an epoch's line is written at most this often."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet, highlight=False)
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._title = ""
        self._images = 0
        self._start = self._last = 0.0

    def say(self, line: str) -> None:
        """One line about what is being done."""
        self._print((line, "dim"))

    def warn(self, line: str) -> None:
        """One line about something unexpected that does not stop the run."""
        self._print(("warning:", "yellow"), f" {line}")

    def stage(self, name: str, role: str) -> None:
        """A training stage begins."""
        self._print((name, "bold"), "" if name == role else f" ({role})")

    def reused(self, folder: str) -> None:
        """An artifact was found finished."""
        self._print((f"reused {folder}", "dim"))

    def step(self, title: str, done: int, total: int, images: int) -> None:
        """A training step is done; ``images`` counts those of the present epoch."""
        if not self.console.is_terminal or self.console.quiet:
            return
        if self._progress is None or title != self._title:
            self._open(title, total, done - 1)
        assert self._progress is not None
        assert self._bar is not None
        if images <= self._images:  # the first step of an epoch: the validation before it is no training
            self._start, self._images = time.monotonic(), images
            self._progress.update(self._bar, completed=done)
            return
        rate = (images - self._images) / max(time.monotonic() - self._start, 1e-9)
        self._progress.update(self._bar, completed=done, rate=f"{rate:.0f} images/s")

    def epoch(self, title: str, epochs: int, record: dict[str, Any]) -> None:
        """A training epoch is done."""
        terms = " ".join(f"{name} {value:.4f}" for name, value in record["terms"].items())
        text = f"{terms} val {record['val']:.4f}"
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, note=text)
        elif record["epoch"] == epochs or time.monotonic() - self._last > self.EVERY_S:
            self._last = time.monotonic()
            self._print(f"  {title} epoch {record['epoch']}/{epochs} {text} {record['images_per_s']:.0f} images/s")

    def trained(self, name: str, metric: str, value: float, seconds: float) -> None:
        """A checkpoint is stored."""
        self._print(f"  {name}: {metric} {value:.4f} on the test split, {seconds:.1f} s")

    def cell(self, cell: dict[str, Any], root: Path) -> None:
        """An engine is measured, or is not."""
        what = f"{cell['backend_name']} {cell['precision']} ({cell['role']})"
        if cell["status"] == "measured":
            record = json.loads((root / cell["bench"] / "record.json").read_text())
            metric = record["metric"]
            self._print(
                f"  {what}: p50 {record['latency_ms']['p50']:.3f} ms, {metric['name']} {metric['value']:.4f}, "
                f"{record['size_bytes'] / 1024:.0f} KiB"
            )
        else:
            color = "red" if cell["status"] == "failed" else "yellow"
            self._print(f"  {what}: ", (cell["status"], color), f": {cell['reason']}")

    def close(self) -> None:
        """Leave the terminal clean."""
        self._close()

    def _print(self, *parts: str | tuple[str, str]) -> None:
        """One line of plain and styled parts. No markup: a bracket in a message is a bracket."""
        self._close()
        self.console.print(Text.assemble(*parts), soft_wrap=True)

    def _open(self, title: str, total: int, done: int) -> None:
        self._close()
        self._title, self._images = title, 2**62  # the first step opens an epoch
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            transient=True,
        )
        self._bar = self._progress.add_task(title, total=total, completed=done, rate="", note="")
        self._progress.start()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._bar = None
