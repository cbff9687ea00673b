"""Score files: one Parquet file per shard, written by the rank that scored the shard as soon as it is done, and at the
end of a round one per rank."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.distributed import comm, hosts
from shards.index.shard_index import ShardIndex
from shards.order.score_parts import ScoreParts, path_of
from shards.storage.files import read_json, whole_file, write_bytes, write_json

Unread = tuple[int, int, str, str]  # a pair that cannot be read: (shard, position, key, reason)


class ScoreFiles:
    """Files in FOLDER (shards.order.score_parts) with the columns position, key, cosine, score, and reason.

    Pairs are ranked by the score: the cosine, or NaN for pairs that a guard excludes; reason says why a pair has no
    score. FOLDER/made.json says of which model and config they are; those of another are not used.
    """

    def __init__(
        self,
        folder: Path,
        index: ShardIndex,
        step: int | str,
        config: str = "",
        numbers: Mapping[str, Sequence[str]] | None = None,
    ):
        """`step`: the training step of the model that scores; `config`: the hash of its config; `numbers`: names of
        what is written beside the cosines (scoring.PictureNumbers), until `conclude`, with the features of a picture
        that each is made of."""
        self.folder, self.index = folder, index
        self.made: dict = {"step": step, "config": config}
        if numbers:
            self.made["numbers"] = {name: list(features) for name, features in numbers.items()}

    def path(self, shard: int) -> Path:
        """File of a shard that was just scored."""
        return path_of(self.folder, shard)

    def parts(self) -> ScoreParts:
        return ScoreParts(self.folder, self.index.counts)

    def claim(self) -> ScoreParts:
        """What this model has scored already; files of another are removed. Rank 0 calls, before anything is written,
        and tells the others: on a shared file system new files may show late on other hosts."""
        claim(self.folder, self.made)
        return self.parts()

    def read(self, shard: int, parts: ScoreParts | None = None) -> tuple[np.ndarray, list[Unread]]:
        """(float32 cosines, what could not be read) of a shard that is done. parts: as listed before."""
        table = (parts or self.parts()).read(shard)
        bad = [
            (shard, position, table["key"][position].as_py(), table["reason"][position].as_py())
            for position in np.flatnonzero(np.isnan(table["cosine"].to_numpy())).tolist()
            if table["reason"][position].is_valid  # the model may have given no number
        ]
        return table["cosine"].to_numpy().astype(np.float32), bad

    def numbers(self, shard: int, names: Sequence[str], parts: ScoreParts | None = None) -> dict[str, np.ndarray]:
        """What was taken from the pictures of a shard in the pass that scored it (scoring.PictureNumbers)."""
        table = (parts or self.parts()).read(shard, list(names)) if names else {}
        return {name: table[name].to_numpy() for name in names}

    def table(self, shard: int, cos_B: np.ndarray, reasons: Mapping[int, str], excluded: Mapping[int, str]) -> pa.Table:
        """The rows of a shard with the cosines cos_B, float32 (n,). reasons: {position: why it cannot be read};
        excluded: {position: why it has no score}."""
        score_B = cos_B.copy()
        score_B[list(excluded)] = np.nan
        why = {**excluded, **reasons}
        reason_B = [why.get(position) for position in range(len(cos_B))] if why else [None] * len(cos_B)
        columns = {
            "position": np.arange(len(cos_B)),
            "key": self.index.keys(shard),
            "cosine": cos_B,
            "score": score_B,
            "reason": pa.array(reason_B, pa.string()),
        }
        return pa.table(columns).replace_schema_metadata({key: json.dumps(value) for key, value in self.made.items()})

    def write(
        self, shard: int, cos_B: np.ndarray, reasons: Mapping[int, str], numbers: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Write the cosines of a whole shard, as `table`, and `numbers` in columns of their own."""
        file, table = io.BytesIO(), self.table(shard, cos_B, reasons, {})
        for name, value_B in (numbers or {}).items():
            table = table.append_column(name, pa.array(value_B))
        pq.write_table(table, file, use_dictionary=["reason"])  # all else differs from pair to pair
        write_bytes(self.path(shard), file.getbuffer())

    def conclude(self, excluded: Callable[[int], Mapping[int, str]] = lambda shard: {}) -> None:
        """Put the files of single shards into one of each rank, when all are scored. All ranks call.

        excluded: shard -> {position: why this pair has no score}.
        """
        comm.barrier()
        parts = comm.on_rank0(self.tidy)
        shards = np.array_split(np.flatnonzero(self.index.counts), comm.world())[comm.rank()]
        for some in neighbours([shard for shard in shards.tolist() if not parts.in_part(shard)], parts):
            self.merge(some, parts, excluded)
        comm.barrier()

    def tidy(self) -> ScoreParts:
        """All files, when those of single shards are removed that a file of many shards has too: a merge that was cut
        off left them. Rank 0 calls."""
        parts = self.parts()
        for first, last in parts.parts:
            for shard in parts.alone.intersection(range(first, last + 1)):
                self.path(shard).unlink(missing_ok=True)  # NFS may list what another host has removed
        return self.parts()

    def merge(self, shards: list[int], parts: ScoreParts, excluded: Callable[[int], Mapping[int, str]]) -> None:
        """One file of these shards, between which there are only empty ones."""
        path, writer = path_of(self.folder, shards[0], shards[-1]), None
        with whole_file(path) as file:
            for shard in shards:
                cos_B, bad = self.read(shard, parts)
                table = self.table(shard, cos_B, {position: why for _, position, _, why in bad}, excluded(shard))
                writer = writer or pq.ParquetWriter(file, table.schema, use_dictionary=["reason"])
                writer.write_table(table, row_group_size=len(table))
            writer.close()
        for shard in shards[len(shards) == 1 :]:
            self.path(shard).unlink(missing_ok=True)


def claim(folder: Path, made: dict) -> None:
    """Remove what is in `folder` unless it was made as `made` says, by folder/made.json, which is then written."""
    try:
        same = read_json(folder / "made.json") == made
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "made.json", made)


def prune_scores(folder: Path, keep: int) -> None:
    """Remove the scores of all rounds but the last `keep` up to the round in `folder`, as far as that can be done.

    Only rounds that are complete lose their scores: a run that resumes, from any checkpoint, reads their masks alone.
    Rank 0 calls, when the round is saved.
    """
    made = [path for path in saved_rounds(folder.parent) if number_of(path) <= number_of(folder)]
    for old in made[:-keep]:
        gone = old / "scores.old"  # which nobody takes for all scores, when only a part of it is left
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):
            (old / "scores").rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def saved_rounds(masks: Path) -> list[Path]:
    """Folders in `masks` of a run's rounds whose masks are complete, in their order. A copy that somebody has made
    beside them, as epoch_003_good, is none of them."""
    found = (path.parent for path in masks.glob("epoch_*/mask.json"))
    return sorted((folder for folder in found if folder.name.removeprefix("epoch_").isdecimal()), key=number_of)


def number_of(folder: Path) -> int:
    """Epoch of the folder of a round."""
    return int(folder.name.removeprefix("epoch_"))


def neighbours(shards: Sequence[int], parts: ScoreParts) -> list[list[int]]:
    """The shards in runs between which no other shard has pairs."""
    cuts = np.flatnonzero(np.diff(parts.filled_S[list(shards)]) > 1) + 1
    return [some.tolist() for some in np.split(np.asarray(shards, np.int64), cuts) if len(some)]


def load_scores(folder: Path, counts_S: np.ndarray | Sequence[int]) -> np.ndarray:
    """float32 (N,): the scores saved in `folder`/scores, in (shard, position) order."""
    return ScoreParts(folder / "scores", counts_S).column("score")


def shared_scores(folder: Path, counts_S: np.ndarray | Sequence[int]) -> np.ndarray:
    """`load_scores`, one copy a host, of which each rank reads a part. All ranks call."""
    starts, parts = np.concatenate([[0], np.cumsum(counts_S)]), ScoreParts(folder / "scores", counts_S)
    score_N = hosts.host_array(int(starts[-1]), np.float32)
    cuts = np.linspace(0, len(counts_S), comm.world() + 1).astype(int)
    for shard in range(*cuts[comm.rank() : comm.rank() + 2]):
        if counts_S[shard]:
            score_N[starts[shard] : starts[shard + 1]] = parts.read(shard, ["score"])["score"].to_numpy()
    hosts.share_between_hosts(score_N, list(zip(starts[cuts], starts[cuts[1:]])))
    return score_N
