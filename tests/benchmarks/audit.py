"""How long an audit of a million scored pairs takes, and how large its report is.

python -m tests.benchmarks.audit [--pairs 1000000] [--width 512]

Synthetic: scores of two Gaussians, embeddings in clusters, captions of which some repeat, cells of which some do, and
shards of 10,000 pictures (one shard under many names, 4 KB a pair are written beside). Then `safeclip audit` in a
process of its own.
"""

import argparse
import io
import json
import os
import resource
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


def make_scores(out, index, width, rng):
    """What `safeclip score` leaves."""
    files, centres = ScoreFiles(out / "scores", index, "synthetic"), rng.normal(size=(200, width)).astype(np.float32)
    score_N = np.where(rng.random(index.samples) < 0.1, rng.normal(0.05, 0.06, index.samples), 0)
    score_N = np.where(score_N == 0, rng.normal(0.25, 0.08, index.samples), score_N).astype(np.float32)
    patch_G = rng.integers(1, 1 << 31, GRID * GRID).astype(np.uint32)
    for shard in range(len(index.counts)):
        for kind in ("img_emb", "text_emb"):
            rows = centres[rng.integers(0, 200, SHARD)] + rng.standard_normal((SHARD, width), np.float32)
            save_array(part_path(out, kind, shard), rows.astype(np.float16))
        cells = rng.integers(0, 1 << 22, (SHARD, GRID * GRID), dtype=np.uint32)
        cells[rng.choice(SHARD, 5, replace=False)[:, None], [200, 201]] = patch_G[[200, 201]]
        save_array(part_path(out, "cells", shard), cells)
        captions = [f"a picture of thing {number}" for number in rng.integers(0, 10 * SHARD, SHARD)]
        hashes = rng.integers(1, 1 << 40, SHARD).astype(np.uint64) * np.uint64(1 << 20)
        write_metadata(out, shard, index.table(shard).keys, captions, hashes)
        here = score_N[index.offsets[shard] : index.offsets[shard + 1]]
        files.write(shard, here, {})
    selected = select_pairs(score_N, index.counts, Selection(least_fraction=0.0, max_fraction=1.0), 0)
    save_round(out, selected, index, {"epoch": None, "step": "synthetic", "config": None})
    about = {"model": "synthetic", "embeddings": ".", "data": {"index": str(out.parent / "index")}}
    write_json(out / "score.json", {"identity": "synthetic", "complete": True, "pairs": index.samples, **about})


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=1_000_000)
    options.add_argument("--width", type=int, default=512)
    args = options.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        index = make_shards(folder, -(-args.pairs // SHARD), rng)
        make_scores(folder / "scores", index, args.width, rng)
        before = 0.0
        for only in ([], ["--detectors", "mismatch", "broken", "repeated_caption"]):
            start = time.monotonic()
            command = [
                sys.executable,
                "-m",
                "pipeline.cli",
                "audit",
                str(folder / "scores"),
                "--out",
                str(folder / "out"),
            ]
            subprocess.run(command + only, check=True)
            seconds, size = time.monotonic() - start, (folder / "out/report.html").stat().st_size
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu, before = used.ru_utime + used.ru_stime - before, used.ru_utime + used.ru_stime
            about = json.loads((folder / "out/audit.json").read_text())["detectors"]
            slow = ", ".join(
                f"{name} {one['seconds']:.0f} s" for name, one in about.items() if one.get("seconds", 0) >= 1
            )
            print(
                f"{index.samples:,} pairs, {' '.join(only[1:]) or 'all detectors'}: {seconds:.0f} s, "
                f"{cpu:.0f} CPU s ({slow}), report {size / 1e6:.1f} MB, {used.ru_maxrss / 1e6:.1f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
