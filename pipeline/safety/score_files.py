"""Score files: one Parquet file per shard, written by the rank that scored the shard as soon as it is done."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.index.shard_index import ShardIndex
from shards.storage.files import write_bytes

Unread = tuple[int, int, str, str]  # a pair that cannot be read: (shard, position, key, reason)


class ScoreFiles:
    """FOLDER/00000.parquet ... (none for an empty shard) with the columns position, key, cosine, score, and reason.

    Pairs are ranked by the score: the cosine, or NaN for pairs that a guard excludes; reason says why a pair has no
    score. Files of another step of the model or of another config are not used.
    """

    def __init__(self, folder: Path, index: ShardIndex, step: int | str, config: str = ""):
        """`step`: the training step of the model that scores; `config`: the hash of its config."""
        self.folder, self.index = folder, index
        self.made = {"step": step, "config": config}

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.parquet"

    def done(self) -> list[int]:
        """Numbers of the shards that are scored by the model of this step."""
        return [shard for shard, count in enumerate(self.index.counts) if count and self.made_of(shard) == self.made]

    def made_of(self, shard: int) -> dict | None:
        """{"step", "config"}: of the model that scored the shard; None where it is not scored."""
        try:
            metadata = pq.read_schema(self.path(shard)).metadata
            return {key: json.loads(metadata[key.encode()]) for key in self.made}
        except (OSError, pa.ArrowInvalid, KeyError, TypeError):
            return None

    def read(self, shard: int) -> tuple[np.ndarray, list[Unread]]:
        """(float32 cosines, what could not be read) of a shard that is done."""
        table = pq.read_table(self.path(shard))
        bad = [
            (shard, position, table["key"][position].as_py(), table["reason"][position].as_py())
            for position in np.flatnonzero(np.isnan(table["cosine"].to_numpy())).tolist()
            if table["reason"][position].is_valid  # the model may have given no number
        ]
        return table["cosine"].to_numpy().astype(np.float32), bad

    def write(self, shard: int, cos_B: np.ndarray, reasons: Mapping[int, str], excluded: Iterable[int] = ()) -> None:
        """Write the cosines of a whole shard, float32 (n,). reasons: {position: why it has no score}; excluded:
        positions that have a cosine and no score."""
        score_B = cos_B.copy()
        score_B[list(excluded)] = np.nan
        columns = {
            "position": np.arange(len(cos_B)),
            "key": self.index.table(shard).keys,
            "cosine": cos_B,
            "score": score_B,
            "reason": pa.array([reasons.get(position) for position in range(len(cos_B))], pa.string()),
        }
        file = io.BytesIO()
        pq.write_table(
            pa.table(columns).replace_schema_metadata({k: json.dumps(v) for k, v in self.made.items()}), file
        )
        write_bytes(self.path(shard), file.getbuffer())

    def exclude(self, shard: int, reasons: Mapping[int, str]) -> None:
        """Remove the scores of some pairs of a finished shard. reasons: {position: why}; a pair that cannot be read
        keeps its own reason."""
        cos_B, bad = self.read(shard)
        self.write(shard, cos_B, {**reasons, **{position: reason for _, position, _, reason in bad}}, reasons)


def load_scores(folder: Path, counts_S: np.ndarray | Sequence[int]) -> np.ndarray:
    """float32 (N,): the scores saved in `folder`/scores, in (shard, position) order."""
    paths = [folder / "scores" / f"{shard:05d}.parquet" for shard, count in enumerate(counts_S) if count]
    parts = [pq.read_table(path, columns=["score"])["score"].to_numpy() for path in paths]
    return np.concatenate(parts).astype(np.float32)
