"""What commands import, and the published start-up times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgekd
from edgekd.bench.stats import percentile, ratio_of_medians

ROOT = Path(edgekd.__file__).parents[1]
HEAVY = {
    "torch",
    "pydantic",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "pycuda",
    "tensorrt_rtx",
    "numpy",
    "ruamel",
    "plotly",
    "jinja2",
    "sklearn",
}


def imported(*arguments):
    """The top-level packages that a command has imported when it ends."""
    code = """
import atexit, sys
atexit.register(lambda: print("IMPORTED", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr))
sys.argv = ["edgekd", *sys.argv[1:]]
from edgekd.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stderr.splitlines()[-1].split()
    assert last[0] == "IMPORTED"
    return set(last[1:])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    found = imported(*arguments)
    assert "typer" in found
    assert not found & HEAVY


@pytest.mark.parametrize("arguments", [["compress", "--help"], ["bench", "--help"]], ids=" ".join)
def test_help_of_a_command_imports_nothing_heavy(arguments):
    assert not imported(*arguments) & (HEAVY - {"pydantic"})  # Typer checks the arguments of a command with it


@pytest.mark.parametrize("arguments", [["doctor"], ["backends", "--json"]], ids=" ".join)
def test_what_looks_at_engines_needs_no_training_package(arguments):
    assert not imported(*arguments) & {"torch", "onnx", "lightning_fabric", "torch_pruning", "sklearn"}


def test_validating_imports_no_training_machinery():
    """Torch itself is needed to check taps. Fabric, its compiler and the exporter are not, and take seconds."""
    code = """
import sys
from pathlib import Path
from edgekd import recipe
recipe.preflight(recipe.load_recipe(Path("recipes/classification/quickstart.yaml")))
heavy = {"torch._dynamo", "torch.onnx._internal.exporter", "lightning_fabric", "torchmetrics", "torch_pruning", "onnxscript",
         "sklearn", "scipy", "tensorboard", "plotly", "sympy"}
assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_published_times_follow_from_their_samples():
    path = ROOT / "benchmarks" / "results" / "startup.json"
    text = path.read_text()
    data = json.loads(text)
    assert str(ROOT) not in text
    assert "/home" not in text
    reference = data["commands"][0]
    assert reference["command"] == data["reference"]
    limits = {}
    for row in data["commands"]:
        assert len(row["samples_ns"]) == data["rounds"] >= 10
        assert row["median_ms"] == pytest.approx(percentile(row["samples_ns"], 50) / 1e6)
        ratio, interval = ratio_of_medians(row["samples_ns"], reference["samples_ns"])
        assert (row["ratio"], row["ratio_interval"]) == (ratio, list(interval))
        if row["limit"] is not None:
            limits[row["command"]] = row["limit"]
            assert row["ok"]
            assert row["ratio_interval"][1] <= row["limit"], "the whole interval is within the limit"
    assert limits == {"edgekd --help": 0.25, "edgekd validate recipes/classification/quickstart.yaml": 2.5}
