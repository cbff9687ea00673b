"""The pairs that the report shows, with their thumbnails, cosines over the rounds and nearest pictures."""

import base64
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

from pipeline.audit.blocks import counts_up_to
from pipeline.audit.data import AuditData
from pipeline.audit.detectors import REGISTRY, Finding
from pipeline.audit.detectors.neighbourhood import unit
from shards.errors import BadSample

NEAR = 3  # nearest pictures of a pair in the gallery
THUMB, QUALITY = 96, 60  # pixels of the longer side, WebP quality
PICTURE_BYTES = 12_000_000  # of all thumbnails, as base64; further ones are left out
CAPTION = 500  # characters of a caption


class Items:
    """The pairs that the page shows, each once, with thumbnail, trajectory and the ranks that its detectors give it."""

    def __init__(self, data: AuditData, found: dict[str, Finding]):
        self.data, self.found = data, found
        self.rows: list[int] = []
        self.number: dict[int, int] = {}  # of a row
        self.near: dict[int, list[list[float]]] = {}  # of a row: [[number, cosine]]

    def add(self, row: int, nearest: Iterable[tuple[int, float]] | None = None) -> int:
        """Number of the pair in the list of items."""
        if row not in self.number:
            self.number[row] = len(self.rows)
            self.rows.append(row)
        if nearest is not None:
            self.near[row] = [[self.add(other), cosine] for other, cosine in nearest]
        return self.number[row]

    def finish(self) -> list[dict]:
        """All items that were added."""
        items, spent = self.plain(self.rows), 0
        paths, ranks = trajectories(self.data, self.rows), self.ranks()
        for number, (item, row, path) in enumerate(zip(items, self.rows, paths)):
            item["r"] = {name: rank_M[number] for name, rank_M in ranks.items() if rank_M[number] is not None}
            said = {name: REGISTRY[name].reason(self.found[name].score_N[row]) for name in item["flags"]}
            item["said"] = {name: text for name, text in said.items() if text}
            item["worst"] = min(item["r"], key=item["r"].get, default=None)
            item["path"] = path
            item["near"] = self.near.get(row, [])
            item["thumb"] = thumbnail(self.data, row) if spent < PICTURE_BYTES else None
            spent += len(item["thumb"][0]) if item["thumb"] else 0
        return items

    def ranks(self) -> dict[str, list[float | None]]:
        """{detector: of each pair the fraction of the others that it scores at most as high, None where it does not
        judge it}. A detector that has nothing to say of many pairs gives them one score, and ranks none of them low."""
        ranks: dict[str, list[float | None]] = {}
        for name, finding in self.found.items():
            if REGISTRY[name].ranks:
                score_M, judged = (finding.score_N[self.rows], np.count_nonzero(~np.isnan(finding.score_N)))
                rank_M = (counts_up_to(finding.score_N, score_M) - 1) / max(1, judged)
                ranks[name] = [None if np.isnan(s) else round(r, 5) for s, r in zip(score_M, rank_M.tolist())]
        return ranks

    def plain(self, rows: list[int]) -> list[dict]:
        """The pairs `rows`, without pictures."""
        items = []
        for row, (key, caption) in zip(rows, self.data.named(rows)):
            shard, position = self.data.place(row)
            shortened = caption is not None and len(caption) > CAPTION
            items.append(
                {
                    "s": shard,
                    "p": position,
                    "k": key,
                    "c": caption[:CAPTION] + " ..." if shortened else caption,
                    "cos": None if np.isnan(self.data.cos_N[row]) else round(float(self.data.cos_N[row]), 4),
                    "flags": [name for name, finding in self.found.items() if finding.issue_N[row]],
                    "note": self.data.reasons.get(row) or self.data.excluded.get(row),
                }
            )
        return items


def trajectories(data: AuditData, rows: list[int]) -> list[list[float | None]]:
    """For each of `rows` the list of its cosines at the run's rounds, None where it has none."""
    paths: list[list[float | None]] = [[] for _ in rows]
    by_shard = data.by_shard(rows)
    for saved in data.rounds:
        if not saved.has_scores:
            for path in paths:
                path.append(None)
            continue
        for shard, numbers in by_shard.items():
            column = saved.table(shard, ("cosine",))["cosine"].to_numpy()
            for number in numbers:
                cosine = column[data.place(rows[number])[1]]
                paths[number].append(None if np.isnan(cosine) else round(float(cosine), 3))
    return paths


def thumbnail(data: AuditData, row: int) -> tuple[str, int] | None:
    """(data URI of a WebP, longer side in pixels) of the picture, decoded by our guarded decoder and encoded anew; None
    if unreadable."""
    if not data.samples:
        return None
    try:
        image = data.samples.image(*data.place(row)).convert("RGB")
    except (BadSample, OSError):
        return None
    if max(image.size) > THUMB:
        image.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(), max(image.size)


def nearest_pictures(data: AuditData, rows: list[int], block: int = 1 << 15) -> dict[int, list[tuple[int, float]]]:
    """{row: [(row of a near picture, cosine)]}: the NEAR nearest pictures of each, by embedding, exact; {} without
    embeddings."""
    if data.images is None or not rows:
        return {}
    query_QD = unit(data.images.take(rows))
    best_QK, which_QK = np.full((len(rows), NEAR), -2.0, np.float32), np.zeros((len(rows), NEAR), np.int64)
    own_Q = np.array(rows)
    for start, block_BD in data.images.blocks(block):
        cos_QB = query_QD @ unit(block_BD).T
        inside = (own_Q >= start) & (own_Q < start + len(block_BD))
        cos_QB[inside, own_Q[inside] - start] = -2
        cos_QM = np.concatenate([best_QK, cos_QB], 1)
        row_QM = np.concatenate([which_QK, np.broadcast_to(np.arange(start, start + len(block_BD)), cos_QB.shape)], 1)
        top = np.argpartition(-cos_QM, NEAR - 1, axis=1)[:, :NEAR]
        best_QK, which_QK = np.take_along_axis(cos_QM, top, 1), np.take_along_axis(row_QM, top, 1)
    return {
        row: [(int(w), round(float(c), 3)) for c, w in sorted(zip(cos, which), reverse=True) if c > -2]
        for row, cos, which in zip(rows, best_QK, which_QK)
    }
