"""The heart: scores -> one mixture -> one threshold -> one mask, decided once and received by every rank (METHOD step 4)."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.distributed import comm
from pipeline.safety.diagnosis import change, separation
from pipeline.safety.mixture import DegenerateFit, Mixture, fit_mixture, fit_sklearn, histogram, posterior_threshold
from pipeline.safety.negative_controls import passing
from pipeline.safety.selection import (
    RANGES,
    identity,
    count_at_least,
    scheduled_fraction,
    kth_largest,
    score_of,
    top_by_shard,
)
from shards.errors import UserError
from shards.order.safe_mask import SafeMask, byte_starts, shard_list
from shards.storage.files import write_bytes

BLUNT = 1 / 3  # of the negative controls, by Wilson's lower bound: where more would pass, the round says so


@dataclass
class SelectionRound:
    """Before one epoch: the mixture fitted to the scores of all pairs, the threshold, and which pairs are safe."""

    mixture: Mixture | None
    threshold: float  # the lowest score of the safe set
    fraction: float  # safe pairs / all pairs
    first_fraction: float  # of the run's first round: the schedule grows from it
    mask: SafeMask
    note: str
    # diagnosis.separation, diagnosis.change, the fraction by posterior and by schedule, pairs that guards exclude
    diagnosis: dict
    counts_K: np.ndarray  # mixture.histogram of the scores
    control_C: np.ndarray  # scores of the negative controls
    rank_by: str = "score"  # what the safe set is the highest of: score, or the mixture's posterior

    def summary(self):
        """dict for metrics and mask.json."""
        return {
            "fraction": self.fraction,
            "first_fraction": self.first_fraction,
            "threshold": self.threshold,
            "rank_by": self.rank_by,
            "note": self.note,
            "mixture": self.mixture.to_dict() if self.mixture else None,
            "diagnosis": self.diagnosis,
        }

    def line(self):
        """The round in one line, for the person who watches."""
        of = "score >=" if self.rank_by == "score" else "by posterior, lowest score"
        text, found = f"safe {self.fraction:.1%}, {of} {self.threshold:.3f}", self.diagnosis
        if "ashman_d" in found:
            text += f", D {found['ashman_d']:.2f}, overlap {found['overlap']:.1%}"
        if found.get("excluded"):
            text += f", {found['excluded']:,} excluded"
        if "flips_in" in found:
            text += f", {found['flips_in']:,} in, {found['flips_out']:,} out"
        if "negative_controls" in found:
            text += ", negative controls {passed} of {count}".format(**found["negative_controls"])
        return text + (f" ({self.note})" if self.note else "")


def select_pairs(
    score_N, counts_S, selection, number, first_fraction=None, before=None, control_C=(), excluded=0, kind="cosine"
):
    """SelectionRound number `number` (from 0) of a run; `first_fraction` is that of its first round. Same bits on every
    rank.

    Every rank counts its part of the scores, rank 0 decides, all receive. `before`: folder of the round before, or
    None. `control_C`: scores of the negative controls, of which the round only tells how many would pass. `excluded`: number of
    the pairs that guards exclude; the fraction is one of the others. `kind`: of RANGES.
    """
    control_C = comm.broadcast_object(np.asarray(control_C, np.float32))
    limits = RANGES[kind]
    mine_N = np.array_split(score_N, comm.world())[comm.rank()]
    counts_K = comm.all_reduce_sum(histogram(mine_N, *limits))
    eligible = len(score_N) - excluded
    decided = comm.on_rank0(decide, counts_K, score_N, selection, number, first_fraction, eligible, limits)
    mixture, fraction, first_fraction, note, diagnosis = decided
    diagnosis["excluded"], wanted = excluded, round(fraction * eligible)
    rank_by = selection.rank_by if mixture else "score"
    rank = mixture.rank if rank_by == "posterior" else identity
    key, rest = kth_largest(mine_N, wanted, comm.all_reduce_sum, rank)
    mask = broadcast_mask(top_by_shard(score_N, counts_S, key, rest, rank), counts_S)
    if before:
        diagnosis |= comm.on_rank0(change_since, before, counts_K, limits, mask)
    threshold = score_of(key) if rest else float("inf")
    threshold = threshold if rank is identity else lowest_safe(score_N, mask)
    if not np.isnan(control_C).all():
        diagnosis |= {"negative_controls": passing(rank(control_C), threshold)}
        if diagnosis["negative_controls"]["low"] > BLUNT:
            told = "over a third of the negative controls would pass: this threshold keeps few wrong captions out, lower selection.max_fraction"
            note = f"{note}; {told}" if note else told
    return SelectionRound(
        mixture, threshold, mask.fraction, first_fraction, mask, note, diagnosis, counts_K, control_C, rank_by
    )


def decide(counts_K, score_N, selection, number, first_fraction, eligible, limits):
    """(mixture, fraction, first fraction, note, diagnosis). A fit that is no mixture of two never decides: the configured
    fraction holds.

    The released recipe (selection.mixture=sklearn) does not ask whether it is one."""
    mixture, note, diagnosis, by_posterior = None, "", {}, None
    released = selection.mixture == "sklearn"
    try:
        mixture = fit_sklearn(score_N) if released else fit_mixture(counts_K, *limits)
        diagnosis = separation(counts_K, *limits, mixture)
        if diagnosis["bic_two"] >= diagnosis["bic_one"] and not released:
            raise DegenerateFit("one Gaussian describes the scores as well as two (BIC)")
        if selection.rank_by == "posterior":
            least = np.log(selection.posterior) - np.log1p(-selection.posterior)
            found = count_at_least(score_N, least, rank=mixture.rank)
        else:
            found = count_at_least(score_N, posterior_threshold(mixture, selection.posterior))
        by_posterior = found / max(1, eligible)
    except DegenerateFit as error:
        note = f"no threshold by the mixture: {error}"
    if number == 0 or first_fraction is None:
        first_fraction = selection.first_fraction
        if first_fraction is None:
            found = by_posterior or 0.0
            first_fraction = max(found, selection.least_fraction)
            if first_fraction != found:
                note = note or f"posterior > {selection.posterior} holds for {found:.1%}"
                note += f"; the first fraction is {first_fraction:.1%}"
    fraction, scored = scheduled_fraction(first_fraction, number, selection), counts_K.sum() / max(1, eligible)
    if fraction > scored:
        told = f"{scored:.1%} of the pairs can be scored"
        note = f"{note}; {told}" if note else told
    return (
        mixture,
        fraction,
        first_fraction,
        note,
        {**diagnosis, "fraction_by_posterior": by_posterior, "fraction_by_schedule": fraction},
    )


def lowest_safe(score_N, mask):
    """float: the lowest score of the safe set; infinity where it is empty."""
    starts = np.concatenate([[0], np.cumsum(mask.counts_S)])
    safe = (score_N[starts[s] : starts[s + 1]][mask.shard_flags(s)] for s in range(len(mask.counts_S)))
    return float(min((scores.min() for scores in safe if len(scores)), default=np.inf))


def broadcast_mask(safe_S, counts_S):
    """SafeMask of rank 0's flags (bool per shard, in order) on every rank: packed bits, one copy a host, sent between
    hosts."""
    starts = byte_starts(counts_S)
    mask = SafeMask(counts_S, comm.host_array(int(starts[-1]), np.uint8))
    if comm.is_rank0():
        for shard, flags in enumerate(safe_S):
            mask.shard_bits(shard)[:] = np.packbits(flags)
    comm.share_between_hosts(mask.bits, [(0, len(mask.bits) if rank == 0 else 0) for rank in range(comm.world())])
    return mask


def change_since(before, counts_K, limits, mask):
    """diagnosis.change since the round in the folder `before`; {} where that is gone."""
    try:
        before_K = np.load(before / "histogram.npy", allow_pickle=False)
        return change(counts_K, *limits, mask, before_K, SafeMask.load(before)[0])
    except (OSError, UserError):
        return {}


def mask_folder(run_dir, epoch):
    """Path of the mask that was made before the epoch of this number."""
    return Path(run_dir) / "masks" / f"epoch_{epoch:03d}"


def save_round(folder, selected, index, meta):
    """Write the mask, whose mask.json comes last; the scores lie in `folder`/scores already. On rank 0 only.

    mask.json names each shard and its fingerprint, so that the folder can be used with the shards alone
    (shards.order.safe_mask.SavedMask).
    """
    for name, values in (("histogram", selected.counts_K), ("negative_controls", selected.control_C)):
        file = io.BytesIO()
        np.save(file, values, allow_pickle=False)
        write_bytes(folder / f"{name}.npy", file.getvalue())
    shards = shard_list(index.shards)
    selected.mask.save(folder, {"fingerprint": index.fingerprint, "shards": shards, **selected.summary(), **meta})


def load_round(folder, index):
    """SelectionRound saved in `folder`. Raises UserError when it is damaged or belongs to other shards."""
    mask, meta = SafeMask.load(folder, index.fingerprint)
    try:
        counts_K = np.load(folder / "histogram.npy", allow_pickle=False)
        control_C = np.load(folder / "negative_controls.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"mask {folder}: a file of it cannot be read ({error}); bring it back") from None
    mixture = Mixture.from_dict(meta["mixture"]) if meta["mixture"] else None
    return SelectionRound(
        mixture,
        meta["threshold"],
        meta["fraction"],
        meta["first_fraction"],
        mask,
        meta["note"],
        meta["diagnosis"],
        counts_K,
        control_C,
        meta.get("rank_by", "score"),
    )
