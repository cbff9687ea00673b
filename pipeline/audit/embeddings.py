"""Embeddings on disk in the layout of clip-retrieval, ours or another's: read in place, half precision, any number of
parts.

FOLDER/img_emb/img_emb_N.npy, text_emb/text_emb_N.npy (float16 or float32, one row a pair) and
metadata/metadata_N.parquet (caption, and image_path or key). Format: README of github.com/rom1504/clip-retrieval.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.index.shard_index import Shard, ShardIndex
from shards.order.safe_mask import fingerprint

KINDS = {"img_emb": "npy", "text_emb": "npy", "metadata": "parquet", "cells": "npy"}


def part_path(folder: Path | str, kind: str, number: int) -> Path:
    """Path of part `number` of one of KINDS, as `safeclip score` writes it."""
    return Path(folder) / kind / f"{kind}_{number:05d}.{KINDS[kind]}"


def parts(folder: Path | str, kind: str) -> dict[int, Path]:
    """{number: path} of the parts of one of KINDS in `folder`, in the order of their numbers."""
    pattern = re.compile(rf"{kind}_(\d+)\.{KINDS[kind]}")
    found = ((pattern.fullmatch(path.name), path) for path in (Path(folder) / kind).glob(f"*.{KINDS[kind]}"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def open_part(path: Path) -> np.ndarray:
    """The .npy at `path`, mapped. Raises UserError."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"embeddings {path}: cannot be read ({error}); bring it back, or score again") from None


class Rows:
    """The rows of all parts of one kind as one array on disk. len, width, take(rows), and iteration over blocks.

    A part is mapped while it is read and no longer: what was read of it is not this process's memory afterwards, and
    there may be more parts than a process may have maps.
    """

    def __init__(self, found: dict[int, Path], counts_S: np.ndarray | Sequence[int]):
        """`found`: {number of the shard: path of its part}; `counts_S`: its pairs; an empty one needs no part. Raises
        UserError."""
        self.found, self.offsets = found, np.concatenate([[0], np.cumsum(counts_S)]).astype(np.int64)
        self.width, self.dtype = 0, np.dtype(np.float16)
        for shard in np.flatnonzero(counts_S).tolist():
            part, count = self.part(shard) if shard in found else None, int(counts_S[shard])
            if part is None or part.ndim != 2 or len(part) != count:
                what = "missing" if part is None else f"of shape {part.shape}"
                raise UserError(
                    f"embeddings: part {found.get(shard, shard)} is {what}, expected ({count}, D); score again"
                )
            if self.width not in (0, part.shape[1]):
                raise UserError(f"embeddings {found[shard].parent}: parts of different widths; score again")
            if not self.width:
                self.width, self.dtype = part.shape[1], part.dtype

    def part(self, shard: int) -> np.ndarray:
        """(n, D): the rows of one shard, mapped."""
        return open_part(self.found[shard])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def pieces(self, start: int, stop: int) -> Iterator[tuple[slice, int, slice]]:
        """Yield (their places from `start` on, shard, rows of it) of the rows `start` to `stop`."""
        first, last = np.searchsorted(self.offsets, [start, stop - 1], "right") - 1
        for shard in range(first, last + 1):
            a, b = max(start, int(self.offsets[shard])), min(stop, int(self.offsets[shard + 1]))
            if a < b:
                offset = int(self.offsets[shard])
                yield slice(a - start, b - start), shard, slice(a - offset, b - offset)

    def take(self, rows: np.ndarray | Sequence[int], columns: slice = slice(None)) -> np.ndarray:
        """(B, D): the rows of these numbers, or some columns of them, read from disk."""
        rows = np.asarray(rows, np.int64)
        out = np.empty((len(rows), len(range(self.width)[columns])), self.dtype)
        shard_B = np.searchsorted(self.offsets, rows, "right") - 1
        order = np.argsort(shard_B, kind="stable")
        cuts = np.flatnonzero(np.diff(shard_B[order])) + 1
        for here in np.split(order, cuts) if len(rows) else []:
            shard = int(shard_B[here[0]])
            out[here] = self.part(shard)[rows[here] - self.offsets[shard], columns]
        return out

    def blocks(self, size: int = 1 << 16) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, (B, D)) over all rows."""
        for start in range(0, len(self), size):
            out = np.empty((min(size, len(self) - start), self.width), self.dtype)
            for places, shard, rows in self.pieces(start, start + len(out)):
                out[places] = self.part(shard)[rows]
            yield start, out

    def columns(self, rows: np.ndarray, size: int = 32, piece: int = 1 << 16) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first, (C, M)): all columns of the rows of these numbers, `size` at a time, for a row lies in one
        piece on disk."""
        for start in range(0, self.width, size):
            some = slice(start, min(start + size, self.width))
            out = np.empty((some.stop - some.start, len(rows)), self.dtype)
            for at in range(0, len(rows), piece):
                out[:, at : at + piece] = self.take(rows[at : at + piece], some).T
            yield start, out


class EmbeddingFolder(ShardIndex):
    """Embeddings of others as an index of pairs: each part is a shard, img_emb its file."""

    def __init__(self, folder: Path | str):
        """Raises UserError when parts are missing or do not fit together."""
        images, texts, about = (parts(folder, kind) for kind in ("img_emb", "text_emb", "metadata"))
        if not images or set(images) != set(texts) or set(images) != set(about):
            raise UserError(
                f"--embeddings {folder}: {len(images)} img_emb, {len(texts)} text_emb and {len(about)} metadata parts; "
                "expected the same numbers of each, "
                "as clip-retrieval writes them (clip-retrieval inference --enable_text True)"
            )
        self.images, self.texts, self.about = (list(found.values()) for found in (images, texts, about))
        shards = []
        for image, text, table in zip(self.images, self.texts, self.about):
            (_, *image_width), (_, *text_width) = open_part(image).shape, open_part(text).shape
            if image_width != text_width:
                raise UserError(
                    f"embeddings {image}: {image_width} numbers a row, but {text_width} in its text_emb; "
                    "take both from one CLIP"
                )
            rows = [len(open_part(image)), len(open_part(text)), pq.read_metadata(table).num_rows]
            if len(set(rows)) > 1:
                raise UserError(
                    f"embeddings {image}: {rows[0]} rows, but {rows[1]} in its text_emb and {rows[2]} in its metadata"
                )
            shards.append(Shard(str(image.absolute()), image.stat().st_size, rows[0], fingerprint(image), table=""))
        if not any(shard.samples for shard in shards):
            raise UserError(f"--embeddings {folder}: no row in any of its {len(shards)} parts; expected one a pair")
        super().__init__(shards)
        self.folder = folder

    def __reduce__(self) -> tuple:
        return EmbeddingFolder, (self.folder,)

    def keys(self, shard: int) -> list[str]:
        """The pairs' names, from image_path or key, or else their positions."""
        columns = pq.read_schema(self.about[shard]).names
        name = next((name for name in ("key", "image_path") if name in columns), None)
        if name is None:
            return [str(position) for position in range(self.counts[shard])]
        return [str(key) for key in pq.read_table(self.about[shard], columns=[name])[name].to_pylist()]

    def captions(self, shard: int) -> list[str | None]:
        """None where there is no caption."""
        if "caption" not in pq.read_schema(self.about[shard]).names:
            return [None] * int(self.counts[shard])
        return pq.read_table(self.about[shard], columns=["caption"])["caption"].to_pylist()
