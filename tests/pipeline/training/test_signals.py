"""A signal ends a command at once, with a line that says what is kept, whatever its main thread does."""

import signal
import subprocess
import sys
import time

import pytest

from pipeline.training import signals

PROGRAM = """
import hashlib, os, signal, sys, time
from pipeline.training.signals import ExitOnSignal
ExitOnSignal.GRACE = 0.5
try:
    with ExitOnSignal("all is kept"):
        print("ready", flush=True)
        {work}
finally:
    print("unwound", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize(
    "work, unwinds",
    [
        ("time.sleep(60)", True),
        ("hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)", False),  # a call that no signal interrupts
    ],
)
def test_a_signal_ends_the_process_and_says_what_is_kept(number, work, unwinds):
    words = [sys.executable, "-c", PROGRAM.format(work=work)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)  # until the call has begun
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 75 and err == "safeclip: asked to stop; all is kept\n"
    assert out == ("unwound\n" if unwinds else "")


def test_without_a_signal_nothing_is_left_changed():
    work = "pass\n    print(signal.getsignal(signal.SIGTERM).name, signal.set_wakeup_fd(-1)); sys.exit(3)"
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(work=work)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "ready\nSIG_DFL -1\nunwound\n", "")


def test_ranks_agree_after_each_slow_step_and_else_after_some(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])

    def agreed_after(seconds):
        """Steps after which ranks agree, where a step takes so many seconds."""
        agreement, found = signals.Agreement(), []
        for step in range(1, 31):
            now[0] += seconds
            if agreement.due(step):
                found.append(step)
                agreement.agreed(agreement.milliseconds())
        return found

    assert agreed_after(0.1) == [1, 10, 20, 30] and agreed_after(0.6) == list(range(1, 31))
