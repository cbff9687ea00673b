"""Preemption: SIGTERM and SIGUSR1 make the run save its state and exit."""

import signal
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL: "try again later"; launch/slurm.sbatch requeues on it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGREE_EVERY = 10  # steps between the collectives in which ranks agree to save or exit


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


def ignore_in_worker(_worker: int) -> None:
    """Initialize a reading process: signals to the job are handled by its rank."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
