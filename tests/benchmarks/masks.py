"""The mask of a billion pairs: made on rank 0, sent to every host bit-packed, one copy a host.

torchrun --nproc-per-node 2 -m tests.benchmarks.masks [--pairs 1e9] [--shard 10000] [--one-host]

Each rank stands for a host of its own unless --one-host is given. Last line: one JSON object; bytes and seconds.
"""

import argparse
import json
import resource
import time

import numpy as np

from pipeline.distributed import comm, hosts
from pipeline.safety.round import broadcast_mask
from pipeline.safety.selection import kth_largest, top_by_shard


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=float, default=1e9)
    parser.add_argument("--shard", type=int, default=10_000, help="pairs a shard")
    parser.add_argument("--one-host", action="store_true")
    args = parser.parse_args()
    comm.init()
    if not args.one_host:
        hosts.host = lambda: f"host {comm.rank()}"
    counts_S = np.full(int(args.pairs) // args.shard, args.shard, np.int64)
    cos_S = np.random.default_rng(0).normal(0.25, 0.08, args.shard).astype(np.float32)

    class Repeated:
        """The same shard's scores over and over: what is measured is the mask, not four bytes a pair of scores."""

        def __getitem__(self, _):
            return cos_S

    key, rest = kth_largest(cos_S, args.shard // 2)
    comm.barrier()
    started = time.monotonic()
    nothing = broadcast_mask(iter(()), counts_S)  # zeros: only the sending
    sent = time.monotonic() - started
    started = time.monotonic()
    mask = broadcast_mask(top_by_shard(Repeated(), counts_S, key, rest * len(counts_S)), counts_S)
    seconds = time.monotonic() - started
    fraction = mask.fraction
    assert all(found == fraction for found in comm.gather_objects(mask.fraction)) and not nothing.bits[:1000].any()
    if comm.is_rank0():
        figures = {
            "pairs": int(counts_S.sum()),
            "shards": len(counts_S),
            "ranks": comm.world(),
            "hosts": 1 if args.one_host else comm.world(),
            "mask_bytes": int(mask.bits.nbytes),
            "send_s": round(sent, 3),
            "make_and_send_s": round(seconds, 3),
            "fraction": round(fraction, 4),
            "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
