"""Scores on disk: one Parquet file a shard, written by the rank that scored it as soon as it is done."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.storage import write_bytes


class ScoreFiles:
    """FOLDER/00000.parquet ... (none for an empty shard): position, key, cosine, and the reason where a pair could not be read.

    `step`: the training step of the model that scores; files of another step are not used.
    """

    def __init__(self, folder, index, step):
        self.folder, self.index, self.step = folder, index, step

    def path(self, shard):
        return self.folder / f"{shard:05d}.parquet"

    def done(self):
        """Numbers of the shards that are scored by the model of this step."""
        return [shard for shard, count in enumerate(self.index.counts) if count and self.step_of(shard) == self.step]

    def step_of(self, shard):
        """Step of the model that scored the shard; None where it is not scored."""
        try:
            return json.loads(pq.read_schema(self.path(shard)).metadata[b"step"])
        except (OSError, pa.ArrowInvalid, KeyError, TypeError):
            return None

    def read(self, shard):
        """(float32 cosines, [(shard, position, key, reason)]) of a shard that is done."""
        table = pq.read_table(self.path(shard))
        bad = [
            (shard, position, table["key"][position].as_py(), reason.as_py())
            for position, reason in enumerate(table["reason"])
            if reason.is_valid
        ]
        return table["cosine"].to_numpy().astype(np.float32), bad

    def write(self, shard, cos_B, bad):
        """Put the cosines of a whole shard, and its bad samples, on disk."""
        reasons = [None] * len(cos_B)
        for _, position, _, reason in bad:
            reasons[position] = reason
        columns = {
            "position": np.arange(len(cos_B)),
            "key": self.index.table(shard).keys,
            "cosine": cos_B.astype(np.float32),
            "reason": pa.array(reasons, pa.string()),
        }
        file = io.BytesIO()
        pq.write_table(pa.table(columns).replace_schema_metadata({"step": json.dumps(self.step)}), file)
        write_bytes(self.path(shard), file.getbuffer())


def load_cosines(folder, counts_S):
    """float32 (N,): the cosines saved in `folder`/scores, in (shard, position) order."""
    paths = [folder / "scores" / f"{shard:05d}.parquet" for shard, count in enumerate(counts_S) if count]
    parts = [pq.read_table(path, columns=["cosine"])["cosine"].to_numpy() for path in paths]
    return np.concatenate(parts).astype(np.float32)
