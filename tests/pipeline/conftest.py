"""Ways to run a recipe."""

import pytest
from ruamel.yaml import YAML

from edgekd import pipeline, recipe
from edgekd.display import Display


@pytest.fixture
def write(tmp_path):
    """Write a recipe to a file."""

    def write(data, name="recipe.yaml"):
        path = tmp_path / name
        with path.open("w") as stream:
            YAML().dump(data, stream)
        return path

    return write


class Recorder(Display):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(quiet=True)
        self.warnings, self.stages, self.found = [], [], []

    def warn(self, line):
        self.warnings.append(line)

    def stage(self, name, role):
        self.stages.append(name)

    def reused(self, folder):
        self.found.append(folder)


@pytest.fixture
def run(write, tmp_path):
    """Run a recipe in this process: run(data) -> (outcome, recorder)."""

    def run(data, *, out=None, smoke=False, allow_fallback=False):
        loaded = recipe.load_recipe(write(data))
        if allow_fallback:
            loaded = recipe.Loaded(recipe.allow_fallback(loaded.recipe), loaded.document, loaded.search)
        if smoke:
            loaded = recipe.Loaded(recipe.smoke(loaded.recipe), loaded.document, loaded.search)
        recorder = Recorder()
        outcome = pipeline.compress(loaded, out=out or tmp_path / "run", smoke=smoke, display=recorder, command="edgekd compress")
        return outcome, recorder

    return run
