"""Shared by all tests."""

import copy
import os
import sys

# before anything imports torch: one thread per test process
os.environ.setdefault("OMP_NUM_THREADS", "1")
if sys.platform == "linux":
    # gloo looks the host's name up otherwise, and waits as long as a name server lets it
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

from pathlib import Path

import pytest
from hypothesis import settings

from edgekd import cli

# examples have no time limit: on a busy machine the first one would break any
settings.register_profile("edgekd", deadline=None)
settings.load_profile("edgekd")


LONGEST = ("test_shipped_recipes.py", "test_resume.py")
"""Files that begin first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items):
    """The longest files first; the rest stays in its order."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _own_image_cache(tmp_path_factory):
    """Tests neither read nor fill the user's cache of decoded images."""
    before = os.environ.get("EDGEKD_CACHE")
    os.environ["EDGEKD_CACHE"] = str(tmp_path_factory.mktemp("edgekd-cache"))
    yield
    if before is None:
        del os.environ["EDGEKD_CACHE"]
    else:
        os.environ["EDGEKD_CACHE"] = before


@pytest.fixture(scope="session")
def data_root():
    """$EDGEKD_DATA, the folder of real data sets."""
    value = os.environ.get("EDGEKD_DATA")
    if not value:
        pytest.skip("EDGEKD_DATA is not set")
    if not Path(value).is_dir():
        pytest.skip(f"EDGEKD_DATA is {value}, which is no folder")
    return Path(value)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["edgekd", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return call


# a recipe that runs in seconds
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


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One finished run, for the tests that only look."""
    from ruamel.yaml import YAML

    from edgekd import pipeline, recipe
    from edgekd.display import Display

    folder = tmp_path_factory.mktemp("finished")
    with (folder / "recipe.yaml").open("w") as stream:
        YAML().dump(TINY, stream)
    loaded = recipe.load_recipe(folder / "recipe.yaml")
    return pipeline.compress(
        loaded, out=folder / "run", smoke=False, display=Display(quiet=True), command="edgekd compress recipe.yaml"
    )
