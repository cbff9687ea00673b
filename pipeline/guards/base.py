"""Interface of guards. A guard is a defence beyond the paper that excludes pairs once, after the first scoring.

To add one: a class with a Settings and a name in a module of this package, and an entry in REGISTRY (__init__.py);
`guards: {NAME: {...}}` in a config switches it on.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.settings import FrozenSection
from shards.samples.samples import Samples
from shards.views.loader import Views


@dataclass(frozen=True)
class Pairs:
    """The pairs of a run, and how they are read. device: where features are taken. each_round(done, rounds): called by
    all ranks after every batch of the pass over all pictures."""

    samples: Samples
    views: Views
    batch_size: int
    workers: int
    seed: int
    device: torch.device
    each_round: Callable[[int, int], None] = lambda done, rounds: None


class Guard(ABC):
    """Base class. The docstring of a guard's module has its assumptions, source, cost and evidence.

    Every tunable constant is a field of Settings, with its bounds.
    """

    name = ""
    reason = ""  # of an excluded pair, in its score file
    dtype: type[np.generic] = np.int64  # of `numbers`
    settings: FrozenSection  # of the class's own Settings

    class Settings(FrozenSection):
        """None by default."""

    def __init__(self, settings: FrozenSection):
        self.settings = settings

    def learn(self, pairs: Pairs, score_N: np.ndarray) -> dict:
        """Fit to a sample of the pairs, before `numbers` is called. All ranks call; returns entries for mask.json.

        score_N: float32, the first scores of all pairs, shard after shard; NaN for pairs that cannot be read."""
        return {}

    @abstractmethod
    def numbers(self, images_BCHW: torch.Tensor) -> np.ndarray:
        """dtype (B,): one number per picture, of unaugmented pictures uint8 (B, C, H, W) on the device."""

    @abstractmethod
    def excluded(self, number_M: np.ndarray, valid_M: np.ndarray) -> np.ndarray:
        """bool (M,): which of this rank's pairs are excluded. All ranks call.

        number_M: `numbers` of this rank's pairs; valid_M: False for pairs that cannot be read."""
