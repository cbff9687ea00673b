"""Trigger classifier: statistics of pictures that are common among low scores and rare among high ones.

`trigger_clusters` finds what changes all pictures alike. A filter, as of photographs, changes each in its own way, and
shows in many statistics together. So, of the pairs that earlier guards do not exclude:

1. Two small networks learn to tell sampled pictures with low scores from those with high scores (more than the median)
   by their spectrum and their colours, each on half of the pictures. Honest pictures with low scores have little in
   common; those with a trigger do.
2. Each network judges the other's half. The threshold is the lowest judgement beyond which pictures are `ratio` times
   as frequent among low scores as among high ones.
3. Every pair whose picture is judged beyond it, by the mean of both networks, is excluded. More than the fraction `low`
   of all pairs is no trigger but a part of the data that the model has not learnt yet: then nothing is excluded.

Assumes    a trigger on some percent of the pictures with low scores (1 % of all pairs); captions that do not fit; no
           class of pictures that the model has not learnt at all: such a class would be excluded. Off by default.
Source     classifier two-sample tests (Lopez-Paz and Oquab 2017, arXiv:1610.06545), with cross-fitting; that low scores
           are the second sample is this project's.
Cost       once: some seconds on rank 0; on disk 51 bytes, and the spectrum, for each pair of the random sample.
Evidence   pipeline/guards/README.md, tests/benchmarks/attacks.json
Legend     L sampled pairs of low scores, H of high scores, N both, D numbers of a picture.
"""

import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
from pydantic import Field
from torch import nn

from pipeline.distributed import comm
from pipeline.guards.base import TriggerGuard
from pipeline.guards.sample import Sample

logger = logging.getLogger(__name__)

WIDTH, DROPOUT = 64, 0.3  # of the networks' two hidden layers
EPOCHS, BATCH, RATE, DECAY = 30, 256, 2e-3, 1e-2  # AdamW with a cosine schedule
FARTHEST = 8.0  # deviations of a number that count


class TriggerClassifier(TriggerGuard):
    name = "trigger_classifier"
    reason = "its picture has statistics that are common among low scores only"
    features: tuple[str, ...] = ("spectrum", "colours")

    class Settings(TriggerGuard.Settings):
        ratio: float = Field(default=10.0, ge=1, le=1e6)
        """Times that such pictures are more frequent among low scores than among high ones."""

    settings: Settings

    def learn(self, sample: Sample, device: torch.device) -> dict:
        found = self.found_in(sample, device)
        if not found:
            self.features = ()
            return {"pictures": 0}
        self.threshold, self.networks = found["threshold"], [network.to(device) for network in found["networks"]]
        return {"pictures": found["pictures"], "ratio": found["ratio"]}

    def find(self, low: dict, high: dict) -> dict | None:
        """Networks and threshold, if any is `ratio` times as frequent. low, high: {feature view: uint8 (., D)}."""
        x_ND = torch.cat([self.joined({name: torch.from_numpy(seen[name]) for name in seen}) for seen in (low, high)])
        low_N = torch.arange(len(x_ND)) < len(next(iter(low.values())))
        half_N = torch.from_numpy(np.random.default_rng(0).integers(0, 2, len(x_ND)))
        parts = [(x_ND[half_N == half], low_N[half_N == half]) for half in range(2)]
        if min(int(count) for _, of_N in parts for count in (of_N.sum(), (~of_N).sum())) < self.settings.least:
            return None
        networks = [fitted(*part) for part in parts]
        judged_N = torch.where(half_N == 0, judged(networks[1:], x_ND), judged(networks[:1], x_ND))
        judged_L, judged_H = (judged_N[of_N].sort(descending=True).values for of_N in (low_N, ~low_N))
        count_L = torch.arange(1, len(judged_L) + 1)
        above_L = torch.searchsorted(-judged_H, -judged_L, right=True) + 1
        ratio_L = count_L / len(judged_L) / (above_L / len(judged_H))
        enough = ((ratio_L >= self.settings.ratio) & (count_L >= self.settings.least)).nonzero()
        if not len(enough):
            return None
        last = int(enough[-1])
        about = {"pictures": last + 1, "ratio": round(float(ratio_L[last]), 2)}
        return {"networks": networks, "threshold": float(judged_L[last]), **about}

    def joined(self, seen: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float64 (B, D): in batches of any size the same judgements, up to what no threshold meets."""
        return torch.cat([seen[name] for name in TriggerClassifier.features], 1).double()

    def numbers(self, seen: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """bool (B,): whether a picture is excluded."""
        return judged(self.networks, self.joined(seen)) >= self.threshold

    def excluded(self, number_M: np.ndarray, valid_M: np.ndarray, each_round: Callable[[int, int], None]) -> np.ndarray:
        excluded_M = super().excluded(number_M, valid_M, each_round)
        count, pairs = comm.all_reduce_sum(np.array([excluded_M.sum(), valid_M.sum()])).tolist()
        if count <= self.settings.low * pairs:
            return excluded_M
        logger.warning(
            f"guard {self.name}: excludes nothing, for what it found is in {count / pairs:.0%} of the pairs, more than "
            f"the fraction low ({self.settings.low:g}): probably a class that the model has not learnt yet"
        )
        return np.zeros_like(excluded_M)


class Standardised(nn.Module):
    """Numbers in deviations from their mean."""

    def __init__(self, x_ND: torch.Tensor):
        super().__init__()
        self.mean_D, self.deviation_D = nn.Buffer(x_ND.mean(0)), nn.Buffer(x_ND.std(0) + 1)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return ((x_BD - self.mean_D) / self.deviation_D).clamp(-FARTHEST, FARTHEST)


def network_of(x_ND: torch.Tensor) -> nn.Sequential:
    """With random weights, for numbers as these are."""
    layers: list[nn.Module] = [Standardised(x_ND)]
    for width in (x_ND.shape[1], WIDTH):
        layers += [nn.Linear(width, WIDTH, dtype=x_ND.dtype), nn.ReLU(), nn.Dropout(DROPOUT)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1, dtype=x_ND.dtype))


@torch.enable_grad()
def fitted(x_ND: torch.Tensor, low_N: torch.Tensor) -> nn.Module:
    """A network whose output is the logit of a low score. The same for the same input; on the CPU."""
    x_ND = x_ND.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = network_of(x_ND[~low_N])
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        for _ in range(EPOCHS):
            for some in torch.randperm(len(x_ND)).split(BATCH):
                optimizer.zero_grad()
                nn.functional.binary_cross_entropy_with_logits(
                    network(x_ND[some])[:, 0], low_N[some].float()
                ).backward()
                optimizer.step()
            schedule.step()
    return network.eval().double().requires_grad_(False)


def judged(networks: list[nn.Module], x_BD: torch.Tensor) -> torch.Tensor:
    """float64 (B,): the mean of their outputs."""
    return torch.stack([network(x_BD)[:, 0] for network in networks]).mean(0)
