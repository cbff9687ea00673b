"""What the ranks of a host hold once: arrays in shared memory, made the same on all hosts."""

import os
import socket
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from pipeline.distributed import comm
from shards.errors import UserError

PIECE = 1 << 24  # elements of all hosts that are sent at a time


def host() -> str:
    """Name of this host."""
    return socket.gethostname()


def first_ranks() -> list[int]:
    """For every rank the lowest rank on its host. All ranks call."""
    hosts = comm.gather_objects(host())
    return [hosts.index(one) for one in hosts]


def host_array(count: int, dtype: DTypeLike) -> np.ndarray:
    """(count,) zeros that the ranks of a host share: a file without a name in the temporary folder (TMPDIR), mapped by
    all.

    One copy a host, whatever the number of its ranks. All ranks call. Raises UserError on all when it does not fit on
    one.
    """
    dtype = np.dtype(dtype)
    if not count:
        return np.zeros(0, dtype)
    first, name = first_ranks()[comm.rank()], comm.broadcast_object(uuid.uuid4().hex)
    path, wrong = Path(tempfile.gettempdir()) / f"safeclip_{name}_{first}", None
    if comm.rank() == first:
        try:
            with open(path, "wb") as file:
                os.posix_fallocate(
                    file.fileno(), 0, count * dtype.itemsize
                )  # a full disk must not show later, as SIGBUS
        except OSError as error:
            wrong = f"{host()}: {path.parent}: {error.strerror}"
    need = f"{count * dtype.itemsize:,} bytes are needed there; free some, or set TMPDIR to a larger disk"
    faults = [f"{text}; {need}" for text in comm.gather_objects(wrong) if text]
    if not faults:
        try:
            array = np.memmap(path, dtype, "r+", shape=(count,))
        except OSError as error:  # containers of one name, or each process with a temporary folder of its own
            wrong = (
                f"{host()}: {path.parent}: rank {comm.rank()} does not see a file that rank {first}, whose "
                f"host has the same name, made there ({error.strerror}); give every host a name of its own, and all "
                "its processes one TMPDIR"
            )
        faults = [text for text in comm.gather_objects(wrong) if text]
    if comm.rank() == first:
        path.unlink(missing_ok=True)
    if faults:
        raise UserError(faults[0])
    return array


def share_between_hosts(array: np.ndarray, ranges_R: Sequence[tuple[int, int]]) -> None:
    """Make a `host_array` the same on every host. ranges_R[r]: (start, stop), what rank r has written of it. All ranks
    call.

    The first rank of each host sends for its host; all hosts send at the same time. They have no group of their own:
    the default group being bound to a GPU, torch makes those that are not members of a new group, though it is gloo,
    wait for a split of NCCL's communicator, in which the members take no part.
    """
    comm.barrier()
    firsts = first_ranks()
    leaders = sorted(set(firsts))
    if len(leaders) > 1:
        size = max(1, PIECE // len(leaders))
        parts = [pieces((some for first, some in zip(firsts, ranges_R) if first == leader), size) for leader in leaders]
        for slices in zip_longest(*parts, fillvalue=slice(0, 0)):
            send(array, dict(zip(leaders, slices)))
    comm.barrier()


def pieces(ranges: Iterable[tuple[int, int]], size: int) -> list[slice]:
    """Slices of at most `size` elements that cover the ranges."""
    return [slice(at, min(at + size, stop)) for start, stop in ranges for at in range(start, stop, size)]


def send(array: np.ndarray, slices: Mapping[int, slice]) -> None:
    """slices[r] of `array` from rank r to the others that have one. All ranks call."""
    me, nothing = comm.rank(), slice(0, 0)
    to = [rank for rank in slices if rank != me] if me in slices else []
    mine = slices.get(me, nothing)
    found_R = comm.exchange([array[mine if rank in to else nothing] for rank in range(comm.world())])
    for rank in to:
        array[slices[rank]] = found_R[rank]
