"""The process group: how it begins and ends, and what ranks send each other."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.config.data import open_cache
from pipeline.config.schema import Data
from pipeline.distributed import comm, meeting
from pipeline.distributed.environment import own_gpu
from shards.errors import RunFailed, UserError
from tests.helpers.ranks import run_ranks


def test_a_rank_0_that_never_comes_is_named_within_the_limit(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = str(closed.getsockname()[1])  # bound, and nobody listens
        where = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        monkeypatch.setattr(meeting, "JOIN", 0.5)
        with pytest.raises(RunFailed) as error:
            comm.init()
    assert f"rank 0 does not listen at 127.0.0.1:{port} after 0.5 s" in str(error.value)


def exchanged():
    """Rank r sends (r + to) numbers to each rank; of several types."""
    me = comm.rank()
    sent = [np.arange(me + to) + 10 * me for to in range(3)]
    return [
        [
            [part.tolist() for part in comm.exchange([part.astype(kind) for part in sent])]
            for kind in (np.int64, np.float32)
        ],
        [part.tolist() for part in comm.exchange([part > 15 for part in sent])],
    ]


def test_each_rank_gets_what_the_others_sent_it():
    for to, (numbers, flags) in enumerate(run_ranks(exchanged, 3)):
        expected = [[10 * rank + n for n in range(rank + to)] for rank in range(3)]
        assert numbers == [expected, expected] and flags == [[n > 15 for n in part] for part in expected]


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        where = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        with pytest.raises(UserError, match=f"MASTER_PORT: got {port}, .* set another one"):
            comm.init(timeout=5)


ENDS = """
import atexit, sys, torch.distributed as dist
atexit.register(lambda: print(dist.is_initialized()))  # runs after what is registered later
from pipeline.distributed import comm
from pipeline.distributed.environment import own_gpu
comm.init()
sys.exit(75)
"""


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE: missing, expected a whole number"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: missing, expected a host"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT: got 'x', expected a whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: got '-1', expected a whole number"),
        ({"RANK": "x"}, "RANK: got 'x', expected a whole number"),
        ({"RANK": "2"}, "RANK: got 2, expected less than WORLD_SIZE, 2"),
    ],
)
def test_a_launch_that_is_not_whole_is_named(monkeypatch, changed, said):
    whole = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in (whole | changed).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(meeting, "JOIN", 0.0)
    with pytest.raises(UserError) as error:
        comm.init()
    assert str(error.value).startswith(said)


def test_no_group_outlives_the_process_whatever_its_exit_code():
    """One that does aborts the process, in 1 of 9 ends, and its exit code is lost."""
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("False\n", 75), done.stderr


def test_every_process_has_a_gpu_of_its_own_or_says_what_to_start():
    assert [own_gpu(rank, 4, {"TORCHELASTIC_RUN_ID": "1"}) for rank in range(4)] == [0, 1, 2, 3]
    assert [own_gpu(rank, 4, {"SLURM_PROCID": str(rank)}) for rank in range(4)] == [0, 1, 2, 3]
    assert own_gpu(3, 1, {"SLURM_PROCID": "3"}) == 0
    for env in ({"TORCHELASTIC_RUN_ID": "1", "SLURM_PROCID": "0"}, {}):
        with pytest.raises(UserError, match="LOCAL_RANK: got 1 .*1 GPU.*nproc-per-node"):
            own_gpu(1, 1, env)


def test_a_host_with_too_few_gpus_is_said_by_a_process_that_prints():
    """By all processes of torchrun, so that none waits for the others, and by each task of srun that has none."""
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2"}
    for rank in range(2):
        with pytest.raises(UserError, match="LOCAL_RANK: got 1 .*1 GPU.*PROCESSES") as found:
            own_gpu(rank, 1, torchrun)
        assert not found.value.alone
    assert own_gpu(0, 2, {"SLURM_PROCID": "0", "LOCAL_WORLD_SIZE": "8"}) == 0  # of whoever submitted the job
    with pytest.raises(UserError, match="LOCAL_RANK: got 2 .*2 GPU") as found:
        own_gpu(2, 2, {"SLURM_PROCID": "2"})
    assert found.value.alone


class Joins(Exception):
    """init has come to where it joins the others."""


def test_deepspeed_is_told_the_gpu_of_a_task_that_sees_no_other(monkeypatch):
    """It takes LOCAL_RANK for the GPU's number."""
    chosen = []

    def meet(*where):
        raise Joins

    srun = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "MASTER_ADDR": "127.0.0.1"}
    for name, value in srun.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(comm, "meet", meet)
    for count, expected in ((1, 0), (8, 3)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        for name in ("RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
        with pytest.raises(Joins):
            comm.init()
        assert os.environ["LOCAL_RANK"] == str(expected) and os.environ["RANK"] == "3" and chosen.pop() == expected


def test_a_command_in_a_batch_script_is_one_process(monkeypatch):
    """There SLURM sets the number of the job's tasks, though srun has started none of them."""
    met = []

    def meet(rank, world, timeout):
        met.append((rank, world))
        raise Joins

    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")  # so that what init sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(comm, "meet", meet)
    with pytest.raises(Joins):
        comm.init()
    assert met == [(0, 1)]


def fetched_ahead(cache):
    return open_cache(Data(cache=str(cache), cache_gb=1)).ahead


@pytest.mark.parametrize("stale", ["", "7"])
def test_ranks_of_a_host_share_the_cache_whatever_started_them(monkeypatch, tmp_path, stale):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", stale)
    assert run_ranks(fetched_ahead, 2, tmp_path / "cache") == [125_000_000] * 2


def test_ranks_of_other_hosts_are_not_counted(monkeypatch):
    monkeypatch.setattr(comm, "gather_objects", lambda host: [host, "another", host])
    comm.init()
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"
