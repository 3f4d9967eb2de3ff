"""A place that runs jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from edgekd.jobs import Job, JobResult


class Target(Protocol):
    """A machine with a worker on it."""

    name: str

    def describe(self) -> dict[str, Any]:
        """What the machine is: CPU, memory, GPUs, and each backend's version or install command."""

    def run(self, job: Job, folder: Path, timeout_s: float | None = None) -> JobResult:
        """Do a job in a process of its own; a worker that fails, dies or takes too long is a result, not an exception.

        Args:
            job: What to do; its paths are absolute.
            folder: For job.json, result.json and worker.log; created where it is missing.
            timeout_s: When to stop it, seconds; None for never.
        """
