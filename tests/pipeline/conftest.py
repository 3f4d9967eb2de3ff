"""A recipe that runs in seconds, and a way to run it."""

import copy

import pytest
from ruamel.yaml import YAML

from edgekd import pipeline, recipe
from edgekd.display import Display

TINY = {
    "name": "tiny",
    "task": {"kind": "classification"},
    "data": {"kind": "digits", "size_px": 8},
    "teacher": {"model": {"name": "resnet8"}, "train": {"epochs": 2, "batch_size": 100, "lr": 0.1}},
    "student": {"model": {"name": "resnet8", "arguments": {"width": 0.5}}},
    "compare": ["student_alone"],
    "stages": [
        {"kind": "distill", "method": {"name": "logits"}, "train": {"epochs": 2, "batch_size": 100, "lr": 0.1}},
        {"kind": "prune", "macs": 0.7, "round_to": 2, "train": {"epochs": 1, "batch_size": 100, "lr": 0.02}},
        {"kind": "quantize", "train": {"epochs": 1, "batch_size": 100, "lr": 0.01}},
    ],
    "export": {"max_changed": 0.2},
    "deploy": [{"backend": {"name": "onnxruntime"}, "precision": ["float32", "int8"], "models": ["teacher", "student"]}],
    "measure": {"warmup_s": 0.01, "duration_s": 0.05, "compare_s": 0.1},
}


@pytest.fixture
def tiny():
    """A copy of the recipe, free to be changed."""
    return copy.deepcopy(TINY)


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


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One finished run, for the tests that only look."""
    folder = tmp_path_factory.mktemp("finished")
    with (folder / "recipe.yaml").open("w") as stream:
        YAML().dump(TINY, stream)
    loaded = recipe.load_recipe(folder / "recipe.yaml")
    return pipeline.compress(
        loaded, out=folder / "run", smoke=False, display=Display(quiet=True), command="edgekd compress recipe.yaml"
    )
