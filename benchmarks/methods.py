"""What a distillation method adds: the student with it against the same student alone, over several seeds.

The protocol is the shipped recipe: its data, task, models and budget. The teacher is trained once, with seed 0. For every seed
the student is trained alone and with the method, from the same initial weights, for as many steps (where images without labels
are drawn with the method, more epochs of the labelled ones alone); values are those of the last epoch, on the test split. Where
the recipe finetunes the student first, both go on from the finetuned one. Where its test split is of another set of images than
train and val, the values are those across domains, and each row has the value on val too. Methods whose recipes share task, data,
student and budget share the students alone. A student with several widths is held against an ordinary one of its full width, and
each narrower width against one of that width, trained alone for as long.

    EDGEKD_DATA=... python benchmarks/methods.py --method structured_kd [idd ...] [--seeds 3] [--threads 2]
                                                 [--precision bf16-mixed] [--option holistic_weight=0 ...] [--time]

``--option`` gives the method another value than the recipe does; its result has a file and a row of its own. ``--time`` only
measures the time of a step anew, of both students in turns, into a result file that is there: on a machine without other work.

Each training is an ordinary ``edgekd compress`` in runs/methods, so what is finished is reused. After every seed it writes
results/methods/METHOD.json: the stage; the teacher's value; for each seed both students' values and seconds per epoch; the mean
gain with its 95 % interval (Student's t over seeds); and the time of a step relative to the student alone, the median over seeds,
or over the turns of ``--time``, from the fastest epoch of each training, because other work may have shared the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

from ghost import interval
from pydantic import TypeAdapter
from ruamel.yaml import YAML
from run_recipe import RESULTS, ROOT, compress

from edgekd import models
from edgekd.artifacts import Artifact, read_artifact
from edgekd.distill import MethodConfig
from edgekd.models import ModelConfig

RUNS = ROOT / "runs" / "methods"
ALONE, WITH = "alone", "with the method"
TURNS, TIMED_EPOCHS = 3, 2


def main() -> None:
    found = recipes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=sorted(found), required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the trainings")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="of all trainings")
    parser.add_argument("--option", nargs="+", default=[], metavar="KEY=VALUE", help="of the method, in place of the recipe's")
    parser.add_argument("--time", action="store_true", help="measure the time of a step, and nothing else")
    given = parser.parse_args()
    options = {key: YAML(typ="safe").load(value) for key, _, value in (option.partition("=") for option in given.option)}
    for method in given.method:
        path = found[method]
        recipe = YAML(typ="safe").load(path)
        recipe["compute"] = {"precision": given.precision}
        distilling(recipe)[-1]["method"] |= options
        name = ", ".join([method, *given.option])
        known = restore(name, recipe)
        if given.time:
            write(name, path, recipe, known, given.threads, turns(recipe, given.threads))
            continue
        for seed in range(given.seeds):
            if seed not in known:
                known[seed] = run(recipe, seed, given.threads)
                write(name, path, recipe, known, given.threads)


def recipes() -> dict[str, Path]:
    """Method -> the shipped recipe that distils with it; the one of the method's own name where there are several."""
    found: dict[str, Path] = {}
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        recipe = YAML(typ="safe").load(path)
        if not (stages := distilling(recipe)):
            continue
        name = stages[-1]["method"]["name"]
        if name not in found or path.stem == name:
            found[name] = path
    return found


def distilling(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages up to the one that distils, if there are but finetunings before it; else none."""
    for number, stage in enumerate(recipe["stages"]):
        if stage["kind"] == "distill":
            return list(recipe["stages"][: number + 1])
        if stage["kind"] != "finetune":
            break
    return []


def stages_alone(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of the student alone: those of the method without it, the last for as many steps."""
    *before, last = [dict(stage["train"]) for stage in distilling(recipe)]
    last |= {key: round(last[key] * longer(recipe)) for key in ("epochs", "warmup_epochs") if key in last}
    return [{"kind": "finetune", "train": train} for train in (*before, last)]


def longer(recipe: dict[str, Any]) -> float:
    """Steps in an epoch with the method, over those in one of the labelled images alone (edgekd.data.batches.epoch_length)."""
    share: float = recipe["data"].get("labelled", 1.0)
    if share == 1:
        return 1.0
    method: Any = TypeAdapter(MethodConfig).validate_python(distilling(recipe)[-1]["method"])
    return (2 * max(share, 1 - share) if getattr(method, "half_labelled", False) else 1) / share


def described(data: dict[str, Any]) -> str:
    """The data in a word: its folder, or two where it is tested on another set than it is trained on."""
    splits = data.get("splits", {})
    train, test = (splits.get(name, name).split("/")[0] for name in ("train", "test"))
    if data.get("root") == "." and train != test:
        return f"{train} → {test}"
    return str(data.get("root", data["kind"]))


def digest(*parts: Any) -> str:
    """Ten hexadecimal digits that stand for sections of a recipe."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def ordinary(student: dict[str, Any], width: float = 1.0) -> dict[str, Any]:
    """The section of the student alone: of one with several widths the ordinary network that it is at one of them."""
    config = ModelConfig(**student["model"])
    if not models.widths(config):
        return student
    arguments = models.at_width(config, width).arguments
    given = student["model"].get("arguments", {})
    # as a recipe of that network would have it, so that both share their results
    return {"model": {"name": "unet", "arguments": {key: arguments[key] for key in arguments if key in given}}}


def protocol(recipe: dict[str, Any]) -> str:
    """What students alone share: task, data, precision of training, student, budget."""
    student, stages = ordinary(recipe["student"]), stages_alone(recipe)
    return digest(recipe["task"], recipe["data"], recipe["compute"], student, *(stage["train"] for stage in stages))


def teacher(recipe: dict[str, Any], threads: int) -> Artifact:
    """The recipe's teacher, trained once."""
    given = recipe["teacher"]
    out = RUNS / f"teacher-{digest(recipe['task'], recipe['data'], recipe['compute'], given)}"
    content = {
        "name": "teacher",
        **{key: recipe[key] for key in ("task", "data", "compute")},
        "student": {"model": given["model"]},
        "stages": [{"kind": "finetune", "train": given["train"]}],
    }
    return trained(content, out, threads)["student"]


def taught(recipe: dict[str, Any], seed: int, master: Artifact | None) -> tuple[dict[str, Any], Path]:
    """The recipe of a student with the method, under the trained teacher if there is one, and the directory of its run."""
    shared = {key: recipe[key] for key in ("task", "data", "compute", "student")}
    content = {"name": "method", "seed": seed, **shared, "stages": distilling(recipe)}
    if master is not None:
        content["teacher"] = {"model": {**recipe["teacher"]["model"], "weights": str(master.folder / "model.safetensors")}}
    return content, RUNS / f"students-{protocol(recipe)}-{seed}"


def without_method(content: dict[str, Any], stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The recipe of the student alone, from that of the student with the method."""
    alone = {key: value for key, value in content.items() if key != "teacher"}
    return alone | {"stages": stages, "student": ordinary(content["student"])}


def run(recipe: dict[str, Any], seed: int, threads: int) -> dict[str, Any]:
    """Both students of one seed: values on the test split, seconds of the fastest epoch."""
    master = teacher(recipe, threads) if "teacher" in recipe else None
    content, out = taught(recipe, seed, master)
    alone = without_method(content, stages_alone(recipe))
    found = trained(content, out, threads)
    students = {
        ALONE: known_alone(recipe, seed) or figures(trained(alone, out, threads)["student"]),
        WITH: figures(found["student"]),
    }
    narrow = {}
    for role, artifact in found.items():
        if (width := role.partition("@")[2]) and role.startswith("student"):
            one = trained({**alone, "student": ordinary(recipe["student"], float(width))}, out, threads)["student"]
            narrow[width] = {ALONE: one.metrics["metric"]["value"], WITH: artifact.metrics["metric"]["value"]}
    if narrow:
        students["widths"] = narrow
    value = None if master is None else master.metrics["metric"]["value"]
    return {"seed": seed, "teacher": value, **students}


def turns(recipe: dict[str, Any], threads: int) -> list[dict[str, float]]:
    """Seconds of an epoch of as many steps, of the student alone and with the method, in turns."""
    found = []
    for turn in range(TURNS):
        content, _ = taught(recipe, turn, None)
        short = {"epochs": TIMED_EPOCHS, "warmup_epochs": 0}
        content["stages"] = [{**stage, "train": stage["train"] | short} for stage in content["stages"]]
        if "teacher" in recipe:  # what it has learned makes no step longer
            given = recipe["teacher"]
            content["teacher"] = {**given, "train": {**given["train"], "epochs": 1, "warmup_epochs": 0}}
        alone = without_method(content, [{"kind": "finetune", "train": content["stages"][-1]["train"]}])
        out = RUNS / f"time-{identity(recipe)}-{turn}"
        seconds = {
            name: figures(trained(one, out, threads)["student"])["seconds_per_epoch"]
            for name, one in ((ALONE, alone), (WITH, content))
        }
        found.append(seconds | {WITH: seconds[WITH] / longer(recipe)})
    return found


def trained(content: dict[str, Any], out: Path, threads: int) -> dict[str, Artifact]:
    """Role -> the last checkpoint of a run; of a student with several widths its last training, and each narrower width."""
    code = compress(content, out / f"{digest(content)}.json", out, threads)
    if code != 0:
        raise SystemExit(f"the run in {out} failed with exit code {code}")
    record = json.loads((out / "run.json").read_text())
    made = [model for model in record["models"] if (model["role"], model["stage"]) != ("student", "width")]
    return {model["role"]: read_artifact(out / model["folder"]) for model in made}


def figures(artifact: Artifact) -> dict[str, Any]:
    """What is kept of a training."""
    history = [json.loads(line) for line in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "value": artifact.metrics["metric"]["value"],
        "seconds_per_epoch": min(record["seconds"] for record in history),
        "val": history[-1]["val"],
        "parameters": artifact.metrics["params"],
        "terms": history[-1]["terms"],
        "statistics": history[-1].get("statistics"),
    }


def known_alone(recipe: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """The student alone as another method's result file has it, where the protocol is the same."""
    for path in sorted((RESULTS / "methods").glob("*.json")):
        result = json.loads(path.read_text())
        for value in result["values"] if result["protocol"] == protocol(recipe) else []:
            if value["seed"] == seed:
                return dict(value[ALONE])
    return None


def restore(name: str, recipe: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Seed -> what the result file already has for this very recipe."""
    path = RESULTS / "methods" / f"{name.replace(', ', '-')}.json"
    result = json.loads(path.read_text()) if path.is_file() else None
    if result is None or result["recipe"]["id"] != identity(recipe):
        return {}
    return {value["seed"]: value for value in result["values"]}


def identity(recipe: dict[str, Any]) -> str:
    """Changes where what is measured does: not with the name or the engines."""
    own = [] if ordinary(recipe["student"]) == recipe["student"] else [recipe["student"]]
    return digest(protocol(recipe), recipe.get("teacher"), distilling(recipe)[-1], *own)


def write(
    name: str,
    path: Path,
    recipe: dict[str, Any],
    values: dict[int, dict[str, Any]],
    threads: int,
    timed: list[dict[str, float]] | None = None,
) -> None:
    """The result file; the turns of ``--time`` stay in it where none are given."""
    file = RESULTS / "methods" / f"{name.replace(', ', '-')}.json"
    timed = timed or (json.loads(file.read_text()).get("turns") if file.is_file() else None)
    rows = [values[seed] for seed in sorted(values)]
    gains = [row[WITH]["value"] - row[ALONE]["value"] for row in rows]
    task = recipe["task"]["kind"]
    result = {
        "schema": 1,
        "method": name,
        "protocol": protocol(recipe),
        "recipe": {"path": str(path.relative_to(ROOT)), "id": identity(recipe)},
        "task": task,
        "data": described(recipe["data"]),
        "precision": recipe["compute"]["precision"],
        "threads": threads,
        "student": recipe["student"]["model"],
        "teacher": recipe.get("teacher"),
        "stage": distilling(recipe)[-1],
        "epochs_alone": stages_alone(recipe)[-1]["train"]["epochs"],
        "gain": interval(gains),
        "widths": {
            width: interval([row["widths"][width][WITH] - row["widths"][width][ALONE] for row in rows])
            for width in rows[0].get("widths", {})
        },
        "relative_step_time": statistics.median(turn[WITH] / turn[ALONE] for turn in timed)
        if timed
        else statistics.median(row[WITH]["seconds_per_epoch"] / row[ALONE]["seconds_per_epoch"] for row in rows) / longer(recipe),
        "turns": timed,
        "values": rows,
    }
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1).replace(f"{ROOT}/", ""))
    gain = result["gain"]
    print(f"wrote {file.relative_to(ROOT)}: {len(rows)} seeds, mean gain {gain['mean']:+.4f}")


if __name__ == "__main__":
    main()
