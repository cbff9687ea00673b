"""Input of an audit: the selection rounds of a run, or a score folder, and optional files. Only cosines are
required."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.audit.embeddings import EmbeddingFolder, Rows, parts
from pipeline.audit.mask_commands import require_same_shards
from pipeline.config.data import open_index, open_overlay, open_samples
from pipeline.config.load import load_config
from pipeline.config.schema import Data
from pipeline.safety.mixture import DegenerateFit, Mixture, posterior_threshold
from pipeline.safety.selection import RANGES
from pipeline.settings import read
from shards.errors import BadSample, UserError
from shards.order.safe_mask import SavedMask
from shards.samples.bad_samples import read_bad_samples
from shards.samples.samples import Samples
from shards.storage.files import read_json


class AuditData:
    """N pairs in S shards. saved: the SavedMask judged, the run's last one or that of the scores; rounds: all of the
    run's, in order.

    score_N: what the pairs are ranked by; of a pair that a guard excluded, its cosine. reasons, excluded: {row: reason}
    of the pairs that cannot be read, and of those that the guards of a run excluded.

    sample: pictures that are searched for neighbours. cache: shared by the detectors. None if not available:
    images, texts (embeddings.Rows of unit vectors), cells (Rows), hash_N (uint64), captions (list of str or None),
    samples (shards.samples.samples.Samples, for pictures), overlay (the ground truth), metrics (list of dict).
    """

    def __init__(
        self, source: Path | str, scores: Path | str | None = None, truth: Path | str | None = None, sample: int = 1024
    ):
        """`source`: run directory, folder of `safeclip score`, or a mask's folder. Raises UserError."""
        self.source, self.sample = Path(source), sample
        self.cache: dict[str, Any] = {}
        self.run_dir = self.source if (self.source / "masks").is_dir() else None
        self.scores = Path(scores) if scores else self.source if (self.source / "score.json").exists() else None
        self.rounds = []
        if self.run_dir:
            self.rounds = [SavedMask(path.parent) for path in sorted(self.run_dir.glob("masks/epoch_*/mask.json"))]
            if not self.rounds:
                raise UserError(f"run {source}: no mask in it yet; audit what `safeclip score --model {source}` writes")
            self.saved = self.rounds[-1]
        else:
            self.saved = SavedMask(self.source)
        for other in self.rounds[:-1]:
            require_same_shards(other, self.saved)
        about = self.read_about() if self.scores else {}
        self.model = about.get("model") or f"{self.source}, step {self.saved.meta['step']}"
        self.counts_S = self.saved.mask.counts_S
        self.offsets = np.concatenate([[0], np.cumsum(self.counts_S)]).astype(np.int64)
        self.N = int(self.offsets[-1])
        self.cos_N, self.score_N, self.reasons, self.excluded = self.read_scores()
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

    def read_scores(self) -> tuple[np.ndarray, np.ndarray, dict[int, str], dict[int, str]]:
        """(cosines, scores, reasons, excluded) of all pairs; NaN = unreadable."""
        cos, score, reasons, excluded = [], [], {}, {}
        self.low, self.high = RANGES[self.saved.meta.get("score", "cosine")]
        for shard in range(len(self.counts_S)):
            table = self.saved.table(shard)
            cos.append(table["cosine"].to_numpy().astype(np.float32))
            score_N = table["score"].to_numpy().astype(np.float32)
            score.append(np.where(np.isnan(score_N), cos[-1], score_N))
            unread_N, first = np.isnan(cos[-1]), int(self.offsets[shard])
            for position in np.flatnonzero(unread_N).tolist():
                reasons[first + position] = table["reason"][position].as_py() or "the model gave no number"
            for position in np.flatnonzero(np.isnan(score_N) & ~unread_N).tolist():
                excluded[first + position] = table["reason"][position].as_py() or "it was not ranked"
        for row in read_bad_samples(self.run_dir / "bad_samples") if self.run_dir else ():
            reasons[int(self.offsets[row["shard"]] + row["position"])] = row["reason"]
        return np.concatenate(cos), np.concatenate(score), reasons, excluded

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
                if truth:
                    raise
                return
            if found.fingerprint != self.saved.meta["fingerprint"]:
                where = data.index or ", ".join(source.index for source in data.sources.values())
                raise UserError(f"index {where}: of other shards than the scores; bring those back, or score again")
            self.samples = Samples(
                found, open_overlay(data, found), limits=data.limits
            )  # a few: whole shards are not fetched
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
        return np.concatenate(
            [pq.read_table(path, columns=["hash"])["hash"].to_numpy() for path in self.metadata.values()]
        )

    @cached_property
    def captions(self) -> list[str | None] | None:
        """None where there is none; None for all where neither scores nor shards hold them."""
        if self.metadata:
            found = [pq.read_table(path, columns=["caption"])["caption"].to_pylist() for path in self.metadata.values()]
            return [text for part in found for text in part]
        if not self.samples:
            return None
        return [self.caption(shard, position) for shard, count in enumerate(self.counts_S) for position in range(count)]

    def caption(self, shard: int, position: int) -> str | None:
        """The one that was scored where the scores say it, else the first; None where there is none."""
        if self.metadata:
            return self.captions[int(self.offsets[shard]) + position]
        try:
            return self.samples.caption(shard, position)
        except BadSample:
            return None

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

    def keys(self, shard: int) -> list[str]:
        """Names of one shard's pairs."""
        return self.saved.table(shard, ("key",))["key"].to_pylist()

    def truth(self) -> dict[str, np.ndarray]:
        """{kind: int64 rows} of the poison that the manifest names; {} without one."""
        kinds: dict[str, list[int]] = {}
        for row in self.overlay.rows if self.overlay else []:
            kinds.setdefault(row["kind"], []).append(int(self.offsets[row["shard"]] + row["position"]))
        return {kind: np.array(sorted(rows)) for kind, rows in kinds.items()}
