"""Commands on a saved mask: show, diff, replay from its scores. They need neither torch nor the run."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.audit.export import write_csv
from pipeline.safety.mixture import DegenerateFit, Mixture, posterior_threshold
from pipeline.safety.selection import count_at_least, identity, select_top
from shards.errors import UserError
from shards.order.safe_mask import SafeMask, SavedMask


def describe(folder: Path | str) -> dict:
    """What the mask in `folder` is; threshold is null where nothing is safe, bad_pairs where the scores were not kept.
    Raises UserError."""
    saved = SavedMask(folder)
    meta, counts_S, safe_S = saved.meta, saved.mask.counts_S, saved.mask.counts("safe")
    fraction_S = safe_S / np.maximum(counts_S, 1)
    used = np.flatnonzero(counts_S)
    least, most = used[fraction_S[used].argmin()], used[fraction_S[used].argmax()]
    bad: Counter[str] = Counter()
    for number in range(len(counts_S)) if saved.has_scores else ():
        table = saved.table(number, ("score", "reason"))
        unread = table.filter(np.isnan(table["score"].to_numpy()))
        bad.update(reason or "the model gave no number" for reason in unread["reason"].to_pylist())
    return {
        "epoch": meta["epoch"],
        "step": meta["step"],
        "config": meta["config"],
        "fingerprint": meta["fingerprint"],
        "pairs": int(counts_S.sum()),
        "shards": len(counts_S),
        "safe": int(safe_S.sum()),
        "fraction": meta["fraction"],
        "first_fraction": meta["first_fraction"],
        "score": meta.get("score", "cosine"),
        "threshold": meta["threshold"] if math.isfinite(meta["threshold"]) else None,
        "rank_by": meta.get("rank_by", "score"),
        "mixture": meta["mixture"],
        "least_safe_shard": {"name": saved.shards[least]["name"], "fraction": float(fraction_S[least])},
        "most_safe_shard": {"name": saved.shards[most]["name"], "fraction": float(fraction_S[most])},
        "negative_controls": meta["diagnosis"].get("negative_controls"),
        "bad_pairs": dict(bad.most_common()) if saved.has_scores else None,
        "note": meta["note"],
    }


def show(folder: Path | str, as_json: bool = False) -> str:
    """`describe` for people, or as JSON."""
    d = describe(folder)
    if as_json:
        return json.dumps(d, indent=1)
    least, most = d["least_safe_shard"], d["most_safe_shard"]
    made = f"before epoch {d['epoch']}, by the model of step {d['step']}, config {d['config'] or '-'}"
    lines = [
        ("made", f"without a run, by {d['step']}" if d["epoch"] is None else made),
        ("pairs", f"{d['pairs']:,} in {d['shards']} shards, fingerprint {d['fingerprint']}"),
        ("safe", f"{d['safe']:,} = {d['fraction']:.2%} (first round {d['first_fraction']:.2%})"),
        ("threshold", "none" if d["threshold"] is None else f"{d['score']} {bound(d)} {d['threshold']:.6f}"),
        ("mixture", "none"),
        ("by shard", f"{least['fraction']:.1%} ({least['name']}) to {most['fraction']:.1%} ({most['name']}) safe"),
        ("no score", "not known, the scores were not kept (run.keep)"),
    ]
    if d["bad_pairs"] is not None:
        text = ", ".join(f"{count:,} x {reason}" for reason, count in d["bad_pairs"].items())
        lines[-1] = ("no score", text or "none")
    if d["mixture"]:
        parts = zip(*(d["mixture"][name] for name in ("weight", "mean", "std")))
        lines[4] = ("mixture", " + ".join(f"{weight:.3f} x N({mean:.4f}, {std:.4f})" for weight, mean, std in parts))
    if d["negative_controls"]:
        text = "{passed} of {count} mismatched pairs would pass ({low:.1%} to {high:.1%} at 95 %)".format(
            **d["negative_controls"]
        )
        lines.append(("controls", text))
    if d["note"]:
        lines.append(("note", d["note"]))
    return "\n".join([str(folder)] + [f"  {name:11s} {text}" for name, text in lines])


MOVED = pa.schema(
    [
        ("moved", pa.string()),
        ("shard", pa.string()),
        ("position", pa.int64()),
        ("key", pa.string()),
        ("cosine_a", pa.float32()),
        ("cosine_b", pa.float32()),
    ]
)


def diff(folder_a: Path | str, folder_b: Path | str, out: Path | str | None = None) -> str:
    """How the safe set of B differs from that of A, as lines; with `out` the pairs that moved, as CSV.

    moved: "in" (safe in B only) or "out" (safe in A only). Raises UserError naming the first shard that is not the
    same.
    """
    a, b = SavedMask(folder_a), SavedMask(folder_b)
    require_same_shards(a, b)
    both, only_a, only_b = 0, 0, 0
    for number in range(len(a.shards)):
        a_N, b_N = a.mask.shard_flags(number), b.mask.shard_flags(number)
        both, only_a, only_b = both + (a_N & b_N).sum(), only_a + (a_N & ~b_N).sum(), only_b + (b_N & ~a_N).sum()
    if out:
        write_csv(out, moved(a, b), MOVED)
    union = both + only_a + only_b
    lines = [
        f"{s.folder}: {s.mask.counts('safe').sum():,} of {s.mask.counts_S.sum():,} safe, {about(s)}" for s in (a, b)
    ]
    lines += [
        f"safe in both {both:,}, in A only {only_a:,} (moved out), in B only {only_b:,} (moved in), "
        f"in neither {a.mask.counts_S.sum() - union:,}",
        f"Jaccard {both / union if union else 1.0:.4f}",
    ]
    return "\n".join(lines)


def about(saved: SavedMask) -> str:
    threshold = saved.meta["threshold"]
    return f"epoch {saved.meta['epoch']}, step {saved.meta['step']}, " + (
        f"score {bound(saved.meta)} {threshold:.6f}" if math.isfinite(threshold) else "no threshold"
    )


def bound(meta: dict) -> str:
    """Meaning of the threshold: a lower bound, or the lowest safe score if pairs are ranked by posterior."""
    return "by posterior, the lowest is" if meta.get("rank_by") == "posterior" else ">="


def require_same_shards(a: SavedMask, b: SavedMask) -> None:
    for number, (one, other) in enumerate(zip(a.shards, b.shards)):
        if one["fingerprint"] != other["fingerprint"]:
            raise UserError(
                f"masks {a.folder} and {b.folder}: of different shards; "
                f"number {number} is {one['name']} with fingerprint {one['fingerprint']} in the first, "
                f"{other['name']} with {other['fingerprint']} in the second; compare masks of the same shards"
            )
    if len(a.shards) != len(b.shards):
        longer = max(a, b, key=lambda saved: len(saved.shards))
        number = min(len(a.shards), len(b.shards))
        raise UserError(
            f"masks {a.folder} and {b.folder}: of different shards; number {number}, {longer.shards[number]['name']}, "
            f"is in {longer.folder} only; compare masks of the same shards"
        )


def moved(a: SavedMask, b: SavedMask) -> Iterator[pa.Table]:
    """Yield a Table of MOVED for each shard."""
    for number, shard in enumerate(a.shards):
        a_N, b_N = a.mask.shard_flags(number), b.mask.shard_flags(number)
        position = np.flatnonzero(a_N != b_N)
        one = a.table(number, ("key", "cosine")).take(position)
        columns = [
            pa.array(np.where(b_N[position], "in", "out"), pa.string()),
            pa.array([shard["name"]] * len(position), pa.string()),
            position,
            one["key"],
            pa.array(one["cosine"].to_numpy(), from_pandas=True),
            pa.array(b.table(number, ("cosine",))["cosine"].to_numpy()[position], from_pandas=True),
        ]
        yield pa.table(columns, MOVED)


def scores(saved: SavedMask) -> np.ndarray:
    """float32 (N,): the saved scores in (shard, position) order."""
    parts = [saved.table(number, ("score",))["score"].to_numpy() for number in range(len(saved.shards))]
    return np.concatenate(parts).astype(np.float32)


def replay(folder: Path | str) -> tuple[bool, str]:
    """(same, text): whether the saved scores and the fraction in mask.json give the saved mask, bit for bit, and its
    threshold."""
    saved = SavedMask(folder)
    score_N = scores(saved)
    rank = identity
    if saved.meta.get("rank_by") == "posterior":
        rank = Mixture.from_dict(saved.meta["mixture"]).rank
    safe_N = select_top(score_N, round(saved.meta["fraction"] * len(score_N)), rank)
    rebuilt = SafeMask.from_flags(saved.mask.counts_S, safe_N)
    differ = np.flatnonzero(safe_N != saved.mask.flags())
    threshold = lowest(score_N, safe_N)
    text = f"{folder}: {safe_N.sum():,} of {len(score_N):,} pairs safe, rebuilt from the scores: "
    if len(differ):
        shard = int(np.searchsorted(np.cumsum(saved.mask.counts_S), differ[0], "right"))
        position = int(differ[0] - saved.mask.counts_S[:shard].sum())
        return False, text + (
            f"NOT the saved mask, {len(differ):,} pairs differ, "
            f"the first at {saved.shards[shard]['name']} position {position}"
        )
    if threshold != saved.meta["threshold"] or not np.array_equal(rebuilt.bits, saved.mask.bits):
        return (
            False,
            text + f"NOT the saved mask, the threshold is {threshold!r}, saved was {saved.meta['threshold']!r}",
        )
    return True, text + "bit for bit the saved mask"


def what_if(folder: Path | str, out: Path | str, posterior: float | None = None, fraction: float | None = None) -> str:
    """Another mask from the same scores, into the new folder `out`: the pairs above the threshold where the mixture's
    higher component reaches `posterior`, or the top `fraction` of the pairs. Returns a line. Raises UserError."""
    saved, out = SavedMask(folder), Path(out)
    if (out / "mask.json").exists():
        raise UserError(f"--out {out}: holds a mask already; name a new folder")
    score_N = scores(saved)
    if fraction is not None:
        if not 0 <= fraction <= 1:
            raise UserError(f"--fraction: got {fraction}, expected 0 to 1")
        count, rule = round(fraction * len(score_N)), f"fraction {fraction:g}"
    else:
        if not 0 < posterior < 1:
            raise UserError(f"--posterior: got {posterior}, expected a number between 0 and 1")
        if not saved.meta["mixture"]:
            raise UserError(f"--posterior: mask {folder} has no mixture ({saved.meta['note']}); use --fraction")
        try:
            threshold = posterior_threshold(Mixture.from_dict(saved.meta["mixture"]), posterior)
        except DegenerateFit as error:
            raise UserError(f"--posterior {posterior}: gives no threshold, {error}; use --fraction") from None
        count, rule = count_at_least(score_N, threshold), f"posterior > {posterior:g}"
    safe_N = select_top(score_N, count)
    mask = SafeMask.from_flags(saved.mask.counts_S, safe_N)
    # The scores and nothing else: beside them may lie embeddings of all pairs, a hundred times as large.
    shutil.copytree(saved.folder / "scores", out / "scores", dirs_exist_ok=True)
    # Without a config hash no run takes this mask for its own.
    changed = {
        "fraction": mask.fraction,
        "threshold": lowest(score_N, safe_N),
        "config": None,
        "rank_by": "score",
        "diagnosis": {},
        "note": f"{rule}, not the run's own round",
    }
    mask.save(out, {**saved.meta, **changed}, saved.shards.batch)
    return (
        f"{out}: {safe_N.sum():,} of {len(score_N):,} pairs safe ({mask.fraction:.2%}) by {rule}; "
        f"the saved mask has {saved.mask.fraction:.2%}"
    )


def lowest(score_N: np.ndarray, safe_N: np.ndarray) -> float:
    """The lowest score of the safe set; infinity where it is empty."""
    return float(score_N[safe_N].min()) if safe_N.any() else float("inf")
