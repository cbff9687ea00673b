"""The heartbeat: a rank that works for long ends nothing; one that is frozen, killed or gone ends the others with a
line."""

import atexit
import multiprocessing
import os
import signal
import sys
import time

import pytest

from pipeline.distributed import comm, heartbeat, meeting
from shards.errors import RunFailed
from tests.helpers.ranks import free_port, run_ranks

LIMIT = 3.0
PROCESSES = multiprocessing.get_context("forkserver")


def collective():
    """Hangs, for the others do not come."""
    with comm.naming_the_lost():
        comm.all_reduce_max(1)


def compute():
    """Notices no broken connection."""
    time.sleep(10 * LIMIT)


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def done():
    comm.shutdown()


def late():
    """Done later than the others, as with an upload."""
    time.sleep(1.5 * LIMIT)
    comm.shutdown()


def fail():
    sys.exit(2)


def member(folder, rank, world, port, function):
    """Process: a rank that joins the others, then calls `function`, as a command does that uses the command line."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(folder / f"{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    comm.init(LIMIT)
    heartbeat.before_exit.add(lambda: print("let go", file=sys.stderr, flush=True))
    comm.barrier()
    try:
        function()
    except RunFailed as error:
        print(f"safeclip: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def run(folder, *functions):
    """[(exit code, lines on stderr)] of a rank for each of `functions`; a frozen one is killed at the end."""
    where = len(functions), free_port()
    started = [PROCESSES.Process(target=member, args=(folder, r, *where, f)) for r, f in enumerate(functions)]
    for process in started:
        process.start()
    for process, function in zip(started, functions):
        process.join(0 if function is freeze else 60)
    for process in started:
        process.kill()
        process.join()
    return [(process.exitcode, (folder / f"{r}").read_text().splitlines()) for r, process in enumerate(started)]


def said(lines):
    return [line for line in lines if line.startswith("safeclip: ")]


def busy_in_turns():
    for rank in range(2):
        if comm.rank() == rank:
            time.sleep(1.5 * LIMIT)
        comm.barrier()
    return comm.all_reduce_max(comm.rank())


def test_a_rank_that_works_longer_than_the_limit_is_waited_for():
    assert run_ranks(busy_in_turns, 2, timeout=LIMIT) == [(1,), (1,)]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_frozen_rank_ends_the_others_with_a_line_that_names_it(tmp_path, lost):
    """No connection breaks. With rank 0 the store is frozen too."""
    functions = [collective] * 3
    functions[lost] = freeze
    ends = run(tmp_path, *functions)
    for code, lines in ends[:lost] + ends[lost + 1 :]:
        (line,) = said(lines)
        assert code == 1 and "let go" in lines
        assert f"rank {lost} on " in line and f"gave no sign of life for {LIMIT:g} s" in line and "resumes" in line


@pytest.mark.parametrize("lost, other", [(0, compute), (1, collective)])
def test_a_rank_that_is_killed_ends_the_others(tmp_path, lost, other):
    """With rank 0 the store is gone."""
    functions = [other] * 2
    functions[lost] = kill
    code, lines = run(tmp_path, *functions)[1 - lost]
    (line,) = said(lines)
    assert code == 1 and f"rank {1 - lost}: another process of the run died (" in line and "resumes" in line


@pytest.mark.parametrize("alone", [0, 1])
def test_a_rank_that_fails_alone_keeps_its_code_and_ends_the_others(tmp_path, alone):
    functions = [compute] * 2
    functions[alone] = fail
    ends = run(tmp_path, *functions)
    assert ends[alone][0] == 2 and not said(ends[alone][1])
    (line,) = said(ends[1 - alone][1])
    assert ends[1 - alone][0] == 1 and f"rank {alone} on " in line and "has ended" in line


@pytest.mark.parametrize("functions", [(done, late), (late, done)])
def test_a_rank_that_is_done_later_than_the_others_ends_well(tmp_path, functions):
    assert [(code, said(lines)) for code, lines in run(tmp_path, *functions)] == [(0, [])] * 2


def forked():
    """Whether a fork of this process beats or signs off."""
    beats = comm._heartbeat.beats
    child = os.fork()
    if child == 0:
        comm._heartbeat.stop(False)
        os._exit(any(thread.is_alive() for thread in comm._heartbeat.threads))
    code = os.waitpid(child, 0)[1]
    while comm._heartbeat.beats < beats + 20:  # longer than the limit
        time.sleep(0.05)
    comm.barrier()
    return code


def test_a_fork_of_a_rank_neither_beats_nor_signs_off():
    assert run_ranks(forked, 2, timeout=1) == [0, 0]


def test_a_rank_that_never_comes_is_not_waited_for_long(monkeypatch):
    where = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(meeting, "JOIN", 1.0)
    with pytest.raises(RunFailed, match="rank 0: not all 2 processes came within 1 s"):
        comm.init()
