"""Whatever fails while a checkpoint is written is told on every rank, and takes no complete checkpoint away."""

import errno
import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from pipeline.distributed import comm
from pipeline.training import checkpoint
from pipeline.training import saver as saving
from pipeline.training.saver import Saver
from shards.errors import UserError
from shards.storage import files
from tests.helpers.ranks import run_ranks

ENDED = b'{"epoch": 1, "epoch_step": 0}'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(files, "WAITS", (0.01, 0.01), raising=False)


def saver_in(folder, keep=1):
    return Saver(folder, None, {}, None, keep)


def save(saver, step):
    """The thread of a save of small files, and `wait`."""
    saver.folder = folder = saver.run_dir / f"checkpoints/step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    name = "state.json" if comm.is_rank0() else "other"
    saver.written.clear()
    given = (folder, {folder / name: ENDED}, comm.rank(), comm.world())
    saver.thread = threading.Thread(target=saver.write, args=given, daemon=True)
    saver.thread.start()
    assert saver.written.wait(10)
    saver.wait()


def names(folder):
    return [found.name for found in checkpoint.checkpoints(folder)]


@pytest.mark.parametrize("keep", [1, 2])
def test_an_old_checkpoint_that_cannot_be_removed_is_tried_again(tmp_path, monkeypatch, caplog, keep):
    saver, rmtree = saver_in(tmp_path, keep), shutil.rmtree

    def busy(path, **options):
        if Path(path).name == "step_00000001":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        for step in range(1, 5):
            save(saver, step)
    assert names(tmp_path) == ["step_00000001", *(f"step_{step:08d}" for step in range(5 - keep, 5))]
    assert checkpoint.newest_complete(tmp_path) == (tmp_path / "checkpoints/step_00000004", [])
    assert "step_00000001: cannot be removed (Directory not empty); the next save tries again" in caplog.text
    save(saver, 5)
    assert names(tmp_path) == [f"step_{step:08d}" for step in range(6 - keep, 6)]


def test_old_checkpoints_that_cannot_be_read_are_no_failure(tmp_path, monkeypatch, caplog):
    saver = saver_in(tmp_path)
    save(saver, 1)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "fault", lambda folder: raise_error(OSError(errno.ESTALE, "Stale file handle")))
        save(saver, 2)
    assert "old checkpoints cannot be removed" in caplog.text and len(names(tmp_path)) == 2
    save(saver, 3)
    assert names(tmp_path) == ["step_00000003"]


def test_a_complete_checkpoint_stays_after_an_error(tmp_path, monkeypatch):
    write_json = saving.write_json

    def marked_and_failed(path, value):
        write_json(path, value)
        if path.name == checkpoint.MARKER:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving, "write_json", marked_and_failed)
    with pytest.raises(UserError, match="cannot be written [(]rank 0: Input/output error[)]"):
        save(saver_in(tmp_path), 1)
    assert checkpoint.newest_complete(tmp_path)[0].name == "step_00000001"


def raise_error(error):
    raise error


FAILURES = {
    "memory": (saving, "write_bytes", MemoryError(), "MemoryError"),
    "polling": (Path, "exists", OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
    "reading": (Path, "read_text", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    "damage": (Path, "read_text", ValueError("no JSON"), "no JSON"),
    "marking": (saving, "sync_folder", OSError(errno.EIO, "Input/output error"), "Input/output error"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", FAILURES)
def test_every_failure_of_the_thread_is_told(tmp_path, monkeypatch, how):
    where, name, error, said = FAILURES[how]
    with monkeypatch.context() as patch:
        patch.setattr(where, name, lambda *args, **options: raise_error(error))
        with pytest.raises(UserError, match=f"cannot be written [(]rank 0: .*{said}") as found:
            save(saver_in(tmp_path), 1)
    assert "\n" not in str(found.value) and names(tmp_path) == []


def test_a_receipt_that_cannot_be_read_once_is_read_again(tmp_path, monkeypatch):
    read_text, failed = Path.read_text, []

    def once(path, *args, **options):
        if path.name.startswith("receipt") and not failed:
            failed.append(path)
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", once)
    save(saver_in(tmp_path), 1)
    marker = tmp_path / "checkpoints/step_00000001" / checkpoint.MARKER
    assert failed and json.loads(marker.read_text())["files"] == {"state.json": len(ENDED)}


def failing(folder):
    """The message on this rank after the last rank could not write, and after rank 0 could not mark."""
    found = []
    for failing_rank, name in ((comm.world() - 1, "write_bytes"), (0, "sync_folder")):
        with pytest.MonkeyPatch.context() as patch:
            if comm.rank() == failing_rank:
                patch.setattr(saving, name, lambda *args: raise_error(MemoryError()))
            with pytest.raises(UserError) as error:
                save(saver_in(folder), 1)
        found.append(str(error.value))
        comm.barrier()
    return found


def test_every_rank_is_told(tmp_path):
    first, second = run_ranks(failing, 2, tmp_path)
    assert first == second and "rank 1: MemoryError" in first[0] and "rank 0: MemoryError" in first[1]


def test_a_copy_that_somebody_made_beside_a_checkpoint_stays(tmp_path):
    saver = saver_in(tmp_path)
    save(saver, 1)
    copy = tmp_path / "checkpoints/step_00000001_good"
    shutil.copytree(tmp_path / "checkpoints/step_00000001", copy)
    save(saver, 2)
    save(saver, 3)
    assert names(tmp_path) == ["step_00000003"] and checkpoint.fault(copy) is None
    assert checkpoint.newest_complete(tmp_path) == (tmp_path / "checkpoints/step_00000003", [])


def test_a_checkpoint_is_converted_on_a_disk_without_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def convert(command, **_):
        Path(command[command.index("--output_folder") + 1]).mkdir()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(checkpoint.fcntl, "flock", no_locks)
    monkeypatch.setattr(checkpoint.subprocess, "run", convert)
    checkpoint.to_universal(tmp_path)
    assert (tmp_path / "universal").is_dir()
