"""The process group, and collectives that are used outside the losses."""

import atexit
import contextlib
import datetime
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from pipeline.distributed.environment import complete, own_gpu
from pipeline.distributed.heartbeat import Heartbeat
from pipeline.distributed.meeting import first_line, meet
from shards.errors import RunFailed, UserError

Found = TypeVar("Found")

# torch 2.14 renames these, and warns of the old names.
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# By torch's default float32 convolutions are TF32 on a GPU, matrix products are not. training.precision.tf32 has both.
torch.backends.cudnn.allow_tf32 = False

# On GPUs a gloo group of all ranks for messages between hosts; else the default group is gloo itself.
_control: dist.ProcessGroup | None = None
_heartbeat: Heartbeat | None = None
# Collectives wait for a rank that works alone; the heartbeat tells one that is dead. Milliseconds must fit an int.
PATIENCE = datetime.timedelta(days=7)


def init(timeout: float = 60.0) -> None:
    """Join the process group of torchrun (RANK ...) or srun (SLURM_PROCID ...), or be a group of one.

    gloo on the CPU, NCCL on GPUs. `timeout`: seconds without a sign of life of another process after which this one
    exits (heartbeat.py). Raises UserError, and RunFailed where not all processes come.
    """
    global _control, _heartbeat
    if dist.is_initialized():
        return
    env = os.environ
    complete(env)
    if torch.cuda.is_available():
        # DeepSpeed takes LOCAL_RANK for the GPU's number, throughout training. SLURM_LOCALID stays what it is.
        env["LOCAL_RANK"] = str(own_gpu(int(env["LOCAL_RANK"]), torch.cuda.device_count(), env))
        torch.cuda.set_device(int(env["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store, _heartbeat = meet(int(env["RANK"]), int(env["WORLD_SIZE"]), timeout)
    store.set_timeout(PATIENCE)
    atexit.register(shutdown, False)
    dist.init_process_group(
        backend,
        store=store,
        rank=int(env["RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        timeout=PATIENCE,
        # Without it NCCL guesses one from the rank, which hangs where ranks and GPUs are not in step.
        device_id=device() if backend == "nccl" else None,
    )
    if backend != "gloo":
        # Every rank is a member, and gets no mark for those that are not.
        _control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
    with naming_the_lost():
        hosts = gather_objects(socket.gethostname())
    # What ranks of a host share is divided by it; of the launchers only torchrun sets it.
    env["LOCAL_WORLD_SIZE"] = str(hosts.count(socket.gethostname()))


def wait_long(group: dist.ProcessGroup) -> None:
    """Let the collectives of a group that another package has made wait as long as those of `init`."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.14
    set_timeout(PATIENCE, group)


def shutdown(well: bool = True) -> None:
    """Destroy the process groups, and end the heartbeat; also called when the process exits. well: all ranks call.

    A gloo group that outlives the interpreter sometimes aborts the process (14 of 120 exits measured, its threads are
    not joined), and the exit code is lost. Destroying an NCCL group may wait for a rank that died, so it is skipped
    unless all went `well`.
    """
    global _control, _heartbeat
    if dist.is_initialized():
        if well or _control is None:
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(_control)
    _control = None
    if _heartbeat:  # last, for the above may wait for a rank that is lost
        _heartbeat.stop(well)
    _heartbeat = None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    return rank() == 0


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    if world() > 1:
        dist.barrier(group=_control)


def on_rank0(function: Callable[..., Found], *args: object) -> Found:
    """function(*args), called on rank 0 only; its result, or its UserError, on every rank."""
    result, error = None, None
    if is_rank0():
        try:
            result = function(*args)
        except UserError as found:
            error = found
    result, error = broadcast_object((result, error))
    if error:
        error.everywhere = True
        raise error
    return result


@contextlib.contextmanager
def naming_the_lost() -> Iterator[None]:
    """Turn errors of collectives, whose connection to a rank that died is broken, into RunFailed."""
    try:
        yield
    except RuntimeError as error:
        words = str(error)
        if not (isinstance(error, dist.DistError) or "gloo" in words or "NCCL" in words):
            raise
        if _heartbeat:
            _heartbeat.explain()
        raise RunFailed(
            f"rank {rank()}: another process of the run died ({first_line(error)}); "
            "its own log says why. Start the run again: it resumes from its last checkpoint"
        ) from error


def all_reduce_max(*values: int) -> tuple[int, ...]:
    """For every int (or bool) its largest value over the ranks. The GPUs are not waited for."""
    found = torch.tensor(values, dtype=torch.int64)
    if world() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=_control)
    return tuple(found.tolist())


def all_reduce_sum(counts_K: np.ndarray) -> np.ndarray:
    """int64 (K,): the sum over the ranks of integer counts."""
    if world() == 1:
        return counts_K
    found = torch.from_numpy(counts_K.copy())
    dist.all_reduce(found, group=_control)
    return found.numpy()


def broadcast_object(value: Found) -> Found:
    """Rank 0's `value` on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control)
    return box[0]


def gather_objects(value: Found) -> list[Found]:
    """Every rank's `value`, in rank order, on every rank."""
    if world() == 1:
        return [value]
    box: list[Found] = [None] * world()
    dist.all_gather_object(box, value, group=_control)
    return box


def exchange(parts_R: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What each rank sent to this one, in rank order. parts_R[r]: 1-d, sent to rank r; of one dtype on all ranks, one
    that torch has. All ranks call."""
    if world() == 1:
        return list(parts_R)
    sizes = torch.tensor([len(part) for part in parts_R])
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes, group=_control)
    sent = torch.from_numpy(np.concatenate(parts_R))
    found = sent.new_empty(int(coming.sum()))
    dist.all_to_all_single(found, sent, coming.tolist(), sizes.tolist(), group=_control)
    return [part.numpy() for part in found.split(coming.tolist())]


def all_gather_rows(local_ND: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Rows of all ranks, in rank order; counts[r] is the number of rank r's rows. No gradient."""
    if world() == 1:
        return local_ND
    padded = local_ND.contiguous()
    if min(counts) != max(counts):
        padded = local_ND.new_zeros((max(counts), *local_ND.shape[1:]))
        padded[: len(local_ND)] = local_ND
    everyone = padded.new_empty(len(counts) * len(padded), *padded.shape[1:])
    ALL_GATHER(everyone, padded)
    if min(counts) == max(counts):
        return everyone
    return torch.cat([rows[:count] for rows, count in zip(everyone.split(len(padded)), counts)])


def mean(value: torch.Tensor) -> float:
    """The mean over the ranks of a 0-d tensor."""
    value = value.detach().float().clone()
    if world() > 1:
        dist.all_reduce(value)
    return float(value) / world()
