"""The report: one HTML file that loads nothing, runs its own script only, and in which no caption is ever markup.

What is in it is sampled: the worst pairs with their pictures, the worst groups, a table. All pairs stand in the
findings beside it.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.audit.data import AuditData
from pipeline.audit.detectors import REGISTRY, Finding, Group
from pipeline.audit.detectors.neighbourhood import unit
from shards.errors import BadSample
from shards.storage.files import write_bytes

GALLERY, GROUPS, TABLE = 240, 60, 3000  # pairs with pictures, groups, rows of the table
STRIP, MEMBERS = 8, 500  # of a group: pictures that are shown, members that a tick marks
NEAR = 3  # nearest pictures of a pair in the gallery
THUMB, QUALITY = 96, 60  # pixels of the longer side, WebP quality
PICTURE_BYTES = 12_000_000  # of all thumbnails, as base64; further ones are left out
CAPTION = 500  # characters of a caption
BINS = 120


def write_report(
    path: Path,
    data: AuditData,
    found: dict[str, Finding],
    suspect: Finding,
    about: dict[str, dict],
    truth: dict,
    command: str,
) -> int:
    """Write the report to `path`; returns its bytes. `command`: how its ticks are used."""
    content = contents(data, found, suspect, about, truth, command)
    page = render(content)
    write_bytes(path, page)
    return len(page)


def render(content: dict) -> bytes:
    """The page. The policy names the hashes of the one style and the one script, so nothing else in it can
    run."""
    page = files("pipeline.audit").joinpath("report.html").read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        hashes[tag] = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'"
    )
    # ASCII only, and without the characters that could end the element or begin another.
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return page.replace("{{policy}}", policy).replace("{{data}}", text).encode()


def contents(
    data: AuditData, found: dict[str, Finding], suspect: Finding, about: dict[str, dict], truth: dict, command: str
) -> dict:
    """All that the page shows."""
    order = np.argsort(np.nan_to_num(suspect.score_N, nan=2.0), kind="stable")
    broken = [row for row in sorted(data.reasons) if np.isnan(data.score_N[row])]
    judged = int((~np.isnan(suspect.score_N)).sum())
    gallery = order[: min(GALLERY, judged)].tolist()
    table = broken[: TABLE // 10] + order[: min(TABLE, judged)].tolist()
    groups = worst_groups(found)
    items = Items(data, found)
    suspects = int(suspect.issue_N.sum())
    saved, threshold = data.saved, data.saved.meta["threshold"]
    ranked_N = data.score_N.copy()
    ranked_N[list(data.excluded)] = np.nan  # the mixture is not of them
    counts, low, high = cosine_histogram(ranked_N)
    content = {
        "headline": f"{suspects:,} of {data.N:,} pairs look suspect",
        "about": f"{data.source} · scored by {data.model}",
        "command": command,
        "fingerprint": saved.meta["fingerprint"],
        "pairs": data.N,
        "scored": judged,
        "suspects": suspects,
        "broken": len(broken),
        "safe": saved.mask.fraction,
        "shards": [shard["name"] for shard in saved.shards],
        "shard_prints": [shard["fingerprint"] for shard in saved.shards],
        "histogram": {"low": low, "high": high, "counts": counts},
        "ranked_by": saved.meta.get("score", "cosine"),
        "mixture": saved.meta["mixture"],
        "threshold": finite(threshold),
        "epochs": [
            {
                "epoch": selected.meta["epoch"],
                "fraction": selected.mask.fraction,
                "negative_controls": (selected.meta.get("diagnosis") or {}).get("negative_controls"),
            }
            for selected in data.rounds
        ],
        "thresholds": [finite(selected.meta["threshold"]) for selected in data.rounds],
        "detectors": [
            {"name": name, "title": kind.title, "text": kind.text, "source": kind.source, **about[name]}
            for name, kind in REGISTRY.items()
            if name in about
        ],
        "no_pictures": "" if data.samples else data.no_pictures,
        "truth": truth or None,
    }
    nearest = nearest_pictures(data, gallery)
    content["gallery"] = [items.add(row, nearest=nearest.get(row, ())) for row in gallery]
    content["groups"] = [
        {
            "detector": name,
            "text": group.text,
            "n": len(group.rows),
            "box": group.box,
            "ids": [items.add(int(row)) for row in group.rows[:STRIP]],
            "members": [data.place(row) for row in group.rows[:MEMBERS].tolist()],
        }
        for name, group in groups
    ]
    content["table"] = items.plain(table)
    content["items"] = items.finish()
    return content


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def cosine_histogram(score_N: np.ndarray) -> tuple[list[int], float, float]:
    """(counts, low, high): BINS equal bins over the range of the scores."""
    there = score_N[~np.isnan(score_N)]
    low, high = (float(there.min()), float(there.max())) if len(there) else (0.0, 1.0)
    high = high if high > low else low + 1e-3
    return np.histogram(there, BINS, (low, high))[0].tolist(), low, high


def worst_groups(found: dict[str, Finding]) -> list[tuple[str, Group]]:
    """[(detector, Group)]: the worst groups of each detector in turn, GROUPS at most."""
    queues = [[(name, group) for group in finding.groups] for name, finding in found.items() if finding.groups]
    taken = [one for turn in range(GROUPS) for queue in queues for one in queue[turn : turn + 1]]
    return taken[:GROUPS]


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


class Items:
    """The pairs that the page shows, each once, with thumbnail, trajectory and the ranks that its detectors give it."""

    def __init__(self, data: AuditData, found: dict[str, Finding]):
        self.data, self.found = data, found
        self.rows: list[int] = []
        self.number: dict[int, int] = {}  # of a row
        self.near: dict[int, list[list[float]]] = {}  # of a row: [[number, cosine]]
        self.sorted = {
            name: np.sort(f.score_N[~np.isnan(f.score_N)]) for name, f in found.items() if REGISTRY[name].ranks
        }

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
        paths = trajectories(self.data, self.rows)
        for item, row, path in zip(items, self.rows, paths):
            ranks = {name: self.rank(name, row) for name in self.sorted if not np.isnan(self.found[name].score_N[row])}
            item["r"] = ranks
            item["worst"] = min(ranks, key=ranks.get) if ranks else None
            item["path"] = path
            item["near"] = self.near.get(row, [])
            item["thumb"] = thumbnail(self.data, row) if spent < PICTURE_BYTES else None
            spent += len(item["thumb"][0]) if item["thumb"] else 0
        return items

    def rank(self, name: str, row: int) -> float:
        """The fraction of pairs that the detector scores lower."""
        ordered = self.sorted[name]
        return round(float(np.searchsorted(ordered, self.found[name].score_N[row]) / max(1, len(ordered))), 5)

    def plain(self, rows: list[int]) -> list[dict]:
        """The pairs `rows`, without pictures."""
        keys, items = {}, []
        for row in rows:
            shard, position = self.data.place(row)
            if shard not in keys:
                keys[shard] = self.data.keys(shard)
            caption = self.data.captions[row] if self.data.captions else None
            shortened = caption is not None and len(caption) > CAPTION
            items.append(
                {
                    "s": shard,
                    "p": position,
                    "k": keys[shard][position],
                    "c": caption[:CAPTION] + " ..." if shortened else caption,
                    "cos": None if np.isnan(self.data.cos_N[row]) else round(float(self.data.cos_N[row]), 4),
                    "flags": [name for name, finding in self.found.items() if finding.issue_N[row]],
                    "note": self.data.reasons.get(row) or self.data.excluded.get(row, ""),
                }
            )
        return items


def trajectories(data: AuditData, rows: list[int]) -> list[list[float | None]]:
    """For each of `rows` the list of its cosines at the run's rounds, None where it has none."""
    paths: list[list[float | None]] = [[] for _ in rows]
    for saved in data.rounds:
        columns = {}
        for path, row in zip(paths, rows):
            shard, position = data.place(row)
            if shard not in columns:
                columns[shard] = saved.table(shard, ("cosine",))["cosine"].to_numpy()
            cosine = columns[shard][position]
            path.append(None if np.isnan(cosine) else round(float(cosine), 3))
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
