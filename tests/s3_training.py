"""Two processes train from shards in S3 (moto's server on loopback) through a cache too small for them, to the same
weights as from local shards.

python -m tests.s3_training [--dir runs/s3_training]      some minutes on 2 cores; recorded in tests/s3_training.json

On the way one run is killed (kill -9 of everything) and resumes; and when the server is gone a run ends with one line.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import boto3

from shards.build.shapes import render
from shards.build.write import write_shards

ROOT = Path(__file__).parents[1]


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--dir", default="runs/s3_training")
    folder = Path(options.parse_args().dir).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    samples = (render(number, 0) for number in range(4000))
    paths = write_shards(samples, folder / "shards", per_shard=40)
    server, client = start_server(folder)
    try:
        prove(folder, paths, server, client)
    finally:
        server.kill()


def prove(folder, paths, server, client):
    for path in paths:
        client.upload_file(str(path), "shapes", path.name)
    for name, patterns in (("first", "{00000..00074}"), ("last", "{00075..00099}")):
        safeclip("index", f"s3://shapes/{patterns}.tar", "--out", folder / f"{name}_s3")
        safeclip("index", f"{folder}/shards/{patterns}.tar", "--out", folder / f"{name}_local")
    size = sum(path.stat().st_size for path in paths)
    limit = 0.5 * size
    local, _ = train(folder, "local")
    killed = kill_once(folder, limit)
    seconds, peak = train(folder, "s3", limit, watch=folder / "cache")
    assert weights(folder / "local") == weights(folder / "s3"), "the weights differ"
    assert peak <= limit, "the cache was above its limit"
    gone, line = lose(folder, limit, server)
    figures = {
        "same_weights": True,
        "killed_after_step": killed,
        "shards_mb": round(size / 1e6, 1),
        "cache_limit_mb": round(limit / 1e6, 1),
        "cache_peak_mb": round(peak / 1e6, 1),
        "seconds_local": local,
        "seconds_s3_after_the_kill": seconds,
        "lost_server_s": gone,
        "lost_server": line,
    }
    print(json.dumps(figures))


def start_server(folder):
    """(process of moto's server, boto3 client with a bucket `shapes`); the environment then leads there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1",
    }
    client = boto3.client("s3")  # tries again while the server starts
    client.create_bucket(Bucket="shapes")
    return server, client


def command(folder, name, limit=None):
    """The words that start 2 processes on the shards in S3, or on local ones. The last shard's samples are seen twice
    an epoch."""
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
        "data.window=128",
        "data.streams=4",
        "preset=default",
    ]
    words += ["train.epochs=3", "train.batch_size=128", "evaluation.test=null", "run.save_steps=10"]
    if limit:
        words += [f"data.cache={folder}/cache", f"data.cache_gb={limit / 1e9}", "data.remote_timeout=20"]
    return list(map(str, words))


def train(folder, name, limit=None, watch=None):
    """Train to the end; (seconds, the largest number of bytes that were in the folder `watch`)."""
    started, running, peak = time.monotonic(), subprocess.Popen(command(folder, name, limit), cwd=ROOT), 0
    while running.poll() is None:
        peak = max(peak, occupied(watch))
        time.sleep(0.05)
    assert running.returncode == 0
    return round(time.monotonic() - started, 1), peak


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
    running = subprocess.Popen(command(folder, "s3", limit), cwd=ROOT)
    while not list((folder / "s3" / "checkpoints").glob("step_0000002?/COMPLETE")):
        assert running.poll() is None
        time.sleep(0.1)
    ranks = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.kill()
    for rank in ranks:  # each with its reading processes, in a group of their own
        os.killpg(int(rank), signal.SIGKILL)
    running.wait()
    return int(sorted((folder / "s3" / "checkpoints").glob("*/COMPLETE"))[-1].parent.name[5:])


def lose(folder, limit, server):
    """Kill the server in mid-training; (seconds until the run has ended, the line with which it does)."""
    running = subprocess.Popen(command(folder, "lost", limit), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list((folder / "lost" / "checkpoints").glob("step_0000001?/COMPLETE")):
        assert running.poll() is None
        time.sleep(0.1)
    server.kill()
    started = time.monotonic()
    said = running.communicate(timeout=120)[1]
    seconds = round(time.monotonic() - started, 1)
    assert running.returncode, "it ended well"
    line, *_ = [line for line in said.splitlines() if line.startswith("safeclip: ")]
    return seconds, line


def weights(run):
    """Bytes of the weights of a run's last checkpoint."""
    return sorted((run / "checkpoints").glob("*/COMPLETE"))[-1].with_name("model.safetensors").read_bytes()


def safeclip(*words):
    subprocess.run([sys.executable, "-m", "pipeline.cli", *map(str, words)], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
