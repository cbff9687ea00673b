"""Baselines that filter the data before training, and the oracle: masks of the pairs that plain CLIP may train on
(data.mask).

cosine                the CLIP-score filter: the pairs with the lowest cosines go (Schuhmann et al., NeurIPS 2021,
                      filtered LAION-400M so)
kdistance, slof, dao  local outliers among picture embeddings go; the CLIP that embeds them is trained on the poisoned
                      data, of which the worst 1 to 10 % are removed (Huang et al., ICLR 2025)
oracle                what the attack manifest names goes: the best that any filter could do
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.attacks import load_trigger
from pipeline.audit.data import AuditData
from pipeline.audit.detectors import REGISTRY, lacking
from pipeline.safety.selection import select_top
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SafeMask
from shards.order.safe_mask import fingerprint as fingerprint_of
from shards.order.shard_names import shard_columns
from shards.samples.overlay import Overlay
from shards.storage.files import write_bytes

FILTERS = ("cosine", "kdistance", "slof", "dao")


def filter_pairs(scores: Path | str, by: str, remove: float, out: Path | str) -> str:
    """Write the mask of all pairs but the worst fraction `remove` into the new folder `out`; returns a line.

    scores: folder of `safeclip score`; by: one of FILTERS. Among equals the first pairs by (shard, position) are kept;
    a pair without a score is never kept. The mask's scores are what it filters by: cosines, or of an outlier the
    fraction of pairs that stand out more. Raises UserError.
    """
    if by not in FILTERS:
        raise UserError(f"--by: got {by!r}, expected one of {', '.join(FILTERS)}")
    if not 0 <= remove < 1:
        raise UserError(f"--remove: got {remove}, expected a fraction of the pairs from 0 to less than 1")
    data = AuditData(scores)
    if by == "cosine":
        score_N = data.cos_N
    else:
        lacks = lacking(REGISTRY[by], data)
        if lacks:
            raise UserError(f"--by {by}: {lacks}")
        score_N = REGISTRY[by]().find(data, remove).score_N
    safe_N = select_top(score_N, round((1 - remove) * data.N))
    tables = (data.saved.table(shard, ("key", "cosine", "reason")) for shard in range(len(data.counts_S)))
    about = {
        "fingerprint": data.saved.meta["fingerprint"],
        "shards": data.saved.shards.batch,
        "step": data.saved.meta["step"],
        "score": "cosine" if by == "cosine" else "rank",
        "note": f"filter: the worst {remove:.1%} by {by} are left out",
    }
    save_filter(Path(out), data.counts_S, safe_N, score_N, tables, about, f"--remove {remove}")
    return f"{out}: {safe_N.sum():,} of {data.N:,} pairs kept, the worst {remove:.1%} by {by} left out"


def keep_unpoisoned(
    overlay: Path | str, index: ShardIndex, out: Path | str, fraction: float = 1.0, seed: int = 0
) -> str:
    """Write the mask of all pairs of a ShardIndex but the poisoned ones and the decoys of an Overlay's folder; returns
    a line.

    fraction: of all pairs, so many random ones of them are kept: a small part that is known to be clean, as CleanCLIP
    is given (Bansal et al., ICCV 2023). Scores are 1, of what is left out 0; there are no cosines. Raises UserError.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction: got {fraction}, expected a fraction of the pairs, more than 0 and at most 1")
    manifest = Overlay.load(overlay, index, load_trigger)
    score_N = np.ones(index.samples, np.float32)
    for row in manifest.rows + manifest.decoys:
        score_N[index.offsets[row["shard"]] + row["position"]] = 0
    if fraction < 1:
        order_N = np.random.default_rng(seed).permutation(index.samples)
        score_N[order_N[score_N[order_N] > 0][round(fraction * index.samples) :]] = 0
    about = {
        "fingerprint": index.fingerprint,
        "shards": shard_columns(index.shards),
        "step": f"manifest {fingerprint_of(Path(overlay) / 'manifest.json')}",
        "score": "rank",
        "note": "oracle: what the attack manifest poisons is left out"
        + (f", and all but {fraction:.1%} of the pairs, by seed {seed}" if fraction < 1 else ""),
    }
    save_filter(Path(out), index.counts, score_N > 0, score_N, unscored(index), about, f"--fraction {fraction}")
    return f"{out}: {int(score_N.sum()):,} of {index.samples:,} pairs kept, none that {overlay} poisons"


def unscored(index: ShardIndex) -> Iterator[pa.Table]:
    """Yield key, cosine and reason of each shard, whose pairs have no cosine."""
    for shard, count in enumerate(index.counts.tolist()):
        keys = index.keys(shard) if count else pa.array([], pa.string())
        columns = {"key": keys, "cosine": np.full(count, np.nan, np.float32)}
        yield pa.table({**columns, "reason": pa.nulls(count, pa.string())})


def save_filter(
    out: Path,
    counts_S: np.ndarray,
    safe_N: np.ndarray,
    score_N: np.ndarray,
    tables: Iterable[pa.Table],
    about: dict,
    asked: str,
) -> None:
    """Write a mask's folder (shards.order.safe_mask.SavedMask): the scores first, mask.json last. `tables`: of each
    shard key, cosine and reason, one at a time in memory; about: entries of mask.json, and the columns of the shards.

    asked: the option that decides how many pairs are kept. Raises UserError where that keeps none, and where `out`
    holds a mask.
    """
    if not safe_N.any():
        raise UserError(f"{asked}: keeps none of the {len(safe_N):,} pairs, on which nothing can be trained; keep more")
    if (out / "mask.json").exists():
        raise UserError(f"--out {out}: holds a mask already; name a new folder")
    made = {"step": json.dumps(about["step"])}
    parts = np.split(score_N.astype(np.float32), np.cumsum(counts_S)[:-1])
    for shard, (table, score_B) in enumerate(zip(tables, parts, strict=True)):
        if len(score_B):
            table = table.append_column("score", pa.array(score_B)).replace_schema_metadata(made)
            file = io.BytesIO()
            pq.write_table(table, file)
            write_bytes(out / "scores" / f"{shard:05d}.parquet", file.getbuffer())
    mask = SafeMask.from_flags(counts_S, safe_N)
    threshold = float(score_N[safe_N].min())
    selected = {
        "fraction": mask.fraction,
        "first_fraction": mask.fraction,
        "threshold": threshold,
        "mixture": None,
        "diagnosis": {},
    }
    named = about.pop("shards")
    mask.save(out, {"epoch": None, "config": None, **selected, **about}, named)
