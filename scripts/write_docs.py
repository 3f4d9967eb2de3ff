"""Write the parts of the documentation that follow from code and from committed results, between their markers.

python scripts/write_docs.py            write them
python scripts/write_docs.py --check    only say what is out of date; exit code 1 where something is
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """The exit code."""
    stale = []
    for name, parts in DOCUMENTS.items():
        path = ROOT / name
        text = path.read_text()
        for marker, make in parts.items():
            text = between(text, marker, make(), path)
        if text != path.read_text():
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text)
    if stale and "--check" in sys.argv:
        print(f"out of date: {', '.join(stale)}; run: python scripts/write_docs.py")
        return 1
    return 0


def between(text: str, marker: str, content: str, path: Path) -> str:
    """The text with what stands between ``<!-- marker -->`` and ``<!-- /marker -->`` replaced."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{path} has no markers for {marker!r}")
    return pattern.sub(lambda found: found[1] + content.rstrip("\n") + "\n" + found[2], text)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def options() -> str:
    """Every key of a recipe, from its schema."""
    from edgekd.recipe import json_schema

    schema = json_schema()
    parts = []
    for name, definition in [("Recipe", schema), *sorted(schema["$defs"].items())]:
        if "properties" not in definition:
            continue
        about = " ".join(definition.get("description", "").split())
        required = definition.get("required", [])
        rows = [
            (
                f"`{key}`",
                kind(value),
                default(value, key in required),
                " ".join(value.get("description", "").split()).replace("|", "\\|"),
            )
            for key, value in definition["properties"].items()
        ]
        parts.append(f"### {name}\n\n{about}\n\n{table(('key', 'type', 'default', 'meaning'), rows)}")
    return "\n" + "\n".join(parts)


def kind(value: dict[str, Any]) -> str:
    """The type and the bounds of a key, in a word or two."""
    if "$ref" in value:
        return link(value["$ref"])
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    for union in ("anyOf", "oneOf"):
        if union in value:
            return " or ".join(kind(choice) for choice in value[union])
    if value.get("type") == "array":
        return f"list of {kind(value.get('items', value.get('prefixItems', [{}])[0]))}"
    if value.get("type") == "object":
        return "mapping"
    bounds = [
        f"{sign} {value[bound]}"
        for bound, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if bound in value
    ]
    return " ".join([value.get("type", "any"), *([", ".join(bounds)] if bounds else [])])


def link(reference: str) -> str:
    """A link to a section of this page."""
    name = reference.rsplit("/", 1)[-1]
    return "any" if name == "JsonValue" else f"[{name}](#{name.lower()})"


def default(value: dict[str, Any], required: bool) -> str:
    """A key's default."""
    if required:
        return "*required*"
    return f"`{json.dumps(value['default'])}`" if "default" in value else "see its type"


def methods() -> str:
    """benchmarks/results/methods/*.json as a table."""
    rows = []
    for path in sorted((RESULTS / "methods").glob("*.json")):
        result = json.loads(path.read_text())
        values = result["values"]

        def mean(of: Callable[[dict[str, Any]], float], values: list[dict[str, Any]] = values) -> str:
            return f"{100 * sum(of(value) for value in values) / len(values):.2f}"

        def points(gain: dict[str, Any]) -> str:
            low_high = "" if gain["low"] is None else f" [{100 * gain['low']:+.2f}, {100 * gain['high']:+.2f}]"
            return f"{100 * gain['mean']:+.2f}{low_high}"

        rows.append(
            (
                f"`{result['method']}`",
                result["data"],
                str(len(values)),
                mean(lambda value: value["teacher"]) if values[0]["teacher"] is not None else "–",
                mean(lambda value: value["alone"]["value"]),
                mean(lambda value: value["with the method"]["value"]),
                points(result["gain"]),
                f"{result['relative_step_time']:.2f}×",
            )
        )
        for share, gain in result.get("widths", {}).items():
            alone = mean(lambda value, share=share: value["widths"][share]["alone"])  # type: ignore[misc]
            taught = mean(lambda value, share=share: value["widths"][share]["with the method"])  # type: ignore[misc]
            rows.append(
                (f"`{result['method']}`, width {share}", result["data"], str(len(values)), "–", alone, taught, points(gain), "")
            )
    if not rows:
        return "Nothing yet.\n"
    return table(("method", "data", "seeds", "teacher", "student alone", "with the method", "gain, points", "step"), rows)


def semantic() -> str:
    """The Frechet semantic distances of benchmarks/results/methods/generalizable_msan.json as a table."""
    values = json.loads((RESULTS / "methods" / "generalizable_msan.json").read_text())["values"]
    start = "FSD val to test, "
    names = [name for name in values[0]["with the method"]["statistics"] if name.startswith(start)]
    rows = [
        (str(value["seed"]), *(f"{value['with the method']['statistics'][name]:.1f}" for name in names), f"{gain:+.2f}")
        for value in values
        for gain in [100 * (value["with the method"]["value"] - value["alone"]["value"])]
    ]
    return table(("seed", *(name.removeprefix(start) for name in names), "gain, points"), rows)


def segmenters() -> str:
    """benchmarks/results/segmenter_engines.json as a table: what each engine runs, or why there is none."""
    found = json.loads((RESULTS / "segmenter_engines.json").read_text())["rows"]
    columns = [
        (backend, precision) for backend in ("onnxruntime", "openvino", "tensorrt_rtx") for precision in ("float32", "int8")
    ]
    rows = []
    for row in found:
        by_engine: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for engine in row["engines"]:
            by_engine.setdefault((engine["backend"], engine["precision"]), []).append(engine)
        rows.append((row["model"], f"{row['params'] / 1e6:.1f} M", *(_outcome(by_engine.get(column, [])) for column in columns)))
    return table(("model", "parameters", *(f"{backend}, {precision}" for backend, precision in columns)), rows)


def _outcome(engines: list[dict[str, Any]]) -> str:
    """One word, and for what was run the least share of the MACs in the precision that was asked."""
    if not engines:
        return "–"
    states = sorted({"runs" if engine["status"] == "measured" else engine["status"] for engine in engines})
    shares = [engine["share"] for engine in engines if engine["share"] is not None]
    return " / ".join(states) + (f", {100 * min(shares):.0f} %" if shares and states == ["runs"] else "")


def width() -> str:
    """benchmarks/results/int8_width.json as a table."""
    rows = json.loads((RESULTS / "int8_width.json").read_text())["rows"]
    by_case: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        by_case.setdefault(tuple(row[key] for key in ("model", "width", "size_px", "threads")), {"row": row})[row["backend"]] = (
            row
        )
    return table(
        ("model", "image", "channels", "MMACs", "CPU", "threads", "ONNX Runtime", "OpenVINO"),
        [
            (
                found["row"]["model"],
                f"{found['row']['size_px']} px",
                "-".join(map(str, found["row"]["channels"])),
                f"{found['row']['macs'] / 1e6:.0f}",
                found["row"]["host"]["cpu"]["model"].replace("(R)", "").removesuffix(" Processor"),
                str(found["row"]["threads"]),
                *(f"{found[name]['speedup']:.2f}× [{found[name]['interval'][0]:.2f}, {found[name]['interval'][1]:.2f}]"
                  if found[name]["valid"] else "disturbed" for name in ("onnxruntime", "openvino")),
            )
            for found in by_case.values()
        ],
    )  # fmt: skip


def ghost() -> str:
    """benchmarks/results/ghost_*.json, one table per data set."""
    parts = []
    for path in sorted(path for path in RESULTS.glob("ghost_*.json") if not path.name.startswith("ghost_engines_")):
        found = json.loads(path.read_text())
        values, summary = found["values"], found["summary"]
        twins = {value["seed"]: value["float"] for value in values}
        metric, account = values[0]["metric"], values[0]["account"]
        rows = [
            (
                "float32",
                str(len(twins)),
                f"{100 * sum(twins.values()) / len(twins):.1f} %",
                "–",
                "–",
                "32",
                f"{account['size_float_mb']:.3f}",
                f"{account['bops_float_g']:.1f}",
            )
        ]
        for name, row in sorted(summary.items(), key=lambda entry: (entry[0].startswith("hybrid"), "+" in entry[0])):
            same = row["from_same_size"] if row["from_same_size"]["mean"] is not None else row["from_uniform_5"]
            rows.append(
                (
                    name,
                    str(len(row["seeds"])),
                    f"{100 * row['mean']:.1f} %",
                    points(row["from_float"]),
                    points(same) if name.startswith("hybrid") or "+" in name else "–",
                    f"{row['mean_bits']:.1f}",
                    f"{row['size_mb']:.3f}",
                    f"{row['bops_g']:.1f}",
                )
            )
        head = (
            found["data"],
            "seeds",
            metric,
            "points from float",
            "points from uniform, same size",
            "mean bits",
            "MB",
            "10⁹ BOPs",
        )
        parts.append(table(head, rows))
    return "\n".join(parts)


def ghost_engines() -> str:
    """Engines of what benchmarks/ghost.py trained, where it built them: times and metric, int8 against float32 in turns."""
    parts = []
    for path in sorted(RESULTS.glob("ghost_*.json")):
        found = json.loads(path.read_text())
        rows = []
        for value in sorted(found["values"], key=lambda value: (list(found["summary"]).index(value["variant"]), value["seed"])):
            compared = {comparison["engines"][0]["backend"]: comparison for comparison in value["comparisons"]}
            for backend in dict.fromkeys(engine["backend"] for engine in value["engines"]):
                engines = {engine["precision"]: engine for engine in value["engines"] if engine["backend"] == backend}
                cells = [
                    f"{engines[precision]['latency_ms']['p50']:.2f}" if engines[precision]["status"] == "measured" else "refused"
                    for precision in ("float32", "int8")
                ]
                if "refused" in cells:
                    cells += ["–", f"{100 * value['value']:.1f} %", "–"]
                else:
                    comparison = compared[backend]
                    names = [engine["precision"] for engine in comparison["engines"]]
                    (ratio,) = (one for one in comparison["ratios"] if names[one["engine"]] == "int8")
                    metrics = (value["value"], engines["int8"]["metric"]["value"])
                    cells += [times(ratio, comparison), *(f"{100 * metric:.1f} %" for metric in metrics)]
                rows.append((value["variant"], str(value["seed"]), backend, *cells))
        if rows:
            metric = found["values"][0]["metric"]
            head = ("seed", "engine", "float32 ms", "int8 ms", "faster", f"{metric}, trained", f"{metric}, int8 engine")
            parts.append(table((found["data"], *head), rows))
    return "\n".join(parts) or "None yet."


def detector() -> str:
    """benchmarks/results/detector_512.json as a table: int8 against float32 in turns, and both engines' metric."""
    path = RESULTS / "detector_512.json"
    rows = []
    for seed, kinds in json.loads(path.read_text())["seeds"].items() if path.is_file() else ():
        for kind, found in kinds.items():
            for comparison in found["comparisons"]:
                names = [one["precision"] for one in comparison["engines"]]
                backend = comparison["engines"][0]["backend"]
                engines = {one["precision"]: one for one in found["report"]["engines"] if one["backend"] == backend}
                (ratio,) = (one for one in comparison["ratios"] if names[one["engine"]] == "int8")
                whole, small = (engines[precision]["metric"]["value"] for precision in ("float32", "int8"))
                rows.append(
                    (
                        *(seed, kind, backend),
                        *(f"{engines[precision]['latency_ms']['p50']:.1f}" for precision in ("float32", "int8")),
                        times(ratio, comparison),
                        *(f"{100 * whole:.1f} %", f"{100 * small:.1f} %", f"{100 * (small - whole):+.1f}"),
                    )
                )
    return table(
        ("seed", "quantized by", "engine", "float32 ms", "int8 ms", "faster", "float32 mAP50", "int8 mAP50", "points"), rows
    )


def times(ratio: dict[str, Any], comparison: dict[str, Any]) -> str:
    """A ratio measured in turns, with its interval."""
    low, high = ratio["interval"]
    return f"{ratio['speedup']:.2f}× [{low:.2f}, {high:.2f}]" + ("" if comparison["valid"] else ", disturbed")


def points(found: dict[str, float | None]) -> str:
    """A mean difference with its interval, in points."""
    if found["mean"] is None:
        return "–"
    text = f"{100 * found['mean']:+.1f}"
    if found["low"] is None or found["high"] is None:
        return text
    return f"{text} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def startup() -> str:
    """benchmarks/results/startup.json as a table."""
    commands = json.loads((RESULTS / "startup.json").read_text())["commands"]
    return table(
        ("command", "median", "against `import torch`"),
        [
            (
                f"`{row['command']}`",
                f"{row['median_ms']:.0f} ms",
                f"{row['ratio']:.2f} [{row['ratio_interval'][0]:.2f}, {row['ratio_interval'][1]:.2f}]",
            )
            for row in commands
        ],
    )


def step_cost() -> str:
    """benchmarks/results/step_cost.json as a table."""
    file = RESULTS / "step_cost.json"
    if not file.is_file():
        return "Nothing yet.\n"
    result = json.loads(file.read_text())
    known = {
        "edgekd": (result["ratio"], result["ratio_interval"]),
        "by hand (again)": (result["noise_floor"]["ratio"], result["noise_floor"]["interval"]),
    }
    rows = []
    for loop in result["loops"]:
        ratio, (low, high) = known.get(loop["loop"], (1.0, (1.0, 1.0)))
        rows.append((loop["loop"], f"{loop['median_ms']:.0f} ms", f"{ratio:.3f} [{low:.3f}, {high:.3f}]"))
    title = f"a step, {result['threads']} thread{'s' * (result['threads'] > 1)}"
    return table((title, "median", "against by hand"), rows)


def cifar10() -> str:
    """benchmarks/results/cifar10.json as two tables."""
    report = json.loads((RESULTS / "cifar10.json").read_text())["report"]
    models = table(
        ("model", "architecture", "accuracy (test)", "parameters", "MACs"),
        [
            (
                {"student": f"student: {model['stage']}"}.get(model["role"], model["role"].replace("_", " ")),
                model["title"],
                f"{100 * model['metric']['value']:.2f} %",
                f"{model['params']:,}",
                f"{model['macs'] / 1e6:.1f} M",
            )
            for model in report["models"]
        ],
    )
    engines = table(
        ("backend", "model", "precision", "status", "accuracy (engine)", "p50", "size"),
        [
            (
                engine["backend"],
                engine["role"].replace("_", " "),
                engine["precision"],
                engine["status"],
                "–" if engine["metric"] is None else f"{100 * engine['metric']['value']:.2f} %",
                "–" if engine["latency_ms"] is None else f"{engine['latency_ms']['p50']:.3f} ms",
                f"{engine['size_bytes'] / 1024:.0f} KiB",
            )
            for engine in report["engines"]
        ],
    )
    return models + "\n" + engines


def distilled_engines() -> str:
    """benchmarks/results/distilled_engines.json as a table: means over the seeds."""
    result = json.loads((RESULTS / "distilled_engines.json").read_text())
    rows = []
    found = {(each["backend"], each["precision"]): each for each in result["summary"]}
    for engine in result["seeds"][0]["engines"]:
        same = [
            other
            for row in result["seeds"]
            for other in row["engines"]
            if all(other[key] == engine[key] for key in ("role", "backend", "precision"))
        ]
        gained = found.get((engine["backend"], engine["precision"])) if engine["role"] == "student" else None
        rows.append(
            (
                f"{engine['role']}, {engine['precision']}",
                engine["backend"],
                f"{100 * sum(other['metric']['value'] for other in same) / len(same):.1f} %",
                f"{100 * gained['metric_kept']:.1f} %" if gained else "–",
                f"{gained['speedup']:.1f}×" if gained else "–",
                f"{engine['size_bytes'] / 1024:.0f} KiB",
            )
        )
    metric = result["seeds"][0]["engines"][0]["metric"]["name"]
    return table(("engine", "backend", f"{metric} (engine)", "of the teacher's", "speed, teacher = 1", "size"), rows)


def distilled_best() -> str:
    """The fastest int8 engine of benchmarks/results/distilled_engines.json in a sentence."""
    result = json.loads((RESULTS / "distilled_engines.json").read_text())
    best = max((each for each in result["summary"] if each["precision"] == "int8"), key=lambda each: float(each["speedup"]))
    teacher = result["seeds"][0]["across"]["engines"][0]["backend"]["name"]
    file, recipe = "benchmarks/results/distilled_engines.json", result["recipe"]
    called = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    return (
        f"On street scenes (CamVid), [{Path(recipe).name}]({recipe}) gives an int8 student on\n"
        f"{called.get(best['backend'], best['backend'])} that is {best['speedup']:.1f} times as fast as its float32 teacher on "
        f"{called.get(teacher, teacher)} and keeps\n{100 * best['metric_kept']:.1f} % of its mIoU: means of {best['seeds']} "
        f"seeds, engines measured in turns\n([{file}]({file})).\n"
    )


def h200() -> str:
    """benchmarks/results/h200.json: what ran on that machine."""
    report = json.loads((RESULTS / "h200.json").read_text())["report"]
    return table(
        ("backend", "precision", "status", "accuracy (engine)", "p50", "MACs in the precision"),
        [
            (
                engine["backend"] + (f", provider {engine['options']['provider']}" if "provider" in engine["options"] else ""),
                engine["precision"],
                engine["status"],
                "–" if engine["metric"] is None else f"{100 * engine['metric']['value']:.2f} %",
                "–" if engine["latency_ms"] is None else f"{engine['latency_ms']['p50']:.3f} ms",
                f"{100 * share(engine['audit']['layers'], engine['precision']):.0f} %" if engine["audit"]["layers"] else "–",
            )
            for engine in report["engines"]
            if engine["status"] == "measured"
        ],
    )


def printed(name: str) -> str:
    """What the run of a recipe printed at its end, from benchmarks/results/NAME.json."""
    from edgekd.report import lines

    report = json.loads((RESULTS / f"{name}.json").read_text())["report"]
    return (
        "```text\n"
        + "\n".join(line.rstrip() for line in lines({"ladders": [], "bits": None, "widths": [], **report}))
        + "\n```\n"
    )


def opsets() -> str:
    """Which ONNX opset each engine version reads."""
    from edgekd.engines.opsets import READS

    return table(
        ("engine", "version", "newest ONNX opset"),
        [
            (library, f"{major}.{minor} and later", str(opset))
            for library, rows in READS.items()
            for (major, minor), opset in rows
        ],
    )


def matrix() -> str:
    """benchmarks/results/deployment_matrix.json as two tables: what runs here, and what is built for GPUs elsewhere."""
    runs = json.loads((RESULTS / "deployment_matrix.json").read_text())["runs"]
    families = list(dict.fromkeys(run["family"] for run in runs))
    rows, losses, built = [], [], []
    for family in families:
        mine = [run for run in runs if run["family"] == family]
        for backend in ("onnxruntime", "openvino"):
            for threads in (1, 2):
                cells = [cell for run in mine if (cell := pair(run, backend, threads)) is not None]
                if not cells:
                    continue
                drops = [100 * (cell["float32"] - cell["int8"]) for cell in cells]
                losses += drops if threads == 1 and backend == "onnxruntime" else []
                ratios = sorted(cell["speedup"] for cell in cells)
                marks = "" if all(cell["valid"] for cell in cells) else " (machine not quiet)"
                rows.append(
                    (
                        family,
                        backend,
                        str(threads),
                        str(len(cells)),
                        f"{100 * sum(cell['float32'] for cell in cells) / len(cells):.1f} %",
                        f"{sum(drops) / len(drops):+.2f} [{min(drops):+.1f}, {max(drops):+.1f}]",
                        f"{100 * min(cell['share'] for cell in cells):.0f} %",
                        f"{ratios[len(ratios) // 2]:.2f}× [{ratios[0]:.2f}, {ratios[-1]:.2f}]{marks}",
                    )
                )
        for precision in ("float32", "float16", "int8"):
            cells = [
                cell
                for run in mine
                for cell in run["engines"]
                if cell["backend"] == "tensorrt_rtx" and cell["precision"] == precision
            ]
            done = [cell for cell in cells if cell["status"] in ("built", "measured")]
            names = list(dict.fromkeys(cell["compute_capabilities"][0] for cell in done))
            reasons = list(dict.fromkeys(cell["reason"] for cell in cells if cell not in done))
            if cells:
                built.append((family, precision, f"{len(done)} of {len(cells)}: {', '.join(names)}", "; ".join(reasons) or "–"))
    average = sum(losses) / len(losses)
    head = (
        "family",
        "backend",
        "threads",
        "seeds",
        "float32 accuracy",
        "points lost in int8",
        "MACs in int8",
        "int8 over float32",
    )
    return (
        table(head, rows)
        + f"\nMean loss over {len(losses)} networks (onnxruntime): {average:+.2f} points.\n\n"
        + table(("family", "precision", "TensorRT-RTX engines built, not run", "refused"), built)
    )


def peers() -> str:
    """benchmarks/results/peers.json: a table per family, both backends at one thread."""
    summary = [row for row in json.loads((RESULTS / "peers.json").read_text())["summary"] if row["threads"] == 1]
    parts = []
    for family in dict.fromkeys(row["family"] for row in summary):
        rows = {(row["backend"], row["name"]): row for row in summary if row["family"] == family}
        lines = []
        for name in dict.fromkeys(name for _, name in rows):
            mine = [rows["onnxruntime", name], rows["openvino", name]]
            if name == "float32":
                continue
            cells: list[str] = []
            for row in mine:
                cells.append("failed" if row["drop"] is None else f"{100 * row['drop']['mean']:+.2f}")
                cells.append("–" if row["speedup"] is None else f"{row['speedup']['mean']:.2f}×")
            lines.append((name, *cells))
        seeds = max(len(row["runs"]) for row in rows.values())
        heads = ("ONNX Runtime: points lost", "faster than float32", "OpenVINO: points lost", "faster than float32")
        parts.append(f"**{family}**, {seeds} seed{'s' if seeds > 1 else ''}\n\n{table(('quantized by', *heads), lines)}")
    return "\n".join(parts)


def share(layers: list[dict[str, Any]], precision: str) -> float:
    """Of the multiply-accumulates, those that run in a precision."""
    return sum(row["macs"] for row in layers if row["got"] == precision) / sum(row["macs"] for row in layers)


def pair(run: dict[str, Any], backend: str, threads: int) -> dict[str, Any] | None:
    """One int8 engine of a run and its float32 twin."""
    found = {
        cell["precision"]: (index, cell)
        for index, cell in enumerate(run["engines"])
        if cell["backend"] == backend and cell["threads"] == threads and cell["status"] == "measured"
    }
    if set(found) != {"float32", "int8"}:
        return None
    number, engine = found["int8"]
    ratio, valid = next(
        (ratio, group["valid"]) for group in run["summaries"] for ratio in group["ratios"] if ratio["engine"] == number
    )
    return {
        "float32": found["float32"][1]["metric"]["value"],
        "int8": engine["metric"]["value"],
        "share": share(engine["audit"]["layers"], "int8"),
        "speedup": ratio["speedup"],
        "valid": valid,
    }


DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"quickstart": partial(printed, "quickstart"), "distilled best": distilled_best},
    "docs/deployment.md": {"opsets": opsets, "matrix": matrix, "segmenters": segmenters, "peers": peers},
    "docs/methods.md": {"methods": methods, "semantic": semantic},
    "docs/recipes.md": {"options": options},
    "docs/results.md": {
        "cifar10": cifar10,
        "detector 512": detector,
        "distilled engines": distilled_engines,
        "ghost": ghost,
        "ghost engines": ghost_engines,
        "ghost recipe": partial(printed, "ghost"),
        "camvid recipe": partial(printed, "camvid"),
        "h200": h200,
        "int8 width": width,
        "startup": startup,
        "step cost": step_cost,
    },
}

if __name__ == "__main__":
    sys.exit(main())
