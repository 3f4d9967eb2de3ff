"""A run that several tests look at, outside of any one test's folder."""

from ruamel.yaml import YAML

from edgekd import pipeline, recipe
from edgekd.display import Display


def run_once(data, folder):
    """Run a recipe in this process -> (outcome, run directory)."""
    path = folder / "recipe.yaml"
    with path.open("w") as stream:
        YAML().dump(data, stream)
    loaded = recipe.load_recipe(path)
    outcome = pipeline.compress(loaded, out=folder / "run", smoke=False, display=Display(quiet=True), command="edgekd compress")
    return outcome, folder / "run"
