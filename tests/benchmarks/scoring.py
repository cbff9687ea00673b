"""Scoring beside a bare forward pass over the same batches, and beside scoring as it was published, in one run.

python -m tests.benchmarks.scoring [--pairs 4000] [--rounds 3] [--config configs/quickstart.yaml] [--dir runs/scoring]
torchrun --nproc-per-node 2 -m tests.benchmarks.scoring

bare: the batches are read and go through both towers, nothing else. ours: pipeline.safety.scoring, written to disk
shard by shard. published: augmented pairs; the embeddings of both towers are gathered in every batch
and every rank takes the cosines of all. Last line: one JSON object, pairs/s (medians over the rounds) and ratios.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.config.load import load_config
from pipeline.distributed import comm
from pipeline.safety.score_files import ScoreFiles
from pipeline.safety.scoring import ShardBatches, assign_shards, score_all_pairs
from pipeline.training.curriculum import Step
from pipeline.training.start import Run
from shards.build.shapes import shapes
from shards.order.plan import EpochPlan
from shards.views.loader import PlainBatches, TrainBatches
from shards.views.readers import batches

SIZE = 250  # pairs a rank forwards at a time; divides the 1,000 of a shard


def bare(run):
    mine = assign_shards(run.index.counts, comm.world())[comm.rank()]
    todo = ShardBatches(run.index.offsets, mine, run.config.selection.batch_size)
    for batch in batches(PlainBatches(run.samples, todo, run.views), workers=run.config.data.workers):
        here = batch.to(run.device)
        run.engine(here.images, here.tokens)


def ours(run):
    config = run.config
    folder = comm.broadcast_object(run.run_dir / "scores" / str(time.monotonic_ns()))
    files = ScoreFiles(folder, run.index, 0)
    score_all_pairs(
        run.engine, run.samples, run.views, config.selection.batch_size, run.device, config.data.workers, files
    )


def published(run):
    """The order of the data is a shuffled one, as in training."""
    size = run.config.selection.batch_size * comm.world()
    plan = EpochPlan(run.index.counts, seed=0, epoch=0, view="all", batch_size=size, streams=2)
    steps = [Step("clip", "all", plan, number) for number in range(plan.steps)]
    reading = TrainBatches(run.samples, steps, run.views, seed=0, epoch=0, rank=comm.rank(), world=comm.world())
    scores, rows = [], [size // comm.world()] * comm.world()
    for batch in batches(reading, workers=run.config.data.workers):
        here = batch.to(run.device)
        image_BD, text_BD, _ = run.engine(here.images, here.tokens)
        image_GD, text_GD = comm.all_gather_rows(image_BD, rows), comm.all_gather_rows(text_BD, rows)
        number_G = comm.all_gather_rows(here.rows.to(run.device), rows)
        scores += zip(number_G.tolist(), (image_GD * text_GD).sum(1).tolist())
    return np.array([score for _, score in sorted(scores)], np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--dir", type=Path, default=Path("runs/scoring"))
    args = parser.parse_args()
    comm.init()
    comm.on_rank0(shutil.rmtree, args.dir, True)
    comm.on_rank0(lambda: shapes(args.dir / "data", pairs=args.pairs, test=36))
    words = [f"run.dir={args.dir}/run", f"data.index={args.dir}/data/index", "evaluation.test=null", "data.workers=0"]
    published_strength = "{crop_min: 0.08, flip: 0.5, jitter: 0.8, grey: 0.2, blur: 0.5}"
    words += [f"selection.batch_size={SIZE}", f"data.clip_augment={published_strength}"]
    run = Run(load_config(args.config, words))
    run.saver.wait()
    run.engine.eval()
    seconds = {way: [] for way in (bare, ours, published)}
    with torch.no_grad():
        for turn in range(args.rounds + 1):
            for way, times in seconds.items():
                comm.barrier()
                started = time.monotonic()
                way(run)
                comm.barrier()
                if turn:  # the first round warms up
                    times.append(time.monotonic() - started)
    if comm.is_rank0():
        speed = {way.__name__: round(args.pairs / statistics.median(times), 1) for way, times in seconds.items()}
        figures = {
            "ranks": comm.world(),
            "pairs": args.pairs,
            "pairs_per_s": speed,
            "ours_over_bare": round(speed["ours"] / speed["bare"], 3),
            "ours_over_published": round(speed["ours"] / speed["published"], 2),
        }
        shutil.rmtree(args.dir)
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
