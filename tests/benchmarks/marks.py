"""Marks: what waits and is held back of honest pairs and of each kind of poison in finished runs, and what finding marks costs.

python -m tests.benchmarks.marks RUN... --out FILE      RUN: runs of `default` on poisoned data, e.g. runs/reproduce/*/seed*/default
python -m tests.benchmarks.marks --pairs 65536          the cost, on random pictures and words

Writes FILE (recorded: tests/benchmarks/marks.json), an object a run: groups that are marks; shares of the pairs that wait (left out of the slow epochs: marked, or copies), are held back (lowered by marks or
suspicion) at the first and the last split, and in the safe set there; the mean rank of the canaries' scores there, 0 to 1, and of each group that is held from it on (marks first) its pictures by kind and
the mean rank of theirs. `--pairs` prints one JSON object: seconds on this machine.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

from pipeline.configfile import load_config
from pipeline.data import open_index, open_samples
from pipeline.evaluation.selection_quality import poison_rows
from pipeline.safety.marks import LOOKS, TERMS_AT_ONCE, marks_of_look, whitened
from pipeline.safety.sample import PIXELS, TEXTURES, Sample, textures
from pipeline.safety.suspicion import APART, FREE, Suspicion
from pipeline.training.splitting import slow_folder
from shards.masks import SafeMask, SavedMask
from shards.storage import write_json


def found_in(run):
    """The object of a run."""
    config = load_config(run / "config.yaml")
    index = open_index(config.data)
    overlay = open_samples(config.data, index).overlay
    rows = {kind: poison_rows(overlay, index, kind) for kind in overlay.kinds}
    rows["honest"] = np.setdiff1d(np.arange(index.samples), poison_rows(overlay, index))
    splits = [SavedMask(path.parent) for path in sorted(run.glob("masks/epoch_*/mask.json"))]
    flags = {"waits": ~SafeMask.load(slow_folder(run, config.selection), index.fingerprint)[0].flags()}
    found = {"set": run.parts[-3], "seed": config.run.seed, "marks": Suspicion.load(run / "masks/sample").marks}
    for name, saved in (("first", splits[0]), ("last", splits[-1])):
        tables = [saved.table(shard, ("score", "lowered")) for shard in range(len(index.counts))]
        score_N, lowered_N = (np.concatenate([table[c].to_numpy() for table in tables]) for c in ("score", "lowered"))
        flags[f"held_{name}"], flags[f"safe_{name}"] = lowered_N > 0, saved.mask.flags()
        found |= {
            f"{what}_{name}": x for what, x in groups(run, saved.folder, score_N + lowered_N, config, rows).items()
        }
    return found | {what: {kind: float(flag[row].mean()) for kind, row in rows.items()} for what, flag in flags.items()}


def groups(run, split, score_N, config, rows):
    """{"canaries": mean rank of their scores, "groups": of each group that the split's suspicion holds, [{"mark", "pictures" by kind, "rank"}]}."""
    score_N = np.where(np.isnan(score_N), -np.inf, score_N)
    strength = config.selection.suspicion * np.std(score_N[np.isfinite(score_N)])
    rank_N, suspicion = rankdata(score_N) / len(score_N), Suspicion.load(split)
    canaries = np.searchsorted(np.sort(score_N), np.load(split / "canaries.npy")).mean() / len(score_N)
    with np.load(run / "masks/sample/looks.npz") as sample:
        row_S, look_SD = sample["row_S"], torch.from_numpy(sample["look_SD"]) / 255
    found = []
    for number, said_S in enumerate(suspicion.said(torch.from_numpy(row_S), look_SD)):
        those = row_S[said_S.numpy() > (APART - FREE) * strength]
        pictures = {kind: int(np.isin(those, row).sum()) for kind, row in rows.items()}
        found.append(
            {"mark": number < suspicion.marks, "pictures": pictures, "rank": round(float(rank_N[those].mean()), 3)}
        )
    return {"canaries": round(float(canaries), 3), "groups": found}


def cost(pairs):
    """Seconds of the parts of marks.find_marks on one rank, and of the textures of the pictures; a piece is TERMS_AT_ONCE of the terms, by pixels and
    by textures. The ranks share pieces and textures."""
    rng = np.random.default_rng(0)
    words_SL = np.minimum(300 + rng.zipf(1.3, (pairs, 77)), 49_000)
    token_SL = np.where(np.arange(77) < rng.integers(6, 20, (pairs, 1)), words_SL, 0)
    shapes_KD = rng.normal(size=(60, PIXELS + TEXTURES)).astype(np.float32)
    look_SD = 128 + 6 * rng.normal(size=(pairs, 60)).astype(np.float32) @ shapes_KD
    look_SD = np.clip(look_SD + 8 * rng.normal(size=look_SD.shape), 0, 255).astype(np.uint8)
    begun = time.perf_counter()
    sample = Sample(np.arange(pairs), look_SD[:, :PIXELS], token_SL, look_SD[:, PIXELS:])
    has_ST, made = sample.has_ST, time.perf_counter()
    white_SD = whitened(sample)

    def of(terms):
        sample.has_ST, begun = has_ST[:, :terms], time.perf_counter()
        for look, bounds in zip((sample, sample.textures), LOOKS):
            marks_of_look(sample, look, white_SD, bounds)
        return time.perf_counter() - begun

    setup = time.perf_counter() - made + of(0)
    piece, pieces = of(TERMS_AT_ONCE) - of(0), -(-has_ST.shape[1] // TERMS_AT_ONCE)
    images, asked = torch.zeros(1000, 3, 224, 224, dtype=torch.uint8), time.perf_counter()
    for image in images.split(1):
        textures(image)
    asked = (time.perf_counter() - asked) / 1000 * pairs
    parts = {"textures": asked, "sample": made - begun, "setup": setup, "piece": piece}
    parts["all"] = asked + made - begun + setup + pieces * piece
    return {"pairs": pairs, "terms": has_ST.shape[1], "pieces": pieces} | {k: round(v, 1) for k, v in parts.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--pairs", type=int)
    args = parser.parse_args()
    if bool(args.runs) != bool(args.out) or bool(args.runs) == bool(args.pairs):
        parser.error("give runs and --out, or --pairs")
    if args.pairs:
        return print(json.dumps(cost(args.pairs)))
    found = [found_in(run) for run in args.runs]
    write_json(args.out, found)
    for name in sorted({run["set"] for run in found}):
        of_set = [run for run in found if run["set"] == name]
        for what in ("waits", "held_first", "held_last", "safe_first", "safe_last"):
            shares = {kind: [run[what][kind] for run in of_set] for kind in of_set[0][what]}
            print(
                name, what, *(f"{kind} {np.mean(x):.1%} ({min(x):.1%} to {max(x):.1%})" for kind, x in shares.items())
            )


if __name__ == "__main__":
    main()
