"""Interface of guards. A guard is a defence beyond the paper that excludes pairs once, after the first scoring.

To add one: a class with a Settings and a name in a module of this package, and an entry in REGISTRY (__init__.py);
`guards: {NAME: {...}}` in a config switches it on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field

from pipeline.distributed import comm
from pipeline.guards.features import distinct
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


class TriggerGuard(Guard):
    """Base of guards that learn from a random sample what is common in pictures with low scores and rare in those with
    high scores, and exclude all pairs whose pictures have it. Uint8 features only."""

    dtype = np.bool_

    class Settings(Guard.Settings):
        low: float = Field(default=0.1, ge=0.001, le=0.5)
        """Fraction of the pairs whose scores are low. Those above the median are high."""
        sample: int = Field(default=8_192, ge=64, le=10**7)
        """Pairs with low scores, and twice as many with high ones, whose pictures are compared, at most."""
        least: int = Field(default=8, ge=2, le=10**7)
        """Smallest number of pictures with low scores that a trigger is found in."""

    settings: Settings

    def sampled(self, count: int) -> int:
        return min(count, int(4 * self.settings.sample / self.settings.low))

    def found_in(self, sample: Sample, device: torch.device) -> Any:
        """What `find` finds in the sample, on all ranks. All ranks call."""
        return comm.on_rank0(self.find_on_rank0, sample, device)

    def find_on_rank0(self, sample: Sample, device: torch.device) -> Any:
        low, high = sample.low_and_high(self.settings.low, self.settings.sample, device)
        return self.find(*(distinct(sample.features(rows, self.features)) for rows in (low, high)))

    @abstractmethod
    def find(self, low: dict[str, np.ndarray], high: dict[str, np.ndarray]) -> Any:
        """What distinguishes pictures with low scores from those with high scores. low, high: {feature: uint8 (., D)},
        without pictures that occur twice."""

    def excluded(self, number_M: np.ndarray, valid_M: np.ndarray, each_round: Callable[[int, int], None]) -> np.ndarray:
        return number_M & valid_M
