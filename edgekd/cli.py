"""The command line. One short function per command; heavy imports stay inside them, so that ``--help`` is quick.

Exit codes: 0 done, 1 the run failed, 2 the recipe or the command is wrong, 3 over budget, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from edgekd import __version__
from edgekd.errors import BudgetExceeded, EdgekdError, RecipeError, UsageError

app = typer.Typer(
    name="edgekd",
    help="From a trained teacher to a small, quantized vision engine, measured on the device it will run on.",
    epilog="Example: edgekd compress recipes/classification/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line; errors that edgekd raises on purpose become a message, a hint and an exit code."""
    try:
        app()
    except EdgekdError as error:
        for line in error.message.splitlines():
            print(f"error: {line}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RecipeError | UsageError) else 3 if isinstance(error, BudgetExceeded) else 1)


def _version(show: bool) -> None:
    if show:
        print(f"edgekd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(epilog="Example: edgekd compress recipes/classification/quickstart.yaml --out runs/first")
def compress(
    recipe: RecipeFile,
    out: Annotated[
        Path | None, typer.Option(help="The run directory; finished work in it is reused.", show_default="runs/NAME")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Two steps per training on a few images: does the recipe run at all?")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    allow_fallback: Annotated[
        bool,
        typer.Option("--allow-fallback", help="Measure engines that do not run in the precision that was asked, too."),
    ] = False,
) -> None:
    """Run a recipe: train, distil, prune, quantize, export, build engines, measure, report.

    The same command again goes on where it stopped and reuses what is finished.
    """
    _share_cores()
    from edgekd import recipe as recipes

    _import_from(recipe)
    loaded = recipes.load_recipe(recipe)
    recipes.preflight(loaded)
    if smoke:
        loaded = replace(loaded, recipe=recipes.smoke(loaded.recipe))
    if allow_fallback:
        loaded = replace(loaded, recipe=recipes.allow_fallback(loaded.recipe))
    from edgekd import pipeline, report
    from edgekd.artifacts import Store
    from edgekd.display import Display
    from edgekd.train.hardware import rank

    display = Display(quiet=quiet or rank() != 0)
    folder = out or Path("runs") / (loaded.recipe.name + ("-smoke" if smoke else ""))
    Store(folder)  # makes the run directory, or says why it cannot
    try:
        outcome = pipeline.compress(loaded, out=folder, smoke=smoke, display=display, command=pipeline.command_line())
    except KeyboardInterrupt:
        display.close()
        print("stopped; the same command goes on from the last finished epoch", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        display.close()
    if rank() != 0:
        return
    print("\n".join(report.lines(outcome.report)))
    print(f"\nreport: {folder / 'report' / 'report.html'}")
    if outcome.failures:
        raise EdgekdError(
            "\n".join(["the run finished, but not every engine:", *outcome.failures]), hint="the report has the reasons"
        )


@app.command(epilog="Example: edgekd validate recipes/classification/quickstart.yaml")
def validate(recipe: RecipeFile) -> None:
    """Check a recipe, its files and the backends that it needs, without doing any work."""
    from edgekd import recipe as recipes

    _import_from(recipe)
    loaded = recipes.load_recipe(recipe)
    recipes.preflight(loaded)
    stages = " > ".join(stage.kind for stage in loaded.recipe.stages)
    engines = sum(len(recipes.deployed_roles(loaded.recipe, entry)) * len(entry.precision) for entry in loaded.recipe.deploy)
    print(f"{recipe}: valid. {stages}; up to {engines} engine{'s' * (engines != 1)}")


@app.command(epilog="Example: edgekd schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from edgekd import recipe as recipes

    print(json.dumps(recipes.json_schema(), indent=1))


@app.command(epilog="Example: edgekd methods --json")
def methods(as_json: Json = False) -> None:
    """List the distillation methods and their options."""
    from edgekd.distill import METHODS

    rows = []
    for config in METHODS:
        fields = {
            name: {"default": None if field.is_required() else field.default, "help": field.description or ""}
            for name, field in config.model_fields.items()
            if name != "name"
        }
        name = config.model_json_schema()["properties"]["name"]["const"]
        rows.append({"name": name, "summary": (config.__doc__ or "").strip().splitlines()[0], "options": fields})
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['name']}: {row['summary']}")
        for name, option in row["options"].items():
            print(f"  {name} = {option['default']}: {' '.join(option['help'].split())}")


@app.command(epilog="Example: edgekd backends --json")
def backends(as_json: Json = False) -> None:
    """List the backends: version or install command, and the precisions that they run."""
    from edgekd.engines import BACKENDS, OPTIONS

    rows: list[dict[str, Any]] = []
    for name, backend in BACKENDS.items():
        found = backend.available()
        rows.append(
            {
                "name": name,
                "available": found.ok,
                "version": found.version,
                "reason": found.reason,
                "install": found.hint,
                "precisions": list(OPTIONS[name]().precisions),
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        state = row["version"] if row["available"] else f"not available: {row['reason']}; {row['install']}"
        print(f"{row['name']:<14} {state}  ({', '.join(row['precisions'])})")


@app.command(epilog="Example: edgekd bench model.onnx --backend openvino --threads 2; edgekd bench runs/quickstart/*-engine-*")
def bench(
    models: Annotated[list[Path], typer.Argument(help="ONNX files, or engine folders of a run.", show_default=False)],
    backend: Annotated[str, typer.Option(help="For ONNX files: the backend that builds and runs them.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="For ONNX files: CPU threads.")] = 1,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images per inference.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="How long to measure each.")] = 3.0,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="For ONNX files whose sizes are free: NAME=1x3x224x224, the batch first; once per input."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure engines: alone in a process of their own, and, where there are several, interleaved against the first."""
    from edgekd import standalone

    shapes = standalone.parse_shapes(shape or [])
    result = standalone.bench(models, backend=backend, threads=threads, batch=batch, seconds=seconds, shapes=shapes)
    print(json.dumps(result, indent=1) if as_json else "\n".join(standalone.lines(result)))


@app.command(epilog="Example: edgekd bundle runs/quickstart --backend onnxruntime --precision int8 --out classifier")
def bundle(
    run: Annotated[Path, typer.Argument(help="A finished run directory.", show_default=False)],
    backend: Annotated[str | None, typer.Option(help="Of the student's engines, that of this backend.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the student's engines, that of this precision.")] = None,
    engine: Annotated[str | None, typer.Option(help="The engine in this folder of the run.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; it must not exist.", show_default="RUN/bundle-BACKEND-PRECISION")
    ] = None,
) -> None:
    """Write an engine as a folder to copy to a device: by default the one that the report's answer is about."""
    from edgekd.bundle import make

    try:
        found = make.make(run, choice=make.Choice(backend, precision, engine), out=out)
    except KeyboardInterrupt:
        print("stopped; no bundle was written", file=sys.stderr)
        raise typer.Exit(130) from None
    print("\n".join(make.lines(found)))


@app.command("check-bundle", epilog="Example: edgekd check-bundle classifier --rebuild classifier-here")
def check_bundle(
    folder: Annotated[Path, typer.Argument(help="A folder that edgekd bundle wrote.", show_default=False)],
    rebuild: Annotated[
        Path | None,
        typer.Option(help="Build the engine for this machine from the bundled model, as a new bundle here.", show_default=False),
    ] = None,
) -> None:
    """Check a bundle on this machine: are its files whole, does its engine run here, does it give what it gave before?"""
    from edgekd.bundle import check

    try:
        found = check.check(folder) if rebuild is None else check.rebuild(folder, rebuild)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    print("\n".join(check.lines(found)))


@app.command(epilog="Example: edgekd report runs/quickstart")
def report(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Where to write.", show_default="RUN/report")] = None,
) -> None:
    """Write the report of a run again from its files, finished or not."""
    from edgekd import report as reports

    print("\n".join(reports.lines(reports.write(run, out))))


@app.command(epilog="Example: edgekd doctor --json")
def doctor(as_json: Json = False) -> None:
    """Say what this machine is, which backends it has, and what that means for INT8."""
    from edgekd import doctor as doctors

    facts = doctors.inspect()
    print(json.dumps(facts, indent=1) if as_json else "\n".join(doctors.lines(facts)))


def _share_cores() -> None:
    """Have torch's waiting threads give their cores back soon: call it before torch is imported.

    By default they spin. Where anything else wants a core, the thread that all wait for does not get one, and training becomes
    many times slower; alone on the machine, the difference is a few percent.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _import_from(recipe: Path) -> None:
    """Let import paths of a recipe name modules in the working directory and beside the recipe."""
    for folder in (str(recipe.resolve().parent), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.insert(0, folder)
