"""The report: one HTML file that loads nothing, runs its own script only, and in which no caption is ever markup.

What is in it is sampled: the worst pairs with their pictures, the worst groups, a table. All pairs stand in the
findings beside it.
"""

import base64
import hashlib
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from pipeline.audit.blocks import blocks, worst_rows
from pipeline.audit.data import AuditData
from pipeline.audit.detectors import REGISTRY, Finding, Group
from pipeline.audit.report_items import Items, nearest_pictures
from pipeline.audit.report_map import embedding_map
from shards.storage.files import write_bytes

GALLERY, GROUPS, TABLE = 240, 60, 3000  # pairs with pictures, groups, rows of the table
STRIP = 8  # pictures of a group that are shown; a tick marks all of its rows
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
    """The page. Its policy names the hashes of the one style and the one script, so nothing else in it can run.

    Jinja2's `tojson` escapes what could end the element that holds the data.
    """
    pages = Environment(loader=PackageLoader("pipeline.audit"), autoescape=True)
    pages.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    style, map_script, script = (
        pages.loader.get_source(pages, name)[0] for name in ("report.css", "report_map.js", "report.js")
    )
    script = map_script + script
    policy = (
        f"default-src 'none'; img-src data:; style-src '{content_hash(style)}'; script-src '{content_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    page = pages.get_template("report.html")
    return page.render(policy=policy, style=Markup(style), script=Markup(script), content=content).encode()


def content_hash(text: str) -> str:
    """The hash source of a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def contents(
    data: AuditData, found: dict[str, Finding], suspect: Finding, about: dict[str, dict], truth: dict, command: str
) -> dict:
    """All that the page shows."""
    worst = worst_rows(suspect.score_N, TABLE).tolist()
    broken = data.reasons.row_M[np.isnan(data.score_N[data.reasons.row_M])]
    gallery, table = worst[:GALLERY], broken[: TABLE // 10].tolist() + worst
    groups = worst_groups(found)
    items = Items(data, found)
    suspects = int(suspect.issue_N.sum())
    saved, threshold = data.saved, data.saved.meta["threshold"]
    ranked_N = data.score_N.copy()
    ranked_N[data.excluded.row_M] = np.nan  # the mixture is not of them
    counts, low, high = cosine_histogram(ranked_N)
    content = {
        "headline": f"{suspects:,} of {data.N:,} pairs look suspect",
        "about": f"{data.source} · scored by {data.model}" + not_kept(data),
        "command": command,
        "fingerprint": saved.meta["fingerprint"],
        "pairs": data.N,
        "scored": sum(counts),
        "suspects": suspects,
        "broken": len(broken),
        "safe": saved.mask.fraction,
        "shard_count": len(saved.shards),
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
            "n": group.size,
            "box": group.box,
            "ids": [items.add(int(row)) for row in group.rows[:STRIP]],
            "members": [data.place(row) for row in group.rows.tolist()],
        }
        for name, group in groups
    ]
    content["map"] = embedding_map(data, items, suspect)
    content["table"] = items.plain(table)
    content["items"] = items.finish()
    named = {item["s"] for item in content["items"] + content["table"]}
    named |= {shard for group in content["groups"] for shard, _ in group["members"]}
    for key, field in ("shards", "name"), ("shard_prints", "fingerprint"):
        content[key] = {shard: saved.shards[shard][field] for shard in sorted(named)}
    return content


def not_kept(data: AuditData) -> str:
    """What the report cannot show of the rounds of a run whose scores are gone, for its second line."""
    gone = sum(not saved.has_scores for saved in data.rounds)
    if not gone:
        return ""
    return f" · scores of {gone} of {len(data.rounds)} rounds were not kept (run.keep): no cosines of pairs there"


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def cosine_histogram(score_N: np.ndarray) -> tuple[list[int], float, float]:
    """(counts, low, high): BINS equal bins over the range of the scores."""
    low, high = 0.0, 1.0
    if not np.isnan(score_N).all():  # which is so of no scores, too
        low, high = float(np.nanmin(score_N)), float(np.nanmax(score_N))
        high = max(high, low + 1e-3)  # scores that are nearly equal leave no room for the bins
    counts = np.zeros(BINS, np.int64)
    for part in blocks(len(score_N)):
        counts += np.histogram(score_N[part][~np.isnan(score_N[part])], BINS, (low, high))[0]
    return counts.tolist(), low, high


def worst_groups(found: dict[str, Finding]) -> list[tuple[str, Group]]:
    """[(detector, Group)]: the worst groups of each detector in turn, GROUPS at most."""
    queues = [[(name, group) for group in finding.groups] for name, finding in found.items() if finding.groups]
    taken = [one for turn in range(GROUPS) for queue in queues for one in queue[turn : turn + 1]]
    return taken[:GROUPS]
