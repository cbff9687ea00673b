"""A selection round: the scores of all pairs give a histogram, a mixture, a safe fraction and the mask of the safe set.

`select_pairs` is the whole round. Rank 0 decides, and every rank receives the same mask.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.distributed import comm, hosts
from pipeline.safety.diagnosis import change, separation
from pipeline.safety.mixture import DegenerateFit, Mixture, fit_mixture, fit_sklearn, histogram, posterior_threshold
from pipeline.safety.negative_controls import passing
from pipeline.safety.selection import (
    RANGES,
    Rank,
    SelectionSettings,
    count_at_least,
    identity,
    kth_largest,
    scheduled_fraction,
    score_of,
    top_by_shard,
)
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SafeMask, byte_starts
from shards.order.shard_names import shard_columns
from shards.storage.files import write_bytes

# A round warns when negative controls pass this often, by the lower end of Wilson's interval, compared with all pairs.
# Recorded rounds of photos that protected a run have up to .65, others .87 and more (tests/benchmarks/attacks.json).
MAX_PASSING = 3 / 4


@dataclass
class SelectionRound:
    """Result of a selection round: the mixture fitted to the scores of all pairs, the threshold, and the safe set."""

    mixture: Mixture | None
    threshold: float  # lowest score of the safe set, infinite where that is empty
    fraction: float  # safe pairs / all pairs
    first_fraction: float  # safe fraction of the run's first round, from which the schedule grows
    mask: SafeMask
    note: str
    # separation and change (diagnosis.py), fraction by posterior and by schedule, excluded pairs, negative controls
    diagnosis: dict
    counts_K: np.ndarray  # mixture.histogram of the scores
    control_C: np.ndarray  # scores of the negative controls
    rank_by: str = "score"  # what pairs are ranked by: score, or the mixture's posterior

    def summary(self) -> dict:
        """For metrics.jsonl and mask.json."""
        return {
            "fraction": self.fraction,
            "first_fraction": self.first_fraction,
            "threshold": self.threshold if math.isfinite(self.threshold) else None,  # JSON has no infinity
            "rank_by": self.rank_by,
            "note": self.note,
            "mixture": self.mixture.to_dict() if self.mixture else None,
            "diagnosis": self.diagnosis,
        }

    def line(self) -> str:
        """The round in one line, for the log."""
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
    score_N: np.ndarray,
    counts_S: np.ndarray,
    selection: SelectionSettings,
    number: int,
    first_fraction: float | None = None,
    before: Path | None = None,
    control_C: np.ndarray | Sequence[float] = (),
    excluded: int = 0,
    kind: str = "cosine",
) -> SelectionRound:
    """The round of the scores of all pairs, the same bits on every rank. All ranks call.

    number: SafeCLIP epochs before the round; first_fraction: safe fraction of the first round; before: folder of the
    previous round or None; control_C: scores of the negative controls, on rank 0; excluded: pairs that guards exclude.
    """
    limits, eligible = RANGES[kind], len(score_N) - excluded
    local_N = np.array_split(score_N, comm.world())[comm.rank()]
    counts_K = comm.all_reduce_sum(histogram(local_N, *limits))
    mixture, by_posterior, diagnosis, notes = comm.on_rank0(fit, counts_K, score_N, selection, limits, eligible)
    scored = counts_K.sum() / max(1, eligible)
    fraction, first_fraction, notes = safe_fraction(by_posterior, scored, selection, number, first_fraction, notes)
    rank_by = selection.rank_by if mixture else "score"
    rank = mixture.rank if rank_by == "posterior" else identity
    key, ties = kth_largest(local_N, round(fraction * eligible), comm.all_reduce_sum, rank)
    mask = broadcast_mask(top_by_shard(score_N, counts_S, key, ties, rank), counts_S)

    diagnosis |= {"fraction_by_posterior": by_posterior, "fraction_by_schedule": fraction, "excluded": excluded}
    diagnosis |= comm.on_rank0(change_since, before, counts_K, limits, mask) if before else {}
    control_C = comm.broadcast_object(np.asarray(control_C, np.float32))
    threshold, controls, warnings = outcome(score_N, mask, key, ties, rank, control_C)
    diagnosis, note = diagnosis | controls, "; ".join(notes + warnings)
    return SelectionRound(
        mixture, threshold, mask.fraction, first_fraction, mask, note, diagnosis, counts_K, control_C, rank_by
    )


def fit(
    counts_K: np.ndarray, score_N: np.ndarray, selection: SelectionSettings, limits: tuple[float, float], eligible: int
) -> tuple[Mixture | None, float | None, dict[str, float], list[str]]:
    """(mixture, fraction of the eligible pairs with a posterior of at least selection.posterior, diagnosis, notes).

    The fraction is None when the scores are no mixture of two components; the configured one is then used. The released
    recipe (selection.mixture=sklearn) does not test this. Rank 0 calls.
    """
    mixture, diagnosis, released = None, {}, selection.mixture == "sklearn"
    try:
        mixture = fit_sklearn(score_N) if released else fit_mixture(counts_K, *limits)
        diagnosis = separation(counts_K, *limits, mixture)
        if diagnosis["bic_two"] >= diagnosis["bic_one"] and not released:
            raise DegenerateFit("one Gaussian describes the scores as well as two (BIC)")
        if selection.rank_by == "posterior":
            log_odds = np.log(selection.posterior) - np.log1p(-selection.posterior)
            found = count_at_least(score_N, log_odds, rank=mixture.rank)
        else:
            found = count_at_least(score_N, posterior_threshold(mixture, selection.posterior))
    except DegenerateFit as error:
        decides = selection.first_fraction is None
        return mixture, None, diagnosis, [f"no threshold by the mixture: {error}"] if decides else []
    return mixture, found / max(1, eligible), diagnosis, []


def safe_fraction(
    by_posterior: float | None,
    scored: float,
    selection: SelectionSettings,
    number: int,
    first_fraction: float | None,
    notes: list[str],
) -> tuple[float, float, list[str]]:
    """(fraction, fraction of the first round, notes): the first by config or posterior, later ones by the schedule.

    scored: fraction of the eligible pairs that have a score.
    """
    notes = list(notes)
    if number == 0 or first_fraction is None:
        first_fraction = selection.first_fraction
        if first_fraction is None:
            found = by_posterior or 0.0
            first_fraction = max(found, selection.least_fraction)
            if first_fraction != found:
                notes = notes or [f"posterior > {selection.posterior} holds for {found:.1%}"]
                notes.append(f"the first fraction is {first_fraction:.1%}")
    fraction = scheduled_fraction(first_fraction, number, selection)
    if fraction > scored:
        notes.append(f"{scored:.1%} of the pairs can be scored")
    return fraction, first_fraction, notes


def outcome(
    score_N: np.ndarray, mask: SafeMask, key: int, ties: int, rank: Rank, control_C: np.ndarray
) -> tuple[float, dict, list[str]]:
    """(lowest score of the safe set, diagnosis of the negative controls, warnings). key, ties: of kth_largest."""
    threshold = score_of(key) if ties else float("inf")
    lowest = threshold if rank is identity else lowest_safe(score_N, mask)
    if np.isnan(control_C).all():
        return lowest, {}, []
    found, warnings = passing(rank(control_C), threshold), []
    if found["low"] > MAX_PASSING * mask.fraction:
        warnings.append(
            f"{found['fraction']:.0%} of the negative controls would pass: the scores hardly tell wrong captions, and "
            "guards may find nothing; more pairs or more steps before the first round are needed"
        )
    return lowest, {"negative_controls": found}, warnings


def lowest_safe(score_N: np.ndarray, mask: SafeMask) -> float:
    """Lowest score of the safe set; infinity when it is empty."""
    starts = np.concatenate([[0], np.cumsum(mask.counts_S)])
    safe = (score_N[starts[s] : starts[s + 1]][mask.shard_flags(s)] for s in range(len(mask.counts_S)))
    return float(min((scores.min() for scores in safe if len(scores)), default=np.inf))


def broadcast_mask(safe_S: Iterable[np.ndarray], counts_S: np.ndarray) -> SafeMask:
    """The mask of rank 0's flags (one bool array per shard, in order) on every rank; one copy of the bits per host."""
    starts = byte_starts(counts_S)
    mask = SafeMask(counts_S, hosts.host_array(int(starts[-1]), np.uint8))
    if comm.is_rank0():
        for shard, flags in enumerate(safe_S):
            mask.shard_bits(shard)[:] = np.packbits(flags)
    hosts.share_between_hosts(mask.bits, [(0, len(mask.bits) if rank == 0 else 0) for rank in range(comm.world())])
    return mask


def change_since(before: Path, counts_K: np.ndarray, limits: tuple[float, float], mask: SafeMask) -> dict[str, float]:
    """diagnosis.change since the round in the folder `before`; {} when its files are missing or damaged."""
    try:
        before_K = np.load(before / "histogram.npy", allow_pickle=False)
        return change(counts_K, *limits, mask, before_K, SafeMask.load(before)[0])
    except (OSError, ValueError, EOFError, UserError):
        return {}


def mask_folder(run_dir: Path | str, epoch: int) -> Path:
    """Folder of the selection round before this epoch."""
    return Path(run_dir) / "masks" / f"epoch_{epoch:03d}"


def save_round(folder: Path, selected: SelectionRound, index: ShardIndex, meta: dict) -> None:
    """Write a round to `folder`, mask.json last; its scores are in `folder`/scores already. Rank 0 calls.

    The mask has the name and fingerprint of each shard, so that the folder can be used without the run
    (shards.order.safe_mask.SavedMask).
    """
    for name, values in (("histogram", selected.counts_K), ("negative_controls", selected.control_C)):
        file = io.BytesIO()
        np.save(file, values, allow_pickle=False)
        write_bytes(folder / f"{name}.npy", file.getvalue())
    about = {"fingerprint": index.fingerprint, **selected.summary(), **meta}
    selected.mask.save(folder, about, shard_columns(index.shards))


def load_round(folder: Path, index: ShardIndex) -> SelectionRound:
    """The round saved in `folder`. Raises UserError if it is damaged or belongs to other shards."""
    mask, meta = SafeMask.load(folder, index.fingerprint)
    try:
        counts_K = np.load(folder / "histogram.npy", allow_pickle=False)
        control_C = np.load(folder / "negative_controls.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"mask {folder}: a file of it cannot be read ({error}); bring it back") from None
    mixture = Mixture.from_dict(meta["mixture"]) if meta["mixture"] else None
    return SelectionRound(
        mixture,
        math.inf if meta["threshold"] is None else meta["threshold"],
        meta["fraction"],
        meta["first_fraction"],
        mask,
        meta["note"],
        meta["diagnosis"],
        counts_K,
        control_C,
        meta.get("rank_by", "score"),
    )
