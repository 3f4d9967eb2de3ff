"""This machine: the worker in a process of its own, so that a crash or a leak of an engine library stays there."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import edgekd
from edgekd.bench import host
from edgekd.jobs import BuildJob, Job, JobResult, read_result, write_job
from edgekd.worker import PARENT, RESULT

_TAIL_LINES = 40


class Local:
    """The machine that edgekd runs on."""

    name = "local"

    def describe(self) -> dict[str, Any]:
        """What this machine is; imports every backend that is installed."""
        return host.describe()

    def run(self, job: Job, folder: Path, timeout_s: float | None = None) -> JobResult:
        """Start a worker and sleep until it ends; see ``Target.run``."""
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        result_path, log_path = folder / RESULT, folder / "worker.log"
        result_path.unlink(missing_ok=True)  # an earlier worker's answer is not this one's
        write_job(job, folder / "job.json")
        timed_out = threading.Event()
        with log_path.open("wb") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "edgekd.worker", "job.json"],
                cwd=folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

            def stop() -> None:
                timed_out.set()
                worker.kill()

            # A timer, because Popen.wait with a timeout wakes up every 50 ms, which is work beside the measurement.
            timer = threading.Timer(timeout_s, stop) if timeout_s is not None else None
            try:
                if timer:
                    timer.start()
                code = worker.wait()
            except BaseException:
                worker.kill()
                worker.wait()
                raise
            finally:
                if timer:
                    timer.cancel()
        if result_path.exists():
            return read_result(result_path)
        text = log_path.read_text(errors="replace")
        if isinstance(job, BuildJob):  # while a library builds, what it writes to standard error goes there
            with contextlib.suppress(OSError):
                text += (Path(job.out) / "build.log").read_text(errors="replace")
        return _death(job, code, timeout_s if timed_out.is_set() else None, "\n".join(text.splitlines()[-_TAIL_LINES:]))


def _death(job: Job, code: int, timeout_s: float | None, tail: str) -> JobResult:
    """The result of a worker that wrote none."""
    if timeout_s is not None:
        message, hint = f"the worker was stopped: its {job.kind} job took more than {timeout_s:g} s", "allow it more time"
    elif code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        message = f"the worker was killed by {name} during its {job.kind} job"
        killed = "the system kills with SIGKILL when memory runs out: free some, or use a smaller batch"
        hint = killed if name == "SIGKILL" else "a crash inside the engine library: see the log, and try another version of it"
    else:
        message, hint = f"the worker ended with exit code {code} and wrote no result for its {job.kind} job", "see the log"
    return JobResult("failed", reason=message, error=f"TargetError: {message}", hint=hint, log_tail=tail)


def _environment() -> dict[str, str]:
    """The worker's environment: every thread pool that takes its size from here gets one thread.

    An engine's own threads are an option of its backend, and come from nowhere else.
    """
    environment = {**os.environ, PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        environment[name] = "1"
    package = Path(edgekd.__file__).resolve().parents[1]
    if not {"site-packages", "dist-packages"} & set(package.parts):  # a checkout that is not installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    return environment
