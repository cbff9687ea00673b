"""Pre-emption: SIGTERM and SIGUSR1 ask the run to save and stop, they do not kill it."""

import signal

EXIT_CODE = 75  # EX_TEMPFAIL: "try again later"; launch/slurm.sbatch requeues on it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGREE_EVERY = 10  # steps after which the ranks ask each other whether to save or stop


class Preempted(Exception):
    """The run was asked to stop, and has saved its state."""


class StopSignal:
    """While it is entered, notes the signals that ask this process to stop. A second one changes nothing: the save goes
    on."""

    def __init__(self):
        self.received = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, _number, _frame):
        self.received = True


def ignore_in_worker(_worker):
    """For reading processes: their rank decides when they end, though a signal to the job reaches them too."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
