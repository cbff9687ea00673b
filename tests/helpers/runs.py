"""Runs of very small models on rendered shapes: their configs, how they are cut off, and what they leave."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from pipeline.cli.main import main
from pipeline.config.schema import Config
from pipeline.distributed import comm
from pipeline.training import checkpoint, selection_round, signals
from pipeline.training import run as running
from pipeline.training.signals import Preempted
from tests.helpers.models import MODEL

STEPS = 40  # 4 epochs of 10: unimodal, low_rate, two with a selection round before them


def config(folder, name, **changes):
    """Config of preset=default but for a warm-up and a growing safe set; `changes`: section__key=value."""
    made = Config(preset="default")
    made.run.dir, made.data.index = str(folder / name), str(folder / "shapes" / "index")
    made.data.workers, made.data.streams, made.data.window = 0, 4, 64
    made.model.config = json.loads(json.dumps(MODEL))
    train = made.train
    train.epochs, train.unimodal_epochs, train.low_rate_epochs = 4, 1, 1
    train.batch_size, train.warmup_steps, train.support_queue = 24, 5, 64
    made.selection.first_fraction, made.selection.growth, made.selection.batch_size = 0.4, 0.1, 32
    made.guards = {"duplicates": {"max_pairs": 2}, "trigger_clusters": {"least": 3}}
    made.train.clip_views, made.selection.rank_by, made.selection.scored_view = 1, "score", "plain"
    for key, value in changes.items():
        section, field = key.split("__")
        setattr(getattr(made, section), field, value)
    return made


def cut_off(made, step, on=None, times=1, which=signal.SIGUSR1):
    """Train until rank `on` (default: the last) is asked to stop while it works on `step` of this start; ranks ask each
    other every 4 steps of the run."""
    original, seen = running.train_step, []

    def train_step(*args):
        seen.append(args)
        if len(seen) == step:
            ask(on, which, times)
        return original(*args)

    running.train_step = train_step
    try:
        until_preempted(made, every=4)
    finally:
        running.train_step = original


def cut_off_in_pass(made, what, on=None, which=signal.SIGUSR1):
    """Train until rank `on` is asked to stop after the first round of a phase: "sample", "scoring" or "guards"."""
    original = selection_round.each_round

    def each_round(run, epoch, stop, meter, name):
        told = original(run, epoch, stop, meter, name)

        def asked(done, rounds):
            if name == what and done == 1:
                ask(on, which)
            told(done, rounds)

        return asked

    selection_round.each_round = each_round
    try:
        until_preempted(made, every=2)
    finally:
        selection_round.each_round = original


def ask(on, which, times=1):
    """Send a signal to rank `on`, if it is this one."""
    if comm.rank() == (comm.world() - 1 if on is None else on):
        for _ in range(times):
            os.kill(os.getpid(), which)


def until_preempted(made, every):
    """Train, and be cut off; ranks ask each other after `every` steps or batches."""
    agreed, signals.AGREE_EVERY, signals.SLOW = (signals.AGREE_EVERY, signals.SLOW), every, float("inf")
    try:
        running.train(made)
    except Preempted:
        return
    finally:
        signals.AGREE_EVERY, signals.SLOW = agreed
    raise AssertionError("it was not cut off")


def weights(made, steps=STEPS):
    """Bytes of the weights at the end of a run of so many steps."""
    folder, warnings = checkpoint.newest_complete(made.run.dir)
    assert not warnings and folder.name == f"step_{steps:08d}"
    return (folder / "model.safetensors").read_bytes()


# What depends on the clock and the machine in a line of metrics.jsonl.
TIMED = ("seconds", "samples_per_s", "samples_per_s_per_gpu", "data_wait", "memory_gb", "mfu")


def metrics(made):
    """Lines of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in open(f"{made.run.dir}/metrics.jsonl")]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def command(folder, *words):
    """`safeclip words` in this process, in `folder`. With run_ranks it takes a third of the time of torchrun, for tests
    of what a command leaves."""
    os.chdir(folder)
    main([str(word) for word in words])


def safeclip(*words, processes=1, cwd=None, check=True):
    """Run the command line; returns the finished process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = [sys.executable, *(torchrun if processes > 1 else []), "-m", "pipeline.cli"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*program, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=env, timeout=300)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done
