"""One training loop that tests/benchmarks/step.py measures, a process a rank: python -m tests.benchmarks.step_sides
NAME JOB

Trains until it is ended. Rank 0 waits between stretches of steps for what tests/benchmarks/step.py asks of it.
"""

import json
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch


class Gate:
    """Called after each step of rank 0. A request (skipped, timed, profile): so many steps, then so many whose seconds
    are the answer; profile: a file for the table of torch.profiler over the timed ones, or None."""

    def __init__(self, pipe):
        self.connection, self.left, self.timed, self.profile, self.profiler = Connection(pipe), 1, 0, None, None

    def __call__(self):
        self.left -= 1
        if self.left == self.timed and self.timed:
            if self.profile:
                self.profiler = torch.profiler.profile()
                self.profiler.start()
            self.started = self.now()
        elif self.left <= 0:
            try:
                self.answer()
            except (EOFError, BrokenPipeError):  # tests/benchmarks/step.py has ended
                os._exit(0)

    def answer(self):
        self.connection.send(self.now() - self.started if self.timed else 0.0)
        if self.profiler:
            self.profiler.stop()
            averages = self.profiler.key_averages()
            key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            Path(self.profile).write_text(averages.table(sort_by=key, row_limit=40, max_name_column_width=60))
            self.profiler = None
        skipped, self.timed, self.profile = self.connection.recv()
        self.left = skipped + self.timed

    @staticmethod
    def now():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def ours(job, gate):
    """`safeclip train` with the config that is written for it."""
    from pipeline.config.load import load_config
    from pipeline.training import run

    step = run.train_step

    def timed(*args):
        found = step(*args)
        gate()
        return found

    run.train_step = timed
    run.train(load_config(job["config"]))


def open_clip(job, gate):
    """open_clip_train.main with the arguments that are written for it."""
    import open_clip
    import webdataset
    from open_clip_train import data, main
    from torch.optim.optimizer import register_optimizer_step_post_hook

    # open_clip 3.3's own reader stops with a KeyError at the end of a shard under webdataset 1.0.
    data.tarfile_to_samples_nothrow = webdataset.tarfile_to_samples()
    if not torch.cuda.is_available():  # on the CPU it gives DDP a device, which DDP refuses
        wrapped = torch.nn.parallel.DistributedDataParallel
        torch.nn.parallel.DistributedDataParallel = lambda model, device_ids, **kwargs: wrapped(model, **kwargs)
    open_clip.add_model_config(Path(job["models"]))
    register_optimizer_step_post_hook(lambda *_: gate())
    main.main(job["arguments"])


def main():
    name, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(job["threads"])
    gate = Gate(job["pipe"]) if os.environ["RANK"] == "0" else lambda: None
    {"ours": ours, "open_clip": open_clip}[name](job, gate)


if __name__ == "__main__":
    main()
