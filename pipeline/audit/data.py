"""Input of an audit: the selection rounds of a run, or a score folder, and optional files. Only cosines are
required."""

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.audit.captions import Captions, metadata_column
from pipeline.audit.embeddings import EmbeddingFolder, Rows, parts
from pipeline.audit.mask_commands import require_same_shards
from pipeline.audit.notes import Notes
from pipeline.config.data import open_index, open_overlay, open_samples
from pipeline.config.load import load_config
from pipeline.config.schema import Data
from pipeline.safety.mixture import DegenerateFit, Mixture, posterior_threshold
from pipeline.safety.score_files import saved_rounds
from pipeline.safety.selection import RANGES
from pipeline.settings import read
from shards.errors import UserError
from shards.order.safe_mask import SavedMask
from shards.samples.bad_samples import read_bad_samples
from shards.samples.samples import Samples
from shards.storage.files import read_json

logger = logging.getLogger(__name__)


class Scored(NamedTuple):
    """What the score files say of N pairs. Cosines and scores: float32 (N,), NaN = unreadable."""

    cos_N: np.ndarray
    score_N: np.ndarray
    reasons: Notes
    excluded: Notes


class AuditData:
    """N pairs in S shards. saved: the SavedMask judged, the run's last one or that of the scores; rounds: all of the
    run's, in order.

    Opened without the scores, which are read when they are first asked for: cos_N; score_N, what the pairs are ranked
    by, of a pair that a guard excluded its cosine; reasons and excluded, the Notes of the pairs that cannot be read,
    and of those that the guards of a run excluded.

    sample: pictures that are searched for neighbours. cache: shared by the detectors. None if not available:
    images, texts (embeddings.Rows of unit vectors), cells (Rows), hash_N (uint64), captions (Captions),
    samples (shards.samples.samples.Samples, for pictures), overlay (the ground truth), metrics (list of dict).
    """

    def __init__(
        self, source: Path | str, scores: Path | str | None = None, truth: Path | str | None = None, sample: int = 1024
    ):
        """`source`: run directory, folder of `safeclip score`, or a mask's folder. Raises UserError."""
        self.source, self.sample = Path(source), sample
        self.cache: dict[str, Any] = {}
        self.run_dir = self.source if any((self.source / part).is_dir() for part in ("masks", "checkpoints")) else None
        self.scores = Path(scores) if scores else self.source if (self.source / "score.json").exists() else None
        self.rounds = []
        if self.run_dir:
            self.rounds = [SavedMask(folder) for folder in saved_rounds(self.run_dir / "masks")]
            if not self.rounds:
                raise UserError(
                    f"run {source}: no selection round; use `safeclip score --model {source} --out OUT`, audit OUT"
                )
            self.saved = self.rounds[-1]
        else:
            self.saved = SavedMask(self.source)
        for other in self.rounds[:-1]:
            require_same_shards(other, self.saved)
        about = self.read_about() if self.scores else {}
        self.others = bool(about.get("embeddings")) and not about.get("data")  # embeddings of others, of no shards
        self.model = about.get("model") or f"{self.source}, step {self.saved.meta['step']}"
        self.counts_S = self.saved.mask.counts_S
        self.offsets = np.concatenate([[0], np.cumsum(self.counts_S)]).astype(np.int64)
        self.N = int(self.offsets[-1])
        self.low, self.high = RANGES[self.saved.meta.get("score", "cosine")]
        self.images: Rows | None = None
        self.texts: Rows | None = None
        self.cells: Rows | None = None
        if about.get("embeddings"):
            self.open_embeddings(self.scores / about["embeddings"])
        self.open_shards(about, truth)

    def read_about(self) -> dict:
        try:
            about = read_json(self.scores / "score.json")
        except (OSError, ValueError) as error:
            raise UserError(
                f"scores {self.scores}: cannot read score.json ({error}); expected a folder of `safeclip score`"
            ) from None
        if not about.get("complete"):
            raise UserError(f"scores {self.scores}: not finished; give the same `safeclip score` command again")
        if self.run_dir:
            require_same_shards(SavedMask(self.scores), self.saved)
        return about

    @cached_property
    def scored(self) -> Scored:
        """Of all pairs, from the score files, a shard at a time."""
        cos_N, score_N = np.empty(self.N, np.float32), np.empty(self.N, np.float32)
        reasons, excluded = Notes(), Notes()
        for shard, first in enumerate(self.offsets[:-1].tolist()):
            rows = slice(first, int(self.offsets[shard + 1]))
            table = self.saved.table(shard, ("cosine", "score", "reason"))
            cos_N[rows], score_B = table["cosine"].to_numpy(), table["score"].to_numpy()
            unread_B, unranked_B = np.isnan(cos_N[rows]), np.isnan(score_B)
            score_N[rows] = np.where(unranked_B, cos_N[rows], score_B)
            for position in np.flatnonzero(unread_B).tolist():
                reasons.add(first + position, table["reason"][position].as_py() or "the model gave no number")
            for position in np.flatnonzero(unranked_B & ~unread_B).tolist():
                excluded.add(first + position, table["reason"][position].as_py() or "it was not ranked")
        for row in read_bad_samples(self.run_dir / "bad_samples") if self.run_dir else ():
            reasons.add(int(self.offsets[row["shard"]] + row["position"]), row["reason"])
        return Scored(cos_N, score_N, reasons, excluded)

    @property
    def cos_N(self) -> np.ndarray:
        return self.scored.cos_N

    @property
    def score_N(self) -> np.ndarray:
        return self.scored.score_N

    @property
    def reasons(self) -> Notes:
        return self.scored.reasons

    @property
    def excluded(self) -> Notes:
        return self.scored.excluded

    def open_embeddings(self, folder: Path) -> None:
        if folder.resolve() == self.scores.resolve():
            images, texts = parts(folder, "img_emb"), parts(folder, "text_emb")
            self.cells = Rows(parts(folder, "cells"), self.counts_S)
        else:
            others = EmbeddingFolder(folder)
            images, texts = dict(enumerate(others.images)), dict(enumerate(others.texts))
        self.images, self.texts = Rows(images, self.counts_S), Rows(texts, self.counts_S)

    def open_shards(self, about: dict, truth: Path | str | None) -> None:
        """The pictures and the ground truth, as far as they are still where they were."""
        data = read(Data, about["data"], "data.") if about.get("data") else None
        if self.run_dir and not data:
            data = load_config(self.run_dir / "config.yaml").data
        self.overlay, self.samples, self.no_pictures = None, None, "these scores name no shards"
        if data:
            try:
                found = open_index(data)
                found.verify(data.remote_timeout)
            except UserError as error:
                self.no_pictures = str(error)
                logger.warning(f"no pictures: {error}")
                if truth:
                    raise
                return
            if found.fingerprint != self.saved.meta["fingerprint"]:
                where = data.index or ", ".join(source.index for source in data.sources.values())
                raise UserError(f"index {where}: of other shards than the scores; bring those back, or score again")
            # Only a few samples are read: whole shards are not fetched.
            self.samples = Samples(found, open_overlay(data, found), limits=data.limits)
            self.shards = data
            self.overlay = open_overlay(data, found, truth)
        elif truth:
            raise UserError(f"--truth: an attack manifest is of shards, and {self.source} names none")

    def all_samples(self) -> Samples:
        """`samples` for who reads all pictures: shards behind URLs are fetched whole."""
        return open_samples(self.shards, self.samples.index)

    @cached_property
    def metadata(self) -> dict[int, Path]:
        """{number of the shard: path} of metadata parts."""
        return parts(self.scores, "metadata") if self.scores else {}

    @cached_property
    def hash_N(self) -> np.ndarray | None:
        """uint64 (N,): pixels.signature of each picture, 0 = could not be read; None where they were not kept."""
        if self.cells is None:
            return None
        hash_N = np.zeros(self.N, np.uint64)
        for shard, count in enumerate(self.counts_S.tolist()):
            if count:
                rows = slice(int(self.offsets[shard]), int(self.offsets[shard + 1]))
                hash_N[rows] = metadata_column(self.metadata, shard, "hash", count).to_numpy()
        return hash_N

    @cached_property
    def captions(self) -> Captions | None:
        """None where neither scores nor shards hold them."""
        if not self.metadata and not self.samples:
            return None
        return Captions(self.metadata, self.samples, self.counts_S)

    def caption(self, shard: int, position: int) -> str | None:
        """The one that was scored where the scores say it, else the first; None where there is none."""
        return self.captions.at(shard, [position])[0]

    @cached_property
    def metrics(self) -> list[dict]:
        path = self.run_dir / "metrics.jsonl" if self.run_dir else None
        return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []

    @cached_property
    def mixture(self) -> Mixture | None:
        """Of the scores, or None."""
        return Mixture.from_dict(self.saved.meta["mixture"]) if self.saved.meta["mixture"] else None

    def threshold_at(self, posterior: float) -> float | None:
        """The threshold where the higher component has this posterior; None where the scores are no mixture of two."""
        try:
            return posterior_threshold(self.mixture, posterior) if self.mixture else None
        except DegenerateFit:
            return None

    def place(self, row: int) -> tuple[int, int]:
        """(shard, position) of a row."""
        shard = int(np.searchsorted(self.offsets, row, "right") - 1)
        return shard, int(row - self.offsets[shard])

    def named(self, rows: Sequence[int]) -> list[tuple[str, str | None]]:
        """[(key, caption)] of a few rows; each shard's columns are read once."""
        found: list[tuple[str, str | None]] = [("", None)] * len(rows)
        for shard, numbers in self.by_shard(rows).items():
            positions = [int(rows[number] - self.offsets[shard]) for number in numbers]
            keys = self.saved.table(shard, ("key",))["key"]
            captions = self.captions.at(shard, positions) if self.captions else [None] * len(positions)
            for number, position, caption in zip(numbers, positions, captions):
                found[number] = keys[position].as_py(), caption
        return found

    def by_shard(self, rows: Sequence[int]) -> dict[int, list[int]]:
        """{shard: places in `rows` of its rows}, shards in order."""
        shards = np.searchsorted(self.offsets, np.asarray(rows, np.int64), "right") - 1
        found: dict[int, list[int]] = {}
        for number in np.argsort(shards, kind="stable").tolist():
            found.setdefault(int(shards[number]), []).append(number)
        return found

    def truth(self) -> dict[str, np.ndarray]:
        """{kind: int64 rows} of the poison that the manifest names; {} without one."""
        kinds: dict[str, list[int]] = {}
        for row in self.overlay.rows if self.overlay else []:
            kinds.setdefault(row["kind"], []).append(int(self.offsets[row["shard"]] + row["position"]))
        return {kind: np.array(sorted(rows)) for kind, rows in kinds.items()}
