"""What an epoch takes at full size: pairs as CC3M's (textures of 256 to 512 pixels, JPEG), a config's model and batch,
on the GPU if there is one.

python -m tests.benchmarks.epoch [--config configs/cc3m_rn50.yaml] [--pairs 16384] [--workers 12] [--dir runs/epoch]
[--overrides ...]

Trains preset=default for six epochs: unimodal, two slow ones (which are plain CLIP's, at another rate), and three of
SafeCLIP, each with its selection round; of each kind the last is taken. Last line: one JSON object. The pictures are no
concepts, so the scores mean nothing; guards are off, for each picture stands in many pairs.
"""

import argparse
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from shards.build.write import write_shards
from shards.index.build_index import build_index
from tests.benchmarks.cost import epochs
from tests.benchmarks.loader_data import pairs, texture


def picture(number):
    """JPEG bytes."""
    rng, file = np.random.default_rng(number), io.BytesIO()
    width, height = (int(side) for side in rng.integers(256, 513, 2))
    texture(rng, width, height).save(file, "JPEG", quality=90)
    return file.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cc3m_rn50.yaml")
    parser.add_argument("--pairs", type=int, default=16_384)
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 4))
    parser.add_argument("--dir", type=Path, default=Path("runs/epoch"))
    parser.add_argument("--overrides", nargs="*", default=[])
    args = parser.parse_args()
    if not (args.dir / "index" / "index.json").exists():
        with ProcessPoolExecutor() as pool:
            pictures = list(pool.map(picture, range(400), chunksize=8))
        paths = write_shards(pairs("jpg", pictures, args.pairs), args.dir / "tars", 1000)
        build_index([str(path) for path in paths], args.dir / "index")
    words = ["preset=default", f"run.dir={args.dir}/run", "run.restart=true", f"data.index={args.dir}/index"]
    words += [f"data.workers={args.workers}", "wandb.mode=disabled", "evaluation.test=null"]
    words += ["guards.duplicates=null", "guards.trigger_clusters=null"]
    words += ["train.epochs=6", "train.unimodal_epochs=1", "train.low_rate_epochs=2", *args.overrides]
    subprocess.run([sys.executable, "-m", "pipeline.cli", "train", args.config, *words], check=True)
    steps, rounds, _ = epochs(args.dir / "run")
    figures = {
        "pairs": args.pairs,
        "unimodal_s": round(steps[0], 1),
        "clip_s": round(steps[2], 1),
        "safeclip_s": round(steps[5], 1),
        "selection_s": round(rounds[5], 1),
        "ratio": round((steps[5] + rounds[5]) / steps[2], 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
