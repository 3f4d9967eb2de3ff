"""``python -m edgekd.worker job.json``: the only code that runs on a target.

Reads one job, does it, and writes result.json beside it, whatever happens: a failure is a result too. Standard library, NumPy and
the one engine library; this keeps the memory that it reports small, and lets it run on a device that has nothing else.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from edgekd.bench.compare import compare
from edgekd.bench.measure import bench, predict
from edgekd.engines import WrongMachineError, build_engine, options_from
from edgekd.errors import DataError, EdgekdError, MissingDependency
from edgekd.jobs import BenchJob, BuildJob, CompareJob, Job, JobResult, read_job, write_result

RESULT = "result.json"
PARENT = "EDGEKD_WORKER_PARENT"
"""Environment variable: the process to die with."""
_TAIL_LINES = 40


def perform(job: Job) -> dict[str, Any]:
    """Do a job and return the payload of its result.

    Raises:
        EdgekdError: What went wrong.
    """
    if job_problem := _problem(job):
        raise DataError(f"{job.kind} job: {job_problem}")
    if isinstance(job, BuildJob):
        return build_engine(Path(job.model), options_from(job.backend), job.precision, Path(job.out))
    if isinstance(job, BenchJob):
        return bench(job)
    if isinstance(job, CompareJob):
        return compare(job)
    return predict(Path(job.engine), Path(job.inputs), Path(job.out), job.batch)


def _problem(job: Job) -> str:
    """What is wrong with a job's numbers, or nothing."""
    if not isinstance(job, BuildJob) and (not isinstance(job.batch, int) or job.batch < 1):
        return f"batch must be an integer of at least 1; received {job.batch!r}"
    if isinstance(job, BenchJob) and job.max_samples < 1:
        return f"max_samples must be at least 1; received {job.max_samples!r}"
    if isinstance(job, CompareJob) and job.max_rounds < 1:
        return f"max_rounds must be at least 1; received {job.max_rounds!r}"
    return ""


def run(path: Path) -> JobResult:
    """Read a job's file and do it; every failure becomes a result."""
    try:
        job = read_job(path)
    except (ValueError, OSError) as error:
        return _failed(error, f"the job {path} cannot be read: {error}", "write it with edgekd.jobs.write_job", "")
    try:
        return JobResult("ok", perform(job))
    except (WrongMachineError, MissingDependency) as error:
        return JobResult("skipped", reason=error.message, hint=error.hint)
    except EdgekdError as error:
        return _failed(error, error.message, error.hint, _build_log(job))
    except MemoryError as error:
        log = traceback.format_exc()
        return _failed(error, f"out of memory during the {job.kind} job", "free some memory, or use a smaller batch", log)
    except Exception as error:
        # The boundary of the process: a bug here must reach the parent as a result, with its traceback.
        tail = "\n".join(filter(None, [_build_log(job), traceback.format_exc()]))
        return _failed(error, str(error) or type(error).__name__, "this is a bug in edgekd: please report it with the log", tail)


def _failed(error: Exception, message: str, hint: str, log: str) -> JobResult:
    tail = "\n".join(log.splitlines()[-_TAIL_LINES:])
    return JobResult("failed", reason=message, error=f"{type(error).__name__}: {message}", hint=hint, log_tail=tail)


def _build_log(job: Job) -> str:
    if not isinstance(job, BuildJob):
        return ""
    try:
        return (Path(job.out) / "build.log").read_text(errors="replace")
    except OSError:
        return ""


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies.

    Otherwise a worker would outlive a killed run, and write into folders that the next run is using.
    """
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the call
        sys.exit(1)


def main(arguments: list[str]) -> int:
    """The exit code: 0 where a result was written, whatever it says."""
    if len(arguments) != 1:
        print("usage: python -m edgekd.worker JOB.json", file=sys.stderr)
        return 2
    die_with_parent()
    path = Path(arguments[0])
    result = run(path)
    try:
        write_result(result, path.with_name(RESULT))
    except OSError as error:
        print(f"error: {result.error or result.status}; and the result cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    faulthandler.enable()  # a crash inside a library leaves the line of Python that called it
    sys.exit(main(sys.argv[1:]))
