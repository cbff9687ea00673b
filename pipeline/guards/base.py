"""Interface of guards. A guard is a defence beyond the paper that excludes pairs once, after the first scoring.

To add one: a class with a Settings and a name in a module of this package, and an entry in REGISTRY (__init__.py);
`guards: {NAME: {...}}` in a config switches it on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.settings import FrozenSection

if TYPE_CHECKING:
    from pipeline.guards.sample import Sample


class Guard(ABC):
    """Base class. The docstring of a guard's module has its assumptions, source, cost and evidence.

    Every tunable constant is a field of Settings, with its bounds.
    """

    name = ""
    reason = ""  # of an excluded pair, in its score file
    dtype: type[np.generic] = np.int64  # of `numbers`
    features: tuple[str, ...] = ()  # names of features.FEATURES that `learn` and `numbers` take
    settings: FrozenSection  # of the class's own Settings

    class Settings(FrozenSection):
        """None by default."""

    def __init__(self, settings: FrozenSection):
        self.settings = settings

    def sampled(self, count: int) -> int:
        """Of so many pairs, how many `learn` needs at random."""
        return 0

    def learn(self, sample: Sample, device: torch.device) -> dict:
        """Fit to a sample of the pairs that is scored before the others. All ranks call, before `numbers`; returns
        entries for mask.json. May leave out `features` that `numbers` does not need."""
        return {}

    @abstractmethod
    def numbers(self, seen: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """dtype (B,): one number per picture, of its `features`, (B, ...) each, on the device."""

    @abstractmethod
    def excluded(self, number_M: np.ndarray, valid_M: np.ndarray, each_round: Callable[[int, int], None]) -> np.ndarray:
        """bool (M,): which of this rank's pairs are excluded. All ranks call.

        number_M: `numbers` of this rank's pairs; valid_M: False for pairs that cannot be read. Where it takes long, all
        ranks call each_round(done, rounds) now and then."""
