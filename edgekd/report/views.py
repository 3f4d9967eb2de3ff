"""The report's data arranged as tables of text. Markdown, HTML and terminal print these, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from edgekd.report import units

Report = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Text in rows and columns."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numeric: frozenset[int]
    """Columns that are aligned right."""

    def __bool__(self) -> bool:
        return bool(self.rows)

    def without(self, *columns: str) -> Table:
        """The same table with fewer columns."""
        keep = [index for index, name in enumerate(self.columns) if name not in columns]
        return Table(
            tuple(self.columns[index] for index in keep),
            [tuple(row[index] for index in keep) for row in self.rows],
            frozenset(new for new, old in enumerate(keep) if old in self.numeric),
        )


def table(columns: str, rows: Iterable[Iterable[object]]) -> Table:
    """A table from its headings, separated by ``|``; a heading that ends in ``>`` is a column of numbers."""
    names = [name.strip() for name in columns.split("|")]
    return Table(
        tuple(name.rstrip("> ") for name in names),
        [tuple(units.plain(cell) for cell in row) for row in rows],
        frozenset(index for index, name in enumerate(names) if name.endswith(">")),
    )


def metric_name(report: Report) -> str:
    """The task's metric, or ``metric`` where nothing says which."""
    entries = [entry["metric"] for entry in (*report["models"], *report["engines"]) if entry["metric"]]
    return str(entries[0]["name"]) if entries else "metric"


def headline(report: Report) -> str:
    """The answer in one sentence."""
    answer = report["answer"]
    if answer["compressed"] is None:
        return f"No answer yet: {answer['reason']}."
    engine, metric = report["engines"][answer["compressed"]], answer["metric"]
    at = engine["role"].partition("@")[2]
    what = (
        f"The compressed student{f' at width {at}' if at else ''} ({engine['precision']} on {engine['group']}{_threads(engine)})"
    )
    if metric["compressed"] is not None:
        value = units.metric({"name": metric["name"], "value": metric["compressed"]})
    else:
        value = "unknown"
    if answer["reference"] is None:
        return f"{what} takes {units.ms(engine['latency_ms']['p50'])} at {value} {metric['name']}; {answer['reason']}."
    latency, size = answer["latency_ms"], answer["size_bytes"]
    text = f"{what} runs {units.ratio(latency['ratio'])} as fast as {_reference_words(report)}"
    if latency["interval"] is not None:
        text += f" {units.interval(latency['interval'])}"
    text += f", at {value} {metric['name']}"
    if metric["difference"] is not None:
        text += f" ({units.difference(metric['difference'], metric['name'])})"
    if size["ratio"] is not None:
        text += f", in a file {factor(size['ratio'], 'smaller', 'larger')}"
    return text + "."


def latency_note(report: Report) -> str | None:
    """Why the speed-up is not the quotient of the two latencies; None where it is."""
    if not report["answer"]["latency_ms"]["interleaved"]:
        return None
    return (
        "Latencies are of each engine alone; the speed-up is of both measured in turns, which a drift of the machine hits alike."
    )


def factor(ratio: float | None, less: str, more: str) -> str:
    """``3.10× smaller`` or ``1.20× larger``."""
    if ratio is None:
        return units.NONE
    return f"{units.ratio(ratio)} {less}" if ratio >= 1 else f"{units.ratio(1 / ratio)} {more}"


def _threads(engine: dict[str, Any]) -> str:
    count = engine["threads"]
    return "" if count is None or "threads" in engine["group"] else f", {count} thread{'s' if count != 1 else ''}"


def _reference_words(report: Report) -> str:
    engine, compressed = (report["engines"][report["answer"][key]] for key in ("reference", "compressed"))
    if "@" in compressed["role"] and engine["role"] == "student":
        return "its full width"
    return {"teacher": "the teacher", "student_alone": "the student trained alone"}.get(
        engine["role"], f"its {engine['precision']} twin"
    )


def answer(report: Report) -> Table:
    """The answer as a table: what, before, after, change."""
    found = report["answer"]
    latency, metric, energy = found["latency_ms"], found["metric"], found["energy_j"]
    speed = f"{units.ratio(latency['ratio'])} as fast"
    if latency["interleaved"]:
        speed += f", interleaved; {100 * latency['confidence']:.0f} % interval {units.interval(latency['interval'])}"
    else:
        speed += ", measured apart"

    def named(key: str) -> dict[str, Any] | None:
        return {"name": metric["name"], "value": metric[key]} if metric[key] is not None else None

    rows = [
        (
            metric["name"] or "metric",
            units.metric(named("reference")),
            units.metric(named("compressed")),
            units.difference(metric["difference"], metric["name"] or ""),
        ),
        (
            "latency, p50",
            units.ms(latency["reference"]),
            units.ms(latency["compressed"]),
            speed if latency["ratio"] else units.NONE,
        ),
        _amount("engine size", found["size_bytes"], units.size, "smaller", "larger"),
        _amount("peak memory", found["peak_memory_mib"], units.mib, "less", "more"),
        _amount("energy per inference", energy, units.joules, "less", "more"),
        _amount("parameters", found["params"], units.count, "fewer", "more"),
        _amount("multiply-accumulates", found["macs"], units.count, "fewer", "more"),
    ]
    if energy["compressed"] is None and energy["reason"]:
        rows[4] = (*rows[4][:3], f"not read: {energy['reason']}")
    before = report["engines"][found["reference"]]["role"] if found["reference"] is not None else "teacher"
    return table(f"|{units.role(before)} >|compressed >|change", rows)


def _amount(name: str, pair: dict[str, Any], text: Any, less: str, more: str) -> tuple[str, str, str, str]:
    return name, text(pair["reference"]), text(pair["compressed"]), factor(pair["ratio"], less, more)


def models(report: Report) -> Table:
    """One row per checkpoint."""
    rows = [
        (
            units.stage_title(model["role"], model["stage"]),
            model["title"],
            units.metric(model["metric"]),
            units.count(model["params"]),
            units.count(model["macs"]),
            bits(model["bits"]),
            units.NONE if model["epochs"] is None else model["epochs"],
            units.seconds(model["seconds"]),
        )
        for model in report["models"]
    ]
    return table(f"model|architecture|{metric_name(report)} >|params >|MACs >|bits (weights/activations)|epochs >|time >", rows)


def bits(pairs: list[dict[str, Any]]) -> str:
    """``8/8`` for weights and activations; several pairs where layers differ."""
    return ", ".join(f"{pair['weight']}/{pair['activation']}" for pair in pairs) or units.NONE


def precision_share(engine: dict[str, Any]) -> str:
    """Which share of the multiply-accumulates the built engine runs in its precision, as its library says."""
    rows = (engine["audit"] or {}).get("layers") or []
    runs = "float32" if engine["precision"] == "hybrid" else engine["precision"]  # hybrid bits in float operations
    got = sum(row["macs"] for row in rows if row["got"] == runs and not row.get("elsewhere"))
    total = sum(row["macs"] for row in rows)
    return f"{100 * got / total:.0f} %" if total else units.NONE


def _percent(part: float | None, whole: float) -> str:
    return units.NONE if part is None or not whole else f"{100 * part / whole:.1f} %"


def audit(engine: dict[str, Any]) -> Table:
    """The precision audit of one engine: per layer what was asked and what it runs in."""
    rows = (engine["audit"] or {}).get("layers") or []
    macs, time = (sum(row[column] or 0 for row in rows) for column in ("macs", "time_us"))
    return table(
        "layer|operation|asked|runs in|as|share of MACs >|share of time >|time, µs >",
        [
            (
                row["path"],
                row["op"],
                row["asked"],
                row["got"] + (f" on the {row['elsewhere']}" if row.get("elsewhere") else ""),
                row["kind"] or units.NONE,
                _percent(row["macs"], macs),
                _percent(row["time_us"], time),
                units.number(row["time_us"]),
            )
            for row in rows
        ],
    )


def engines(report: Report) -> Table:
    """One row per cell of the deploy matrix."""
    rows = []
    for engine in report["engines"]:
        latency = engine["latency_ms"] or {}
        spread = [units.number(latency.get(key)) for key in ("p50", "p90", "p99", "mean")]
        rows.append(
            (
                engine["group"],
                units.role(engine["role"]),
                engine["precision"],
                status(engine),
                precision_share(engine),
                units.metric(engine["metric"]),
                *spread,
                units.number(engine["first_ms"]),
                units.number(engine["peak_memory_mib"]),
                units.size(engine["size_bytes"]),
            )
        )
    times = "p50 ms >|p90 ms >|p99 ms >|mean ms >|first ms >"
    return table(f"backend|model|precision|status|MACs in it >|{metric_name(report)} >|{times}|memory MiB >|size >", rows)


def details(report: Report) -> Table:
    """Every metric of every measured engine, where a task has more than one."""
    rows = [(engine["title"], (engine["metric"] or {}).get("details") or {}) for engine in report["engines"]]
    names = list(dict.fromkeys(name for _, found in rows for name in found))
    if len(names) < 2:
        return table("engine", [])
    shown = [(title, *(units.metric({"name": name, "value": found[name]}) for name in names)) for title, found in rows if found]
    return table("engine|" + "|".join(f"{name} >" for name in names), shown)


def status(engine: dict[str, Any]) -> str:
    """``measured``, or what became of it instead; a measurement that may not be used is ``invalid``."""
    return "invalid" if engine["valid"] is False else str(engine["status"])


def notes(report: Report) -> list[str]:
    """Why engines are not measured, and what was noticed while others were."""
    found = [f"{engine['title']} {engine['status']}: {engine['reason']}" for engine in report["engines"] if engine["reason"]]
    found += [f"{engine['title']}: {warning}" for engine in report["engines"] for warning in engine["warnings"]]
    return [units.plain(note) for note in found]


def comparisons(report: Report) -> Table:
    """One row per engine that was measured interleaved with another."""
    rows = [
        (
            report["engines"][ratio["engine"]]["title"],
            report["engines"][ratio["reference"]]["title"].partition(": ")[2],
            units.ratio(ratio["speedup"]),
            units.interval(ratio["interval"]),
            ratio["verdict"] if comparison["valid"] is not False else f"{ratio['verdict']} (invalid)",
            units.interval((comparison["noise_floor"] or {}).get("interval"), 4),
            comparison["rounds"],
        )
        for comparison in report["comparisons"]
        for ratio in comparison["ratios"]
    ]
    return table("engine|against|speed-up >|95 % interval >|verdict|noise floor >|rounds >", rows)


def budget(report: Report) -> Table:
    """Each limit of the budget, and what was measured."""
    checks = (report["budget"] or {}).get("checks", [])
    words = {
        "latency_ms": ("latency, p50", units.ms),
        "size_mib": ("engine size", lambda value: units.size(round(value * 2**20))),
        "memory_mib": ("peak memory", units.mib),
        "accuracy_drop": ("accuracy lost", lambda value: f"{value:.2f} points".replace("-", "−")),
    }
    rows = []
    for check in checks:
        name, text = words.get(check["limit"], (check["limit"], units.number))
        index = check.get("cell")
        engine = report["engines"][index]["title"] if isinstance(index, int) and index < len(report["engines"]) else units.NONE
        rows.append((name, text(check["allowed"]), text(check["measured"]), "met" if check["ok"] else "missed", engine))
    return table("limit|allowed >|measured >|result|engine", rows)


def budget_line(report: Report) -> str | None:
    """The budget in one line; None where the recipe has none."""
    found = report["budget"]
    if found is None:
        return None
    if not found.get("checks"):
        return "budget: not met, because no engine of the student was measured"
    missed = sum(not check["ok"] for check in found["checks"])
    return "budget: met" if not missed else f"budget: missed, {missed} of {len(found['checks'])} limits"


def training(report: Report) -> Table:
    """The last epoch of every training."""
    rows = []
    for stage in report["training"]:
        last = stage["epochs"][-1]
        terms = ", ".join(f"{name} {units.number(value)}" for name, value in (last.get("terms") or {}).items())
        value = last.get("val")
        shown = units.metric({"name": stage["metric"], "value": value}) if value is not None else units.NONE
        rows.append((stage["title"], len(stage["epochs"]), shown, terms))
    return table("training|epochs >|validation, last epoch >|terms, last epoch", rows)


def statistics(report: Report) -> Table:
    """What methods say of themselves after the last epoch, such as the share of open gates."""
    rows = [
        (stage["title"], name, units.number(value))
        for stage in report["training"]
        for name, value in (stage["epochs"][-1].get("statistics") or {}).items()
    ]
    return table("training|what|last epoch >", rows)


def layers(report: Report) -> Table:
    """One row per layer of the finished student."""
    rows = [
        (
            row["path"],
            row.get("kind", ""),
            row.get("channels_before", ""),
            row.get("channels", ""),
            units.count(row.get("params")),
            units.percent(row.get("sparsity")),
            row.get("weight_bits", units.NONE),
            row.get("activation_bits", units.NONE),
        )
        for row in report["layers"]
    ]
    return table("layer|kind|channels before >|channels >|params >|zero weights >|weight bits >|activation bits >", rows)


def layers_line(report: Report) -> str:
    """The layers of the finished student in one sentence."""
    rows = report["layers"]
    before, after = sum(row["channels_before"] for row in rows), sum(row["channels"] for row in rows)
    weights = sorted({row.get("weight_bits", 32) for row in rows})
    text = f"{len(rows)} layers, {after} output channels"
    text += f" of {before} before pruning" if after != before else ""
    text += f"; weights of {' and '.join(map(str, weights))} bits."
    if weights[0] < 8:
        text += " Weights below 8 bits are stored in fewer bits; no engine here computes faster with them."
    return text


def ladder(found: dict[str, Any]) -> Table:
    """One row per step of a precision ladder."""
    name = found["metric"]
    rows: list[tuple[object, ...]] = [
        ("float32", units.NONE, units.metric({"name": name, "value": found["float"]}), units.NONE, units.NONE, units.NONE, "")
    ]
    rows += [
        (
            step["name"],
            ", ".join(step["kept"]) or "none" if step["name"] != "float16" else "all, in float16",
            units.metric({"name": name, "value": step["metric"]}),
            units.number(step["drop"]) if step["drop"] >= 0 else f"−{units.number(-step['drop'])}",
            units.percent(step["int8_macs"]),
            units.seconds(step["seconds"]),
            "yes" if step["within"] else "no",
        )
        for step in found["steps"]
    ]
    limit = f"within {found['max_drop']:g}"
    return table(f"step|layers kept in float|{name}, validation >|points below float >|MACs in int8 >|time >|{limit}", rows)


def ladder_line(found: dict[str, Any]) -> str:
    """How a precision ladder ended, in one sentence."""
    if not found["reached"]:
        return f"No step is within {found['max_drop']:g} points of the float model on the validation split."
    if found["precision"] == "float16":
        return f"No int8 model is within {found['max_drop']:g} points of the float model; float16 takes its place."
    last = found["steps"][-1]
    kept = f" with {len(last['kept'])} layer{'s' if len(last['kept']) != 1 else ''} in float" if last["kept"] else ""
    return f"int8{kept} is within {found['max_drop']:g} points of the float model: the step {last['name']!r}."


def ladder_ranking(found: dict[str, Any]) -> Table:
    """What int8 does to the outputs where one layer alone is quantized, the worst first."""
    rows = [(entry["path"], f"{entry['divergence']:.2e}") for entry in found["ranking"]]
    return table("layer|output error where it alone is int8 >", rows)


def skipped(report: Report) -> Table:
    """What is missing and why."""
    return table("what|status|why", [(row["what"], row["status"], row["why"]) for row in report["skipped"]])


def state_line(report: Report) -> str | None:
    """What became of the run; None where it finished."""
    state = report["state"]
    if state["status"] == "failed":
        where = f" at {state['failed_at']}" if state["failed_at"] else ""
        return units.plain(f"This run failed{where}: {state['reason'] or 'no reason was recorded'}")
    if state["status"] == "unfinished":
        last = state["last_step"] or "none"
        return units.plain(f"This run is not finished: it was interrupted, or is still running (last finished step: {last})")
    return None


def parity(report: Report) -> Table:
    """One row per hop and output: how far a form of the model is from the one before; a hop that was not run has its reason."""
    rows: list[tuple[object, ...]] = []
    for entry in report["parity"]:
        about = (entry["hop"], units.role(entry["role"]), entry["encoding"] or units.NONE)
        if not entry["outputs"]:
            rows.append((*about, f"not run: {entry['reason']}", *[units.NONE] * 6))
        for output in entry["outputs"]:
            images = f"{output.get('images', units.NONE)} {entry['split'] or ''}".rstrip()
            rows.append(
                (
                    *about,
                    output.get("output", ""),
                    images,
                    _of_allowed(_small_percent(output.get("max_error")), _small_percent(entry["allowed"].get("max_error"))),
                    _worst(output.get("worst")),
                    f"{output['cosine']:.6f}" if output.get("cosine") is not None else units.NONE,
                    _of_allowed(units.percent(output.get("changed")), units.percent(entry["allowed"].get("max_changed"))),
                    _before_after(entry["metric"]),
                )
            )
        if entry["tensors"]:
            rows.append((*about, *_tensors(entry["tensors"])))
    columns = "hop|model|precision|output|images >|max error (allowed) >|worst element: expected, received|cosine >"
    return table(columns + "|decisions changed (allowed) >|metric before → after >", rows)


def _tensors(found: dict[str, Any]) -> tuple[object, ...]:
    """What a comparison tensor by tensor says, in the columns of the others."""
    if not found.get("count"):
        return (units.plain(found.get("reason", "")), *[units.NONE] * 6)
    return (
        f"{found['count']} tensors, one by one",
        units.NONE,
        f"{units.number(found['max_steps'], 3)} of a step (1)",
        f"in {found['module']}",
        units.NONE,
        f"{_small_percent(found['differing'])} a step off",
        units.NONE,
    )


def _of_allowed(value: str, allowed: str) -> str:
    return f"{value} ({allowed})"


def _worst(worst: dict[str, Any] | None) -> str:
    """Which element differs most, and its two values."""
    if worst is None:
        return units.NONE
    values = ["not finite" if worst[key] is None else units.number(worst[key], 4) for key in ("expected", "received")]
    return f"image {worst['image']}, {worst['position']}: {values[0]}, {values[1]}"


def _before_after(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return units.NONE
    shown = [
        units.NONE if metric[key] is None else units.metric({"name": metric["name"], "value": metric[key]})
        for key in ("before", "after")
    ]
    return f"{shown[0]} → {shown[1]}"


def _small_percent(value: float | None) -> str:
    return units.NONE if value is None else f"{units.number(100 * value, 2)} %"
