"""Trigger clusters: features that are common among pictures with low scores and rare among those with high scores.

A poisoned pair has a picture with a trigger and a caption of something else, so at the first selection round nearly all
of them have low scores. Natural features are as frequent among low scores as among high ones. So:

1. Sampled pictures are whitened: their features are made uncorrelated, of variance 1, by the mean and the covariance of
   pictures with high scores (half of those sampled; the others are the reference of step 3). A trigger becomes a long
   constant vector t, for it follows none of the correlations of natural pictures: two pictures that carry it have a
   cosine of about t.t / (D + t.t), two others one of 0 +- 1 / sqrt(D).
2. Each sampled picture with a low score and `least` near ones (a cosine beyond `near` deviations) gives a cluster. Its
   mean is the matched filter of what they share, the best linear detector (Turin 1960). A picture carries it if its
   response is more than half of the cluster's mean response, each member's without itself.
3. What is carried `ratio` times as often among low scores as among high ones is a trigger, unless the pictures are
   alike in all else (a series that the model has not learnt yet). Every pair whose picture carries it is excluded.

Feature views: pixels; maxima of random 3 x 3 filters (Saxe et al. 2011), which are the same wherever a patch is; the
differences of neighbouring pixels and the spectrum, which warps and filters change by the same factors in all pictures.

Assumes    `least` sampled pictures with low scores that a trigger changes alike in a view; captions that do not fit.
Source     spectral signatures (Tran, Li and Madry 2018), on whitened pixels in place of the representation of one class
           that a poisoned model has; the reference of high scores is ours.
Cost       once: up to 4 * `sample` ** 2 * (768 + 128 + 512 + 108) multiplications on rank 0; on disk 1,524 bytes for
           each of the 4 * `sample` / `low` random pairs with which the first scoring begins (pictures of 32 pixels).
Evidence   tests/benchmarks/comparison.md, tests/benchmarks/attacks.json
Legend     L sampled pairs of low scores, H of high scores, Q seeds, D numbers of a picture.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from pydantic import Field

from pipeline.distributed import comm
from pipeline.guards.base import TriggerGuard
from pipeline.guards.sample import Sample
from pipeline.guards.statistics import alike, robust, whitening

AT_ONCE = 256  # seeds whose near pictures are found at once
CLOSER = {"spectrum": 2 / 3}  # of `near`, in a view of so few numbers that unlike pictures have larger cosines
COMPARED = 16  # pictures of a cluster that are compared with each other


class TriggerClusters(TriggerGuard):
    name = "trigger_clusters"
    reason = "its picture has a trigger that is common among low scores"
    features = ("pixels", "filters", "differences", "spectrum")

    class Settings(TriggerGuard.Settings):
        near: float = Field(default=6.0, ge=0, le=1e6)
        """Robust deviations of the cosines of random pictures, beyond which two are near."""
        ratio: float = Field(default=6.0, ge=1, le=1e6)
        """Times that a trigger is more frequent among low scores than among high ones."""
        alike: float = Field(default=0.35, ge=-1, le=1)
        """Largest median cosine of members with their nearest member, after their mean is subtracted."""

    settings: Settings

    def learn(self, sample: Sample, device: torch.device) -> dict:
        found = self.found_in(sample, device)
        self.filters = [(it["features"], torch.tensor(it["filter"], device=device), it["threshold"]) for it in found]
        self.features = tuple(dict.fromkeys(name for name, _, _ in self.filters))
        return {"triggers": [{key: one[key] for key in ("features", "pictures", "ratio", "alike")} for one in found]}

    def find(self, low: dict, high: dict) -> list[dict]:
        """Triggers of a sample, each without the pictures of earlier ones. low, high: {feature view: uint8 (., D)}."""
        found, pixel_LD, rest_L, rest_H = [], None, np.ones(len(low["pixels"]), bool), None
        for name in self.features if len(low["pixels"]) and len(high["pixels"]) > 1 else ():
            low_LD, high_HD = (torch.from_numpy(seen[name]).to(comm.device()).float() / 255 for seen in (low, high))
            mean_D, white_DD = whitening(high_HD[::2])  # in which these are shorter than others are
            low_LD, high_HD = (low_LD - mean_D) @ white_DD, (high_HD[1::2] - mean_D) @ white_DD
            pixel_LD = low_LD if pixel_LD is None else pixel_LD
            rest_H = np.ones(len(high_HD), bool) if rest_H is None else rest_H
            clusters = clusters_of_seeds(low_LD, high_HD, np.flatnonzero(rest_L), self.settings, CLOSER.get(name, 1))
            for filter_D, threshold, row_M, row_K in sorted(clusters, key=lambda one: -len(one[2]) / (len(one[3]) + 1)):
                new_M, new_K = row_M[rest_L[row_M]], row_K[rest_H[row_K]]
                ratio = len(new_M) / len(low_LD) / ((len(new_K) + 1) / len(high_HD))
                if len(new_M) < self.settings.least or ratio < self.settings.ratio:
                    continue
                some_M = np.random.default_rng(0).permutation(new_M)[:COMPARED]
                likeness = alike(pixel_LD[some_M], float(pixel_LD.norm(dim=1).median()))
                if likeness > self.settings.alike:
                    continue
                rest_L[row_M], rest_H[row_K] = False, False
                weight_D = white_DD @ filter_D
                about = {"pictures": len(row_M), "ratio": round(ratio, 2), "alike": round(likeness, 2)}
                about |= {"filter": weight_D.cpu().numpy(), "threshold": threshold + float(mean_D @ weight_D)}
                found.append({"features": name, **about})
        return found

    def numbers(self, seen: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """bool (B,): whether a picture is excluded."""
        some = next(iter(seen.values()))
        excluded_B = torch.zeros(len(some), dtype=torch.bool, device=some.device)
        for name, filter_D, threshold in self.filters:
            excluded_B |= (seen[name].float() / 255) @ filter_D > threshold
        return excluded_B


def clusters_of_seeds(
    low_LD: torch.Tensor, high_HD: torch.Tensor, seed_Q: np.ndarray, settings: TriggerClusters.Settings, closer: float
) -> Iterator[tuple]:
    """Yield (filter_D, threshold of the response, rows among low scores, rows among high ones) of each seed whose
    cluster is a trigger. low_LD, high_HD: whitened; closer: factor of `near`."""
    length_L = low_LD.norm(dim=1).clamp(min=1e-6)
    unit_LD = low_LD / length_L[:, None]
    unit_HD = high_HD / high_HD.norm(dim=1, keepdim=True).clamp(min=1e-6)
    one, other = np.random.default_rng(0).integers(0, len(unit_HD), (2, 20_000))
    _, deviation = robust((unit_HD[one] * unit_HD[other]).sum(1)[torch.from_numpy(one != other)])
    for at in range(0, len(seed_Q), AT_ONCE):
        in_QL = unit_LD[seed_Q[at : at + AT_ONCE]] @ unit_LD.T > settings.near * closer * deviation
        in_QL = in_QL[in_QL.sum(1) > settings.least]  # itself too
        for _ in range(2):  # the second time of what the first filter found
            count_Q = in_QL.sum(1).clamp(min=1)
            filter_QD = in_QL.float() @ low_LD / count_Q[:, None]
            low_QL, high_QH = filter_QD @ low_LD.T, filter_QD @ high_HD.T
            # The mean response of the members, of each without its own part in the filter.
            own_Q = (in_QL * length_L**2).sum(1) / count_Q
            top_Q = (count_Q * filter_QD.square().sum(1) - own_Q) / (count_Q - 1).clamp(min=1)
            threshold_Q = (high_QH.median(1).values + top_Q) / 2
            in_QL = low_QL > threshold_Q[:, None]
        in_QH = high_QH > threshold_Q[:, None]
        ratio_Q = in_QL.sum(1) / len(low_LD) / ((in_QH.sum(1) + 1) / len(high_HD))
        for q in ((ratio_Q >= settings.ratio) & (in_QL.sum(1) >= settings.least)).nonzero()[:, 0].tolist():
            rows = (np.flatnonzero(in_Q[q].cpu().numpy()) for in_Q in (in_QL, in_QH))
            yield filter_QD[q], float(threshold_Q[q]), *rows
