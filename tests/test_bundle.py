"""An engine as a folder for a device: written whole, read without torch, refused where it is not what it was."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgekd
from edgekd.artifacts import file_table
from edgekd.bundle import check, make, open_bundle
from edgekd.errors import ArtifactError, ParityError, UsageError

ROOT = Path(edgekd.__file__).parents[1]
CHOICE = make.Choice(backend="onnxruntime", precision="int8")


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """A bundle, for the tests that only look."""
    out = tmp_path_factory.mktemp("bundles") / "whole"
    make.make(finished.folder, choice=CHOICE, out=out)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it, free to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def change(folder, name, edit):
    """Change one of a bundle's JSON files; the manifest then tells the truth about its bytes."""
    data = json.loads((folder / name).read_text())
    edit(data)
    (folder / name).write_text(json.dumps(data))
    if name != "bundle.json":
        change(folder, "bundle.json", lambda manifest: manifest["files"].update({name: file_table(folder)[name]}))


# --- making ---


def test_what_a_bundle_holds(finished, whole):
    manifest = json.loads((whole / "bundle.json").read_text())
    there = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == there - {"bundle.json"}
    assert there == {
        *("bundle.json", "golden.npz", "engine/model.onnx", "engine/io.json", "engine/engine.json", "engine/build.log"),
        *("model/model.onnx", "model/io.json", "model/layers.json"),
    }
    assert (manifest["run"]["name"], manifest["backend"], manifest["precision"]) == ("tiny", "onnxruntime", "int8")
    engine = next(each for each in finished.report["engines"] if (each["role"], each["precision"]) == ("student", "int8"))
    assert manifest["measured"]["latency_ms"] == engine["latency_ms"]
    assert manifest["measured"]["metric"] == engine["metric"]
    assert manifest["measured"]["host"]["cpu"]["model"]
    for name, kind in {"onnx": "export", "engine": "engine", "bench": "bench", "checkpoint": "quantize"}.items():
        assert len(list(finished.folder.glob(f"*-{kind}-{manifest['artifacts'][name]['id'][:12]}"))) == 1
    assert "torch" in manifest["artifacts"]["checkpoint"]["environment"]["libraries"]
    nothing_says_where_it_was_made(whole, finished.folder.parent)


def nothing_says_where_it_was_made(bundle, place):
    for path in bundle.rglob("*"):
        assert not path.is_file() or str(place).encode() not in path.read_bytes(), path


def test_the_default_is_the_engine_of_the_answer(finished, tmp_path):
    answer = finished.report["engines"][finished.report["answer"]["compressed"]]
    manifest = make.make(finished.folder, choice=make.Choice(), out=tmp_path / "a").manifest
    assert (manifest["backend"], manifest["precision"]) == (answer["backend"], answer["precision"])
    assert manifest["measured"]["latency_ms"] == answer["latency_ms"]


def test_any_engine_by_its_folder(finished, tmp_path):
    teacher = next(each for each in finished.report["engines"] if each["role"] == "teacher")
    choice = make.Choice(engine=str(finished.folder / teacher["folders"]["engine"]))
    bundle = make.make(finished.folder, choice=choice, out=tmp_path / "a")
    assert bundle.manifest["model"]["role"] == "teacher"
    assert "of the teacher" in "\n".join(make.lines(bundle))


@pytest.mark.parametrize(
    ("choice", "message", "listed"),
    [
        (make.Choice(backend="openvino"), "no engine of the student with backend openvino", 3),
        (make.Choice(precision="int4"), "no engine of the student with precision int4", 3),
        (make.Choice(engine="99-engine"), "no engine with folder 99-engine", 3),
        (make.Choice(backend="onnxruntime"), "2 engines of the student with backend onnxruntime", 2),
    ],
)
def test_a_choice_that_is_not_one_engine_lists_what_there_is(finished, tmp_path, choice, message, listed):
    with pytest.raises(UsageError, match=message) as caught:
        make.make(finished.folder, choice=choice, out=tmp_path / "a")
    assert (
        len(re.findall(r"^\d+-engine-\w+: onnxruntime: (?:student|teacher) \w+, measured$", caught.value.message, re.M)) == listed
    )
    assert caught.value.hint == "choose one with --engine FOLDER"
    assert not list(tmp_path.iterdir())


def test_runs_without_a_bundle(finished, tmp_path):
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())

    def refused(**changes):
        (run / "run.json").write_text(json.dumps({**record, **changes}))
        with pytest.raises(ArtifactError) as caught:
            make.make(run, choice=CHOICE, out=tmp_path / "a")
        assert caught.value.hint
        return caught.value.message

    assert "is unfinished" in refused(finished=None)
    assert "has no engine" in refused(cells=[], comparisons=[])
    with pytest.raises(ArtifactError, match="is no run directory"):
        make.make(tmp_path, choice=CHOICE, out=tmp_path / "a")


def test_a_damaged_run_makes_no_bundle(finished, tmp_path):
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    manifest = make.make(run, choice=CHOICE, out=tmp_path / "a").manifest
    (engine,) = run.glob(f"*-engine-{manifest['artifacts']['engine']['id'][:12]}")
    (engine / "model.onnx").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"its file model\.onnx has 0 bytes instead of"):
        make.make(run, choice=CHOICE, out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_existing_folder_is_left_alone(finished, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ArtifactError, match="exists already"):
        make.make(finished.folder, choice=CHOICE, out=tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "x"


def test_a_kill_in_the_middle_leaves_no_bundle(finished, tmp_path):
    """SIGKILL right before the manifest is written: what is left does not pass for a bundle, and does not stop the next one."""
    code = """
import os, signal, sys
from pathlib import Path
from edgekd.bundle import make
make.write_manifest = lambda *_: os.kill(os.getpid(), getattr(signal, sys.argv[3]))
make.make(Path(sys.argv[1]), choice=make.Choice(backend="onnxruntime", precision="int8"), out=Path(sys.argv[2]))
"""
    out = tmp_path / "out"
    for name, left in (("SIGINT", 0), ("SIGKILL", 1)):
        command = [sys.executable, "-c", code, str(finished.folder), str(out), name]
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            check=False,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert done.returncode != 0
        assert [path.name for path in tmp_path.iterdir()] == [".partial-out"] * left
    make.make(finished.folder, choice=CHOICE, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- checking ---


def test_on_the_same_machine_every_bit_is_the_same(whole):
    checked = check.check(whole)
    assert (checked.images, checked.equal, checked.max_error) == (8, True, 0.0)
    assert "equal, bit for bit" in "\n".join(check.lines(checked))


TAMPERED = {
    "a changed byte": (lambda folder: flip(folder / "engine/model.onnx"), r"engine/model\.onnx has changed"),
    "a missing file": (lambda folder: (folder / "model/layers.json").unlink(), r"model/layers\.json is missing"),
    "a cut file": (lambda folder: os.truncate(folder / "golden.npz", 100), r"golden\.npz has 100 bytes instead of"),
    "one file more": (lambda folder: (folder / "engine/more.bin").write_text("x"), r"engine/more\.bin is no file of this bundle"),
    "no manifest": (lambda folder: (folder / "bundle.json").unlink(), r"is no bundle: it has no bundle\.json"),
    "half a manifest": (lambda folder: os.truncate(folder / "bundle.json", 100), r"bundle\.json cannot be read"),
    "another schema": (lambda folder: change(folder, "bundle.json", lambda data: data.update(schema=9)), "has schema 9"),
    "a way out": (
        lambda folder: change(
            folder, "bundle.json", lambda data: data["files"].update({"../x": {"sha256": "", "size_bytes": 0}})
        ),
        "lies outside the folder",
    ),
    "no engine": (
        lambda folder: change(folder, "bundle.json", lambda data: data["files"].pop("engine/engine.json")),
        "there is no",
    ),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", TAMPERED)
def test_a_bundle_that_is_not_whole_is_refused_and_names_the_file(copy, name):
    damage, message = TAMPERED[name]
    damage(copy)
    with pytest.raises(ArtifactError, match=message) as caught:
        open_bundle(copy)
    assert caught.value.hint


def test_every_damage_is_named(copy):
    flip(copy / "golden.npz")
    (copy / "engine" / "io.json").unlink()
    (copy / "more").write_text("")
    with pytest.raises(ArtifactError) as caught:
        open_bundle(copy)
    assert len(caught.value.message.splitlines()) == 3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["fingerprint"].update(version="0.0.1"), r"built with version 0\.0\.1; here it is"),
        (lambda data: data["fingerprint"]["cpu_flags"].append("avx10"), "built with cpu_flags avx10, which this machine lacks"),
        (lambda data: data["fingerprint"].update(arch="riscv64"), "built with arch riscv64; here it is"),
    ],
)
def test_the_wrong_machine_is_told_in_one_line_with_the_way_out(copy, edit, message, capsys, monkeypatch):
    change(copy, "engine/engine.json", edit)
    monkeypatch.setattr(sys, "argv", ["edgekd", "check-bundle", str(copy)])
    from edgekd import cli

    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: this machine cannot run the engine: .*{message}", error)
    assert f"edgekd check-bundle {copy} --rebuild NEW_FOLDER" in hint
    with pytest.raises(Exception, match=message):
        open_bundle(copy).session()


def test_an_engine_of_another_machine_is_built_again(copy, tmp_path):
    change(copy, "engine/engine.json", lambda data: data["fingerprint"].update(version="0.0.1"))
    checked = check.rebuild(copy, tmp_path / "here")
    assert checked.max_error <= checked.bundle.manifest["golden"]["max_error"]
    manifest = checked.bundle.manifest
    assert manifest["measured"] is None
    assert manifest["rebuilt_from"]["version"] == "0.0.1"
    assert set(manifest["artifacts"]) == {"checkpoint", "onnx"}
    assert check.check(tmp_path / "here").images == 8
    assert (tmp_path / "here" / "golden.npz").read_bytes() == (copy / "golden.npz").read_bytes()
    with pytest.raises(ArtifactError, match="exists already"):
        check.rebuild(copy, tmp_path / "here")


def golden(folder, edit):
    """Change the golden batch's outputs, and have the manifest agree."""
    with np.load(folder / "golden.npz") as arrays:
        data = dict(arrays)
    edit(data)
    with (folder / "golden.npz").open("wb") as stream:
        np.savez(stream, **data)
    change(folder, "bundle.json", lambda manifest: manifest["files"].update({"golden.npz": file_table(folder)["golden.npz"]}))


def test_other_outputs_are_refused(copy):
    def turn(data):
        data["output.logits"] = -data["output.logits"]

    golden(copy, turn)
    with pytest.raises(ParityError, match=r"does not give the golden outputs: [1-8] of 8 decisions changed"):
        check.check(copy)


def test_other_bits_are_refused_on_the_same_machine_and_allowed_on_another(copy):
    golden(copy, lambda data: data.update({"output.logits": data["output.logits"] * np.float32(1.001)}))
    with pytest.raises(ParityError, match="gave other bits on a machine like this one"):
        check.check(copy)
    change(copy, "bundle.json", lambda data: data["golden"]["fingerprint"].update(cpu="another"))
    checked = check.check(copy)
    assert not checked.equal
    assert checked.max_error == pytest.approx(0.001, rel=0.01)
    assert "largest difference 1.0e-03" in "\n".join(check.lines(checked))


def test_outputs_that_are_not_finite_are_refused(copy):
    change(copy, "bundle.json", lambda data: data["golden"].update(fingerprint=None))
    golden(copy, lambda data: data.update({"output.logits": data["output.logits"] * np.float32("nan")}))
    with pytest.raises(ParityError):
        check.check(copy)


def test_an_engine_that_does_not_run_on_the_host_gets_the_models_outputs(tiny, finished, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from edgekd import pipeline, recipe
    from edgekd.display import Display
    from edgekd.engines.hardware import has_nvidia_driver

    if has_nvidia_driver():
        pytest.skip("there is an NVIDIA GPU here")
    run = Path(shutil.copytree(finished.folder, tmp_path / "run"))
    tiny["deploy"] = [{"backend": {"name": "tensorrt_rtx"}, "precision": ["int8"]}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(tiny))
    loaded = recipe.load_recipe(tmp_path / "recipe.yaml")
    pipeline.compress(loaded, out=run, smoke=False, display=Display(quiet=True), command="")
    bundle = make.make(run, choice=make.Choice(backend="tensorrt_rtx"), out=tmp_path / "a")
    assert bundle.manifest["measured"] is None
    assert bundle.manifest["golden"]["outputs_of"].startswith("model.onnx in ONNX Runtime")
    assert np.abs(bundle.golden().outputs["logits"]).max() > 0
    assert "Input filename: model.onnx" in (tmp_path / "a" / "engine" / "build.log").read_text()
    nothing_says_where_it_was_made(tmp_path / "a", tmp_path)
    with pytest.raises(Exception, match="this machine cannot run the engine: built, not run: no NVIDIA GPU here"):
        check.check(tmp_path / "a")


# --- on the device ---


def test_the_example_of_the_documentation_runs_without_torch(whole, tmp_path):
    page = (ROOT / "docs" / "deployment.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with np.load(whole / "golden.npz") as arrays:
        np.save(tmp_path / "images.npy", arrays["images"])
    (tmp_path / "classifier").symlink_to(whole)
    block = "import sys\nfor name in ('torch', 'pydantic', 'onnx', 'typer'):\n    sys.modules[name] = None\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", block + example], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 8
    assert {name for name, _ in rows} <= set("0123456789")
    assert all(0.1 <= float(score) <= 1 for _, score in rows)


def test_a_missing_library_is_told_with_its_install_command(whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Exception, match="this machine cannot run the engine: the Python package 'onnxruntime'") as caught:
        open_bundle(whole).session()
    assert caught.value.hint.startswith("run: pip install onnxruntime; edgekd check-bundle")
