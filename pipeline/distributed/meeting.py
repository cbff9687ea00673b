"""How the processes of a run find each other, within a limit, before they form a group whose collectives wait long."""

import os
import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from pipeline.distributed.heartbeat import Heartbeat
from shards.errors import RunFailed, UserError

JOIN = 600.0  # seconds until all processes have come; some may import from a slow file system for minutes


def meet(rank: int, world: int, timeout: float) -> tuple[dist.Store, Heartbeat | None]:
    """(store, heartbeat) of a group, when all its ranks have come. The heartbeat, of more than one rank, is started.

    timeout: limit of Heartbeat. Raises UserError for a port that is taken, and RunFailed when a rank has not come for
    JOIN seconds.
    """
    env, limit, heartbeat = os.environ, timedelta(seconds=JOIN), None
    if rank and "TORCHELASTIC_RUN_ID" not in env:
        await_rank_0(env["MASTER_ADDR"], int(env["MASTER_PORT"]))
    try:
        kept, _, _ = next(rendezvous("env://", rank, world, timeout=limit))
        token = introduce(kept, rank)
        store = dist.PrefixStore(token, kept)
        if world > 1:
            heartbeat = Heartbeat(rank, world, token, timeout, kept)
            store.add("came", 1)
            if rank == 0:
                welcome(kept, token, world)
            store.wait(["all"], limit)
            heartbeat.start()
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT: got {env['MASTER_PORT']}, on which another process of {socket.gethostname()} listens; "
                "set another one"
            ) from None
        raise RunFailed(
            f"rank {rank}: not all {world} processes came within {JOIN:g} s ({first_line(error)}); "
            "the log of one that is missing says why. Start the run again"
        ) from None
    return store, heartbeat


def introduce(store: dist.Store, rank: int) -> str:
    """The prefix of the keys of this start, which rank 0 makes. torchrun may keep its store, with the keys in it, when
    it starts the processes again: another rank waits for an answer to a name that is new."""
    name = uuid.uuid4().hex
    if rank == 0:
        return name
    store.set(f"hello/{store.add('hellos', 1)}", name)
    store.wait([f"welcome/{name}"], timedelta(seconds=JOIN))
    return store.get(f"welcome/{name}").decode()


def welcome(store: dist.Store, token: str, world: int) -> None:
    """Answer every `introduce`, those of earlier starts too, until all ranks of this one have come. Rank 0 calls."""
    answered, until = 0, time.monotonic() + JOIN
    while (came := store.add(f"{token}/came", 0)) < world:
        if store.check([f"hello/{answered + 1}"]):
            answered += 1
            store.set(f"welcome/{store.get(f'hello/{answered}').decode()}", token)
        elif time.monotonic() > until:
            raise dist.DistStoreError(f"{came} came")
        else:
            time.sleep(0.02)
    store.set(f"{token}/all", "")


def await_rank_0(address: str, port: int) -> None:
    """Until rank 0 listens. torch's own wait takes more than twice its timeout where rank 0 died before it could.
    Raises RunFailed."""
    until = time.monotonic() + JOIN
    while True:
        try:
            return socket.create_connection((address, port), timeout=1).close()
        except OSError as error:
            if time.monotonic() > until:
                raise RunFailed(
                    f"rank {os.environ['RANK']}: rank 0 does not listen at {address}:{port} "
                    f"after {JOIN:g} s ({error}); "
                    "its own log says why, if it is no firewall. Start the run again"
                ) from None
            time.sleep(0.2)


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
