"""kill -9 at any moment, then the same command: finished work is reused, and the weights are those of an undisturbed run."""

import hashlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from edgekd.train.loop import STATE


def command(recipe, out):
    return [sys.executable, "-m", "edgekd", "compress", str(recipe), "--out", str(out), "--quiet"]


def weights(folder):
    """Stage -> sha256 of the weights that it left."""
    return {
        path.parent.name.split("-")[1]: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("[0-9]*/model.safetensors"))
    }


@pytest.fixture
def recipe(tiny, write):
    tiny["deploy"] = [{"backend": {"name": "null"}, "precision": ["float32", "int8"]}]
    tiny["compute"] = {"threads": 1}
    tiny["data"]["size_px"] = 16
    tiny["data"]["augment"] = {"flip": False, "crop_padding_px": 2}
    tiny["teacher"]["train"].update(epochs=4)
    tiny["stages"][0]["train"].update(epochs=4, ema_decay=0.9)
    tiny["stages"][2]["train"].update(epochs=3)
    return write(tiny)


def finish(recipe, out):
    done = subprocess.run(command(recipe, out), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done


def kill_when(recipe, out, moment):
    """Start the run, and kill it as soon as ``moment`` says so; False where it ended before."""
    process = subprocess.Popen(command(recipe, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start = time.monotonic()
    try:
        while process.poll() is None:
            if moment(time.monotonic() - start):
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.002)
        assert process.returncode == 0
        return False
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_killed_runs_end_with_the_same_bits(recipe, tmp_path):
    finish(recipe, tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    assert set(expected) == {"teacher", "student_alone", "distill", "prune", "quantize"}
    out = tmp_path / "killed"
    rng = random.Random(7)
    seen = set()

    def writing(_):
        """An artifact is being written."""
        return bool(list(out.glob(".partial-*"))) and not seen & {path.name for path in out.glob(".partial-*")}

    def between_epochs(_):
        """A training has saved at least one epoch."""
        states = {path.parent.name for path in out.glob(f"work/*/{STATE}")}
        if states - seen:
            seen.update(states)
            return True
        return False

    def at_random(longest):
        moment = rng.uniform(2.0, longest)
        return lambda elapsed: elapsed > moment

    kills = 0
    for moment in (between_epochs, writing, at_random(5), between_epochs, at_random(7), at_random(9)):
        kills += kill_when(recipe, out, moment)
        seen.update(path.name for path in out.glob(".partial-*"))
    assert kills >= 3
    result = finish(recipe, out)
    assert "Traceback" not in result.stderr
    assert weights(out) == expected
    assert not list(out.glob(".partial-*"))
    assert not list(out.glob(f"work/*/{STATE}"))


def test_the_interrupted_stage_goes_on_from_its_last_epoch(recipe, tmp_path):
    out = tmp_path / "run"
    assert kill_when(recipe, out, lambda _: bool(list(out.glob(f"work/*/{STATE}"))))
    states = list(out.glob(f"work/*/{STATE}"))
    assert len(states) == 1
    text = recipe.read_text()
    done = subprocess.run([*command(recipe, out)[:-1]], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert recipe.read_text() == text
    first = re.search(r"01-teacher epoch (\d)/4", done.stderr)
    assert first is not None
    assert int(first.group(1)) > 1  # the first was done before the kill
