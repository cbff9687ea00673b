"""Soak: a SafeCLIP run that is killed again and again must end with the very weights of one that was left alone.

python -m tests.soak [--kills 40] [--ranks 2] [--seed 0] [--out runs/soak]

Kills are kill -9, of one rank or of all, at random moments and at chosen ones: between a scoring's last score and its
mask, and while a checkpoint is being written. Prints how many fell into which stage, writes OUT/soak.json, and exits
with 1 on any difference.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pipeline.training import checkpoint
from tests.helpers.runs import TIMED

PAIRS, BATCH = 2_400, 48
STEPS = PAIRS // BATCH  # of an epoch
CONFIG = f"""
preset: default
data: {{index: shapes/index, workers: 1, streams: 4, window: 256}}
model:
  config:
    embed_dim: 32
    vision_cfg: {{image_size: 32, timm_model_name: test_resnet, timm_pool: avg, timm_proj: linear}}
    text_cfg: {{context_length: 20, vocab_size: 49408, width: 32, heads: 2, layers: 1}}
run: {{save_steps: 10, timeout: 30}}
train: {{epochs: 6, unimodal_epochs: 1, low_rate_epochs: 1, batch_size: {BATCH}, warmup_steps: 10, support_queue: 256}}
selection: {{batch_size: 64, first_fraction: 0.5, growth: 0.1, risky: unimodal}}
"""


def start(run, ranks, folder):
    """The processes of one start, each its own rank, as srun would start them: [Popen]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(ranks):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        log = open(folder / "log.txt", "ab")
        words = [sys.executable, "-m", "pipeline.cli", "train", "config.yaml", f"run.dir={run}"]
        processes.append(subprocess.Popen(words, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True))
    return processes


def end(processes, seconds=60):
    """Exit codes; what has not ended after `seconds` is a hang, and an error."""
    limit = time.monotonic() + seconds
    while any(p.poll() is None for p in processes):
        if time.monotonic() > limit:
            kill(processes)
            raise SystemExit(f"soak: a rank still ran {seconds} s after another had died")
        time.sleep(0.05)
    return [p.returncode for p in processes]


def kill(processes):
    """kill -9 of ranks and their reading processes."""
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def stage(run, log_from):
    """In what the run is, as its files and its log tell."""
    said = (run.parent / "log.txt").read_bytes()[log_from:]
    if b"pairs in" not in said:
        return "starting"
    unfinished = [f for f in checkpoint.checkpoints(run) if not (f / checkpoint.MARKER).exists()]
    if unfinished:
        return "saving at an epoch's edge" if int(unfinished[-1].name[-8:]) % STEPS == 0 else "saving in mid-epoch"
    masks = sorted(run.glob("masks/epoch_*"))
    if masks and not (masks[-1] / "mask.json").exists():
        return "scores done, mask not" if scored(masks[-1]) else "scoring"
    rows = [json.loads(row) for row in whole_lines(run / "metrics.jsonl")]
    # The line of a selection round is the last one before the steps that are trained with it.
    return f"in a {rows[-1]['stage'].replace('selection', 'safeclip')} epoch" if rows else "in the first steps"


def scored(mask):
    return len(list(mask.glob("scores/0*.parquet"))) == 3


def whole_lines(path):
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def moment(rng, kind, run, limit):
    """Wait for the moment to kill: a random one up to `limit` seconds, or when the files show a certain state."""
    until = time.monotonic() + rng.uniform(0, limit)
    deadline = time.monotonic() + 2 * limit
    if kind == "random":
        while time.monotonic() < until:
            yield
        return
    done = {f.name for f in checkpoint.checkpoints(run)}
    while time.monotonic() < deadline:
        if kind == "mask" and any(scored(m) and not (m / "mask.json").exists() for m in run.glob("masks/epoch_*")):
            return
        fresh = [f for f in checkpoint.checkpoints(run) if f.name not in done]
        if kind == "save" and fresh and not (fresh[-1] / checkpoint.MARKER).exists():
            if rng.random() < 0.3:
                return
        yield


def weights(run):
    """Digest of the final weights, and of metrics.jsonl but for its timings."""
    folder, warnings = checkpoint.newest_complete(run)
    assert folder and not warnings, warnings
    rows = [json.loads(row) for row in whole_lines(run / "metrics.jsonl")]
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return digest, hashlib.sha256(json.dumps(rows).encode()).hexdigest(), len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    rng, folder = random.Random(args.seed), args.out.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    from shards.build.shapes import shapes

    shapes(folder / "shapes", pairs=PAIRS, test=36)
    (folder / "config.yaml").write_text(CONFIG)
    began = time.monotonic()
    assert end(start("whole", args.ranks, folder), 600) == [0] * args.ranks, "the run that is left alone failed"
    length = time.monotonic() - began
    print(f"left alone: {length:.0f} s", flush=True)
    run, kills, seen, starts = folder / "killed", 0, collections.Counter(), 0
    while True:
        log_from = (folder / "log.txt").stat().st_size
        processes, starts = start("killed", args.ranks, folder), starts + 1
        if kills < args.kills:
            kind = rng.choice(("random", "random", "mask", "save"))
            for _ in moment(rng, kind, run, length * 0.4):
                if any(p.poll() is not None for p in processes):
                    break
                time.sleep(0.0005)
            if all(p.poll() is None for p in processes):
                where = stage(run, log_from)
                victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
                kill(victims)
                kills += 1
                seen[where] += 1
                print(f"kill {kills}: {'all ranks' if victims is processes else 'one rank'}, {where}", flush=True)
                end(processes)
                continue
        codes = end(processes, 600)
        if codes != [0] * args.ranks:
            raise SystemExit(f"soak: exit codes {codes}; see {folder}/log.txt")
        if kills >= args.kills:
            break
        print("the run ended; started anew", flush=True)
        check(folder)
        shutil.rmtree(run)
    check(folder)
    figures = {
        "kills": kills,
        "starts": starts,
        "ranks": args.ranks,
        "stages": dict(seen),
        "seconds": round(time.monotonic() - began),
    }
    (folder / "soak.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
    print(f"{kills} kills, every one resumed, final weights and metrics identical")


def check(folder):
    """Raise SystemExit if the killed run ended otherwise than the one left alone."""
    whole, killed = weights(folder / "whole"), weights(folder / "killed")
    if whole != killed:
        raise SystemExit(f"soak: the killed run differs: {killed} instead of {whole}")


if __name__ == "__main__":
    main()
