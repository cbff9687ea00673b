"""Runs tasks as processes, several at a time, and logs progress. Signals are passed on; interrupted tasks resume in the
next call."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from pipeline.evaluation.comparison.plan import Task
from pipeline.training.signals import EXIT_CODE

logger = logging.getLogger(__name__)

POLL = 0.2  # seconds


class Pool:
    """jobs: processes at a time. gpus: numbers of the GPUs that share them. progress: called now and then with the
    running tasks; returns a line."""

    def __init__(
        self, jobs: int, progress: Callable[["Pool"], str], gpus: Iterable[str] = (), lock: Iterable[int] = ()
    ):
        self.jobs, self.progress, self.gpus, self.lock = jobs, progress, list(gpus), tuple(lock)
        self.running: dict[Task, tuple[subprocess.Popen, float, str | None]] = {}  # process, when it began, its GPU
        self.failed: dict[Task, str] = {}
        self.done: set[Task] = set()
        self.stopped = False
        self.said = 0.0

    def run(self, tasks: list[Task]) -> None:
        """Run what is not done, each task after what it needs. Then `failed` has {task: why}, and `stopped` tells
        whether a signal ended it."""
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        waiting = list(tasks)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(bar_format="{desc}", dynamic_ncols=True, disable=not (tasks and terminal))
        try:
            while (waiting and not self.stopped) or self.running:
                waiting = [task for task in waiting if not self.settle(task)]
                self.collect()
                self.say()
                time.sleep(POLL)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if tasks:
                self.say(last=True)
            self.bar.close()

    def settle(self, task: Task) -> bool:
        """Whether the task needs no more waiting: it is done, is started now, or can never be."""
        if task.done:
            self.done.add(task)
            return True
        lost = next((need for need in task.needs if need in self.failed), None)
        if lost:
            self.failed[task] = f"needs {lost.name}"
            return True
        ready = all(need in self.done or need.done for need in task.needs)
        if not ready or len(self.running) >= self.jobs or self.stopped:
            return False
        self.start(task)
        return True

    def start(self, task: Task) -> None:
        if task.prepare:
            task.prepare()
        task.log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        used = [gpu for _, _, gpu in self.running.values()]
        gpu = min(self.gpus, key=used.count) if self.gpus else None
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        with open(task.log, "ab") as log:
            # A session of its own: ^C reaches this process alone, which asks it to save and stop. The lock goes with
            # it, should it outlive this one.
            process = subprocess.Popen(
                [str(word) for word in task.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                pass_fds=self.lock,
            )
        self.running[task] = process, time.monotonic(), gpu

    def collect(self) -> None:
        """Take in what has ended."""
        for task, (process, began, _) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[task]
            if code == 0:
                self.finish(task, time.monotonic() - began)
            elif not (self.stopped or code == EXIT_CODE):
                self.failed[task] = f"exit code {code}, {task.log}: {last_line(task.log)}"
                logger.error(f"FAILED {task.name}: {self.failed[task]}")
            elif not self.stopped:
                self.stop()  # another than this process asked it to stop

    def finish(self, task: Task, seconds: float) -> None:
        try:
            task.mark(seconds)
            if task.finish:
                task.finish(seconds)
            self.done.add(task)
        except (OSError, KeyError, ValueError) as error:
            self.failed[task] = f"what it left cannot be used ({error!r}), {task.log}"

    def stop(self, *received: object) -> None:
        """Terminate all running processes, which save and stop. received: arguments of a signal handler, not used."""
        self.stopped = True
        for process, *_ in self.running.values():
            process.terminate()

    def say(self, last: bool = False) -> None:
        """The progress line: kept up to date on a terminal, now and then in a log."""
        if last or time.monotonic() - self.said > (600 if self.bar.disable else 2):
            self.said = time.monotonic()
            line = self.progress(self)
            self.bar.set_description_str(line)
            if self.bar.disable:
                logger.info(line)


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing was said"
