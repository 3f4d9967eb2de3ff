"""Run a shipped recipe in full and keep what its report says, with the raw samples of the interleaved comparisons.

    python benchmarks/run_recipe.py recipes/classification/cifar10.yaml

Finished work in runs/NAME is reused, so an interrupted run goes on. Where the teacher has an engine, that is then measured in
turns with all the student's engines of as many threads, whatever their backends: what distillation and integers gain together.
Writes results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgekd.jobs import CompareJob
from edgekd.targets.local import Local

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    recipe = parser.parse_args().recipe
    run = Path("runs") / recipe.stem  # relative: the report shows the command, and is published
    done = subprocess.run([sys.executable, "-m", "edgekd", "compress", str(recipe), "--out", str(run)], check=False, cwd=ROOT)
    if done.returncode not in (0, 3):  # over budget is a result too
        raise SystemExit(f"{recipe} failed with exit code {done.returncode}")
    result = RESULTS / f"{recipe.stem}.json"
    result.write_text(
        json.dumps(collect(ROOT / run) | {"across": across(ROOT / run)}).replace(f"{ROOT}/", "")
    )  # where this checkout lies is nobody's business
    print(f"wrote {result.relative_to(ROOT)}")


RESULTS = ROOT / "benchmarks" / "results"


def compress(content: dict[str, Any], file: Path, out: Path, threads: int) -> int:
    """Write a recipe and run it with this checkout's edgekd.

    Args:
        content: The recipe as data.
        file: Where it is written.
        out: The run directory; what is finished there is reused.
        threads: Of the trainings.

    Returns:
        The exit code.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1))  # JSON is YAML
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "edgekd", "compress", str(file), "--out", str(out)]
    return subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode


def across(run: Path) -> dict[str, Any] | None:
    """The comparison of the teacher's first float32 engine, the reference, with the student's engines of all backends."""
    record = json.loads((run / "run.json").read_text())
    cells = [cell for cell in record["cells"] if cell["status"] == "measured" and cell["batch"] == 1]
    teachers = [cell for cell in cells if (cell["role"], cell["precision"]) == ("teacher", "float32")]
    if not teachers:
        return None
    threads = teachers[0]["backend"].get("threads")
    students = [cell for cell in cells if cell["role"] == "student" and cell["backend"].get("threads") == threads]
    compared = [teachers[0], *students]
    (images,) = (run / "inputs").glob("bench-*.npy")
    job = CompareJob([str(run / cell["engine"]) for cell in compared], str(images), warmup_s=0.5, duration_s=4.0 * len(compared))
    with tempfile.TemporaryDirectory() as scratch:
        done = Local().run(job, Path(scratch))
    if done.status != "ok":
        raise SystemExit(f"the comparison across backends failed: {done.error or done.reason}")
    names = [{key: cell[key] for key in ("role", "backend", "precision")} for cell in compared]
    samples = [{"samples_ns": engine["samples_ns"]} for engine in done.payload["engines"]]
    engines = [name | sample for name, sample in zip(names, samples, strict=True)]
    return {"engines": engines, **{key: done.payload[key] for key in ("ratios", "noise_floor", "valid", "warnings")}}


def collect(run: Path) -> dict[str, Any]:
    """report.json, and per comparison what was measured in turns: samples in nanoseconds, round by round."""
    report = json.loads((run / "report" / "report.json").read_text())
    comparisons = []
    for comparison in json.loads((run / "run.json").read_text())["comparisons"]:  # the folder may have those of earlier recipes
        record = json.loads((run / comparison["folder"] / "record.json").read_text())
        comparisons.append(
            {
                "engines": [
                    {"backend": engine["backend"], "precision": engine["precision"], "samples_ns": engine["samples_ns"]}
                    for engine in record["engines"]
                ],
                "ratios": record["ratios"],
                "noise_floor": record["noise_floor"],
                "valid": record["valid"],
                "warnings": record["warnings"],
            }
        )
    return {"schema": 1, "report": report, "comparisons": comparisons}


if __name__ == "__main__":
    main()
