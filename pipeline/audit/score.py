"""Scores of any CLIP on any shards: every pair's cosine, its embeddings and what its pixels look like, in one pass.

OUT is a mask's folder (mask.json, safe.npy, histogram.npy, scores/), so that every `safeclip mask` command takes it,
and beside that clip-retrieval's img_emb/, text_emb/ and metadata/ (key, caption, picture hash), cells/
(pipeline.audit.pixels) and score.json.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.audit.embeddings import EmbeddingFolder, Rows, part_path
from pipeline.audit.score_batches import Pairs, Rowset
from pipeline.config.data import open_index, open_samples
from pipeline.config.schema import Data, Selection
from pipeline.distributed import comm
from pipeline.safety.round import SelectionRound, save_round, select_pairs
from pipeline.safety.score_files import ScoreFiles, shared_scores
from pipeline.safety.scoring import ShardBatches, assign_shards, least_similar
from pipeline.training.signals import ignore
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import fingerprint
from shards.progress import progress
from shards.samples.samples import Samples
from shards.storage.files import read_json, write_bytes, write_json
from shards.storage.prefetch import fetched_ahead
from shards.views.readers import batches

if TYPE_CHECKING:
    from pipeline.audit.models import Scorer


# Of a batch: its rows, their cosines, the captions that these are of, and the embeddings of pictures and captions,
# zeros where a row could not be read.
Scored = tuple[Rowset, np.ndarray, list[str | None], np.ndarray, np.ndarray]


def score(
    out: Path | str,
    model: str | None = None,
    pretrained: str | None = None,
    data: Sequence[str] = (),
    overlay: str | None = None,
    embeddings: Path | str | None = None,
    lean: bool = False,
    batch_size: int = 256,
    workers: int = 2,
) -> str:
    """Score all pairs into the folder `out`; returns a line. All ranks of a process group may call it, or one process.

    model, pretrained: as models.load_scorer takes them. data: shards' paths (brace-expanded), or one index folder; left
    out, those of the run. overlay: an attack to read the data with, by default that of the run. embeddings: in their
    place a folder of embeddings that exist. lean: keep the cosines and captions only. What is there of the same model
    is not scored again. Raises UserError.
    """
    out = Path(out)
    if embeddings and (model or data):
        raise UserError("--embeddings: has the cosines of its own model; leave --model and --data out")
    if not embeddings and not model:
        raise UserError("--model: missing; name a run, an open_clip model or local directory, or give --embeddings")
    comm.init()
    if embeddings:
        folder = EmbeddingFolder(embeddings)
        index: EmbeddingFolder | ShardIndex = folder
        files = ScoreFiles(out / "scores", index, f"embeddings/{index.fingerprint}")
        about: dict = {"model": f"embeddings {embeddings}", "embeddings": str(Path(embeddings).absolute())}
        comm.on_rank0(claim, out, files.made["step"])
        score_embeddings(folder, out, files)
    else:
        from pipeline.audit.models import load_scorer

        scorer = load_scorer(model, pretrained)
        found = comm.on_rank0(data_of, data, scorer.data, overlay, out)
        index = open_index(found)
        samples = open_samples(found, index)
        comm.on_rank0(samples.verify, found.remote_timeout)
        parts = [scorer.identity, index.fingerprint, fingerprint_of(found.overlay), "lean" if lean else "all"]
        files = ScoreFiles(out / "scores", index, "/".join(parts))
        about = {
            "model": scorer.name,
            "embeddings": None if lean else ".",
            "data": found.model_dump(include={"index", "sources", "overlay"}),
        }
        comm.on_rank0(claim, out, files.made["step"])
        score_shards(scorer, samples, files, out, not lean, batch_size, workers)
    comm.barrier()
    score_N = shared_scores(out, index.counts)
    by_posterior = Selection(mixture="converged", rank_by="score", least_fraction=0.0, max_fraction=1.0)
    selected = select_pairs(score_N, index.counts, by_posterior, 0)
    return comm.on_rank0(conclude, out, index, selected, score_N, files.made["step"], about)


def fingerprint_of(folder: Path | str | None) -> str:
    """Of an attack manifest; "" of none."""
    return fingerprint(Path(folder) / "manifest.json") if folder else ""


def data_of(named: Sequence[str], of_run: Data | None, overlay: str | None, out: Path) -> Data:
    """The config.Data of --data, its index built in OUT/index where shards are named, or of the run; its paths
    absolute. On rank 0."""
    if not named and not of_run:
        raise UserError("--data: missing; name the shards, or the folder of their index")
    if named:
        is_index = len(named) == 1 and Path(named[0]).is_dir()
        if not is_index:
            build_index(named, out / "index")
        data = Data(index=named[0] if is_index else str(out / "index"), overlay=overlay)
    else:
        data = of_run.model_copy(update={"overlay": overlay or of_run.overlay})
    sources = data.sources and {
        name: source.model_copy(update={"index": os.path.abspath(source.index)})
        for name, source in data.sources.items()
    }
    index, overlay = (path and os.path.abspath(path) for path in (data.index, data.overlay))
    data = data.model_copy(update={"index": index, "sources": sources, "overlay": overlay})
    return data


def claim(out: Path, identity: str) -> None:
    """Take the folder OUT for this model and data. On rank 0. Raises UserError when it holds something else."""
    try:
        there = read_json(out / "score.json")["identity"]
    except (OSError, ValueError, KeyError):
        taken = {path.name for path in out.iterdir()} - {"index"} if out.is_dir() else set()
        there = identity if not taken else None
    if there != identity:
        raise UserError(f"--out {out}: holds scores of another model or other data, or other files; name another")
    write_json(out / "score.json", {"identity": identity, "complete": False})


def score_embeddings(index: EmbeddingFolder, out: Path, files: ScoreFiles) -> None:
    """Cosines of embeddings that exist, this rank's part of the shards that are not done."""
    done = set(comm.broadcast_object(files.claim().done() if comm.is_rank0() else None))
    mine = range(comm.rank(), len(index.counts), comm.world())
    todo = [shard for shard in mine if shard not in done and index.counts[shard]]
    for shard in progress(todo, len(todo), "parts of rank 0 scored", comm.is_rank0()):
        images, texts = (Rows({0: paths[shard]}, [index.counts[shard]]) for paths in (index.images, index.texts))
        cos_N = np.empty(len(images), np.float32)
        for start, image_BD in images.blocks():
            image_BD = image_BD.astype(np.float32)
            text_BD = texts.take(np.arange(start, start + len(image_BD))).astype(np.float32)
            norm_B = np.linalg.norm(image_BD, axis=1) * np.linalg.norm(text_BD, axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):  # a row of zeros has no cosine: NaN
                cos_N[start : start + len(image_BD)] = (image_BD * text_BD).sum(1) / norm_B
        write_metadata(out, shard, index.keys(shard), index.captions(shard), None)
        unread = np.flatnonzero(np.isnan(cos_N)).tolist()
        files.write(shard, cos_N, dict.fromkeys(unread, "the embedding has no direction"))


@torch.no_grad()
def score_shards(
    scorer: "Scorer", samples: Samples, files: ScoreFiles, out: Path, keep: bool, batch_size: int, workers: int
) -> None:
    """Score this rank's part of the shards that are not done, each written as soon as it is whole, its scores last."""
    index = samples.index
    done = set(comm.broadcast_object(files.claim().done() if comm.is_rank0() else None))
    mine = [s for s in assign_shards(index.counts, comm.world(), done)[comm.rank()] if s not in done]
    todo = ShardBatches(index.offsets, mine, batch_size)
    parts, device, width = [], comm.device(), width_of(scorer)
    dataset = Pairs(samples, todo, scorer.preprocess, scorer.tokenize)
    reading = zip(todo, fetched_ahead(batches(dataset, 0, workers, ignore), dataset))
    for (row_B, _), rows in progress(reading, len(todo), "batches of rank 0 scored", comm.is_rank0()):
        if rows.valid.any():
            image_BD, text_TD = scorer.encode(rows.images.to(device), rows.tokens.to(device))
            least_B = least_similar(image_BD, text_TD, rows.caption_of.to(device))
            text_BD, captions = text_TD[least_B], [rows.captions[number] for number in least_B.tolist()]
            cos_B = (image_BD * text_BD).sum(1).masked_fill(~rows.valid.to(device), float("nan"))
            unread_B1 = cos_B.isnan()[:, None]
            embeddings = (some_BD.half().masked_fill(unread_B1, 0).cpu().numpy() for some_BD in (image_BD, text_BD))
            parts.append((rows, cos_B.cpu().numpy(), captions, *embeddings))
        else:
            first = dict(zip(reversed(rows.caption_of.tolist()), reversed(rows.captions)))
            captions = [first[row] for row in range(len(rows.valid))]
            none_BD = np.zeros((len(captions), width), np.float16)
            parts.append((rows, np.full(len(captions), np.nan, np.float32), captions, none_BD, none_BD))
        shard = int(index.place(row_B[0])[0])
        if row_B[-1] + 1 == index.offsets[shard + 1]:
            write_shard(out, shard, index, files, parts, keep)
            parts = []


@torch.no_grad()
def width_of(scorer: "Scorer") -> int:
    """Numbers of an embedding: also of a shard of which no pair can be read, for all parts have one width."""
    blank = scorer.preprocess(Image.new("RGB", (8, 8)))[None]
    device = comm.device()
    return scorer.encode(blank.to(device), scorer.tokenize([""]).to(device))[0].shape[1]


def write_shard(out: Path, shard: int, index: ShardIndex, files: ScoreFiles, parts: list[Scored], keep: bool) -> None:
    """Everything of one shard."""
    rowsets, cosines, captions, images, texts = zip(*parts)
    hashes = np.concatenate([rows.hashes for rows in rowsets])
    if keep:
        for kind, arrays in (("img_emb", images), ("text_emb", texts)):
            save_array(part_path(out, kind, shard), np.concatenate(arrays))
        save_array(part_path(out, "cells", shard), np.concatenate([rows.cells for rows in rowsets]))
    write_metadata(out, shard, index.keys(shard), sum(captions, []), hashes if keep else None)
    cos_N = np.concatenate(cosines)
    files.write(shard, cos_N, {position: reason for rows in rowsets for _, position, _, reason in rows.bad})


def save_array(path: Path, array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    write_bytes(path, file.getbuffer())


def write_metadata(
    out: Path, shard: int, keys: list[str] | pa.ChunkedArray, captions: list[str | None], hashes: np.ndarray | None
) -> None:
    columns = {
        "key": keys if isinstance(keys, pa.ChunkedArray) else pa.array(keys, pa.string()),
        "caption": pa.array(captions, pa.string()),
    }
    if hashes is not None:
        columns["hash"] = hashes
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    write_bytes(part_path(out, "metadata", shard), file.getbuffer())


def conclude(
    out: Path, index: ShardIndex, selected: SelectionRound, score_N: np.ndarray, identity: str, about: dict
) -> str:
    """Save the mask; score.json last. Returns a line. On rank 0."""
    save_round(out, selected, index, {"epoch": None, "step": identity, "config": None})
    write_json(out / "score.json", {"identity": identity, "complete": True, "pairs": index.samples, **about})
    bad = int(np.isnan(score_N).sum())
    unread = f", {bad:,} could not be read" if bad else ""
    mean = np.nanmean(score_N) if bad < len(score_N) else float("nan")
    return (
        f"{out}: {index.samples:,} pairs scored by {about['model']}, mean cosine {mean:.3f}{unread}; {selected.line()}"
    )
