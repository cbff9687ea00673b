"""Scores on disk: one Parquet file a shard, written by the rank that scored it as soon as it is done."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.storage import write_bytes


class ScoreFiles:
    """FOLDER/00000.parquet ... (none for an empty shard): position, key, cosine, score, lowered, and the reason where a pair has no score.

    The score is what pairs are ranked by (selection.score): of this split alone, or with `before` the mean over the splits up to this one,
    in either case lowered by suspicion, by as much as `lowered` says.
    Files of another step of the model, made by another config, or with means of another number, are not used.
    """

    def __init__(self, folder, index, step, config="", before=None, splits=0):
        """`step`: the training step of the model that scores; `config`: the hash of its config; `before`: the folder of the split
        before, the last of `splits` ones, whose scores are means too; None: no mean."""
        self.folder, self.index, self.before, self.splits = folder, index, before, splits
        self.made = {"step": step, "config": config, "mean_of": splits + 1 if before else 1}

    def path(self, shard):
        return self.folder / f"{shard:05d}.parquet"

    def done(self):
        """Numbers of the shards that are scored by the model of this step."""
        return [shard for shard, count in enumerate(self.index.counts) if count and self.made_of(shard) == self.made]

    def made_of(self, shard):
        """{"step", "config", "mean_of"}: of the model that scored the shard, and the number of splits; None where it is not scored."""
        try:
            metadata = pq.read_schema(self.path(shard)).metadata
            return {key: json.loads(metadata[key.encode()]) for key in self.made}
        except (OSError, pa.ArrowInvalid, KeyError, TypeError):
            return None

    def read(self, shard):
        """(float32 scores, [(shard, position, key, reason)] of what could not be read) of a shard that is done."""
        table = pq.read_table(self.path(shard))
        bad = [
            (shard, position, table["key"][position].as_py(), table["reason"][position].as_py())
            for position in np.flatnonzero(np.isnan(table["cosine"].to_numpy())).tolist()
            if table["reason"][position].is_valid  # the model may have given no number
        ]
        return table["score"].to_numpy().astype(np.float32), bad

    def lowered(self, shard):
        """float32 (n,): by how much suspicion lowered the scores of a shard that is done."""
        return pq.read_table(self.path(shard), columns=["lowered"])["lowered"].to_numpy().astype(np.float32)

    def write(self, shard, cos_B, score_B, bad, lowered_B=None):
        """Put a whole shard's cosines and scores, float32 (n,), and why some have none on disk; returns the scores, meant and lowered.

        Raises UserError when the scores of the split before are gone.
        """
        lowered_B = np.zeros_like(score_B) if lowered_B is None else lowered_B
        score_B = (self.mean(shard, score_B) if self.before else score_B) - lowered_B
        reasons = [None] * len(cos_B)
        for _, position, _, reason in bad:
            reasons[position] = reason
        columns = {
            "position": np.arange(len(cos_B)),
            "key": self.index.table(shard).keys,
            "cosine": cos_B,
            "score": score_B,
            "lowered": lowered_B,
            "reason": pa.array(reasons, pa.string()),
        }
        file = io.BytesIO()
        pq.write_table(
            pa.table(columns).replace_schema_metadata({k: json.dumps(v) for k, v in self.made.items()}), file
        )
        write_bytes(self.path(shard), file.getbuffer())
        return score_B

    def mean(self, shard, score_B):
        """The mean of these scores and of those of the splits before, as they were before suspicion lowered them; a pair that none of
        them could read has this score."""
        path = self.before / f"{shard:05d}.parquet"
        try:
            table = pq.read_table(path, columns=["score", "lowered"])
            before_B = table["score"].to_numpy() + table["lowered"].to_numpy()
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            raise UserError(
                f"scores {path}: cannot be read ({error}), and selection.score=agreement goes on from them; bring them back"
            ) from None
        return running_mean(before_B, score_B, self.splits)


def running_mean(before_B, score_B, splits):
    """float32: the mean of `splits` scores so far and of one more; where there was no mean, this one. NaN where this one is NaN."""
    return np.where(np.isnan(before_B), score_B, before_B + (score_B - before_B) / np.float32(splits + 1))


def load_scores(folder, counts_S):
    """float32 (N,): the scores saved in `folder`/scores, in (shard, position) order."""
    paths = [folder / "scores" / f"{shard:05d}.parquet" for shard, count in enumerate(counts_S) if count]
    parts = [pq.read_table(path, columns=["score"])["score"].to_numpy() for path in paths]
    return np.concatenate(parts).astype(np.float32)
