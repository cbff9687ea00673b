"""The loader beside open_clip's training loader and megatron-energon: the same shards, transforms and workers, in one
run.

python -m tests.benchmarks.loader [--energon VENV/bin/python] [--rounds 5] [--workers 1] [--only raw ...] [--dir
runs/loader]

--energon names the Python of a virtual environment in which `pip install megatron-energon==7.4.1 open_clip_torch` was
run. Rounds are interleaved; figures are medians. Last line: one JSON object. Samples/s and ratios at 32 px (rendered
PNG) and 224 px (textures as JPEG, 256 to 512 pixels a side), each with crops alone (open_clip's default) and with
colour jitter; raw: bytes only (pread: the system's reads alone; crc: their comparison with the index, part of ours,
and its share of a sample's time); start: seconds to the first batch at 90 % of an epoch of 100,000 over those at 0 %;
view: bytes read by an epoch over 15 % of the samples over those of a whole one, all reads of the process counted;
views: processor time of a pair that is read in two views over that of one view, with crops alone, and with colours
changed by the reader or later on the device; growth: of a reader's memory from its 2nd epoch of 1,280 samples to its
12th.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np

from pipeline.training.curriculum import Step
from pipeline.training.tokens import Tokenizer
from shards.index.shard_index import ShardIndex
from shards.order.plan import EpochPlan
from shards.order.safe_mask import SafeMask
from shards.samples.samples import Samples
from shards.views.batch import View, Views
from shards.views.loader import TrainBatches
from shards.views.readers import batches
from tests.benchmarks.loader_data import data_sets
from tests.benchmarks.loader_sides import STREAMS, WINDOW, our_augment

BATCH = {32: 256, 224: 64}
PARTS = ("speed", "raw", "start", "view", "views", "growth")


class Side:
    """A loader in a process of its own, so that each has its own packages."""

    def __init__(self, python, name, log):
        program = [python, "-m", "tests.benchmarks.loader_sides", name]
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(log, "a"), text=True
        )
        self.name, self.log = name, log

    def speed(self, **job):
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} died; {self.log} says why")
        return json.loads(answer)


def compare(sides, folder, size, colour, workers, rounds):
    """{name: samples/s}, medians over the rounds, and the ratios of ours."""
    job = {"folder": str(folder), "size": size, "colour": colour, "workers": workers, "batch": BATCH[size]}
    pairs = ShardIndex.load(folder / "index").samples
    found = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side.speed(**job, pairs=pairs))
    speed = {name: round(statistics.median(values), 1) for name, values in found.items()}
    ratios = {f"over_{name}": round(speed["ours"] / value, 2) for name, value in speed.items() if name != "ours"}
    return {"samples_per_s": speed, **ratios}


def make_steps(index, batch, mask=None):
    view = "safe" if mask else "all"
    counts = mask.counts(view) if mask else index.counts
    plan = EpochPlan(counts, seed=0, epoch=0, view=view, batch_size=batch, streams=STREAMS, window=WINDOW)
    return [Step("clip", view, plan, number, mask=mask) for number in range(plan.steps)]


def raw(folder, rounds):
    """Microseconds a sample in this process, bytes only: webdataset's sequential iterator, and ours in the epoch's
    order.

    pread: our reads of picture and caption alone, no order and no look-ups; below this is only who leaves the bytes
    where they are.
    """
    import webdataset

    index = ShardIndex.load(folder / "index")
    reader, urls = Samples(index).reader, [shard.path for shard in index.shards]
    places = [place for step in make_steps(index, 256) for place in zip(*step.plan.batch(step.number)[:2])]
    ranges = []
    for shard, position in places:
        table, file = index.table(shard), reader.descriptor(shard)
        ranges.append((file, int(table.image.size[position]), int(table.image.offset[position])))
        ranges.append((file, int(table.texts[0].size[position]), int(table.texts[0].offset[position])))
    found = {"webdataset": [], "ours": [], "pread": [], "crc": []}
    for turn in range(rounds + 1):  # the first warms up
        started = time.perf_counter()
        count = sum(len(sample["txt"]) > 0 for sample in webdataset.WebDataset(urls, shardshuffle=False))
        found["webdataset"].append((time.perf_counter() - started) / count)
        started, count = time.perf_counter(), 0
        for step in make_steps(index, 256):
            shard_B, nth_B, _ = step.plan.batch(step.number)
            for shard, position in zip(shard_B.tolist(), nth_B.tolist()):
                count += len(reader.image_bytes(shard, position)) > 0 and len(reader.texts(shard, position)[0]) > 0
        found["ours"].append((time.perf_counter() - started) / count)
        started = time.perf_counter()
        for where in ranges:
            os.pread(*where)
        found["pread"].append((time.perf_counter() - started) / len(places))
        seconds = 0.0
        for where in ranges:
            data, started = os.pread(*where), time.perf_counter()
            zlib.crc32(data)
            seconds += time.perf_counter() - started
        found["crc"].append(seconds / len(places))
    us = {name: round(statistics.median(values[1:]) * 1e6, 2) for name, values in found.items()}
    ratios = {f"{name}_over_webdataset": round(us["webdataset"] / us[name], 1) for name in ("ours", "pread")}
    return {"us_a_sample": us, "mean_bytes": sum(size for _, size, _ in ranges) // len(places), **ratios}


def start(index, views, rounds):
    """Seconds to the first batch at the start of an epoch and at 90 % of it."""
    steps, samples = make_steps(index, 256), Samples(index)
    seconds = {0.0: [], 0.9: []}
    for _ in range(rounds):
        for fraction, times in seconds.items():
            started = time.perf_counter()
            next(batches(TrainBatches(samples, steps, views, seed=0, epoch=0), int(fraction * len(steps)), 1))
            times.append(time.perf_counter() - started)
    at_0, at_90 = (statistics.median(times) for times in seconds.values())
    return {"seconds": [round(at_0, 3), round(at_90, 3)], "ratio": round(at_90 / at_0, 2)}


def process_bytes():
    """Bytes that this process has read so far, from files or their cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def view(index, views):
    """Bytes read by an epoch over a random 15 % of the samples over those of a whole epoch."""
    flags = np.random.default_rng(0).random(index.samples) < 0.15
    found = []
    for mask in (None, SafeMask.from_flags(index.counts, flags)):
        before = process_bytes()
        for _ in batches(TrainBatches(Samples(index), make_steps(index, 256, mask), views, seed=0, epoch=0)):
            pass
        found.append(process_bytes() - before)
    return {"bytes": found, "ratio": round(found[1] / found[0], 3)}


def two_views(folder, size, rounds):
    """{augmentation: {"us_a_pair": [in one view, in two], "ratio"}} in this process, in turns; ratio: median of the
    rounds."""
    index, found = ShardIndex.load(folder / "index"), {}
    steps, samples = make_steps(index, BATCH[size])[:8], Samples(index)
    for name, colour, on_device in (("crops", False, False), ("colours", True, False), ("on_device", True, True)):
        view, seconds = View(our_augment(colour)), {1: [], 2: []}
        for _ in range(rounds + 1):  # the first warms up
            for count, times in seconds.items():
                views = Views(size, Tokenizer(), {"clip": (view,) * count}, on_device)
                started = time.process_time()
                for _ in batches(TrainBatches(samples, steps, views, seed=0, epoch=0)):
                    pass
                times.append((time.process_time() - started) / (len(steps) * BATCH[size]))
        one, two = (times[1:] for times in seconds.values())
        us = [round(1e6 * statistics.median(times), 1) for times in (one, two)]
        found[name] = {"us_a_pair": us, "ratio": round(statistics.median(b / a for a, b in zip(one, two)), 2)}
    return found


def growth(index, views):
    """Resident memory of a reader after its 2nd epoch and after its 12th."""
    steps, samples, resident = make_steps(index, 64)[:20], Samples(index), []
    for epoch in range(12):
        for _ in batches(TrainBatches(samples, steps, views, seed=0, epoch=epoch)):
            pass
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    return {
        "megabytes": [round(resident[1] / 1e6), round(resident[11] / 1e6)],
        "ratio": round(resident[11] / resident[1], 4),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--energon", help="Python of the virtual environment that has megatron-energon")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dir", type=Path, default=Path("runs/loader"))
    args = parser.parse_args()
    folders = data_sets(args.dir, args.energon)
    figures = {"workers": args.workers, "rounds": args.rounds}
    if "speed" in args.only:
        log = args.dir / "log.txt"
        sides = {"ours": Side(sys.executable, "ours", log), "open_clip": Side(sys.executable, "open_clip", log)}
        if args.energon:
            sides["energon"] = Side(args.energon, "energon", log)
        for size in (32, 224):
            for colour in (False, True):
                name = f"{size}_px" + ("_colour" if colour else "")
                figures[name] = compare(sides, folders[size], size, colour, args.workers, args.rounds)
                print(name, figures[name], flush=True)
    plain = our_augment(False)
    index, views = ShardIndex.load(folders["large"] / "index"), Views(32, Tokenizer(), {"clip": (View(plain),)})
    if "raw" in args.only:
        figures["raw"] = {f"{size}_px": raw(folders[size], args.rounds) for size in (32, 224)}
    if {"raw", "speed"} <= set(args.only):  # the part of a sample's time that its comparison with the index takes
        for size in ("32_px", "224_px"):
            seconds = figures["raw"][size]["us_a_sample"]["crc"] / 1e6
            figures["raw"][size]["crc_share"] = round(seconds * figures[size]["samples_per_s"]["ours"], 4)
    if "start" in args.only:
        figures["start"] = start(index, views, args.rounds)
    if "view" in args.only:
        figures["view"] = view(index, views)
    if "views" in args.only:
        figures["views"] = {f"{size}_px": two_views(folders[size], size, args.rounds) for size in (32, 224)}
    if "growth" in args.only:
        views = Views(224, Tokenizer(), {"clip": (View(plain),)})
        figures["growth"] = growth(ShardIndex.load(folders[224] / "index"), views)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
