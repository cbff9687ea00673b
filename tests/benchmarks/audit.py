"""How long an audit of a million scored pairs takes, how much memory, and how large its report is.

python -m tests.benchmarks.audit [--pairs 1000000] [--width 512] [--parts N] [--work DIR]

Synthetic: scores of two Gaussians, embeddings in clusters, captions of which some repeat, cells of which some do, and
shards of 10,000 pictures (one shard under many names). Of embeddings and cells there are `--parts` different parts
(all), the others are links to these: each has 4 KB a pair at a width of 512. A width of 0 makes scores and captions
only, of which all but `--parts` are links, too. Then `safeclip audit` in a process of its own, with all detectors and
with three.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.audit.embeddings import part_path
from pipeline.audit.pixels import GRID
from pipeline.audit.score import save_array, write_metadata
from pipeline.config.schema import Selection
from pipeline.safety.round import save_round, select_pairs
from pipeline.safety.score_files import ScoreFiles
from shards.build.write import write_shards
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex, write_index
from shards.storage.files import write_json

SHARD = 10_000


def pictures(rng):
    for number in range(SHARD):
        file = io.BytesIO()
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((128, 128), Image.BICUBIC).save(file, "JPEG")
        yield {"__key__": f"{number:06d}", "jpg": file.getvalue(), "txt": f"picture {number}"}


def make_shards(folder, shards, rng):
    """ShardIndex of `shards` names of one shard."""
    (first,) = write_shards(pictures(rng), folder / "first", SHARD)
    index = build_index([str(first)], folder / "index")
    paths = [folder / "data" / f"{number:05d}.tar" for number in range(shards)]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        os.link(first, path)
    write_index(folder / "index", [replace(index.shards[0], path=str(path)) for path in paths], "txt", "")
    return ShardIndex.load(folder / "index")


def make_scores(out, index, width, rng, parts=0):
    """What `safeclip score` leaves. parts: different ones of embeddings and cells, 0 = all."""
    files, centres = ScoreFiles(out / "scores", index, "synthetic"), rng.normal(size=(200, width)).astype(np.float32)
    score_N, captions = np.empty(index.samples, np.float32), 10 * SHARD
    patch_G = rng.integers(1, 1 << 31, GRID * GRID).astype(np.uint32)
    for shard in range(len(index.counts)):
        for kind in ("img_emb", "text_emb", "cells") if width else ():
            path = part_path(out, kind, shard)
            if parts and shard >= parts:
                os.link(part_path(out, kind, shard % parts), path)
                continue
            rows = cells(patch_G, rng) if kind == "cells" else embedded(centres, rng)
            save_array(path, rows)
        here = score_N[index.offsets[shard] : index.offsets[shard + 1]]
        if parts and shard >= parts and not width:
            os.link(part_path(out, "metadata", shard % parts), part_path(out, "metadata", shard))
            os.link(files.path(shard % parts), files.path(shard))
            here[:] = score_N[index.offsets[shard % parts] : index.offsets[shard % parts + 1]]
            continue
        texts = [f"a picture of thing {number}" for number in rng.integers(0, captions, SHARD)]
        hashes = rng.integers(1, 1 << 40, SHARD).astype(np.uint64) * np.uint64(1 << 20) if width else None
        write_metadata(out, shard, index.table(shard).keys, texts, hashes)
        low, high = rng.normal(0.05, 0.06, SHARD), rng.normal(0.25, 0.08, SHARD)
        here[:] = np.where(rng.random(SHARD) < 0.1, low, high)
        files.write(shard, here, {})
    selected = select_pairs(score_N, index.counts, Selection(least_fraction=0.0, max_fraction=1.0), 0)
    save_round(out, selected, index, {"epoch": None, "step": "synthetic", "config": None})
    about = {"embeddings": "." if width else None, "data": {"index": str(out.parent / "index")}}
    about |= {"identity": "synthetic", "model": "synthetic", "complete": True, "pairs": index.samples}
    write_json(out / "score.json", about)


def embedded(centres, rng):
    rows = centres[rng.integers(0, len(centres), SHARD)]
    return (rows + rng.standard_normal(rows.shape, np.float32)).astype(np.float16)


def cells(patch_G, rng):
    """A patch of two cells in five of the pictures."""
    found = rng.integers(0, 1 << 22, (SHARD, GRID * GRID), dtype=np.uint32)
    found[rng.choice(SHARD, 5, replace=False)[:, None], [200, 201]] = patch_G[[200, 201]]
    return found


def measured(words):
    """(seconds, CPU seconds, bytes at most) of a command."""
    start = time.monotonic()
    process = subprocess.Popen(words)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(words)}: failed")
    return time.monotonic() - start, used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=1_000_000)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--parts", type=int, default=0)
    options.add_argument("--work", type=Path)
    args = options.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        folder = Path(folder)
        index = make_shards(folder, -(-args.pairs // SHARD), rng)
        make_scores(folder / "scores", index, args.width, rng, args.parts)
        command = [sys.executable, "-m", "pipeline.cli", "audit", str(folder / "scores"), "--out", str(folder / "out")]
        for only in ([], ["--detectors", "mismatch", "broken", "repeated_caption"]):
            seconds, cpu, memory = measured(command + only)
            size = (folder / "out/report.html").stat().st_size
            about = json.loads((folder / "out/audit.json").read_text())["detectors"]
            slow = ", ".join(
                f"{name} {one['seconds']:.0f} s" for name, one in about.items() if one.get("seconds", 0) >= 1
            )
            print(
                f"{index.samples:,} pairs, {' '.join(only[1:]) or 'all detectors'}: {seconds:.0f} s, {cpu:.0f} CPU s "
                f"({slow}), report {size / 1e6:.1f} MB, {memory / 1e9:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
