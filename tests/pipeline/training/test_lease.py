"""One run at a time writes a run directory: who holds it is told, and who died is taken over."""

import errno
import json
import os
import subprocess
import time

import pytest

from pipeline.distributed import comm
from pipeline.distributed.heartbeat import before_exit
from pipeline.doctor import checks
from pipeline.training import checkpoint, lease
from pipeline.training import run as running
from pipeline.training.lease import Lease
from shards.build.shapes import shapes
from shards.errors import UserError
from shards.storage import files
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in {"BEAT": 0.1, "STALE": 0.6, "SETTLE": 0.05}.items():
        monkeypatch.setattr(lease, name, seconds)
    monkeypatch.setattr(files, "WAITS", (0.01, 0.01), raising=False)


def held_by(folder, age=0.0, **changes):
    """A lease of another process, renewed `age` seconds ago."""
    folder.mkdir(exist_ok=True)
    path = folder / lease.NAME
    path.write_text(json.dumps({**Lease(folder).mine, "token": "other", "pid": 1, "job": "42", **changes}))
    os.utime(path, (time.time() - age,) * 2)
    return path


ELSEWHERE = {"host": "node7", "machine": "another boot"}


def test_a_lease_is_renewed_and_released(tmp_path):
    mine = Lease(tmp_path / "run")
    mine.acquire()
    before = mine.path.stat().st_mtime_ns
    time.sleep(0.4)
    assert mine.path.stat().st_mtime_ns > before and not mine.lost
    assert mine.release in before_exit  # called where this process exits because another is lost
    mine.path.unlink()  # by hand
    time.sleep(0.4)
    assert mine.is_mine() and not mine.lost
    mine.check()
    mine.release()
    assert not mine.path.exists() and mine.release not in before_exit


def test_a_living_process_of_this_host_is_named_and_a_dead_one_taken_over(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as holder:
        path = held_by(tmp_path, age=9.0, pid=holder.pid, started=lease.started(holder.pid))
        with pytest.raises(UserError, match=f"process {holder.pid} on .* [(]SLURM job 42[)].*; stop that run") as error:
            Lease(tmp_path).acquire()
        assert "\n" not in str(error.value) and lease.holder_of(tmp_path)
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and not waited for
        os.utime(path)
        assert lease.holder_of(tmp_path) is None
        assert Lease(tmp_path).attempt()
    held_by(tmp_path, pid=os.getppid(), started="another process had this number")
    assert Lease(tmp_path).attempt()


def test_another_host_is_refused_while_it_renews_its_lease(tmp_path):
    path = held_by(tmp_path, **ELSEWHERE)
    waiting = Lease(tmp_path)
    assert not waiting.attempt() and "process 1 on node7" in lease.holder_of(tmp_path)
    os.utime(path)
    with pytest.raises(UserError, match="is in use by process 1 on node7"):
        waiting.attempt()


@pytest.mark.parametrize("age", [3600.0, 0.3, -3600.0])  # the last: the server's clock was set back
def test_another_host_that_is_silent_is_taken_over(tmp_path, age, caplog):
    caplog.set_level("INFO")
    held_by(tmp_path, age, **ELSEWHERE)
    mine, begin = Lease(tmp_path), time.monotonic()
    mine.acquire()
    assert (time.monotonic() - begin < 0.3) == (age > 1) and mine.is_mine()
    assert ("was last seen 0 s ago" in caplog.text) == (age == 0.3)
    mine.release()


@pytest.mark.parametrize("text", ["", "[1]", '{"machine": 3}'])
def test_a_damaged_lease_is_one_of_a_host_that_is_not_known(tmp_path, text):
    path = held_by(tmp_path)
    path.write_text(text)
    assert not Lease(tmp_path).attempt() and "an unknown host" in lease.holder_of(tmp_path)
    os.utime(path, (1, 1))
    assert Lease(tmp_path).attempt()


def unreadable(patch, times=10**6):
    """The first `times` reads of a lease fail."""
    reads = []

    def opened(path, mode):
        reads.extend([path] if mode == "rb" else [])
        if mode == "rb" and len(reads) <= times:
            raise OSError(errno.EIO, "Input/output error")
        return open(path, mode)

    patch.setattr(lease, "open", opened, raising=False)


def test_a_lease_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path, monkeypatch):
    mine = Lease(tmp_path / "run")
    mine.acquire()
    with monkeypatch.context() as patch:
        unreadable(patch)
        time.sleep(0.8)  # longer than STALE
        mine.check()
        assert not mine.lost and "cannot be read (Input/output error)" in lease.holder_of(tmp_path / "run")
    before = mine.path.stat().st_mtime_ns
    time.sleep(0.4)
    assert mine.path.stat().st_mtime_ns > before and not mine.lost
    mine.path.write_text("")  # nobody's
    mine.check()
    time.sleep(0.4)
    assert not mine.lost
    held_by(tmp_path / "run", **ELSEWHERE)
    time.sleep(0.4)
    assert mine.lost
    with pytest.raises(UserError, match="is in use by process 1 on node7"):
        mine.check()


def test_a_start_reads_a_lease_again(tmp_path, monkeypatch):
    held_by(tmp_path, 3600.0, **ELSEWHERE)
    with monkeypatch.context() as patch:
        unreadable(patch)
        with pytest.raises(UserError, match="cannot be read or written [(]Input/output error[)]"):
            Lease(tmp_path).attempt()
    unreadable(monkeypatch, 2)
    assert Lease(tmp_path).attempt()


def test_a_place_that_cannot_be_a_run_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run"):
        with pytest.raises(UserError, match="cannot be read or written .*; take another run.dir"):
            Lease(tmp_path / name).attempt()


def second_process(folder):
    """Rank 0 holds the lease, rank 1 is another run."""
    mine = Lease(folder)
    mine.acquire()
    try:
        return comm.rank() and Lease(folder).attempt()
    except UserError as error:
        return str(error)
    finally:
        comm.barrier()
        mine.release()


def test_two_processes_at_once(tmp_path):
    _, refused = run_ranks(second_process, 2, tmp_path)
    assert "is in use by process" in refused
    assert not (tmp_path / lease.NAME).exists()


def robbed(folder):
    """Another host takes the run directory over while this run works on its step 5."""
    original, seen = running.train_step, []

    def train_step(*args):
        seen.append(args)
        if len(seen) == 5 and comm.is_rank0():
            held_by(folder / "run", **ELSEWHERE)
        return original(*args)

    running.train_step = train_step
    made = config(folder, "run")
    try:
        running.train(made)
    except UserError as error:
        return str(error), [path.name for path in checkpoint.checkpoints(made.run.dir)]


def test_a_run_that_lost_its_directory_stops_and_doctor_tells_who_has_it(tmp_path):
    shapes(tmp_path / "shapes", pairs=240, test=36)
    for message, saved in run_ranks(robbed, 2, tmp_path):
        assert "is in use by process 1 on node7" in message and "\n" not in message
        assert saved == ["step_00000000"]
    os.utime(tmp_path / "run" / lease.NAME)
    (finding,) = checks.check_run_dir(config(tmp_path, "run"), None, 2)
    assert finding[0] == "fatal" and "is in use by process 1 on node7" in finding[2]
