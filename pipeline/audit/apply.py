"""Filtered copies of shards, for those who want a copy: the kept samples with all their members, byte for byte. Several
processes may share the shards (shards.shares)."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.audit.files import find_shards, members, output
from shards.errors import UserError
from shards.index.build_index import turn
from shards.order.safe_mask import SafeMask, SavedMask
from shards.progress import progress
from shards.shares import Parts, Share, in_order, processes
from shards.storage.files import claim_folder, remove_leftovers, write_json

RECORD = 10_240  # bytes; tar archives are padded to a multiple of it
MARK = "applied.json"


def apply_mask(
    folder: Path | str,
    patterns: Sequence[str | Path],
    out: Path | str,
    keep: str = "safe",
    review: Path | str | None = None,
    workers: int | None = None,
    share: Share = Share(),
) -> str | None:
    """Write OUT/NAME for each shard of this share of `patterns`, with its safe (or "risky") samples only; returns what
    was done of all as a line, or None where another process does.

    Shards that are in OUT already are kept, so that the same command resumes after a failure; OUT/applied.json says of
    which mask they are. OUT/sizes.json holds the samples of each shard, as open_clip reads them. `review`: the ticks of
    a report, which the mask gives way to. Raises UserError if the mask keeps no pair, or naming the shard that is not
    the mask's, before anything of it is copied.
    """
    saved, out = SavedMask(folder), Path(out)
    if review:
        saved.mask = reviewed(saved, review)
    if not saved.mask.counts(keep).any():
        raise UserError(
            f"mask {folder}: has no {keep} pair, so nothing would be copied; make one that has, for example of scores "
            f"with `safeclip mask filter {folder} --by cosine --remove .05 --out MASK`"
        )
    paths = find_shards(saved, patterns, share)
    numbers = list(paths)
    claim(out, saved, keep)
    parts, workers = Parts(out, share, keep, numbers), workers or processes()

    def jobs() -> Iterator[tuple[Path, str, np.ndarray, Path]]:
        for number in share.of(numbers):
            flags_N, shard = saved.mask.shard_flags(number), saved.shards[number]
            yield paths[number], shard["fingerprint"], flags_N if keep == "safe" else ~flags_N, out / shard["name"]

    with share.alone(), ProcessPoolExecutor(workers) as pool:
        done = in_order(pool, make_copy, jobs(), 2 * workers)
        made = sum(progress(done, len(share.of(numbers)), "shards copied", share.shown))
    found = parts.join(made)
    if found is None:
        return None
    kept_S = saved.mask.counts(keep)
    remove_leftovers([out / MARK, *(out / saved.shards[number]["name"] for number in paths)])
    with turn(out):
        write_sizes(out, {saved.shards[number]["name"]: int(kept_S[number]) for number in paths})
    kept, samples = sum(kept_S[number] for number in paths), sum(saved.mask.counts_S[number] for number in paths)
    before = len(paths) - sum(found)
    there = f", {before} of them were there already" if before else ""
    return f"{out}: {kept:,} {keep} of {samples:,} samples in {len(paths)} shards{there}"


def reviewed(saved: SavedMask, path: Path | str) -> SafeMask:
    """The saved mask with the pairs that a person ticked "poison" risky and those ticked "fine" safe. Raises
    UserError.

    `path`: CSV with shard, position, fingerprint (of the shard, may be empty) and verdict, as a report exports it.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # a spreadsheet may have saved it
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--review {path}: cannot be read ({error}); export the ticks of a report again") from None
    flags_S = [saved.mask.shard_flags(shard) for shard in range(len(saved.shards))]
    for line, row in enumerate(rows, 2):
        name, verdict = (row.get("shard") or "").removeprefix("'"), row.get("verdict")
        number, position = saved.shards.number(name), row.get("position") or ""
        wrong = None
        if number is None:
            wrong = f"shard {name!r} is none of mask {saved.folder}"
        elif not position.isdecimal() or int(position) >= len(flags_S[number]):
            wrong = f"position {position!r}, expected 0 to {len(flags_S[number]) - 1}"
        elif verdict not in ("poison", "fine"):
            wrong = f"verdict {verdict!r}, expected poison or fine"
        elif row.get("fingerprint") and row["fingerprint"] != saved.shards[number]["fingerprint"]:
            wrong = (
                f"shard {name} had fingerprint {row['fingerprint']} in the report, "
                f"here {saved.shards[number]['fingerprint']}"
            )
        if wrong:
            raise UserError(f"--review {path}: line {line}: {wrong}; take the ticks of a report on these shards")
        flags_S[number][int(position)] = verdict == "fine"
    return SafeMask.from_flags(saved.mask.counts_S, np.concatenate(flags_S))


def claim(out: Path, saved: SavedMask, keep: str) -> None:
    """Note in OUT which mask and side its shards are of. Raises UserError when it is in use for something else."""
    bits = hashlib.blake2b(saved.mask.bits.tobytes(), digest_size=16).hexdigest()
    mark = {"fingerprint": saved.meta["fingerprint"], "epoch": saved.meta["epoch"], "bits": bits, "keep": keep}
    there = claim_folder(out / MARK, mark)
    if there != mark:
        raise UserError(
            f"--out {out}: expected no such folder, an empty one, or one with the {keep} samples of {saved.folder}; "
            f"it holds {'samples of another mask, or its other side' if there else 'other files'}; name another"
        )


def make_copy(path: Path, fingerprint: str, kept_N: np.ndarray, target: Path) -> bool:
    """`filter_shard` unless there is a file at `target`; whether it was written."""
    if target.exists():
        return False
    filter_shard(path, fingerprint, kept_N, target)
    return True


def filter_shard(path: Path, fingerprint: str, kept_N: np.ndarray, target: Path) -> None:
    """Write the samples of one shard where `kept_N` (bool by position) to `target`. Raises UserError."""
    found = members(path, fingerprint)
    with open(path, "rb") as source, output(target) as file:
        for member in found:
            if kept_N[member.position]:
                source.seek(member.start)
                left = member.stop - member.start
                while left:
                    left -= file.write(source.read(min(left, 1 << 20)))
        end = file.tell() + 1024  # two blocks of zeros end an archive
        file.write(bytes(1024 + -end % RECORD))


def write_sizes(out: Path, sizes: dict[str, int]) -> None:
    """Add {shard: samples} to the sizes.json of each folder below `out` that has shards in it."""
    for folder in {os.path.dirname(name) for name in sizes}:
        path = out / folder / "sizes.json"
        there = json.loads(path.read_text()) if path.exists() else {}
        here = {os.path.basename(name): size for name, size in sizes.items() if os.path.dirname(name) == folder}
        write_json(path, dict(sorted({**there, **here}.items())))
