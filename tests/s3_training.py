"""Two processes train from shards in S3 (moto's server on loopback) through a cache too small for them, to the same weights as from local shards.

python -m tests.s3_training [--dir runs/s3_training]      some minutes on 2 cores; recorded in tests/s3_training.json

On the way one run is killed (kill -9 of everything) and goes on; and when the server is gone a run ends with one line.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

from shards.demo import shapes
from shards.index import build_index

ROOT = Path(__file__).parents[1]


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--dir", default="runs/s3_training")
    folder = Path(options.parse_args().dir).absolute()
    for name in ("local", "s3", "cache", "lost", "lost_cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    shapes(folder / "shapes", pairs=4000, test=72)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1",
    }
    client = boto3.client("s3")
    client.create_bucket(Bucket="shapes")
    paths = sorted((folder / "shapes" / "train").glob("*.tar"))
    for path in paths:
        client.upload_file(str(path), "shapes", path.name)
    for name, patterns in (
        ("first", "{00000..00002}"),
        ("last", "00003"),
    ):  # by processes of their own: this one has the server
        safeclip("index", f"s3://shapes/{patterns}.tar", "--out", folder / f"{name}_s3")
        build_index([f"{folder}/shapes/train/{patterns}.tar"], folder / f"{name}_local")
    size = sum(path.stat().st_size for path in paths)
    limit = 0.6 * size
    started = time.monotonic()
    train(folder, "local")
    local = time.monotonic() - started
    killed = kill_once(folder, limit)
    started = time.monotonic()
    most = train(folder, "s3", limit, watch=folder / "cache")
    seconds = time.monotonic() - started
    runs = [weights(folder / name) for name in ("local", "s3")]
    assert runs[0] == runs[1], "the weights differ"
    server.stop()
    started = time.monotonic()
    line = lost(folder, limit)
    figures = {
        "same_weights": True,
        "killed_after_step": killed,
        "shards_mb": round(size / 1e6, 1),
        "cache_limit_mb": round(limit / 1e6, 1),
        "cache_most_mb": round(most / 1e6, 1),
        "seconds_local": round(local, 1),
        "seconds_s3_after_the_kill": round(seconds, 1),
        "lost_server_s": round(time.monotonic() - started, 1),
        "lost_server": line,
    }
    print(json.dumps(figures))


def command(folder, name, limit=None):
    """The words that start 2 processes on the shards in S3, or on local ones. The last shard's samples are seen twice an epoch."""
    kind = "local" if limit is None else "s3"
    sources = f"{{first: {{index: {folder}/first_{kind}}}, last: {{index: {folder}/last_{kind}, weight: 2}}}}"
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "pipeline.cli",
        "train",
        ROOT / "configs" / "quickstart.yaml",
    ]
    words += [
        f"run.dir={folder / name}",
        'data.index=""',
        f"data.sources={sources}",
        "data.workers=1",
        "data.window=256",
        "preset=default",
    ]
    words += ["train.epochs=3", "train.batch_size=128", "evaluation.test=null", "run.save_steps=10"]
    if limit:
        words += [f"data.cache={folder}/cache", f"data.cache_gb={limit / 1e9}", "data.remote_timeout=20"]
    return list(map(str, words))


def train(folder, name, limit=None, watch=None):
    """Train to the end; the most bytes that were in the folder `watch`."""
    running, most = subprocess.Popen(command(folder, name, limit), cwd=ROOT), 0
    while running.poll() is None:
        most = max(most, occupied(watch))
        time.sleep(0.05)
    assert running.returncode == 0
    return most


def occupied(folder):
    total = 0
    for path in folder.glob("*.*") if folder else ():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            pass
    return total


def kill_once(folder, limit):
    """Begin the run and kill all its processes some steps later; the number of its last checkpoint."""
    running = subprocess.Popen(command(folder, "s3", limit), cwd=ROOT, start_new_session=True)
    while not list((folder / "s3" / "checkpoints").glob("step_0000002?/COMPLETE")):
        assert running.poll() is None
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    return int(sorted((folder / "s3" / "checkpoints").glob("*/COMPLETE"))[-1].parent.name[5:])


def lost(folder, limit):
    """The line with which a run ends whose server is gone from the start, but for the check of sizes."""
    shutil.rmtree(folder / "cache")
    words = command(folder, "lost", limit) + ["data.remote_timeout=5"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode, "it ended well"
    (line,) = {line for line in done.stderr.splitlines() if line.startswith("safeclip: ")}
    return line


def weights(run):
    """Bytes of the weights of a run's last checkpoint."""
    return sorted((run / "checkpoints").glob("*/COMPLETE"))[-1].with_name("model.safetensors").read_bytes()


def safeclip(*words):
    subprocess.run([sys.executable, "-m", "pipeline.cli", *map(str, words)], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
