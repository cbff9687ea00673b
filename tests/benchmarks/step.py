"""The training step beside open_clip's: `safeclip train` with preset=clip and open_clip_train on the same shards,
model, batch, precision, threads and number of reading processes, in turns within one run.

python -m tests.benchmarks.step [--cases small_32 vit_s_32_224] [--processes 1 2] [--zero 0 1 2 3] [--workers 1]
[--threads 1] [--rounds 5] [--steps 20] [--skip N] [--profile] [--dir runs/step]

Each side trains in processes of its own, and waits while another is measured. Samples/s of all processes together, the
median over the rounds; the first steps of each turn are not timed, for batches were read in the pause. ratio: the
median over the rounds of ours over theirs in the same round. Transforms: crops alone (open_clip's default). zero_N:
ours at that ZeRO stage; open_clip: DistributedDataParallel, local loss with gathered gradients. bf16: ours
DeepSpeed's, theirs amp_bf16. mfu: model FLOPs utilization, on GPUs whose peak is known. --profile: tables of
torch.profiler in --dir. Last line: one JSON object.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

import torch
import yaml

from pipeline.distributed import comm
from pipeline.training.flops import flops_a_view, peak_flops
from shards.build.write import write_shards
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from tests.benchmarks.loader_data import jpegs, pairs
from tests.helpers.ranks import free_port

PHOTOS = yaml.safe_load(Path("configs/photos.yaml").read_text())["model"]
# model, batch of each process, precision, folder of the data (None: textures as JPEG of 256 to 512 pixels a side)
CASES = {
    "small_32": (PHOTOS, 256, "fp32", Path("data/photos")),
    "vit_s_32_224": ({"name": "ViT-S-32-alt"}, 16, "fp32", None),
    "rn50": ({"name": "RN50"}, 256, "bf16", None),
    "vit_b_32": ({"name": "ViT-B-32"}, 1024, "bf16", None),
    "vit_b_16": ({"name": "ViT-B-16"}, 512, "bf16", None),
}
ON_GPU = ("rn50", "vit_b_32", "vit_b_16")
ENDLESS = 1_000_000  # steps of an epoch, at least: no turn meets its end


class Side:
    """A training loop in processes of its own."""

    def __init__(self, name, job, processes, log):
        self.log, job_file = log, log.with_suffix(".json")
        self.connection, theirs = Pipe()
        job_file.write_text(json.dumps({**job, "pipe": theirs.fileno()}))
        program = [sys.executable, "-m", "tests.benchmarks.step_sides", name, str(job_file)]
        env = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        env["OMP_NUM_THREADS"] = str(job["threads"])
        self.ranks = []
        for rank in map(str, range(processes)):
            with open(log, "a") as out:
                own = {**env, "RANK": rank, "LOCAL_RANK": rank}
                started = subprocess.Popen(program, env=own, stdout=out, stderr=out, pass_fds=[theirs.fileno()])
            self.ranks.append(started)
        theirs.close()
        self.answer()

    def answer(self):
        try:
            while not self.connection.poll(1):
                if any(process.poll() is not None for process in self.ranks):
                    raise EOFError
            return self.connection.recv()
        except EOFError:
            raise SystemExit(f"a process died; {self.log} says why, or the memory did not suffice") from None

    def seconds(self, skipped, timed, profile=None):
        """Of `timed` steps behind `skipped` ones."""
        self.connection.send((skipped, timed, profile and str(profile)))
        return self.answer()

    def close(self):
        for process in self.ranks:
            process.terminate()
        for process in self.ranks:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def our_job(case, stage, processes, args):
    model, batch, precision, folder = CASES[case]
    data = folder or args.dir / "224"
    index = ShardIndex.load(data / "index")
    weight = -(-ENDLESS * batch * processes // index.samples)
    run = args.dir / f"{case}_{processes}_zero_{stage}"
    augment = {"crop_min": 0.9, "flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0}
    config = {
        "preset": "clip",
        "run": {"dir": str(run), "restart": True},
        "data": {"sources": {"all": {"index": str(data / "index"), "weight": weight}}, "workers": args.workers},
        "model": model,
        "train": {"batch_size": batch * processes, "precision": precision, "zero_stage": stage, "epochs": 1},
        "evaluation": {"every": 0},
    }
    config["data"]["clip_augment"] = augment
    file = args.dir / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return {"config": str(file), "threads": args.threads}


def their_job(case, processes, args):
    model, batch, precision, folder = CASES[case]
    tars = folder / "train" if folder else args.dir / "224" / "tars"
    last = len(list(tars.glob("*.tar"))) - 1
    models = args.dir / "models"
    models.mkdir(exist_ok=True)
    (models / f"{case}.json").write_text(json.dumps(model.get("config") or {}))
    if "name" in model:
        (models / f"{case}.json").unlink()
    words = {
        "train-data": f"{tars}/{{00000..{last:05d}}}.tar",
        "dataset-type": "webdataset",
        "train-num-samples": ENDLESS * batch * processes,
        "model": model.get("name", case),
        "batch-size": batch,
        "workers": args.workers,
        "precision": {"fp32": "fp32", "bf16": "amp_bf16"}[precision],
        "logs": args.dir / "logs",
        "name": f"{case}_{processes}_{os.getpid()}",
        "epochs": 1,
        "warmup": 10_000,
        "device": comm.device().type,
        "log-every-n-steps": 20,
    }
    arguments = [str(word) for key, value in words.items() for word in (f"--{key}", value)]
    arguments += ["--local-loss", "--gather-with-grad"] * (processes > 1)
    return {"arguments": arguments, "models": str(models), "threads": args.threads}


def measure(case, processes, args):
    """{"samples_per_s": {side: median}, "ratio": {zero_N: median}, "mfu": {side: fraction}}"""
    model, batch, precision, _ = CASES[case]
    sides = {}
    try:
        job = their_job(case, processes, args)
        sides["open_clip"] = Side("open_clip", job, processes, args.dir / f"{case}_{processes}_open_clip.log")
        for stage in args.zero:
            log = args.dir / f"{case}_{processes}_zero_{stage}.log"
            sides[f"zero_{stage}"] = Side("ours", our_job(case, stage, processes, args), processes, log)
        skipped = args.skip if args.skip is not None else 4 * args.workers + 2
        found = {name: [] for name in sides}
        for turn in range(args.rounds):
            for name, side in sides.items():
                found[name].append(batch * processes * args.steps / side.seconds(skipped, args.steps))
        if args.profile:
            for name, side in sides.items():
                side.seconds(skipped, args.steps, args.dir / f"{case}_{processes}_{name}.txt")
    finally:
        for side in sides.values():
            side.close()
    speed = {name: statistics.median(values) for name, values in found.items()}
    figures = {"samples_per_s": {name: round(value, 1) for name, value in speed.items()}}
    figures["ratio"] = {
        name: round(statistics.median(ours / theirs for ours, theirs in zip(values, found["open_clip"])), 3)
        for name, values in found.items()
        if name != "open_clip"
    }
    peak = peak_flops(comm.device(), precision)
    if peak:
        each = flops_a_view(model) / processes / peak
        figures["mfu"] = {name: round(value * each, 3) for name, value in speed.items()}
    return figures


def make_data(folder):
    """512 pairs in 8 shards, once."""
    if not (folder / "index" / "index.json").exists():
        paths = write_shards(pairs("jpg", jpegs(128), 512), folder / "tars", 64)
        build_index([str(path) for path in paths], folder / "index")


def main():
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ON_GPU if gpu else [case for case in CASES if case not in ON_GPU]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=cases)
    parser.add_argument("--processes", nargs="+", type=int, default=[1] if gpu else [1, 2])
    parser.add_argument("--zero", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() - 4))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--skip", type=int, help="steps of a turn that are not timed; default: those read in the pause")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--dir", type=Path, default=Path("runs/step"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the sides end too
    make_data(args.dir / "224")
    figures = {"workers": args.workers, "threads": args.threads, "rounds": args.rounds, "steps": args.steps}
    for case in args.cases:
        for processes in args.processes:
            name = f"{case}_{processes}"
            figures[name] = measure(case, processes, args)
            print(name, figures[name], flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
