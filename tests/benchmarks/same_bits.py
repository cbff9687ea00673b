"""What small runs of every preset learn, to the bit: for a change of the code that may change nothing.

python -m tests.benchmarks.same_bits before.json              on the code before the change
python -m tests.benchmarks.same_bits after.json --like before.json      after it; exit code 1 where they differ

Runs are of 2,000 rendered scenes (6 epochs, 1 and 2 processes) and, where data/photos is there, of its first 5,000
photographs (4 epochs). Of each it keeps the SHA-256 of every safe set and of the final weights, and of the losses of
all logged steps. The same on one machine with one build of torch.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRESETS = ("paper", "paper_fixed", "default", "clip", "roclip")


def run(words, processes=1):
    program = [sys.executable, "-m"]
    if processes > 1:
        program += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run([*program, "pipeline.cli", *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"safeclip {words}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def learnt(run_dir):
    """{"masks": {round: hash}, "weights": hash, "losses": hash} of a finished run."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    masks = sorted(run_dir.glob("masks/epoch_*/safe.npy"))
    (weights,) = run_dir.glob("checkpoints/*/model.safetensors")
    return {
        "masks": {path.parent.name: sha256(path.read_bytes()) for path in masks},
        "weights": sha256(weights.read_bytes()),
        "losses": sha256(json.dumps(losses).encode()),
    }


def sets(folder):
    """Yield (name, config, words, numbers of processes)."""
    run(["data", "shapes", folder / "shapes", "--pairs", 2000])
    words = [f"data.index={folder}/shapes/index", "data.overlay=null", "train.epochs=6"]
    yield "shapes", "configs/quickstart.yaml", words, (1, 2)
    photos = ROOT / "data/photos/train"
    if photos.is_dir():
        run(["index", *sorted(photos.glob("*.tar"))[:5], "--out", folder / "photos"])
        yield "photos", "configs/photos.yaml", [f"data.index={folder}/photos", "train.epochs=4"], (1,)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", type=Path, help="what another call wrote")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, config, words, counts in sets(folder):
            for preset in PRESETS:
                for processes in counts:
                    key = f"{name} {preset} {processes}"
                    run_dir = folder / key.replace(" ", "_")
                    own = [f"preset={preset}", f"run.dir={run_dir}", "run.keep=1", "evaluation.test=null"]
                    # A batch that the smallest safe set of these few pairs fills.
                    run(["train", config, *own, "data.workers=0", "train.batch_size=64", *words], processes)
                    found[key] = learnt(run_dir)
                    print(key, found[key]["weights"][:12], flush=True)
                    args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.like:
        before = json.loads(args.like.read_text())
        different = [key for key in before.keys() | found.keys() if before.get(key) != found.get(key)]
        for key in sorted(different):
            print(f"{key}: {before.get(key)} before, {found.get(key)} now")
        print(f"{len(found) - len(different)} of {len(found)} runs are the same")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
