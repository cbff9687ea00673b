"""Planning at scale: the order of 5,000,000,000 simulated samples in 500,000 shards, and one mask of them.

python -m tests.benchmarks.planning [--shards 500000] [--samples 5e9] [--batch 32768] [--world 256]

Last line: one JSON object. build_s: counting the mask's safe samples by shard and building the plan over them; slot_us:
a rank's rows of a step, (shard, position) by plan and mask, divided by their number, the median over steps from all
over the epoch; one_slot_us: the plan's answer for a single slot of all samples (any step, any slot), median and 99th
percentile; peak_megabytes: of the process, imports included; above: of them, over the mask's own bits.
"""

import argparse
import json
import resource
import statistics
import time

import numpy as np

from shards.order.plan import EpochPlan
from shards.order.safe_mask import SafeMask, byte_starts


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def microseconds(function, arguments):
    """Of each call."""
    times = []
    for argument in arguments:
        started = time.perf_counter()
        function(*argument)
        times.append((time.perf_counter() - started) * 1e6)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=500_000)
    parser.add_argument("--samples", type=float, default=5e9)
    parser.add_argument("--batch", type=int, default=32_768)
    parser.add_argument("--world", type=int, default=256)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    mean = int(args.samples) // args.shards
    more = rng.integers(0, mean // 2, args.shards // 2)
    counts_S = np.concatenate([mean + more, mean - more])
    started = time.perf_counter()
    whole = EpochPlan(counts_S, seed=0, epoch=0, view="all", batch_size=args.batch, streams=64, window=8192)
    all_s = time.perf_counter() - started
    bits = np.empty(byte_starts(counts_S)[-1], np.uint8)
    for at in range(0, len(bits), 1 << 24):  # about seven in eight are safe
        bits[at : at + (1 << 24)] = rng.integers(0, 256, min(1 << 24, len(bits) - at), np.uint8) | 0x77
    mask = SafeMask(counts_S, bits)
    last = mask.starts[1:] - 1  # what follows a shard's last sample is no sample
    bits[last] &= (0xFF00 >> np.where(counts_S % 8, counts_S % 8, 8)).astype(np.uint8)
    started = time.perf_counter()
    plan = EpochPlan(mask.counts("safe"), seed=0, epoch=0, view="safe", batch_size=args.batch, streams=64, window=8192)
    build_s = time.perf_counter() - started
    rows = args.batch // args.world

    def read(step):
        shard_B, nth_B, _ = plan.batch(step, step % args.world, args.world)
        assert len(mask.locate("safe", shard_B, nth_B)) == rows

    steps = [(step,) for step in rng.integers(0, plan.steps, 300).tolist()]
    slots = zip(rng.integers(0, whole.steps, 10_000).tolist(), rng.integers(0, args.batch, 10_000).tolist())
    one_slot = microseconds(whole.slot, slots)
    figures = {
        "samples": int(counts_S.sum()),
        "shards": args.shards,
        "safe": round(mask.fraction, 3),
        "build_all_s": round(all_s, 3),
        "build_s": round(build_s, 3),
        "rows": rows,
        "slot_us": round(statistics.median(microseconds(read, steps)) / rows, 2),
        "one_slot_us": round(statistics.median(one_slot), 1),
        "one_slot_us_99": round(float(np.percentile(one_slot, 99)), 1),
        "mask_megabytes": round(bits.nbytes / 1e6),
        "peak_megabytes": round(peak()),
        "above_mask_megabytes": round(peak() - bits.nbytes / (1 << 20)),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
