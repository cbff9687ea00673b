"""The control plane of one run at web scale: what each step takes on one rank, on simulated counts and scores.

python -m tests.benchmarks.scale [--pairs 5e9] [--shards 500000] [--ranks 64] [--hosts 8] [--work DIR] [--steps A B]

Code paths and files are the real ones; shards, their tables and score files are links to one file each. A step runs in
a process of its own. Where a step is measured on a part, its figures are multiplied, and `part` says which. Columns:
seconds; rank_bytes: growth of the peak of a process's own memory; host_bytes: shared by the ranks of a host, such as
the files that are mapped; disk_bytes, files: what is written in all; wire_bytes: what one host receives. Last line: one
JSON object {step: figures}.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pipeline.distributed import comm, hosts
from pipeline.guards import make_guards
from pipeline.safety.mixture import fit_mixture, histogram
from pipeline.safety.round import broadcast_mask
from pipeline.safety.score_files import ScoreFiles, load_scores
from pipeline.safety.selection import RANGES, kth_largest, top_by_shard
from pipeline.training.checkpoint import newest_complete
from shards.index.build_index import build_index
from shards.index.scan import table_name
from shards.index.shard_index import Shard, ShardIndex, write_index
from shards.order.plan import EpochPlan
from shards.order.safe_mask import SafeMask, SavedMask, byte_starts
from shards.order.shard_names import shard_columns
from shards.samples.bad_samples import BadSamplesFiles
from tests.helpers.ranks import run_ranks
from tests.helpers.tars import write_tar

BAD = 0.005  # of the pairs
SOME = 300  # shards of a rank that are written
BATCH, WIDTH = 65_536, 512  # pairs of a step, numbers of an embedding
ONE_BY_ONE = {"grows": False}  # shard after shard: the memory is that of the part that is measured
META = {"epoch": 0, "step": 0, "config": "", "fraction": 0.5, "first_fraction": 0.5, "threshold": 0.2}
META |= {"mixture": None, "note": ""}


@dataclass
class World:
    """A run of `pairs` pairs in `shards` shards on `ranks` ranks of `hosts` hosts; its files are in `work`."""

    pairs: int
    shards: int
    ranks: int
    hosts: int
    work: Path

    @property
    def counts_S(self):
        return np.full(self.shards, self.pairs // self.shards, np.int64)

    @property
    def share(self):
        """Pairs of a rank."""
        return self.pairs // self.ranks

    @cached_property
    def index(self):
        return ShardIndex.load(self.work / "index")

    def scores(self, count):
        """float32: two Gaussians."""
        rng = np.random.default_rng(0)
        score_N = rng.standard_normal(count, np.float32) * np.float32(0.05) + np.float32(0.25)
        score_N[: count // 5] -= np.float32(0.2)
        return score_N

    def mask(self):
        bits = np.full(byte_starts(self.counts_S)[-1], 0xF0, np.uint8)
        return SafeMask(self.counts_S, bits)

    def prepare(self):
        """One shard with its table and its score file, and links to them under all names."""
        count = self.pairs // self.shards
        shutil.rmtree(self.work, ignore_errors=True)
        for name in ("shards", "index/tables", "epoch_000/scores", "checkpoints"):
            (self.work / name).mkdir(parents=True)
        members = [(f"{i:09d}.{e}", b"x") for i in range(count) for e in ("jpg", "txt")]
        one = write_tar(self.work / "one.tar", members)
        index = build_index([str(one)], self.work / "one")
        files = ScoreFiles(self.work / "epoch_000" / "scores", index, 0)
        files.claim()
        files.write(0, self.scores(count), {})
        (self.work / "epoch_000/scores/00000.parquet").rename(self.work / "one.parquet")
        found, shards = os.stat(one), []
        for shard in range(self.shards):
            path = f"{self.work}/shards/{shard:06d}.tar"
            table = table_name(path, found.st_size, found.st_mtime_ns, "txt", "")
            os.symlink("../one.tar", path)
            os.symlink(index.shards[0].table, self.work / "index" / "tables" / table)
            os.symlink("../../one.parquet", self.work / "epoch_000" / "scores" / f"{shard:05d}.parquet")
            shards.append(Shard(path, found.st_size, count, f"{shard:032x}", table))
        write_index(self.work / "index", shards, "txt", "")
        self.mask().save(self.work / "epoch_000", {"fingerprint": "", **META}, shard_columns(self.index.shards))


def on_hosts(work, world, what):
    """On each of two processes, as if on hosts of their own: seconds to make an array the same on both."""
    hosts.host = lambda: str(comm.rank())
    count, kind = {"scores": (world.pairs, np.float32), "mask": (world.pairs // 8, np.uint8)}[what]
    count = min(count, 1 << 28)
    array = hosts.host_array(count, kind)
    array[comm.rank() :: 2] = 1
    started = time.monotonic()
    half = count // 2
    ranges = [(0, half), (half, count)] if what == "scores" else [(0, count), (0, 0)]
    hosts.share_between_hosts(array, ranges)
    return time.monotonic() - started, array.nbytes


def share(world, what, size):
    (seconds, done), _ = run_ranks(on_hosts, 2, world.work, world, what, timeout=600)
    return {"seconds": seconds, "part": done / size, "host_bytes": size, "wire_bytes": size}


def open_index(world):
    return {"then": lambda: world.index, "host_bytes": mapped(world.work / "index")}


def mapped(folder):
    """Bytes of an index or a mask that are mapped, so that a host holds them once."""
    return sum(path.stat().st_size for pattern in ("shards_*.arrow", "safe.npy") for path in folder.glob(pattern))


def verify_shards(world):
    index = world.index
    return {"then": index.verify}


def plan_epoch(world):
    counts_S = world.index.counts
    return {
        "then": lambda: EpochPlan(counts_S, seed=0, epoch=0, view="all", batch_size=32_768, streams=64, window=8192)
    }


def first_batch(world):
    mask, counts = world.mask(), world.mask().counts("safe")
    plan = EpochPlan(counts, seed=0, epoch=0, view="safe", batch_size=32_768, streams=64, window=8192)
    return {"then": lambda: mask.locate("safe", *plan.batch(0, 0, world.ranks)[:2])}


def scored(world, name):
    """(ScoreFiles of the first SOME shards of a rank in the folder `name`, their part of all shards, scores of one)."""
    counts_S = world.counts_S.copy()
    todo = min(world.shards // world.ranks, SOME)
    counts_S[todo:] = 0
    index = SimpleNamespace(counts=counts_S, keys=world.index.keys)
    files = ScoreFiles(world.work / name / "scores", index, 0)
    files.claim()
    return files, todo / world.shards, world.scores(world.pairs // world.shards)


def write(files, cos_B):
    for shard in np.flatnonzero(files.index.counts).tolist():
        files.write(shard, cos_B, {})


def write_scores(world):
    """A rank's shards."""
    files, part, cos_B = scored(world, "written")
    size = os.path.getsize(world.work / "one.parquet") * world.shards
    return {
        "then": lambda: write(files, cos_B),
        "part": part * world.ranks,
        "disk_bytes": size,
        "files": world.shards,
        **ONE_BY_ONE,
    }


def merge_scores(world):
    """A rank's shards, at the end of a round."""
    files, part, cos_B = scored(world, "merged")
    write(files, cos_B)
    return {"then": files.conclude, "part": part * world.ranks, "files": world.ranks, **ONE_BY_ONE}


def find_scored(world):
    files = ScoreFiles(world.work / "epoch_000" / "scores", world.index, 0)
    return {"then": files.claim}


def gather_scores(world):
    return share(world, "scores", 4 * world.pairs)


def count_histogram(world):
    """Of a rank's scores."""
    score_N = world.scores(world.share)
    return {"then": lambda: histogram(score_N, *RANGES["cosine"])}


def mixture(world):
    counts_K = histogram(world.scores(1_000_000), *RANGES["cosine"]) * (world.pairs // 1_000_000)
    return {"then": lambda: fit_mixture(counts_K, *RANGES["cosine"]), "wire_bytes": counts_K.nbytes}


def selection(world):
    """Threshold by a rank's scores, as if all ranks had the same."""
    score_N = world.scores(world.share)
    return {"then": lambda: kth_largest(score_N, world.pairs // 2, lambda counts_K: counts_K * world.ranks)}


def make_mask(world):
    """Rank 0, of all scores."""
    score_n, counts_S = world.scores(world.pairs // world.shards), world.counts_S
    key, ties = kth_largest(score_n, len(score_n) // 2)

    class Repeated:
        def __getitem__(self, _):
            return score_n

    def make():
        broadcast_mask(top_by_shard(Repeated(), counts_S, key, ties * world.shards), counts_S)

    return {"then": make, "host_bytes": world.pairs // 8}


def send_mask(world):
    return share(world, "mask", world.pairs // 8)


def save_mask(world):
    mask, shards, folder = world.mask(), world.index.shards, world.work / "saved"
    return {"then": lambda: mask.save(folder, {"fingerprint": "", **META}, shard_columns(shards)), "wrote": folder}


def open_mask(world):
    folder = world.work / "epoch_000"
    return {"then": lambda: SavedMask(folder), "host_bytes": mapped(folder)}


def record_bad_samples(world):
    """A rank's part."""
    count = int(world.share * BAD)
    bad = [(n % 64 * 64, n, f"{n:09d}", "picture is of no known format") for n in range(count)]
    files = BadSamplesFiles(world.work / "bad_samples", [0])
    return {"then": lambda: files.add(bad), "wrote": world.work / "bad_samples", "times": world.ranks}


def find_duplicates(world):
    """A rank's part: a picture in a thousand comes three times."""
    (guard,) = make_guards({"duplicates": {}})
    rng = np.random.default_rng(0)
    number_M = rng.integers(-(2**63), 2**63, world.share)
    often = world.share // 1000
    number_M[: 2 * often] = np.tile(number_M[-often:], 2)
    valid_M = np.ones(len(number_M), bool)
    return {
        "then": lambda: guard.excluded(number_M, valid_M, lambda done, rounds: None),
        "wire_bytes": 16 * world.pairs // world.hosts,
    }


def loss_of_a_step(world):
    """CLIP's loss of a batch of 65,536 pairs, forward and backward: a rank's rows, in torch's fake process group."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pipeline.training.losses import clip_loss

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.ranks)
    rows = BATCH // world.ranks
    views = [torch.nn.functional.normalize(torch.randn(rows, WIDTH), dim=1).requires_grad_() for _ in range(4)]
    valid, scale = torch.ones(rows, dtype=torch.bool), torch.tensor([10.0], requires_grad=True)
    received = 4 * (BATCH - rows) * WIDTH * 4 * world.ranks // world.hosts  # of two columns and their gradients
    return {"then": lambda: clip_loss(*views, scale, valid).backward(), "wire_bytes": received}


def find_checkpoint(world):
    for step in range(3):
        folder = world.work / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(exist_ok=True)
        for rank in range(world.ranks):
            (folder / f"receipt_{rank:05d}.json").write_text("{}")
    return {"then": lambda: newest_complete(world.work)}


def audit_scores(world):
    """All scores in one process."""
    files, part, cos_B = scored(world, "audited")
    write(files, cos_B)
    files.conclude()
    return {"then": lambda: load_scores(files.folder.parent, files.index.counts), "part": part}


STEPS = [open_index, verify_shards, plan_epoch, first_batch, write_scores, find_scored, gather_scores, count_histogram]
STEPS += [mixture, selection, make_mask, send_mask, merge_scores, save_mask, open_mask, record_bad_samples]
STEPS += [find_duplicates, loss_of_a_step, find_checkpoint, audit_scores]
COLUMNS = ("seconds", "rank_bytes", "host_bytes", "disk_bytes", "files", "wire_bytes")


def own_memory():
    """Bytes of this process that no other shares: neither mapped files nor shared arrays."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@contextlib.contextmanager
def watched(every=0.002):
    """A list, in which the peak of `own_memory` of the block stands at its end."""
    peak, done = [own_memory()], threading.Event()

    def watch():
        while not done.wait(every):
            peak[0] = max(peak[0], own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], own_memory())


def measure(step, world):
    """{column: figure} of one step, in this process."""
    told = step(world)
    found = {**dict.fromkeys(COLUMNS, 0), "part": 1.0} | {
        k: v for k, v in told.items() if k not in ("then", "wrote", "times", "grows")
    }
    if "then" in told:
        before, started = own_memory(), time.monotonic()
        with watched() as peak:
            told["then"]()
            found["seconds"] = time.monotonic() - started
        found["rank_bytes"] = peak[0] - before
    if "wrote" in told:
        written = [path.stat().st_size for path in told["wrote"].rglob("*") if path.is_file()]
        found["disk_bytes"], found["files"] = sum(written) * told.get("times", 1), len(written) * told.get("times", 1)
    if found["part"] < 1:
        found["seconds"] /= found["part"]
        found["rank_bytes"] = int(found["rank_bytes"] / (found["part"] if told.get("grows", True) else 1))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=float, default=5e9)
    parser.add_argument("--shards", type=int, default=500_000)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "scale")
    parser.add_argument("--steps", nargs="*", choices=[step.__name__ for step in STEPS])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    pairs = int(args.pairs) // args.shards // 8 * 8 * args.shards  # whole bytes of a mask
    world = World(pairs, args.shards, args.ranks, args.hosts, args.work.absolute())
    if args.one:
        return print(json.dumps(measure(globals()[args.one], world)))
    world.prepare()
    figures = {}
    print(f"{'step':20s}" + "".join(f"{name:>18s}" for name in (*COLUMNS, "part")), flush=True)
    for step in STEPS:
        if args.steps and step.__name__ not in args.steps:
            continue
        words = [sys.executable, "-m", "tests.benchmarks.scale", "--one", step.__name__, *sys.argv[1:]]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found = figures[step.__name__] = json.loads(done.stdout.splitlines()[-1])
        cells = [f"{found['seconds']:18.2f}", *(f"{found[name]:18,}" for name in COLUMNS[1:]), f"{found['part']:18.3g}"]
        print(f"{step.__name__:20s}" + "".join(cells), flush=True)
    shutil.rmtree(world.work)
    print(json.dumps({step: {name: found[name] for name in COLUMNS} for step, found in figures.items()}))


if __name__ == "__main__":
    main()
