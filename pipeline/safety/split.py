"""The heart: scores -> one mixture -> one cut -> one mask, decided once and received by every rank (METHOD step 4)."""

from dataclasses import dataclass

import numpy as np

from pipeline import comm
from pipeline.safety.mixture import DegenerateFit, Mixture, fit_mixture, histogram, upper_cut
from pipeline.safety.scores import load_cosines
from pipeline.safety.selection import count_at_least, growth, select_top
from shards.masks import SafeMask


@dataclass
class Split:
    """Before one epoch: the cosines of all pairs, the mixture fitted to them, the cut, and which pairs are safe."""

    cos_N: np.ndarray  # float32 in [-1, 1], NaN = unreadable
    mixture: Mixture | None
    cut: float  # the lowest cosine of the safe set
    share: float  # safe pairs / all pairs
    first_share: float  # of the run's first split: the schedule grows from it
    mask: SafeMask
    note: str = ""

    def summary(self):
        """dict for metrics and mask.json."""
        return {
            "share": self.share,
            "first_share": self.first_share,
            "cut": self.cut,
            "note": self.note,
            "mixture": self.mixture.to_dict() if self.mixture else None,
        }


def split_pairs(cos_N, counts_S, selection, number, first_share=None):
    """Split for the `number`-th split (from 0) of a run; `first_share` is that of its first split. Same bits on every rank."""
    decided = decide(cos_N, selection, number, first_share) if comm.is_main() else None
    mixture, share, first_share, note = comm.broadcast_object(decided)
    safe_N = select_top(cos_N, round(share * len(cos_N))) if comm.is_main() else None
    mask = broadcast_mask(safe_N, counts_S)
    safe_N = mask.flags()
    cut = float(cos_N[safe_N].min()) if safe_N.any() else float("inf")
    return Split(cos_N, mixture, cut, float(safe_N.mean()), first_share, mask, note)


def decide(cos_N, selection, number, first_share):
    """(mixture, share, first share, note). A fit that is no mixture of two never decides: the configured share holds."""
    note = ""
    try:
        mixture = fit_mixture(histogram(cos_N, -1.0, 1.0), -1.0, 1.0)
    except DegenerateFit as error:
        mixture, note = None, f"no mixture: {error}"
    if number == 0 or first_share is None:
        first_share = selection.first_share
        if first_share is None:
            try:
                found = count_at_least(cos_N, upper_cut(mixture, selection.posterior)) / len(cos_N) if mixture else 0.0
            except DegenerateFit as error:
                found, note = 0.0, f"no cut: {error}"
            first_share = min(max(found, selection.least_share), selection.cap)
            if first_share != found:
                note = note or f"posterior > {selection.posterior} holds for {found:.1%}; the share is kept in bounds"
    share = growth(first_share, number, selection.growth, selection.cap)
    return mixture, share, first_share, note


def broadcast_mask(safe_N, counts_S):
    """SafeMask of rank 0's flags on every rank, sent shard by shard as packed bits."""
    mask = SafeMask.from_flags(counts_S, safe_N if comm.is_main() else np.zeros(int(counts_S.sum()), bool))
    for shard in range(len(counts_S)):
        mask.shard_bits(shard)[:] = comm.broadcast_bytes(mask.shard_bits(shard))
    return mask


def save_split(folder, split, index, meta):
    """Write the mask, whose mask.json comes last; the cosines lie in `folder`/scores already. On rank 0 only."""
    split.mask.save(folder, {"fingerprint": index.fingerprint, **split.summary(), **meta})


def load_split(folder, index):
    """Split saved in `folder`. Raises UserError when it is damaged or belongs to other shards."""
    mask, meta = SafeMask.load(folder, index.fingerprint)
    cos_N = load_cosines(folder, index.counts)
    mixture = Mixture.from_dict(meta["mixture"]) if meta["mixture"] else None
    return Split(cos_N, mixture, meta["cut"], meta["share"], meta["first_share"], mask, meta["note"])
