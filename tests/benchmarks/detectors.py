"""What each detector of the audit finds of known poison, alone and combined, and what it costs.

python -m tests.benchmarks.detectors RUN... --out DIR       RUN: runs of launch/reproduce.sh on poisoned data, such as
runs/comparison/photos/b_seed1/none_7bfcaf7ae678

Scores every run's data with its own model (`safeclip score --model RUN`), audits them (with the run's rounds, if it has
masks; what is there is used again) and writes DIR/detectors.md: AUROC for each attack (clean pairs above poison),
precision of the 0.1 % and 1 % of the pairs with the lowest scores (all attacks together), seconds per 100,000 pairs.
Recorded in tests/benchmarks/detectors.md.
"""

import argparse
import json
from pathlib import Path
from textwrap import fill

from pipeline.audit.audit import audit
from pipeline.audit.detectors import REGISTRY
from pipeline.audit.score import score
from shards.storage.files import write_bytes


def name_of(run):
    """ "photos, group b, seed 1, none" of .../photos/b_seed1/none_7bfcaf7ae678."""
    data, cell, defence = Path(run).parts[-3:]
    group, seed = cell.split("_seed")
    return f"{data}, group {group}, seed {seed}, {defence.rpartition('_')[0]}"


def section(run, out):
    """Markdown of one run."""
    folder = out / "_".join(Path(run).parts[-3:])
    if not (folder / "audit/audit.json").exists():
        print(score(folder / "scores", model=run, workers=0), flush=True)
        masks = any(Path(run).glob("masks/epoch_*/mask.json"))
        source = {"source": run, "scores": folder / "scores"} if masks else {"source": folder / "scores"}
        print(audit(out=folder / "audit", **source), flush=True)
    found = json.loads((folder / "audit/audit.json").read_text())
    kinds = sorted(found["truth"]["poison"])
    poison = ", ".join(f"{found['truth']['poison'][kind]} {kind}" for kind in kinds)
    lines = [
        f"\n## {name_of(run)}\n",
        fill(f"{found['pairs']:,} pairs, poison: {poison}.", 120) + "\n",
        f"| detector | {' | '.join(f'AUROC {kind}' for kind in kinds)} | precision at 0.1 % | at 1 % | s per 100,000 |",
        "|---|" + "---|" * (len(kinds) + 3),
    ]
    for name, one in found["truth"]["detectors"].items():
        if name in REGISTRY and not REGISTRY[name].ranks:
            continue
        aurocs = " | ".join(f"{one['attacks'][kind]['auroc']:.3f}" for kind in kinds)
        precision = " | ".join(f"{value:.0%}" for value in one["precision"].values())
        seconds = found["detectors"].get(name, {}).get("seconds")
        cost = "" if seconds is None else f"{seconds * 1e5 / found['pairs']:.1f}"
        lines.append(f"| {name} | {aurocs} | {precision} | {cost} |")
    return "\n".join(lines) + "\n"


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="+", metavar="RUN")
    options.add_argument("--out", required=True, metavar="DIR")
    args = options.parse_args()
    out = Path(args.out)
    text = (
        "# Detectors of the audit, against known poison\n\n"
        "Made by `python -m tests.benchmarks.detectors RUN... --out DIR`.\n"
    )
    for run in args.runs:
        text += section(run, out)
        write_bytes(out / "detectors.md", text.encode())


if __name__ == "__main__":
    main()
