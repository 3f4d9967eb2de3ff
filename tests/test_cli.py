"""The command line from outside: what it lists, prints and returns."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper

import edgekd
from edgekd import cli
from edgekd.errors import ArtifactError, BudgetExceeded, EdgekdError, RecipeError, TrainingError

ROOT = Path(edgekd.__file__).parents[1]
RECIPE = str(ROOT / "recipes" / "classification" / "quickstart.yaml")

# The command line is what scripts and habits are built on. A deliberate change is made here too, and told in CHANGELOG.md.
COMMANDS = {
    "": ["--version"],
    "compress": ["recipe", "--out", "--smoke", "--quiet", "--allow-fallback"],
    "validate": ["recipe"],
    "schema": [],
    "methods": ["--json"],
    "backends": ["--json"],
    "bench": ["models", "--backend", "--threads", "--batch", "--seconds", "--shape", "--json"],
    "bundle": ["run", "--backend", "--precision", "--engine", "--out"],
    "check-bundle": ["folder", "--rebuild"],
    "report": ["run", "--out"],
    "doctor": ["--json"],
}


def test_the_command_line_is_frozen():
    group = typer.main.get_command(cli.app)
    found = {"": group, **group.commands}
    names = {name: [parameter.opts[0] for parameter in command.params] for name, command in found.items()}
    assert names == COMMANDS, "a command or an option was added, renamed or removed: if that is meant, edit COMMANDS here"
    assert all(len(parameter.opts) == 1 for command in found.values() for parameter in command.params), "one name per option"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, run):
    arguments = [command] if command else []
    code, out, err = run(*arguments, "--help")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert f"Example: edgekd {command or 'compress'}" in text
    for name in COMMANDS[command]:
        assert name in text
    assert run(*arguments, "-h") == (0, out, "")


def test_version_and_no_arguments(run):
    assert run("--version") == (0, f"edgekd {edgekd.__version__}\n", "")
    code, out, err = run()
    assert code == 2
    assert "Example: edgekd compress" in " ".join((out + err).split())


def test_python_m_and_the_installed_command_are_the_same():
    for command in ([sys.executable, "-m", "edgekd"], [str(Path(sys.executable).with_name("edgekd"))]):
        done = subprocess.run([*command, "--version"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"edgekd {edgekd.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compres", "x.yaml"], "No such command 'compres'"),
        (["validate"], "Missing argument 'recipe'"),
        (["validate", RECIPE, "--smoke"], "No such option: --smoke"),
        (["compress", RECIPE, "--out"], "requires an argument"),
        (["bench", "x.onnx", "--threads", "0"], "Invalid value for '--threads'"),
        (["bench", "x.onnx", "--seconds", "soon"], "Invalid value for '--seconds'"),
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments, message, run):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


# --- what commands print ---


def test_methods(run):
    code, out, err = run("methods", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    logits = next(row for row in rows if row["name"] == "logits")
    assert logits["options"]["temperature"]["default"] == 4.0
    assert all(row["summary"] and all(option["help"] for option in row["options"].values()) for row in rows)
    code, out, _ = run("methods")
    assert code == 0
    assert "logits: Softened logits" in out
    assert "  temperature = 4.0: T: divides" in out


def test_backends(run):
    code, out, err = run("backends", "--json")
    assert (code, err) == (0, "")
    rows = {row["name"]: row for row in json.loads(out)}
    assert list(rows) == ["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "null"]
    for row in rows.values():
        assert set(row) == {"name", "available", "version", "reason", "install", "precisions"}
        assert bool(row["version"]) == row["available"]
        assert "float32" in row["precisions"]
    assert rows["null"]["available"]
    code, out, _ = run("backends")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(rows)


def test_a_backend_that_is_not_installed_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    code, out, _ = run("backends")
    assert code == 0
    assert "run: pip install 'edgekd[openvino]'" in next(line for line in out.splitlines() if line.startswith("openvino"))
    code, _, err = run("validate", RECIPE)
    assert code == 2
    assert "deploy[1].backend.name: the Python package 'openvino' cannot be imported here" in err
    assert err.splitlines()[-1] == "hint: run: pip install 'edgekd[openvino]'"


def test_a_provider_that_onnxruntime_lacks_is_told_before_any_work(run, tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    text = (
        "name: gpu\ntask: {kind: classification}\ndata: {kind: digits, size_px: 8}\nstudent:\n  model: {name: resnet8}\n"
        "stages:\n  - {kind: finetune, train: {epochs: 1}}\n"
        "deploy:\n  - backend: {name: onnxruntime, provider: cuda}\n    precision: [float32, float16]\n"
    )
    (tmp_path / "gpu.yaml").write_text(text)
    code, _, err = run("validate", tmp_path / "gpu.yaml")
    assert code == 2
    assert "deploy[0].backend.provider: provider cuda needs onnxruntime's CUDAExecutionProvider; the installed one has" in err
    assert "pip install onnxruntime-gpu" in err
    (tmp_path / "gpu.yaml").write_text(text.replace("float16", "int8"))
    code, _, err = run("validate", tmp_path / "gpu.yaml")
    assert code == 2
    assert "deploy[0].precision[1]: onnxruntime's CUDA provider has no int8 convolutions" in err


def test_doctor(run):
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["cpu"]["cores_usable"] >= 1
    assert "INT8" in facts["advice"][0]
    assert set(facts["backends"]) == {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "null"}
    code, out, _ = run("doctor")
    assert code == 0
    assert out.startswith("CPU  ")


def test_schema(run):
    code, out, err = run("schema")
    assert (code, err) == (0, "")
    assert json.loads(out)["title"] == "edgekd recipe"


def test_a_closed_pipe_is_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m edgekd schema | head -c 1", shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


def test_import_paths_name_modules_beside_the_recipe_and_in_the_working_directory(tmp_path, run, monkeypatch):
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "models_beside_recipe.py").write_text(
        "from torch import nn\ndef build(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    (tmp_path / "data_in_working_directory.py").write_text("def load():\n    raise RuntimeError('only called by a run')\n")
    (tmp_path / "beside" / "mine.yaml").write_text(
        "name: mine\ntask: {kind: classification}\n"
        "data: {kind: callable, call: 'data_in_working_directory:load'}\n"
        "student:\n  model: {name: callable, call: 'models_beside_recipe:build', taps: {logits: '1'}}\n"
        "stages:\n  - {kind: finetune, train: {epochs: 1}}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run("validate", "beside/mine.yaml") == (0, "beside/mine.yaml: valid. finetune; up to 0 engines\n", "")


# --- exit codes of a run ---


@pytest.fixture
def outcome(monkeypatch, tmp_path):
    """Replace the run itself, which other tests test: the function given to it is called instead."""
    from edgekd import pipeline, report

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "lines", lambda found: [f"the answer of {found['name']}"])

    def become(function):
        monkeypatch.setattr(pipeline, "compress", function)

    def whole(failures=()):
        return lambda loaded, **_: pipeline.Outcome({"name": loaded.recipe.name}, tmp_path, list(failures))

    become.whole = whole
    return become


def test_a_run_that_is_done_exits_with_0(outcome, run, tmp_path):
    seen = {}

    def compress(loaded, **arguments):
        seen.update(arguments, recipe=loaded.recipe)
        return outcome.whole()(loaded)

    outcome(compress)
    code, out, err = run("compress", RECIPE)
    assert (code, err) == (0, "")
    assert out == "the answer of quickstart\n\nreport: runs/quickstart/report/report.html\n"
    assert seen["out"] == Path("runs/quickstart")
    assert seen["smoke"] is False
    assert seen["command"] == f"edgekd compress {RECIPE}"
    assert seen["recipe"].teacher.train.epochs > 1
    run("compress", RECIPE, "--smoke", "--quiet")
    assert seen["out"] == Path("runs/quickstart-smoke")
    assert seen["smoke"] is True
    assert seen["recipe"].teacher.train.epochs == 1
    assert not any(entry.allow_fallback for entry in seen["recipe"].deploy)
    run("compress", RECIPE, "--allow-fallback")
    assert len(seen["recipe"].deploy) > 1
    assert all(entry.allow_fallback for entry in seen["recipe"].deploy)
    run("compress", RECIPE, "--out", tmp_path / "elsewhere")
    assert seen["out"] == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingError("term kd is not finite", "lower lr"), 1),
        (ArtifactError("in use", "wait"), 1),
        (EdgekdError("two\nlines", "both are shown"), 1),
        (RecipeError("compute.devices is 2", "start it with torchrun"), 2),
        (BudgetExceeded("over budget: size_mib 2 (allowed 1)", "see the report"), 3),
    ],
)
def test_errors_become_exit_codes(error, code, outcome, run):
    def compress(*_, **__):
        raise error

    outcome(compress)
    found, out, err = run("compress", RECIPE)
    assert (found, out) == (code, "")
    assert err == "".join(f"error: {line}\n" for line in error.message.splitlines()) + f"hint: {error.hint}\n"


def test_failed_engines_are_told_after_the_result_and_exit_with_1(outcome, run):
    outcome(outcome.whole(["openvino int8: the library refused", "null int8: nothing"]))
    code, out, err = run("compress", RECIPE)
    assert code == 1
    assert "the answer of quickstart" in out
    assert err.splitlines() == [
        "error: the run finished, but not every engine:",
        "error: openvino int8: the library refused",
        "error: null int8: nothing",
        "hint: the report has the reasons",
    ]


def test_a_bug_shows_its_traceback(outcome, run):
    def compress(*_, **__):
        raise ZeroDivisionError("a bug")

    outcome(compress)
    with pytest.raises(ZeroDivisionError):
        run("compress", RECIPE)


def test_an_interrupted_run_says_how_to_go_on(outcome, run):
    def compress(*_, **__):
        raise KeyboardInterrupt

    outcome(compress)
    assert run("compress", RECIPE) == (130, "", "stopped; the same command goes on from the last finished epoch\n")


def test_a_run_directory_that_cannot_be_made(outcome, run, tmp_path):
    outcome(outcome.whole())
    (tmp_path / "file").write_text("")
    code, _, err = run("compress", RECIPE, "--out", tmp_path / "file")
    assert code == 1
    assert f"error: the run directory {tmp_path / 'file'} cannot be made" in err
    assert "hint: give another directory with --out" in err


def test_control_c_in_a_real_process(tmp_path):
    """Ctrl-C while training: one line, exit code 130, and no traceback."""
    (tmp_path / "small.yaml").write_text(
        "name: small\ntask: {kind: classification}\ndata: {kind: digits, size_px: 8}\n"
        "student:\n  model: {name: resnet8}\nstages:\n  - {kind: finetune, train: {epochs: 1000}}\n"
    )
    command = [sys.executable, "-m", "edgekd", "compress", "small.yaml", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}

    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has what it starts in the background ignore Ctrl-C

    with subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=heed, **pipes) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "epoch 1/" in line:
                time.sleep(0.2)
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, lines
    assert lines[-1] == "stopped; the same command goes on from the last finished epoch\n"
    assert not any("Traceback" in line for line in lines)
    assert not list((tmp_path / "run").glob("[0-9]*"))


def test_report_of_what_is_no_run(run, tmp_path):
    code, out, err = run("report", tmp_path / "gone")
    assert (code, out) == (1, "")
    assert "is no run directory" in err
    assert "hint: " in err


# --- bench ---


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small foreign ONNX file: no io.json, and a free batch."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [4, 3, 3, 3], np.full(108, 0.1, np.float32))
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight"], ["maps"]), helper.make_node("GlobalAveragePool", ["maps"], ["logits"])],
        "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4, 1, 1])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_bench_of_one_file(model, run):
    code, out, err = run("bench", model, "--backend", "onnxruntime", "--seconds", "0.1", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["comparison"] is None
    (engine,) = result["engines"]
    assert engine["model"] == str(model)
    assert engine["backend"] == "onnxruntime"
    assert len(engine["samples_ns"]) >= 50


def test_bench_of_several_interleaves_them(model, run):
    code, out, err = run("bench", model, model, "--backend", "null", "--seconds", "0.1", "--batch", "2")
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if not line.startswith("  warning: ")]
    assert len(lines) == 3
    assert f"{model} on null: p50 " in lines[0]
    assert "x the first [" in lines[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.onnx"], "gone.onnx does not exist"),
        ([RECIPE], "cannot be read as ONNX"),
        (["."], "is not an engine folder: it has no engine.json"),
        (["MODEL", "--backend", "onxruntime"], "did you mean 'onnxruntime'"),
    ],
)
def test_bench_of_what_cannot_be_measured(arguments, message, model, run):
    code, out, err = run("bench", *(str(model) if word == "MODEL" else word for word in arguments))
    assert (code, out) == (1, "")
    assert message in err
    assert "hint: " in err
    assert "Traceback" not in err
