"""Heartbeat: tells a process that works for long from one that is dead, whatever it works on.

Collectives of a run wait for days (comm.PATIENCE), because one rank may rightly work alone for hours. A thread of every
rank beats instead: it writes a number that grows into the store of the process group and reads that of the rank before
it, so the load grows with the number of ranks only. Who finds that number unchanged for `limit` seconds writes a
verdict, which all read. A store that is silent for `limit` seconds is the loss of rank 0, on whose host it is. Then the
process says so and exits, though its main thread may hang in a collective.

Silence is counted in beats of the observer: a process that was itself stopped for a while does not blame the others.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from pipeline import logs
from shards.errors import RunFailed

EXIT_CODE = 1  # as of RunFailed
BEATS = 12  # within `limit`
LONGEST = 2.0  # seconds between beats, at most
FAREWELL = 5.0  # seconds for log files and `before_exit`, which may be on a disk that does not answer
CONNECT = timedelta(minutes=10)
VERDICT = "verdict"
DONE, ENDED = "done", "ended"  # last beats of a process: of a run that is done, or before that

before_exit: set[Callable[[], None]] = set()  # called before this process exits because another is lost


class Heartbeat:
    """The heartbeat of this process, between `start` and `stop`.

    Made by all ranks before they meet, so that each can read the others' first beat from the start on.
    """

    def __init__(self, rank: int, world: int, prefix: str, limit: float, kept: dist.Store):
        """prefix: of the keys in the store at MASTER_ADDR and MASTER_PORT. limit: seconds of silence. kept: rank 0's
        object of that store, which may be its server and lives as long as this one.

        The connection is its own: a request of another thread may hold up a shared one.
        """
        self.rank, self.world, self.limit, self.kept, self.process = rank, world, limit, kept, os.getpid()
        self.every = min(LONGEST, limit / BEATS)
        self.host, address = socket.gethostname(), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self.beats, self.of_0 = 0, f"0 {address[0]}"  # how often the store has answered, and what rank 0 wrote last
        self.ended, self.told, self.last_beat = threading.Event(), threading.Event(), ENDED
        client = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=CONNECT)
        self.store = dist.PrefixStore(f"heartbeat/{prefix}", client)
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self.beat, self.watch_store)]
        self.store.set(str(rank), f"0 {self.host}")
        if rank == 0:
            self.store.set(VERDICT, "")

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def beat(self) -> None:
        """Thread: beat, and watch the rank before this one, until the end. Ends also when the store is lost."""
        before, silent, other, words = b"", 0, (self.rank - 1) % self.world, ""
        with contextlib.suppress(dist.DistError):
            while not words and not self.ended.is_set():
                self.store.set(str(self.rank), f"{self.beats} {self.host}")
                verdict, of_0, found = self.store.multi_get([VERDICT, "0", str(other)])
                self.beats, self.of_0 = self.beats + 1, of_0.decode()
                silent = silent + 1 if found == before and not found.startswith(DONE.encode()) else 0
                before = found
                words = verdict.decode()
                if not words and silent * self.every >= self.limit:
                    words = self.verdict(other, found.decode())
                    self.store.set(VERDICT, words)
                if words:
                    self.tell(words)
                self.ended.wait(0 if words else self.every)
            self.store.set(str(self.rank), f"{self.last_beat} {self.host}")
            if self.rank == 0:
                self.see_off()
        if self.told.is_set():
            leave()

    def see_off(self) -> None:
        """Keep the store, which rank 0 may hold, until the others have ended too, or could read that this one has."""
        others, until = [str(rank) for rank in range(1, self.world)], time.monotonic() + 2 * self.every
        while time.monotonic() < until:
            if all(value.decode().startswith((DONE, ENDED)) for value in self.store.multi_get(others)):
                return
            time.sleep(self.every / 20)

    def watch_store(self) -> None:
        """Thread: lose rank 0 when the store is silent. It asks nothing itself: a request may hang for ever."""
        before, silent = -1, 0
        while not self.ended.wait(self.every) and not self.of_0.startswith(DONE):
            silent = silent + 1 if self.beats == before else 0
            before = self.beats
            if silent * self.every >= self.limit:
                self.tell(self.verdict(0, self.of_0))
                if self.told.is_set():
                    leave()

    def verdict(self, rank: int, last: str) -> str:
        """The words for the silence of `rank`; last: what it wrote."""
        state, _, host = last.partition(" ")
        how = "has ended" if state == ENDED else "gave no sign of life"
        return f"rank {rank} on {host} {how} for {self.limit:g} s"

    def tell(self, words: str) -> None:
        """Say that the run ends because of another process, unless this one ends by itself."""
        if self.ended.is_set():
            return
        self.told.set()
        error = RunFailed(
            f"rank {self.rank}: another process of the run died ({words}); its own log says why. "
            "Start the run again: it resumes from its last checkpoint"
        )
        last_words = threading.Thread(target=say, args=(error,), daemon=True)
        last_words.start()
        last_words.join(FAREWELL)

    def explain(self) -> None:
        """Called when a connection to another rank is broken: does not return if it is known which rank is lost, or
        will be in two beats, for then a thread says so and exits."""
        if self.told.wait(2 * self.every):
            threading.Event().wait()

    def stop(self, well: bool) -> None:
        """Tell the others that this process ends by itself; unless it ends `well`, as all do, they end after `limit`.

        Does nothing in a fork of the process.
        """
        if os.getpid() != self.process:
            return
        self.last_beat = DONE if well else ENDED
        self.ended.set()
        for thread in self.threads:
            thread.join(3 * self.every)


def say(error: RunFailed) -> None:
    """Print the error as the command line does, log it, and let go of what this process holds."""
    print(f"safeclip: {error}", file=sys.stderr, flush=True)
    logs.close_file(error)
    for function in list(before_exit):
        function()
    for child in multiprocessing.active_children():  # reading processes, which ignore signals to the job
        child.kill()


def leave() -> NoReturn:
    """End the process although its main thread hangs."""
    os._exit(EXIT_CODE)
