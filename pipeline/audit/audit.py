"""The audit: detectors over a run or over scores, their findings in files, and a report that a person can use."""

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.audit.data import AuditData
from pipeline.audit.detectors import chosen
from pipeline.audit.findings import combined, run_detectors, write_findings
from pipeline.audit.memory import require_memory
from pipeline.audit.report import write_report
from pipeline.audit.truth import against_truth
from pipeline.audit.unfinished import Unfinished
from shards.errors import UserError
from shards.storage.files import write_json

logger = logging.getLogger(__name__)


def audit(
    source: Path | str,
    out: Path | str,
    scores: Path | str | None = None,
    truth: Path | str | None = None,
    detectors: Sequence[str] | None = None,
    worst: float = 0.01,
    sample: int = 1024,
) -> str:
    """Write OUT/findings.parquet, findings.csv, audit.json and report.html; returns a line. Raises UserError, also
    where the host has too little memory.

    An audit of the same that was stopped goes on after the detectors that it had run.

    source: run directory, or folder of `safeclip score`. scores: with a run, what `safeclip score --model RUN` wrote.
    truth: folder of an attack manifest (default: the one that the run or the scores were read with). worst: see
    detectors.Detector.find. sample: pictures in which the neighbourhood detectors look for neighbours.
    """
    if not 0 < worst < 1:
        raise UserError(f"--worst: got {worst}, expected a fraction between 0 and 1")
    if sample < 3:
        raise UserError(f"--sample: got {sample}, expected 3 pictures or more")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    data = AuditData(source, scores, truth, sample)
    require_memory(data, chosen(detectors))
    out.mkdir(parents=True, exist_ok=True)
    logger.info("%s: %s pairs in %d shards, %d rounds", source, f"{data.N:,}", len(data.counts_S), len(data.rounds))
    kept = Unfinished(out, data, worst)
    found, about = run_detectors(data, worst, detectors, kept)
    if not found:
        raise UserError(f"--detectors: none of {', '.join(about)} can run on {source}; see the reasons above")
    suspect = combined(found, worst)
    against = against_truth(data, found, suspect)
    write_findings(data, found, suspect, out)
    size = write_report(out / "report.html", data, found, suspect, about, against, advice(data))
    suspects = int(suspect.issue_N.sum())
    meta = data.saved.meta
    write_json(
        out / "audit.json",
        {
            "source": str(source),
            "model": data.model,
            "fingerprint": meta["fingerprint"],
            "pairs": data.N,
            "suspects": suspects,
            "unreadable": len(data.reasons),
            "safe_fraction": data.saved.mask.fraction,
            "mixture": meta["mixture"],
            "worst": worst,
            "detectors": about,
            "truth": against,
        },
    )
    kept.remove()
    return (
        f"{out}/report.html: {suspects:,} of {data.N:,} pairs look suspect ({size / 1e6:.1f} MB); "
        "findings.parquet and findings.csv have all"
    )


def advice(data: AuditData) -> str:
    """The command that applies ticks; "" for embeddings of others, whose masks are of no shards that could be
    copied."""
    if data.others:
        return ""
    mask, first = str(data.saved.folder), ""
    if not data.saved.mask.fraction:  # the scores are no two groups, so the mask calls no pair safe
        mask, first = "MASK", f"safeclip mask filter {mask} --by cosine --remove .05 --out MASK && "
    return f"{first}safeclip mask apply {mask} SHARDS --out DIR --review review.csv"
