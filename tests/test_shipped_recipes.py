"""Every shipped recipe is validated, and smoke-run through the command line."""

import json
from pathlib import Path

import pytest

from edgekd.recipe import load_recipe, preflight

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))


@pytest.mark.filterwarnings("default")  # what a user would see, too
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_smoke(recipe, tmp_path, request, run):
    if "root:" in recipe.read_text():
        request.getfixturevalue("data_root")  # skips where there is no data
    preflight(load_recipe(recipe))  # as it is: a smoke run trains less
    code, _, err = run("compress", recipe, "--smoke", "--out", tmp_path)
    assert code == 0, err
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {engine["status"] for engine in report["engines"]} <= {"measured", "built"}
    assert all(engine["reason"] for engine in report["engines"] if engine["status"] == "built")
    assert (tmp_path / "report" / "report.html").stat().st_size > 100_000
