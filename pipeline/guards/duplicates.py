"""Duplicates: pictures that occur in many pairs. Targeted poisoning puts one picture under several captions of one
class.

Assumes    that the duplicates are equal pixel by pixel once decoded and resized; near-duplicates are not detected.
Source     deduplication by content hash, as image-text datasets are cleaned; the attack is Carlini and Terzis 2022.
Cost       one pass over all pictures; 8 bytes a pair on each host during the pass.
Evidence   tests/benchmarks/comparison.md.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from pydantic import Field

from pipeline.guards.base import Guard


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

    def kept(self, number_N: np.ndarray, valid_N: np.ndarray, offsets_S: np.ndarray) -> Iterator[np.ndarray]:
        """Pictures that cannot be read are kept."""
        number, count = np.unique(number_N[valid_N], return_counts=True)
        often = number[count > self.settings.max_pairs]
        for start, stop in zip(offsets_S, offsets_S[1:]):
            yield ~(np.isin(number_N[start:stop], often) & valid_N[start:stop])


@lru_cache(maxsize=1)
def weights(pixels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-(2**63), 2**63, pixels) | 1
