"""Quality of a run's selection against the ground truth, at every selection round or for the mask of a filter.

Honest pairs are those that the manifest does not name: neither poison nor decoys. What has no score ranks below all
that have one, and is never safe.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.safety.score_files import load_scores, number_of, saved_rounds
from pipeline.training import checkpoint
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SafeMask, fingerprint
from shards.samples.overlay import Overlay

KEYS = ("recall", "auroc", "fpr_at_full_recall", "fpr_at_99_recall")


@dataclass
class Round:
    """A saved mask. epoch: that it was made before; None for the mask of a filter. folder: also holds scores/, unless
    they are gone."""

    epoch: int | None
    mask: SafeMask
    folder: Path

    def scores(self) -> np.ndarray | None:
        """float32 (N,), NaN where a pair has none; None where the scores were not kept."""
        return load_scores(self.folder, self.mask.counts_S) if (self.folder / "scores").is_dir() else None


def selection_rounds(run_dir: str | Path, config: Config, index: ShardIndex) -> list[Round]:
    """The rounds of a run's masks, or of the filter's mask (data.mask) that it trained with; [] for a run without
    either.

    The mask of CleanCLIP is no filter: it names the clean part for the fine-tuning. Raises UserError where a mask is
    damaged, and where data.mask or the index are not those that the run was trained on.
    """
    check_data(run_dir, config, index)
    rounds = [(number_of(folder), folder) for folder in saved_rounds(Path(run_dir, "masks"))]
    if config.data.mask and config.train.method != "cleanclip":
        rounds = [(None, Path(config.data.mask))]
    return [Round(epoch, SafeMask.load(folder, index.fingerprint)[0], folder) for epoch, folder in rounds]


def check_data(run_dir: str | Path, config: Config, index: ShardIndex) -> None:
    """Raise UserError unless the index and the mask (data.mask) are those of the run's newest checkpoint, if there is
    one."""
    folder, _ = checkpoint.newest_complete(run_dir)
    found = index.fingerprint
    if config.data.mask:
        found += "/" + fingerprint(Path(config.data.mask) / "safe.npy")
    trained = checkpoint.load_state(folder)["data"] if folder else found
    if trained != found:
        same = trained.partition("/")[0] == index.fingerprint
        key = (
            f"data.mask: {config.data.mask} is another mask"
            if same
            else "data.index: these are other shards, or captions,"
        )
        raise UserError(
            f"{key} than {run_dir} was trained on (fingerprint {found}, then {trained}); "
            "bring that one back and name it, or train anew"
        )


def selection_quality(rounds: list[Round], overlay: Overlay, index: ShardIndex) -> tuple[dict, dict]:
    """(of all poison, {NAME: of that attack's}): dicts of lists with an entry for every round; fractions of 1.

    epoch               the round is made before this epoch, counted from 0; None for a filter's mask (in all only)
    false_positives     honest pairs that are left out / honest pairs (in all only: they are the same for every attack)
    recall              poison that is left out / poison
    auroc               of the score: a random honest pair scores higher than a random poisoned one
    fpr_at_full_recall  honest pairs that score no higher than the highest-scoring poison, which a threshold there
                        leaves out
    fpr_at_99_recall    the same with the threshold at the lowest score that leaves 99 % of the poison out
    """
    honest_N = honest_pairs(overlay, index)
    rows = {None: poison_rows(overlay, index)} | {name: poison_rows(overlay, index, name) for name in overlay.kinds}
    found: dict[str | None, list[dict]] = {name: [] for name in rows}
    for round in rounds:
        safe_N, rank_N = round.mask.flags(), ranks(round.scores())
        for name, rows_P in rows.items():
            figures = {"recall": float((~safe_N[rows_P]).mean())}
            found[name].append(figures | score_quality(rank_N, honest_N, rows_P))
        found[None][-1] |= {"epoch": round.epoch, "false_positives": float((~safe_N[honest_N]).mean())}
    columns = {name: {key: [row[key] for row in figures] for key in KEYS} for name, figures in found.items()}
    of_all = columns.pop(None) | {key: [row[key] for row in found[None]] for key in ("epoch", "false_positives")}
    return of_all, columns


def score_quality(rank_N: np.ndarray | None, honest_N: np.ndarray, rows_P: np.ndarray) -> dict:
    """{"auroc", "fpr_at_full_recall", "fpr_at_99_recall"} of scores by their ranks (None: not known), honest pairs and
    poison."""
    if rank_N is None:
        return dict.fromkeys(KEYS[1:])
    rank_M = np.r_[rank_N[honest_N], rank_N[rows_P]]
    poison_M = np.arange(len(rank_M)) >= len(rank_M) - len(rows_P)
    fpr_K, recall_K, _ = roc_curve(poison_M, -rank_M, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(poison_M, -rank_M)),
        "fpr_at_full_recall": float(fpr_K[np.argmax(recall_K >= 1)]),
        "fpr_at_99_recall": float(fpr_K[np.argmax(recall_K >= 0.99)]),
    }


def ranks(score_N: np.ndarray | None) -> np.ndarray | None:
    """int64 (N,): 0 for the pairs without a score, more the higher the score; equal where scores are. None for None."""
    if score_N is None:
        return None
    return np.unique(np.where(np.isnan(score_N), -np.inf, score_N), return_inverse=True)[1]


def poison_rows(overlay: Overlay, index: ShardIndex, name: str | None = None) -> np.ndarray:
    """int64 (P,): the poisoned pairs, as numbers over all shards, of one attack or of all."""
    return rows_of([row for row in overlay.rows if name in (None, row["kind"])], index)


def honest_pairs(overlay: Overlay, index: ShardIndex) -> np.ndarray:
    """bool (N,): neither poison nor a decoy."""
    honest_N = np.ones(index.samples, bool)
    honest_N[rows_of(overlay.rows + overlay.decoys, index)] = False
    return honest_N


def rows_of(entries: list[dict], index: ShardIndex) -> np.ndarray:
    return np.array([index.offsets[entry["shard"]] + entry["position"] for entry in entries], np.int64)


def poison_fractions(masks: list[SafeMask], overlay: Overlay, index: ShardIndex) -> list[float]:
    """For every mask, poisoned pairs / all pairs of the safe set."""
    rows_P = poison_rows(overlay, index)
    return [float(flag_N[rows_P].sum() / max(1, flag_N.sum())) for flag_N in (mask.flags() for mask in masks)]


def trained_on(run_dir: str | Path, config: Config, index: ShardIndex) -> np.ndarray | None:
    """bool (N,): the pairs that the CLIP loss sees in any epoch of a run, and of the run whose weights it started from;
    of a run without an attack (data.overlay of the config that it was trained with) none, for it saw them unpoisoned.
    What SafeCLIP trains on before its first selection round (all pairs, at low rates) does not count.

    None if that is not known because a mask or a run is missing.
    """
    method, masks = config.train.method, [round.mask for round in selection_rounds(run_dir, config, index)]
    trained_N = np.full(index.samples, method != "safeclip" and not config.data.mask)
    if method == "cleanclip":
        masks = [SafeMask.load(config.data.mask, index.fingerprint)[0]]
    for mask in masks:
        trained_N |= mask.flags()
    trained_N &= config.data.overlay is not None
    if config.model.pretrained:
        start = Path(config.model.pretrained)
        if not (start / "config.yaml").exists():
            return None
        before_N = trained_on(start, load_config(start / "config.yaml"), index)
        return None if before_N is None else trained_N | before_N
    return trained_N
