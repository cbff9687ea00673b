"""Findings of an audit that is not finished: one file a detector, so that an audit that was stopped goes on."""

import hashlib
import io
import json
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipeline.audit.data import AuditData
from pipeline.audit.detectors import Finding, Group
from shards.storage.files import read_json, write_bytes, write_json


class Unfinished:
    """Files in OUT/unfinished, of one input and one setting; those of another are removed."""

    def __init__(self, out: Path, data: AuditData, worst: float):
        self.folder = out / "unfinished"
        scores = read_json(data.scores / "score.json") if data.scores else None
        of = [[one.meta for one in data.rounds or [data.saved]], scores, worst, data.sample]
        made = {"of": hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()}
        try:
            same = read_json(self.folder / "made.json") == made
        except (OSError, ValueError):
            same = False
        if not same:
            self.remove()
            write_json(self.folder / "made.json", made)

    def save(self, name: str, finding: Finding, about: dict) -> None:
        """Keep what the detector `name` says; about: what audit.json says of it."""
        arrays = {"score_N": finding.score_N, "issue_N": finding.issue_N}
        arrays |= {f"more/{key}": values for key, values in finding.more.items()}
        arrays |= {f"rows/{number}": group.rows for number, group in enumerate(finding.groups)}
        groups = [{**asdict(group), "rows": None} for group in finding.groups]
        arrays["rest"] = np.array(json.dumps({"groups": groups, "about": about}))
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type]  # none has the name of a parameter
        write_bytes(self.folder / f"{name}.npz", file.getbuffer())

    def load(self, name: str) -> tuple[Finding, dict] | None:
        """What `save` kept of a detector; None where there is nothing that can be read."""
        try:
            with np.load(self.folder / f"{name}.npz", allow_pickle=False) as file:
                rest = json.loads(str(file["rest"]))
                groups = [Group(**{**one, "rows": file[f"rows/{number}"]}) for number, one in enumerate(rest["groups"])]
                more = {key.removeprefix("more/"): file[key] for key in file.files if key.startswith("more/")}
                return Finding(file["score_N"], file["issue_N"], groups, more), rest["about"]
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
