"""The heart: scores -> one mixture -> one cut -> one mask, decided once and received by every rank (METHOD step 4)."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.distributed import comm
from pipeline.safety.diagnosis import change, separation
from pipeline.safety.mixture import DegenerateFit, Mixture, fit_mixture, fit_sklearn, histogram, upper_cut
from pipeline.safety.negative_controls import passing
from pipeline.safety.selection import RANGES, as_it_is, count_at_least, grown, kth_largest, score_of, top_by_shard
from shards.errors import UserError
from shards.order.safe_mask import SafeMask, byte_starts, shard_list
from shards.storage.files import write_bytes

BLUNT = 1 / 3  # of the canaries, by Wilson's lower bound: where more would pass, the split says so


@dataclass
class Split:
    """Before one epoch: the mixture fitted to the scores of all pairs, the cut, and which pairs are safe."""

    mixture: Mixture | None
    cut: float  # the lowest score of the safe set
    share: float  # safe pairs / all pairs
    first_share: float  # of the run's first split: the schedule grows from it
    mask: SafeMask
    note: str
    # diagnosis.separation, diagnosis.change, the share by posterior and by schedule, pairs that guards exclude
    diagnosis: dict
    counts_K: np.ndarray  # mixture.histogram of the scores
    canary_C: np.ndarray  # scores of the canaries
    rank_by: str = "score"  # what the safe set is the highest of: score, or the mixture's posterior

    def summary(self):
        """dict for metrics and mask.json."""
        return {
            "share": self.share,
            "first_share": self.first_share,
            "cut": self.cut,
            "rank_by": self.rank_by,
            "note": self.note,
            "mixture": self.mixture.to_dict() if self.mixture else None,
            "diagnosis": self.diagnosis,
        }

    def line(self):
        """The split in one line, for the person who watches."""
        of = "score >=" if self.rank_by == "score" else "by posterior, lowest score"
        text, found = f"safe {self.share:.1%}, {of} {self.cut:.3f}", self.diagnosis
        if "ashman_d" in found:
            text += f", D {found['ashman_d']:.2f}, overlap {found['overlap']:.1%}"
        if found.get("excluded"):
            text += f", {found['excluded']:,} excluded"
        if "flips_in" in found:
            text += f", {found['flips_in']:,} in, {found['flips_out']:,} out"
        if "canaries" in found:
            text += ", canaries {passed} of {count}".format(**found["canaries"])
        return text + (f" ({self.note})" if self.note else "")


def split_pairs(
    score_N, counts_S, selection, number, first_share=None, before=None, canary_C=(), excluded=0, kind="cosine"
):
    """Split for the `number`-th split (from 0) of a run; `first_share` is that of its first split. Same bits on every
    rank.

    Every rank counts its part of the scores, rank 0 decides, all receive. `before`: folder of the split before, or
    None. `canary_C`: scores of the canaries, of which the split only tells how many would pass. `excluded`: number of
    the pairs that guards exclude; the share is one of the others. `kind`: of RANGES.
    """
    canary_C = comm.broadcast_object(np.asarray(canary_C, np.float32))
    limits = RANGES[kind]
    mine_N = np.array_split(score_N, comm.world())[comm.rank()]
    counts_K = comm.all_reduce_sum(histogram(mine_N, *limits))
    eligible = len(score_N) - excluded
    decided = comm.on_rank0(decide, counts_K, score_N, selection, number, first_share, eligible, limits)
    mixture, share, first_share, note, diagnosis = decided
    diagnosis["excluded"], wanted = excluded, round(share * eligible)
    rank_by = selection.rank_by if mixture else "score"
    rank = mixture.rank if rank_by == "posterior" else as_it_is
    key, rest = kth_largest(mine_N, wanted, comm.all_reduce_sum, rank)
    mask = broadcast_mask(top_by_shard(score_N, counts_S, key, rest, rank), counts_S)
    if before:
        diagnosis |= comm.on_rank0(change_since, before, counts_K, limits, mask)
    threshold = score_of(key) if rest else float("inf")
    cut = threshold if rank is as_it_is else lowest_safe(score_N, mask)
    if not np.isnan(canary_C).all():
        diagnosis |= {"canaries": passing(rank(canary_C), threshold)}
        if diagnosis["canaries"]["low"] > BLUNT:
            told = "over a third of the canaries would pass: this cut keeps few wrong captions out, lower selection.cap"
            note = f"{note}; {told}" if note else told
    return Split(mixture, cut, mask.share, first_share, mask, note, diagnosis, counts_K, canary_C, rank_by)


def decide(counts_K, score_N, selection, number, first_share, eligible, limits):
    """(mixture, share, first share, note, diagnosis). A fit that is no mixture of two never decides: the configured
    share holds.

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
            found = count_at_least(score_N, upper_cut(mixture, selection.posterior))
        by_posterior = found / max(1, eligible)
    except DegenerateFit as error:
        note = f"no cut by the mixture: {error}"
    if number == 0 or first_share is None:
        first_share = selection.first_share
        if first_share is None:
            found = by_posterior or 0.0
            first_share = max(found, selection.least_share)
            if first_share != found:
                note = note or f"posterior > {selection.posterior} holds for {found:.1%}"
                note += f"; the first share is {first_share:.1%}"
    share, scored = grown(first_share, number, selection), counts_K.sum() / max(1, eligible)
    if share > scored:
        told = f"{scored:.1%} of the pairs can be scored"
        note = f"{note}; {told}" if note else told
    return (
        mixture,
        share,
        first_share,
        note,
        {**diagnosis, "share_by_posterior": by_posterior, "share_by_schedule": share},
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
    """diagnosis.change since the split in the folder `before`; {} where that is gone."""
    try:
        before_K = np.load(before / "histogram.npy", allow_pickle=False)
        return change(counts_K, *limits, mask, before_K, SafeMask.load(before)[0])
    except (OSError, UserError):
        return {}


def mask_folder(run_dir, epoch):
    """Path of the mask that was made before the epoch of this number."""
    return Path(run_dir) / "masks" / f"epoch_{epoch:03d}"


def save_split(folder, split, index, meta):
    """Write the mask, whose mask.json comes last; the scores lie in `folder`/scores already. On rank 0 only.

    mask.json names each shard and its fingerprint, so that the folder can be used with the shards alone
    (shards.order.safe_mask.SavedMask).
    """
    for name, values in (("histogram", split.counts_K), ("canaries", split.canary_C)):
        file = io.BytesIO()
        np.save(file, values, allow_pickle=False)
        write_bytes(folder / f"{name}.npy", file.getvalue())
    shards = shard_list(index.shards)
    split.mask.save(folder, {"fingerprint": index.fingerprint, "shards": shards, **split.summary(), **meta})


def load_split(folder, index):
    """Split saved in `folder`. Raises UserError when it is damaged or belongs to other shards."""
    mask, meta = SafeMask.load(folder, index.fingerprint)
    try:
        counts_K = np.load(folder / "histogram.npy", allow_pickle=False)
        canary_C = np.load(folder / "canaries.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"mask {folder}: a file of it cannot be read ({error}); bring it back") from None
    mixture = Mixture.from_dict(meta["mixture"]) if meta["mixture"] else None
    return Split(
        mixture,
        meta["cut"],
        meta["share"],
        meta["first_share"],
        mask,
        meta["note"],
        meta["diagnosis"],
        counts_K,
        canary_C,
        meta.get("rank_by", "score"),
    )
