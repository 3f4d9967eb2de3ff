import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgekd
from edgekd.artifacts import (
    MANIFEST,
    SCHEMA,
    BenchRecord,
    Checkpoint,
    Store,
    check_files,
    content_id,
    file_sha256,
    read_artifact,
    whole_folder,
)
from edgekd.artifacts import write_json as write
from edgekd.errors import ArtifactError

ID = content_id({"what": "a test"})
OTHER = content_id({"what": "another test"})


def fields(id=ID, **changes):
    return {
        "id": id,
        "order": 1,
        "kind": "checkpoint",
        "stage": "distill",
        "role": "student",
        "parents": (OTHER,),
        "config": {"epochs": 3},
        "environment": {"edgekd": "0"},
        **changes,
    }


def stored(store, id=ID, **changes):
    with store.draft(**fields(id, **changes)) as draft:
        (draft.folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
        (draft.folder / "plots").mkdir()
        (draft.folder / "plots" / "loss.json").write_text("[1, 2]")
        draft.metrics = {"accuracy": 0.5}
    return store.peek(id)


@pytest.fixture
def notices():
    return []


@pytest.fixture
def store(tmp_path, notices):
    return Store(tmp_path / "run", notices.append)


def names(store):
    return sorted(path.name for path in store.root.iterdir() if path.name != "work")


# --- what is written is what is read ---


def test_round_trip(store):
    assert store.find(ID) is None
    assert store.peek(ID) is None
    work = store.work(ID)
    (work / "state.pt").write_text("half trained")
    artifact = stored(store)
    assert type(artifact) is Checkpoint
    assert artifact == store.find(ID)
    assert names(store) == [f"01-distill-{ID[:12]}"]
    assert (artifact.id, artifact.stage, artifact.role, artifact.parents) == (ID, "distill", "student", (OTHER,))
    assert (artifact.config, artifact.metrics, artifact.environment) == ({"epochs": 3}, {"accuracy": 0.5}, {"edgekd": "0"})
    assert artifact.file("model.safetensors").stat().st_size == artifact.files["model.safetensors"]["size_bytes"] == 2048
    assert artifact.json("plots/loss.json") == [1, 2]
    assert not work.exists()  # finished work is cleared away
    with pytest.raises(ArtifactError, match=r"has no file 'gone'; it has model\.safetensors, plots/loss\.json"):
        artifact.file("gone")


def test_the_manifest_is_as_documented(store):
    artifact = stored(store)
    data = json.loads((artifact.folder / MANIFEST).read_text())
    keys = "schema kind id stage role parents config metrics environment files created seconds"
    assert list(data) == keys.split()
    assert data["schema"] == SCHEMA
    assert list(data["files"]) == ["model.safetensors", "plots/loss.json"]  # not the manifest itself
    assert set(data["files"]["plots/loss.json"]) == {"sha256", "size_bytes"}
    time.strptime(data["created"], "%Y-%m-%dT%H:%M:%SZ")


def test_time_spent_before_the_draft_counts_where_it_is_given(store):
    with store.draft(**fields()) as draft:
        draft.seconds = 12.34567
    assert store.peek(ID).seconds == 12.346


def test_two_artifacts_whose_ids_begin_alike_are_told_apart(store, notices):
    twin = ID[:12] + OTHER[12:]
    stored(store, twin, order=1)
    assert store.find(ID) is None
    stored(store, ID, order=2)
    assert store.find(ID).id == ID
    assert store.find(twin).id == twin
    assert notices == []


def test_the_run_directory_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be made") as caught:
        Store(tmp_path / "file")
    assert "--out" in caught.value.hint


# --- whole or absent ---


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_draft_that_raises_leaves_nothing_but_its_work(store, error):
    (store.work(ID) / "state.pt").write_text("half trained")

    def interrupted():
        with store.draft(**fields()) as draft:
            (draft.folder / "model.safetensors").write_bytes(b"half")
            raise error("stop")

    with pytest.raises(error):
        interrupted()
    assert names(store) == []
    assert (store.work(ID) / "state.pt").read_text() == "half trained"
    assert stored(store) == store.find(ID)


def test_a_full_disk_is_an_error_with_a_next_step(store, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"is full: 01-distill-.* cannot be written") as caught:
        stored(store)
    assert "finished work is reused" in caught.value.hint
    assert names(store) == []
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):  # nothing that edgekd knows a remedy for
        stored(store)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from edgekd.artifacts import Store

moment = int(sys.argv[2])
calls = 0

def deadly(function):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return call

for name in ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir"):
    setattr(os, name, deadly(getattr(os, name)))
Path.write_bytes = deadly(Path.write_bytes)

store = Store(Path(sys.argv[1]), lambda line: None)
id = "0123456789ab" * 5 + "cdef"
if store.find(id) is None:
    fields = {"kind": "checkpoint", "stage": "distill", "role": "student", "parents": (), "config": {}, "environment": {}}
    with store.draft(id=id, order=3, **fields) as draft:
        for index in range(3):
            (draft.folder / f"part{index}").write_bytes(b"x" * 1000)
print("done", calls)
"""
KILLED_ID = "0123456789ab" * 5 + "cdef"


def killed(root, moment):
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(root), str(moment)],
        cwd=Path(edgekd.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


def test_kill_9_at_every_step_leaves_the_artifact_whole_or_absent(tmp_path):
    """The process kills itself before its first, second, ... call that changes the disk; a damaged artifact is in the way too."""
    moments, found = 0, 0
    while True:
        moments += 1
        root = tmp_path / f"run{moments}"
        store = Store(root)
        stored(store, KILLED_ID, order=3).file("model.safetensors").write_bytes(b"damaged")
        (store.work(KILLED_ID) / "state.pt").write_text("half trained")
        done = killed(root, moments)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        for folder in root.glob("[0-9]*"):
            if (folder / "part0").exists():  # the new one has its real name: then it is whole
                check_files(read_artifact(folder))
                found += 1
            else:  # what is left of the damaged one
                with pytest.raises(ArtifactError):
                    check_files(read_artifact(folder))
        assert killed(root, 0).returncode == 0  # the same command again
        assert sorted(store.find(KILLED_ID).files) == ["part0", "part1", "part2"]
        assert names(store) == [f"03-distill-{KILLED_ID[:12]}"]
        assert not (root / "work" / KILLED_ID[:12]).exists()
    assert moments > 15
    assert found >= 2  # it was killed behind the renaming too


def test_kill_9_from_outside_in_the_middle_of_a_draft(tmp_path):
    code = """
import sys, time
from pathlib import Path
from edgekd.artifacts import Store
with Store(Path(sys.argv[1])).draft(
    id=sys.argv[2], order=1, kind="checkpoint", stage="distill", role="student", parents=(), config={}, environment={}
) as draft:
    (draft.folder / "model.safetensors").write_bytes(b"half")
    print("here", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run"), ID]
    with subprocess.Popen(command, cwd=Path(edgekd.__file__).parents[1], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        process.kill()
    store = Store(tmp_path / "run")
    assert names(store) == [f".partial-01-distill-{ID[:12]}"]
    assert store.find(ID) is None
    stored(store, OTHER, order=2)  # another artifact's draft clears it away
    assert names(store) == [f"02-distill-{OTHER[:12]}"]


def test_a_draft_leaves_other_drafts_of_the_same_store_alone(store):
    with store.draft(**fields()) as outer:
        (outer.folder / "kept").write_text("")
        stored(store, OTHER, order=2)
        assert (outer.folder / "kept").exists()
    assert len(names(store)) == 2


# --- damage ---


def damage_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_flipped(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def damage_manifest(change):
    def damage(folder):
        data = json.loads((folder / MANIFEST).read_text())
        change(data)
        (folder / MANIFEST).write_text(json.dumps(data))

    return damage


def damage_replaced_by_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("no folder")


def damage_replaced_by_a_link(folder):
    folder.rename(folder.parent / "elsewhere")
    (folder.parent / "elsewhere" / MANIFEST).unlink()
    folder.symlink_to(folder.parent / "elsewhere")


DAMAGE = {
    "truncated": (damage_truncated, "its file model.safetensors has 2047 bytes instead of 2048"),
    "flipped bit": (damage_flipped, "its file model.safetensors has changed (sha256 differs)"),
    "missing file": (lambda folder: (folder / "model.safetensors").unlink(), "its file model.safetensors is missing"),
    "missing inner file": (lambda folder: shutil.rmtree(folder / "plots"), "its file plots/loss.json is missing"),
    "file is a folder": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
        "its file model.safetensors is missing",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "artifact.json does not exist"),
    "empty manifest": (lambda folder: (folder / MANIFEST).write_text(""), "artifact.json cannot be read"),
    "half a manifest": (lambda folder: os.truncate(folder / MANIFEST, 100), "artifact.json cannot be read"),
    "binary manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "artifact.json cannot be read"),
    "a list as manifest": (lambda folder: (folder / MANIFEST).write_text("[]"), "artifact.json cannot be read"),
    "another schema": (damage_manifest(lambda data: data.update(schema=99)), "has schema 99; this edgekd reads schema 1"),
    "missing field": (damage_manifest(lambda data: data.pop("metrics")), "KeyError('metrics')"),
    "unknown kind": (damage_manifest(lambda data: data.update(kind="chekpoint")), "kind 'chekpoint'; allowed: checkpoint, onnx"),
    "files is a list": (damage_manifest(lambda data: data.update(files=[])), "files is list instead of dict"),
    "file without hash": (damage_manifest(lambda data: data["files"]["model.safetensors"].pop("sha256")), "KeyError('sha256')"),
    "hash is a number": (damage_manifest(lambda data: data["files"]["model.safetensors"].update(sha256=1)), "not a number and"),
    "file outside": (
        damage_manifest(lambda data: data["files"].update({"../../x": {"sha256": "", "size_bytes": 0}})),
        "'../../x' lies outside the folder",
    ),
    "a file instead": (damage_replaced_by_a_file, "artifact.json cannot be read"),
    "a link instead": (damage_replaced_by_a_link, "artifact.json does not exist"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_detected_named_and_removed(store, notices, name):
    damage, expected = DAMAGE[name]
    folder = stored(store).folder
    other = stored(store, OTHER, order=2)
    damage(folder)
    assert store.find(ID) is None
    assert len(notices) == 1
    assert notices[0].startswith(f"damaged artifact {folder.name}: ")
    assert notices[0].endswith("; it is computed again")
    assert expected in notices[0]
    assert not os.path.lexists(folder)
    assert store.find(OTHER) == other
    assert stored(store) == store.find(ID)


def test_reading_a_folder_that_is_none_of_ours(tmp_path):
    with pytest.raises(ArtifactError, match=r"artifact\.json does not exist") as caught:
        read_artifact(tmp_path)
    assert caught.value.hint == "give the folder of a finished artifact"
    with pytest.raises(ArtifactError, match=r"artifact\.json does not exist"):
        read_artifact(tmp_path / "gone")


def test_kinds_have_types(store):
    assert type(stored(store, kind="bench")) is BenchRecord


# --- ids and hashes ---

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8
)
MAPPINGS = st.dictionaries(st.text(max_size=3), VALUES, max_size=4)


def reordered(value):
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(list(value))}
    return [reordered(item) for item in value] if isinstance(value, list) else value


def same(one, other):
    """Equal as JSON: 1, 1.0 and true are three values, and so are 0.0 and -0.0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


@given(MAPPINGS)
def test_an_id_ignores_the_order_of_keys_and_survives_a_file(inputs):
    found = content_id(inputs)
    assert len(found) == 64
    assert set(found) <= set("0123456789abcdef")
    assert content_id(reordered(inputs)) == found
    assert content_id(json.loads(json.dumps(inputs))) == found


@given(MAPPINGS, MAPPINGS)
@settings(max_examples=200)
def test_ids_are_equal_where_the_inputs_are(one, other):
    assert (content_id(one) == content_id(other)) == same(one, other)


@given(MAPPINGS.filter(bool), st.data())
def test_any_change_is_another_id(inputs, data):
    key = data.draw(st.sampled_from(sorted(inputs)))
    value = data.draw(VALUES.filter(lambda value: not same(value, inputs[key])))
    assert content_id({**inputs, key: value}) != content_id(inputs)
    assert content_id({name: inputs[name] for name in inputs if name != key}) != content_id(inputs)


def test_ids_never_change():
    """They name artifacts of earlier runs: another way of hashing would recompute everybody's work."""
    assert content_id({"b": [1, 2.5, None], "a": "é"}) == "84afbf1d4853005f9dd0c81cb1819b53ce86978340764c062160f6e8356665de"


def test_hash_of_a_file(tmp_path, monkeypatch):
    import hashlib

    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    expected = hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert file_sha256(tmp_path / "file") == expected
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # Python 3.10
    assert file_sha256(tmp_path / "file") == expected


def test_json_is_replaced_whole(tmp_path):
    write(tmp_path / "run.json", {"steps": [1]})
    with pytest.raises(ValueError, match="Circular"):
        write(tmp_path / "run.json", (lambda loop: loop.append(loop) or loop)([]))
    assert json.loads((tmp_path / "run.json").read_text()) == {"steps": [1]}


def test_a_whole_folder_or_none(tmp_path):
    with whole_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    with pytest.raises(ArtifactError, match="exists already"), whole_folder(tmp_path / "a" / "b"):
        pass

    def interrupted():
        with whole_folder(tmp_path / "c") as folder:
            (folder / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_whole_folder_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"), whole_folder(tmp_path / "file" / "b"):
        pass
