"""Checkpoints: whole or absent, whatever goes wrong while writing; damaged ones are found and passed over."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from hiexp.io import DataError
from hiexp.rl.checkpoint import CheckpointError, Checkpoints, damage


def writer(content: bytes):
    def write(folder):
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_bytes(content)
        (folder / "state.json").write_text("{}")

    return write


def test_save_verify_load(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(10, writer(b"abc"))
    assert path.name == "step_000010"
    assert (path / "model" / "weights.bin").read_bytes() == b"abc"
    assert checkpoints.latest() == (10, path)


def test_keeps_the_last_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step, score in [(1, 0.2), (2, 0.9), (3, None), (4, 0.9), (5, 0.1), (6, None), (7, 0.3)]:
        checkpoints.save(step, writer(b"x"), score)
    assert checkpoints.steps() == [4, 6, 7]
    assert checkpoints.best() == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004", "step_000006", "step_000007"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest", "manifest_missing"])
def test_a_damaged_checkpoint_falls_back_with_a_warning(tmp_path, harm):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, writer(b"abc"))
    path = checkpoints.save(2, writer(b"def"))
    weights, manifest = path / "model" / "weights.bin", path / "manifest.json"
    if harm == "flip":
        weights.write_bytes(b"dEf")
    elif harm == "truncate":
        weights.write_bytes(b"de")
    elif harm == "remove":
        weights.unlink()
    elif harm == "manifest":
        manifest.write_text("{")
    else:
        manifest.unlink()
    with pytest.warns(UserWarning, match="step_000002: damaged checkpoint"):
        assert checkpoints.latest() == (1, tmp_path / "step_000001")


def test_all_damaged_is_an_error_that_names_them(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    (checkpoints.save(1, writer(b"abc")) / "state.json").unlink()
    (checkpoints.save(2, writer(b"abc")) / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"step_000002.*manifest.json is.*step_000001.*state.json is missing.*restore"):
        checkpoints.latest()
    assert checkpoints.steps() == [1, 2]


def full_disk(folder):
    (folder / "half.bin").write_bytes(b"x" * 10)
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_leaves_the_previous_one_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    before = checkpoints.save(1, writer(b"abc"))
    with pytest.raises(CheckpointError, match=r"step_000002.*No space left.*step 1 is whole.*same command"):
        checkpoints.save(2, full_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert damage(before) is None
    assert checkpoints.save(2, writer(b"def")).is_dir()


def test_full_disk_at_flush_time(tmp_path, monkeypatch):
    # Delayed allocation reports a full disk only when the data is flushed.
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, writer(b"abc"))

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoints.save(2, writer(b"def"))
    assert checkpoints.latest() == (1, tmp_path / "step_000001")
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("kind", [RuntimeError, SafetensorError])
def test_full_disk_as_serialisers_report_it(tmp_path, kind):
    def write(folder):
        raise kind("I/O error: No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        Checkpoints(tmp_path).save(1, write)
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_of_the_system(tmp_path):
    """A real failing write instead of a simulated one, in a process of its own because the limit cannot be lifted."""
    code = f"""
import resource, torch
from hiexp.io import DataError
from hiexp.rl.checkpoint import CheckpointError, Checkpoints
checkpoints = Checkpoints({str(tmp_path)!r})
checkpoints.save(1, lambda folder: torch.save(torch.zeros(10), folder / "optimizer.pt"))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(2, lambda folder: torch.save(torch.zeros(1_000_000), folder / "optimizer.pt"))
except CheckpointError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "step 1 is whole" in result.stdout
    assert Checkpoints(tmp_path).latest() == (1, tmp_path / "step_000001")
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_first_checkpoint_on_a_full_disk(tmp_path):
    with pytest.raises(CheckpointError, match="there is none before it"):
        Checkpoints(tmp_path).save(1, full_disk)


def test_leftovers_of_killed_runs_go(tmp_path):
    (tmp_path / ".step_000009.123.tmp").mkdir()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, writer(b"abc"))
    assert checkpoints.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, writer(b"abc"))
    (path / "state.json").unlink()
    assert damage(checkpoints.save(1, writer(b"abc"))) is None


def test_manifest_names_every_file(tmp_path):
    path = Checkpoints(tmp_path).save(3, writer(b"abc"), 0.5)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["score"]) == (3, 0.5)
    assert sorted(manifest["files"]) == ["model/weights.bin", "state.json"]


def test_a_damaged_later_checkpoint_does_not_outlive_what_was_made_since(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(10, writer(b"abc"))
    (checkpoints.save(20, writer(b"abc"), 0.9) / "state.json").unlink()
    path = checkpoints.save(12, writer(b"abc"), 0.1)
    assert checkpoints.steps() == [12]
    assert checkpoints.latest() == (12, path)
    assert checkpoints.best() == 12
