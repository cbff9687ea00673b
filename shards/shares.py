"""One job that several processes share: torchrun, srun or a SLURM array starts them, and what they have in common is a
folder.

Each process writes the files of its own shards, whole or not at all, and then a part: a file with what it has found.
Whoever writes the last part concludes. No process waits for another, so none waits for one that died: the same command
again, with any number of processes, makes what is missing.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import UserError
from shards.storage.files import write_bytes

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Found = TypeVar("Found")
IRREGULAR = (
    "SLURM_ARRAY_TASK_ID: got {0}, one of {1} tasks from {2} to {3}, expected an array without gaps such as "
    "--array=0-63; submit all of it again (what is done is kept), or give the command once without an array"
)


@dataclass(frozen=True)
class Share:
    """The share of process number `rank` of `world`. launch: what the processes have in common that were started
    together; shown: whether this process shows progress."""

    rank: int = 0
    world: int = 1
    launch: str = ""
    shown: bool = True

    def has(self, number: int) -> bool:
        """Whether item `number` belongs to it."""
        return number % self.world == self.rank

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        return items[self.rank :: self.world]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A UserError in the block is met by this process only."""
        try:
            yield
        except UserError as error:
            error.alone = True
            raise


def launched(env: Mapping[str, str] = os.environ) -> Share:
    """The share of this process by the variables of its launcher: torchrun's (RANK ...), srun's, and those of a SLURM
    array, whose tasks may be of several processes each. Raises UserError."""
    rank, world, launch = 0, 1, ""
    if env.get("RANK") and int(env.get("WORLD_SIZE") or 1) > 1:
        rank, world, launch = int(env["RANK"]), int(env["WORLD_SIZE"]), env.get("TORCHELASTIC_RUN_ID", "")
    # Not SLURM_NTASKS, which is set in a batch script too, where only one process runs.
    elif int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        rank, world = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
        launch = f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}"
    shown = rank == 0
    if env.get("SLURM_ARRAY_TASK_ID"):
        names = ("ID", "COUNT", "MIN", "MAX", "STEP")
        task, tasks, first, last, step = (int(env.get(f"SLURM_ARRAY_TASK_{name}") or 1) for name in names)
        if tasks > 1 and first + (tasks - 1) * step != last:
            raise UserError(IRREGULAR.format(task, tasks, first, last))
        rank, world = (task - first) // step * world + rank, tasks * world
        launch = env.get("SLURM_ARRAY_JOB_ID", "")
    return Share(rank, world, launch, shown)


def processes(env: Mapping[str, str] = os.environ) -> int:
    """How many processes this one may start: one for each core that is its own."""
    if env.get("SLURM_CPUS_PER_TASK"):
        return int(env["SLURM_CPUS_PER_TASK"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(env.get("LOCAL_WORLD_SIZE") or 1))


class Parts:
    """What each process of a job has found: a file each in FOLDER/.parts/.

    job: all that decides the result, as JSON values; parts of another job, or of processes that were started at another
    time, are never read.
    """

    def __init__(self, folder: str | Path, share: Share, *job: Any):
        self.share, self.all = share, Path(folder) / ".parts"
        self.folder = self.all / digest(job)
        started = digest([share.launch, share.world])
        self.paths = [self.folder / f"{started}.{rank}.json" for rank in range(share.world)]
        self.paths[share.rank].unlink(missing_ok=True)  # of an attempt that was cut off

    def join(self, found: Any) -> list | None:
        """Put down what this process has found, a JSON value. The process that is last to do so gets those of all, by
        rank; the others get None."""
        everything = self.exchanged(found) if self.share.world > 1 else [found]
        if everything is None:
            share = self.share
            logger.info(f"share {share.rank + 1} of {share.world} is done; the last process to finish concludes")
            return None
        for folder in self.all.glob(f"{self.folder.name}*"):  # also what earlier attempts left
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.all.rmdir()
        return everything

    def exchanged(self, found: Any) -> list | None:
        """All parts, if they are there and no other process has taken them."""
        try:
            write_bytes(self.paths[self.share.rank], json.dumps(found).encode())
            everything = [json.loads(path.read_bytes()) for path in self.paths]
            # Of several processes that see all parts one can rename their folder.
            self.folder.rename(self.folder.with_name(f"{self.folder.name}.{uuid.uuid4().hex[:12]}"))
        except FileNotFoundError:  # a part, or since this one was put down, the folder
            return None
        return everything


def digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def in_order(pool: Executor, function: Callable[..., Found], jobs: Iterable[tuple], ahead: int) -> Iterator[Found]:
    """Yield function(*job) of each job, in order. At most `ahead` of them are in the pool at a time.

    After an error those that have not begun are left out.
    """
    waiting: deque[Future[Found]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(function, *job))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
