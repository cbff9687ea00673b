"""Arrays that the ranks of a host share: one copy a host, the same on all hosts after they were shared, one line on a
full disk. And the groups' end."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from pipeline.distributed import comm
from shards.errors import RunFailed, UserError
from tests.helpers.ranks import run_ranks

COUNT, BOUNDS = 11, [0, 4, 4, 11]


def two_hosts():
    """Ranks 0 and 2 as if on one host, rank 1 on another: hosts need not hold neighbouring ranks."""
    comm.host, comm.PIECE = (lambda: "b" if comm.rank() == 1 else "a"), 3
    array = comm.host_array(COUNT, np.float32)
    mine = slice(*BOUNDS[comm.rank() : comm.rank() + 2])
    array[mine] = np.arange(COUNT)[mine] + 1
    comm.barrier()
    before = array.copy()
    comm.share_between_hosts(array, list(zip(BOUNDS, BOUNDS[1:])))
    return before, np.array(array)


def test_a_host_has_one_copy_and_all_hosts_end_with_the_same():
    whole = np.arange(COUNT, dtype=np.float32) + 1
    (first, *after0), (second, *after1), (third, *after2) = run_ranks(two_hosts, 3)
    assert np.array_equal(first, whole) and np.array_equal(third, whole) and not second.any()
    for (after,) in (after0, after1, after2):
        assert np.array_equal(after, whole)


def full_on_the_second():
    comm.host = lambda: str(comm.rank())

    def posix_fallocate(file, start, size):
        if comm.rank() == 1:
            raise OSError(28, "No space left on device")

    os.posix_fallocate = posix_fallocate
    with pytest.raises(UserError) as error:
        comm.host_array(1000, np.int64)
    return str(error.value)


def test_a_full_temporary_folder_on_one_host_is_said_on_all():
    first, second = run_ranks(full_on_the_second, 2)
    assert first == second and "No space left" in first and "8,000 bytes" in first and "TMPDIR" in first


def test_a_rank_0_that_never_comes_is_named_within_the_timeout(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = str(closed.getsockname()[1])  # bound, and nobody listens
        where = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        with pytest.raises(RunFailed) as error:
            comm.init(timeout=0.5)
    assert f"rank 0 does not listen at 127.0.0.1:{port} after run.timeout = 0.5 s" in str(error.value)


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(comm.tempfile, "tempdir", str(tmp_path))
    assert not comm.host_array(5, np.uint8).any() and len(comm.host_array(0, np.uint8)) == 0
    assert not list(tmp_path.iterdir())


ENDS = """
import atexit, sys, torch.distributed as dist
atexit.register(lambda: print(dist.is_initialized()))  # runs after what is registered later
from pipeline.distributed import comm
comm.init()
sys.exit(75)
"""


def test_no_group_outlives_the_process_whatever_its_exit_code():
    """One that does aborts the process, in 1 of 9 ends, and its exit code is lost."""
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("False\n", 75), done.stderr


def test_every_process_has_a_gpu_of_its_own_or_says_what_to_start():
    assert [comm.own_gpu(rank, 4, {"TORCHELASTIC_RUN_ID": "1"}) for rank in range(4)] == [0, 1, 2, 3]
    assert [comm.own_gpu(rank, 4, {"SLURM_PROCID": str(rank)}) for rank in range(4)] == [0, 1, 2, 3]
    assert comm.own_gpu(3, 1, {"SLURM_PROCID": "3"}) == 0
    for env in ({"TORCHELASTIC_RUN_ID": "1", "SLURM_PROCID": "0"}, {}):
        with pytest.raises(UserError, match="LOCAL_RANK: got 1 .*1 GPU.*nproc-per-node"):
            comm.own_gpu(1, 1, env)
