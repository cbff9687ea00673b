"""Duplicates: pictures that occur in many pairs. Targeted poisoning puts one picture under several captions of one
class.

Assumes    that the duplicates are equal pixel by pixel once decoded and resized; near-duplicates are not detected.
Source     deduplication by content hash, as image-text datasets are cleaned; the attack is Carlini and Terzis 2022.
Cost       one pass over all pictures; 8 bytes a pair, each on the rank that reads it; these numbers are sent once.
Evidence   tests/benchmarks/comparison.md.
"""

from functools import lru_cache

import numpy as np
import torch
from pydantic import Field

from pipeline.distributed import comm
from pipeline.guards.base import Guard

AT_ONCE = 1 << 22  # pairs of a rank whose numbers are compared at a time
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, 2**64 by the golden ratio (Knuth 1973, section 6.4)


class Duplicates(Guard):
    name = "duplicates"
    reason = "its picture occurs in too many pairs"

    class Settings(Guard.Settings):
        max_pairs: int = Field(default=2, gt=0, le=10**9)
        """A picture that occurs in more pairs than this is excluded from all of them."""

    settings: Settings

    def numbers(self, images_BCHW: torch.Tensor) -> np.ndarray:
        """int64 (B,): hash of each picture, the sum of its pixels with fixed random odd weights modulo 2**64."""
        flat_BP = images_BCHW.flatten(1).cpu().numpy()
        weight_P = weights(flat_BP.shape[1])
        return np.array([(pixels_P * weight_P).sum() for pixels_P in flat_BP], np.int64)

    def excluded(self, number_M: np.ndarray, valid_M: np.ndarray) -> np.ndarray:
        """Each picture's pairs are counted by the rank that its number names, in rounds of about AT_ONCE pairs of a
        rank, so that no rank holds more than that of others. Pictures that cannot be read are kept."""
        world = comm.world()
        mixed_M = number_M.view(np.uint64) * MIX >> np.uint64(32)  # the high bits of a product depend on all of them
        rounds = comm.all_reduce_max(-(-len(number_M) // AT_ONCE))[0]
        found_M = np.zeros(len(number_M), bool)
        for turn in range(rounds):
            row_P = np.flatnonzero(valid_M & (mixed_M // np.uint64(world) % np.uint64(rounds) == turn))
            number_U, unique_P, count_U = np.unique(number_M[row_P], return_inverse=True, return_counts=True)
            owner_U = (number_U.view(np.uint64) * MIX >> np.uint64(32)) % np.uint64(world)
            sent = [np.flatnonzero(owner_U == rank) for rank in range(world)]
            asked = comm.exchange([number_U[some] for some in sent])
            counts = comm.exchange([count_U[some] for some in sent])
            often = comm.exchange(self.often(asked, counts))
            often_U = np.zeros(len(number_U), bool)
            for some, flags in zip(sent, often):
                often_U[some] = flags
            found_M[row_P] = often_U[unique_P]
        return found_M

    def often(self, asked: list[np.ndarray], counts: list[np.ndarray]) -> list[np.ndarray]:
        """bool, for each number of each rank: whether it comes in more than `max_pairs` pairs of all ranks.

        asked[r], counts[r]: int64, the numbers of rank r that belong here, each once, and how many pairs it has of
        each."""
        _, unique_K = np.unique(np.concatenate(asked), return_inverse=True)
        total_U = np.bincount(unique_K, np.concatenate(counts))
        often_K = total_U[unique_K] > self.settings.max_pairs
        return np.split(often_K, np.cumsum([len(some) for some in asked])[:-1])


@lru_cache(maxsize=1)
def weights(pixels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-(2**63), 2**63, pixels) | 1
