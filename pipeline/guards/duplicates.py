"""Duplicates: pictures that occur in many pairs. Targeted poisoning puts one picture under several captions of one
class.

Assumes    that the duplicates are equal pixel by pixel once decoded and resized; near-duplicates are not detected.
Source     deduplication by content hash, as image-text datasets are cleaned; the attack is Carlini and Terzis 2022.
Cost       8 bytes a pair, each on the rank that reads it; these numbers are sent twice.
Evidence   tests/benchmarks/comparison.md.
"""

from collections.abc import Callable, Mapping
from itertools import count

import numpy as np
import torch
from pydantic import Field

from pipeline.distributed import comm
from pipeline.guards.base import Guard

AT_ONCE = 1 << 24  # numbers that a rank counts at a time
BLOCK = 1 << 22  # pairs of a rank whose numbers are sent at a time
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, 2**64 by the golden ratio


class Duplicates(Guard):
    name = "duplicates"
    reason = "its picture occurs in too many pairs"
    features = ("hash",)

    class Settings(Guard.Settings):
        max_pairs: int = Field(default=2, gt=0, le=10**9)
        """A picture that occurs in more pairs than this is excluded from all of them."""

    settings: Settings

    def numbers(self, seen: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return seen["hash"]

    def excluded(self, number_M: np.ndarray, valid_M: np.ndarray, each_round: Callable[[int, int], None]) -> np.ndarray:
        """Each number is counted by the rank that it names, in turns of about AT_ONCE numbers a rank. Pictures that
        cannot be read are kept."""
        (longest,) = comm.all_reduce_max(len(number_M))
        blocks = [slice(at, at + BLOCK) for at in range(0, longest, BLOCK)]
        turns, found_M = -(-longest // AT_ONCE), np.zeros(len(number_M), bool)
        done = count(1)
        for turn in range(turns):
            parts = []
            for block in blocks:
                parts += comm.exchange(self.by_owner(number_M[block][valid_M[block]], turn, turns))
                each_round(next(done), 2 * turns * len(blocks))
            often = repeated(np.sort(np.concatenate(parts)), self.settings.max_pairs)
            for block in blocks:
                asked = self.by_owner(number_M[block][valid_M[block]], turn, turns)
                flags = comm.exchange([among(part, often) for part in comm.exchange(asked)])
                known = np.concatenate([part[flag] for part, flag in zip(asked, flags)])
                found_M[block] |= valid_M[block] & among(number_M[block], np.unique(known))
                each_round(next(done), 2 * turns * len(blocks))
        return found_M

    def by_owner(self, number_B: np.ndarray, turn: int, turns: int) -> list[np.ndarray]:
        """The numbers of this turn for each rank, sorted; of one that comes often no more than make it often."""
        # The high bits of the product depend on all bits of the number (Knuth 1973, section 6.4).
        bucket_B = (number_B.view(np.uint64) * MIX >> np.uint64(32)) * np.uint64(comm.world() * turns) >> np.uint64(32)
        mine_B = bucket_B % np.uint64(turns) == turn
        number_B, owner_B = number_B[mine_B], bucket_B[mine_B] // np.uint64(turns)
        parts = [np.sort(number_B[owner_B == rank]) for rank in range(comm.world())]
        most = self.settings.max_pairs + 1
        return [np.concatenate([part[:most], part[most:][part[most:] != part[:-most]]]) for part in parts]


def repeated(number_K: np.ndarray, times: int) -> np.ndarray:
    """Those of the sorted numbers that come more than so many times, each once."""
    return np.unique(number_K[times:][number_K[times:] == number_K[:-times]])


def among(number_B: np.ndarray, often_U: np.ndarray) -> np.ndarray:
    """bool (B,): which are among the sorted numbers often_U."""
    if not len(often_U):
        return np.zeros(len(number_B), bool)
    return often_U[np.minimum(np.searchsorted(often_U, number_B), len(often_U) - 1)] == number_B
