"""Preemption: SIGTERM and SIGUSR1 make the run save its state and exit, and commands end with what they have done."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType

from pipeline import logs

EXIT_CODE = 75  # EX_TEMPFAIL: "try again later"; launch/slurm.sbatch requeues on it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGREE_EVERY = 10  # steps or batches between the collectives in which ranks agree to save or exit
SLOW = 0.5  # seconds of a step or batch; where they take longer, ranks agree after each


class Preempted(Exception):
    """The run was asked to exit and has saved its state."""


class StopSignal:
    """Context manager that records SIGNALS in `received` instead of ending the process."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, _number: int, _frame: FrameType | None) -> None:
        self.received = True


class Agreement:
    """After which steps or batches ranks agree: the first, then AGREE_EVERY, or each where they are SLOW."""

    def __init__(self) -> None:
        self.each, self.rounds, self.since = True, 0, time.monotonic()

    def due(self, number: int) -> bool:
        """Called after each one. number: of it, the same on all ranks."""
        self.rounds += 1
        return self.each or number % AGREE_EVERY == 0

    def milliseconds(self) -> int:
        """Of a step or batch on this rank, since ranks agreed last."""
        return int(1000 * (time.monotonic() - self.since) / self.rounds)

    def agreed(self, milliseconds: int) -> None:
        """Called when ranks have agreed. milliseconds: of the slowest rank."""
        self.each, self.rounds, self.since = milliseconds > 1000 * SLOW, 0, time.monotonic()


class Stopped(BaseException):
    """Raised in the main thread by a signal. No Exception: nothing on the way may take it for an error of its own."""


class ExitOnSignal:
    """Context manager of a command whose work is in whole files: SIGNALS and SIGINT end the process, with EXIT_CODE and
    a line that says what is kept.

    The signal raises Stopped in the main thread, which lets processes finish what they read for it, or is in a long
    call of a library. A thread ends the process after GRACE seconds, whatever the main thread does.
    """

    GRACE = 5.0

    def __init__(self, kept: str):
        """kept: of the line, what is on disk, and how to go on."""
        self.kept, self.told = kept, threading.Lock()

    def __enter__(self) -> "ExitOnSignal":
        numbers = (*SIGNALS, signal.SIGINT)
        self.before = {number: signal.signal(number, self.stop) for number in numbers}
        self.receiver, self.sender = socket.socketpair()
        self.sender.setblocking(False)
        signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.end_anyway, args=(set(numbers),), daemon=True).start()
        return self

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        for number in self.before:
            signal.signal(number, signal.SIG_IGN)  # once is enough
        raise Stopped

    def end_anyway(self, numbers: set[int]) -> None:
        """Thread: told of a signal at once, also while the main thread is in a long call."""
        while got := self.receiver.recv(1):
            if got[0] in numbers:
                threading.Event().wait(self.GRACE)
                self.tell()
                for child in multiprocessing.active_children():  # they ignore signals to the job
                    child.kill()
                os._exit(EXIT_CODE)

    def tell(self) -> None:
        """Print the line, once, on rank 0."""
        if self.told.acquire(blocking=False) and logs.rank() == 0:
            print(f"safeclip: asked to stop; {self.kept}", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is Stopped:
            self.tell()
            sys.exit(EXIT_CODE)  # within GRACE: the thread still waits
        signal.set_wakeup_fd(-1)
        self.sender.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore(_worker: int = 0) -> None:
    """Ignore signals to the job from now on: in a reading process, whose rank handles them, and in one that ends."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
