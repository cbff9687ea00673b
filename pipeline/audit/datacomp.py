"""A mask as DataComp's subset file: the uids of the safe pairs."""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.audit.blocks import blocks
from pipeline.audit.files import find_shards, members, output
from shards.errors import UserError
from shards.order.safe_mask import SavedMask
from shards.progress import progress
from shards.shares import Parts, Share, in_order, processes
from shards.storage.files import whole_file

UID = np.dtype([("uid", "S16"), ("there", "?")])  # 128 bits in the order of their numbers, and whether there are any
MAX_JSON = 1 << 20  # bytes of a .json member; more is not read


def datacomp(saved: SavedMask, out: Path | str) -> int:
    """`write_subset` of the keys that are uids (32 hex digits)."""
    found = (saved.table(number, ("key",))["key"].to_pylist() for number in range(len(saved.shards)))
    mend = "if the .json members have a uid, add --shards"
    return write_subset(saved, out, (as_array([uid_of_key(key) for key in names]) for names in found), mend)


def datacomp_of_shards(
    saved: SavedMask, out: Path | str, patterns: Sequence[str | Path], share: Share = Share()
) -> int | None:
    """`write_subset` of the uids in the .json members of the shards in `patterns`, or else the keys. The uids of each
    shard are kept in a folder beside `out` until it is written, so that the same command resumes."""
    paths = find_shards(saved, patterns, share)
    needed = [number for number in range(len(saved.shards)) if saved.mask.counts_S[number]]
    lacking = next((saved.shards[number]["name"] for number in needed if number not in paths), None)
    if lacking:
        raise UserError(f"--shards: lacks {lacking}; a subset file is of all shards of the mask, name them all")
    kept = Path(out).with_name(f".{Path(out).name}.uids")
    parts, own, workers = Parts(kept, share, saved.meta["fingerprint"]), share.of(list(paths)), processes()
    jobs = ((saved.folder, number, paths[number], uid_file(kept, saved, number)) for number in own)
    with share.alone(), ProcessPoolExecutor(workers) as pool:
        for _ in progress(in_order(pool, save_uids, jobs, 2 * workers), len(own), "shards read", share.shown):
            pass
    if parts.join(None) is None:
        return None
    found = (
        np.load(uid_file(kept, saved, number)) if saved.mask.counts_S[number] else np.zeros(0, UID)
        for number in range(len(saved.shards))
    )
    with share.alone():
        written = write_subset(saved, out, found, "such shards have no subset file")
    shutil.rmtree(kept)
    return written


def write_subset(saved: SavedMask, out: Path | str, found: Iterable[np.ndarray], mend: str) -> int:
    """DataComp's subset file: a sorted .npy of dtype "u8,u8" with the two halves of the safe pairs' 128-bit uids, each
    once.

    found: UID (N,) of each shard. A uid that a risky pair has too is left out, for DataComp's resharder would take
    both. At most 34 bytes a pair are in memory. Format: resharder.py and README of github.com/mlfoundations/datacomp.
    Raises UserError where a safe pair has no uid; mend: what to do then.
    """
    taken = {view: np.empty(int(saved.mask.counts(view).sum()), "S16") for view in ("safe", "risky")}
    filled = dict.fromkeys(taken, 0)
    for number, uid_N in enumerate(found):
        safe_N, there_N = saved.mask.shard_flags(number), uid_N["there"]
        without = np.flatnonzero(safe_N & ~there_N)
        if len(without):
            key = saved.table(number, ("key",))["key"][int(without[0])].as_py()
            raise UserError(
                f"--format datacomp: sample {key!r} of shard {saved.shards[number]['name']} has no uid, "
                f'expected 32 hex digits as "uid" in its .json member or as its key; {mend}'
            )
        for view, flags_N in (("safe", safe_N), ("risky", ~safe_N & there_N)):
            here = uid_N["uid"][flags_N]
            taken[view][filled[view] : filled[view] + len(here)] = here
            filled[view] += len(here)
    safe_M, risky_M = taken["safe"], taken["risky"][: filled["risky"]]
    safe_M.sort()
    keep_M = np.ones(len(safe_M), bool)
    keep_M[1:] = safe_M[1:] != safe_M[:-1]
    for part in blocks(len(risky_M) if len(safe_M) else 0):
        place_B = np.minimum(np.searchsorted(safe_M, risky_M[part]), len(safe_M) - 1)
        keep_M[place_B[safe_M[place_B] == risky_M[part]]] = False  # the first of equal ones, the others are out
    uids = safe_M[keep_M]
    del taken, safe_M, risky_M
    subset = uids.view(">u8").astype("u8").view("u8,u8")
    with output(out) as file:
        np.save(file, subset, allow_pickle=False)
    return len(subset)


def uid_file(folder: Path, saved: SavedMask, number: int) -> Path:
    """Where the uids of a shard are kept. Its name is the shard's content: another mask of the same shards has them
    too."""
    return folder / f"{saved.shards[number]['fingerprint']}.npy"


def save_uids(folder: Path, number: int, path: Path, target: Path) -> None:
    """Write the UID (N,) of one shard of the mask in `folder` to `target`, unless it is there. Raises UserError."""
    if target.exists():
        return
    saved = opened(folder)
    names = saved.table(number, ("key",))["key"].to_pylist()
    uids = read_uids(path, saved.shards[number]["fingerprint"], names)
    with whole_file(target) as file:
        np.save(file, uids, allow_pickle=False)


@lru_cache(maxsize=1)
def opened(folder: Path) -> SavedMask:
    """The mask in `folder`; each process opens it once."""
    return SavedMask(folder)


def read_uids(path: Path | str, fingerprint: str, names: list[str]) -> np.ndarray:
    """UID (N,) of one shard, from the .json members, or else the keys `names`. Raises UserError."""
    uids = [uid_of_key(key) for key in names]
    found = members(path, fingerprint)
    with open(path, "rb") as file:
        for member in found:
            if member.extension == "json" and member.length <= MAX_JSON:
                file.seek(member.offset)
                try:
                    uid = json.loads(file.read(member.length))["uid"]
                    if re.fullmatch("[0-9a-fA-F]{1,32}", uid):
                        uids[member.position] = bytes.fromhex(uid.zfill(32))
                except (ValueError, KeyError, TypeError, RecursionError):
                    pass  # no uid in there
    return as_array(uids)


def uid_of_key(key: str) -> bytes | None:
    """16 bytes of a key that is a uid, or None."""
    base = key.rpartition("/")[2]
    return bytes.fromhex(base) if re.fullmatch("[0-9a-fA-F]{32}", base) else None


def as_array(uids: list[bytes | None]) -> np.ndarray:
    """UID (N,) of a list of 16 bytes or None."""
    return np.array([(uid or b"", uid is not None) for uid in uids], UID)
