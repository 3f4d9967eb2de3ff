"""Every shipped recipe is validated, and smoke-run through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.recipe import load_recipe, preflight

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_smoke(recipe, tmp_path, request):
    if "root:" in recipe.read_text():
        request.getfixturevalue("data_root")  # skips where there is no data
    command = [sys.executable, "-m", "edgekd"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    preflight(load_recipe(recipe))  # as it is: a smoke run trains less
    done = subprocess.run(
        [*command, "compress", str(recipe), "--smoke", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {engine["status"] for engine in report["engines"]} <= {"measured", "built"}
    assert all(engine["reason"] for engine in report["engines"] if engine["status"] == "built")
    assert (tmp_path / "report" / "report.html").stat().st_size > 100_000
