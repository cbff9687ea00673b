"""Filtered copies of shards, for those who want a copy: the kept samples with all their members, byte for byte."""

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from pipeline.audit.files import find_shards, members, output
from shards.errors import UserError
from shards.masks import SavedMask
from shards.storage import write_json

RECORD = 10_240  # bytes; tar archives are padded to a multiple of it
MARK = "applied.json"


def apply_mask(folder, patterns, out, keep="safe", workers=None):
    """Write OUT/NAME for each shard in `patterns`, with its safe (or "risky") samples only; returns what was done as a line.

    Shards that are in OUT already are kept, so that the same command goes on after a death; OUT/applied.json says of which
    mask they are. OUT/sizes.json holds the samples of each shard, as open_clip reads them. Raises UserError naming the
    shard that is not the mask's, before anything of it is copied.
    """
    saved, out = SavedMask(folder), Path(out)
    paths = find_shards(saved, patterns)
    claim(out, saved, keep)
    jobs = []
    for number, path in paths.items():
        target = out / saved.shards[number]["name"]
        if not target.exists():
            flags_N = saved.mask.shard_flags(number)
            jobs.append((path, saved.shards[number]["fingerprint"], flags_N if keep == "safe" else ~flags_N, target))
    if jobs:
        with ProcessPoolExecutor(min(workers or os.cpu_count(), len(jobs))) as pool:
            list(pool.map(filter_shard, *zip(*jobs)))
    kept_S = saved.mask.counts(keep)
    write_sizes(out, {saved.shards[number]["name"]: int(kept_S[number]) for number in paths})
    kept, samples = sum(kept_S[number] for number in paths), sum(saved.mask.counts_S[number] for number in paths)
    there = f", {len(paths) - len(jobs)} of them were there already" if len(paths) > len(jobs) else ""
    return f"{out}: {kept:,} {keep} of {samples:,} samples in {len(paths)} shards{there}"


def claim(out, saved, keep):
    """Note in OUT which mask and side its shards are of. Raises UserError when it is in use for something else."""
    bits = hashlib.blake2b(saved.mask.bits.tobytes(), digest_size=16).hexdigest()
    mark = {"fingerprint": saved.meta["fingerprint"], "epoch": saved.meta["epoch"], "bits": bits, "keep": keep}
    try:
        there = json.loads((out / MARK).read_text())
    except (OSError, ValueError):
        there = mark if not out.exists() or out.is_dir() and not any(out.iterdir()) else None
    if there != mark:
        raise UserError(
            f"--out {out}: expected no such folder, an empty one, or one with the {keep} samples of {saved.folder}; it holds "
            f"{'samples of another mask, or its other side' if there else 'other files'}; name another"
        )
    write_json(out / MARK, mark)


def filter_shard(path, fingerprint, kept_N, target):
    """Write the samples of one shard where `kept_N` (bool by position) to `target`. Raises UserError."""
    found = members(path, fingerprint)
    with open(path, "rb") as source, output(target) as file:
        for member in found:
            if kept_N[member.position]:
                source.seek(member.start)
                left = member.stop - member.start
                while left:
                    left -= file.write(source.read(min(left, 1 << 20)))
        end = file.tell() + 1024  # two blocks of zeros end an archive
        file.write(bytes(1024 + -end % RECORD))


def write_sizes(out, sizes):
    """Add {shard: samples} to the sizes.json of each folder below `out` that has shards in it."""
    for folder in {os.path.dirname(name) for name in sizes}:
        path = out / folder / "sizes.json"
        there = json.loads(path.read_text()) if path.exists() else {}
        here = {os.path.basename(name): size for name, size in sizes.items() if os.path.dirname(name) == folder}
        write_json(path, dict(sorted({**there, **here}.items())))
