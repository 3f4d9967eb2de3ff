"""From teacher to device: a distilled student's engines against its teacher's in float32, over several seeds.

The protocol is a shipped recipe, whole: teacher, distillation, quantization, engines. What methods.py has trained is reused: the
teacher is the same for all seeds. For every seed all the student's engines are measured in turns with the teacher's first engine,
in one process, whatever their backends. To be run on a machine that does nothing else.

    EDGEKD_DATA=... python benchmarks/distilled_engines.py [recipes/segmentation/camvid_distilled.yaml] [--seeds 3] [--threads 2]
                                                           [--precision bf16-mixed]

Writes results/distilled_engines.json after every seed: each engine's metric on the test split, size and raw samples, the ratios
to the teacher's engine with their intervals; over the seeds the mean ratio (geometric) and mean share of the teacher's metric.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from methods import taught, teacher, trained
from ruamel.yaml import YAML
from run_recipe import RESULTS, ROOT, across

RECIPE = ROOT / "recipes" / "segmentation" / "camvid_distilled.yaml"
RESULT = RESULTS / "distilled_engines.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE, help="one that deploys the teacher too")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the trainings")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="of all trainings")
    given = parser.parse_args()
    recipe = YAML(typ="safe").load(given.recipe)
    if not any("teacher" in entry.get("models", ()) for entry in recipe["deploy"]):
        raise SystemExit(f"{given.recipe} has no engine of the teacher to compare with")
    recipe["compute"] = {"precision": given.precision}
    master = teacher(recipe, given.threads)
    rows = []
    for seed in range(given.seeds):
        content, out = taught(recipe, seed, master)
        content |= {"stages": recipe["stages"], "deploy": recipe["deploy"]}
        trained(content, out, given.threads)
        rows.append({"seed": seed, **measured(out)})
        result = {"schema": 1, "recipe": str(given.recipe.resolve().relative_to(ROOT)), "precision": given.precision}
        result |= {"summary": summary(rows), "seeds": rows}
        RESULT.write_text(json.dumps(result).replace(f"{ROOT}/", ""))
        print(f"wrote {RESULT.relative_to(ROOT)}: {json.dumps(result['summary'], indent=1)}", flush=True)


def measured(out: Path) -> dict[str, Any]:
    """What the engines of one finished run give and take."""
    report = json.loads((out / "report" / "report.json").read_text())
    columns = ("role", "backend", "precision", "threads", "metric", "size_bytes")
    engines = [{key: engine[key] for key in columns} for engine in report["engines"] if engine["status"] == "measured"]
    models = [{key: model[key] for key in ("role", "stage", "params", "macs", "metric")} for model in report["models"]]
    return {"models": models, "engines": engines, "across": across(out), "environment": report["environment"]}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per engine of the student: how many times as fast as the teacher's, and what share of its metric it keeps."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        values = {
            (engine["role"], engine["backend"], engine["precision"]): engine["metric"]["value"] for engine in row["engines"]
        }
        names = [(each["role"], each["backend"]["name"], each["precision"]) for each in row["across"]["engines"]]
        for ratio in row["across"]["ratios"]:
            name = names[ratio["engine"]]
            found.setdefault(name[1:], []).append((ratio["speedup"], values[name] / values[names[0]]))
    return [
        {
            "backend": backend,
            "precision": precision,
            "speedup": statistics.geometric_mean(speedup for speedup, _ in pairs),
            "metric_kept": statistics.mean(kept for _, kept in pairs),
            "seeds": len(pairs),
        }
        for (backend, precision), pairs in found.items()
    ]


if __name__ == "__main__":
    main()
