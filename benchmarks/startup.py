"""How long commands take to start, as ratios to ``import torch``, which no training tool can avoid.

All commands take turns in one run, in an order that rotates, because absolute times drift. The reference runs twice per round:
the ratio of the two is the noise that any other ratio has to be read with. Exits with 1 where a command misses its limit.

    python benchmarks/startup.py [--rounds 15]

Writes results/startup.json with every sample.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd import __version__
from edgekd.artifacts import write_json
from edgekd.bench import host
from edgekd.bench.stats import ratio_of_medians

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).parent / "results" / "startup.json"
RECIPE = "recipes/classification/quickstart.yaml"


@dataclass(frozen=True)
class Command:
    """A command, and how long it may take."""

    name: str
    words: tuple[str, ...]
    limit: float | None = None
    """Largest allowed ratio to the reference."""


REFERENCE = Command('python -c "import torch"', (sys.executable, "-c", "import torch"))
EDGEKD = str(Path(sys.executable).with_name("edgekd"))
COMMANDS = (
    REFERENCE,
    Command('python -c "import torch" (again)', REFERENCE.words),
    Command("edgekd --help", (EDGEKD, "--help"), 0.25),
    Command(f"edgekd validate {RECIPE}", (EDGEKD, "validate", RECIPE), 2.5),
)


def wall_ns(command: Command) -> int:
    """The wall time of one run, nanoseconds."""
    start = time.perf_counter_ns()
    done = subprocess.run(command.words, cwd=ROOT, capture_output=True, text=True, check=False)
    duration_ns = time.perf_counter_ns() - start
    if done.returncode != 0:
        sys.exit(f"{command.name} failed with {done.returncode}:\n{done.stderr}")
    return duration_ns


def measure(rounds: int) -> dict[str, list[int]]:
    """The samples of every command, in nanoseconds; entry i of each list belongs to round i."""
    for command in COMMANDS:  # byte code is compiled, and files are in the page cache
        wall_ns(command)
    samples: dict[str, list[int]] = {command.name: [] for command in COMMANDS}
    for number in range(rounds):
        turn = number % len(COMMANDS)
        for command in (*COMMANDS[turn:], *COMMANDS[:turn]):
            samples[command.name].append(wall_ns(command))
    return samples


def summary(command: Command, samples: dict[str, list[int]]) -> dict[str, Any]:
    """Median and ratio of one command."""
    ratio, interval = ratio_of_medians(samples[command.name], samples[REFERENCE.name])
    return {
        "command": command.name,
        "samples_ns": samples[command.name],
        "median_ms": statistics.median(samples[command.name]) / 1e6,
        "ratio": ratio,
        "ratio_interval": list(interval),
        "limit": command.limit,
        "ok": command.limit is None or ratio <= command.limit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="samples of each command (default: 15)")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file to write")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    samples = measure(arguments.rounds)
    rows = [summary(command, samples) for command in COMMANDS]
    for row in rows:
        low, high = row["ratio_interval"]
        limit = "" if row["limit"] is None else f"  at most {row['limit']}: {'ok' if row['ok'] else 'MISSED'}"
        print(f"{row['command']:<56} {row['median_ms']:8.0f} ms  {row['ratio']:.3f} [{low:.3f}, {high:.3f}]{limit}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.out,
        {
            "what": "wall time of whole processes, interleaved; ratios of medians with a bootstrap interval of 95 %",
            "edgekd": __version__,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "reference": REFERENCE.name,
            "rounds": arguments.rounds,
            "commands": rows,
            "load_average": {"before": load_before, "after": os.getloadavg()[0]},
            "host": host.describe(backends=()),
        },
    )
    if not all(row["ok"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
