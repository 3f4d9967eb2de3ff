"""Write the parts of the documentation that follow from code and from committed results, between their markers.

python scripts/write_docs.py            write them
python scripts/write_docs.py --check    only say what is out of date; exit code 1 where something is
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
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


def width() -> str:
    """benchmarks/results/int8_width.json as a table."""
    rows = json.loads((RESULTS / "int8_width.json").read_text())["rows"]
    by_width: dict[int, dict[str, Any]] = {}
    for row in rows:
        by_width.setdefault(row["width"], {"row": row})[row["backend"]] = row
    return table(
        ("ResNet-8 channels", "MMACs", "ONNX Runtime", "OpenVINO"),
        [
            (
                "-".join(map(str, found["row"]["channels"])),
                f"{found['row']['macs'] / 1e6:.0f}",
                *(f"{found[name]['speedup']:.2f}× [{found[name]['interval'][0]:.2f}, {found[name]['interval'][1]:.2f}]"
                  for name in ("onnxruntime", "openvino")),
            )
            for found in by_width.values()
        ],
    )  # fmt: skip


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


def quickstart() -> str:
    """What benchmarks/results/quickstart.json's run printed at its end."""
    from edgekd.report import lines

    report = json.loads((RESULTS / "quickstart.json").read_text())["report"]
    return "```text\n" + "\n".join(line.rstrip() for line in lines({"ladders": [], **report})) + "\n```\n"


DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"quickstart": quickstart},
    "docs/recipes.md": {"options": options},
    "docs/results.md": {"cifar10": cifar10, "int8 width": width, "startup": startup},
}

if __name__ == "__main__":
    sys.exit(main())
