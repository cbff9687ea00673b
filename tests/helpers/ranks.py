"""Run a function in N gloo processes, as torchrun would, and get what every rank returns."""

import multiprocessing
import os
import socket
import tempfile

import torch
import torch.multiprocessing as mp

# Processes are forked from one that has imported these, which takes longer than most tests.
multiprocessing.set_forkserver_preload(["pipeline.training.run", "deepspeed", "tests.helpers.runs"])


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(function, world, *args, timeout=60):
    """[function(*args) of rank 0, of rank 1, ...]; an error in any rank is raised here. `function` must be importable.

    `timeout`: seconds that a collective waits.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        given = (world, port, folder, dict(os.environ), function, args, timeout)
        mp.start_processes(_rank, given, nprocs=world, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(world)]


def _rank(rank, world, port, folder, environment, function, args, timeout):
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from pipeline.distributed import comm

    comm.init(timeout)
    torch.save(function(*args), f"{folder}/{rank}")
    comm.shutdown()
