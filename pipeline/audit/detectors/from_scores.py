"""What the score files say: mismatched pairs, their history over a run's rounds, excluded and unreadable pairs."""

import numpy as np

from pipeline.audit.blocks import order_fractions
from pipeline.audit.data import AuditData
from pipeline.audit.detectors import Detector, Finding, Group, detector, lowest
from pipeline.guards import REGISTRY as GUARDS


@detector
class Mismatch(Detector):
    """Pairs with the lowest scores, below the threshold of the mixture."""

    name = "mismatch"
    title = "picture and caption do not match"
    text = "The lowest cosines between a picture and its own caption, below the threshold of the mixture."
    source = "Yang, Gao, Mirzasoleiman, ICML 2024"
    family = "cosine"

    def find(self, data: AuditData, worst: float) -> Finding:
        """Flags the lowest scores, `worst` of all at most, and only where the mixture's higher component has a
        posterior below 0.1."""
        score_N = np.clip((data.score_N - data.low) / (data.high - data.low), 0, 1)
        threshold = data.threshold_at(0.1)
        issue_N = lowest(score_N, worst)
        return Finding(score_N, issue_N if threshold is None else issue_N & (data.score_N < threshold))


@detector
class History(Detector):
    """Pairs with low scores on average over the selection rounds of a run."""

    name = "history"
    title = "never fitted during the run"
    text = "Pairs whose score stood low among all others at every round, also where it rose later."
    source = "as Dataset Cartography, Swayamdipta et al., EMNLP 2020"
    needs = ("rounds",)
    family = "cosine"

    def find(self, data: AuditData, worst: float) -> Finding:
        """The score is the mean over the rounds whose scores were kept (run.keep) of the fraction of pairs with a lower
        cosine. more: epochs_risky and flips, over all rounds."""
        total_N, seen_N = np.zeros(data.N, np.float32), np.zeros(data.N, np.int32)
        risky_N, flips_N, before_N = np.zeros(data.N, np.int32), np.zeros(data.N, np.int32), None
        cos_N = np.empty(data.N, np.float32)
        for saved in data.rounds:
            if saved.has_scores:  # a run keeps those of its last rounds (run.keep)
                for shard in range(len(saved.shards)):
                    rows = slice(int(data.offsets[shard]), int(data.offsets[shard + 1]))
                    cos_N[rows] = saved.table(shard, ("cosine",))["cosine"].to_numpy()
                total_N += np.nan_to_num(order_fractions(cos_N), copy=False)
                seen_N += ~np.isnan(cos_N)
            safe_N = saved.mask.flags()
            risky_N += ~safe_N
            flips_N += 0 if before_N is None else safe_N != before_N
            before_N = safe_N
        score_N = np.where(seen_N > 0, total_N / np.maximum(seen_N, 1), np.nan).astype(np.float32)
        return Finding(score_N, lowest(score_N, worst), more={"epochs_risky": risky_N, "flips": flips_N})


@detector
class Excluded(Detector):
    """Pairs that guards of the run excluded, a group for each guard."""

    name = "excluded"
    title = "excluded by a guard"
    text = "Pairs that guards of the run kept out of its safe sets, by the first guard that excluded them."
    needs = ("excluded",)
    ranks = False

    def find(self, data: AuditData, worst: float) -> Finding:
        """The score is 0 or 1. A group for each guard, the largest first."""
        names = {guard.reason: name for name, guard in GUARDS.items()}
        groups = [
            Group(reason, f"{len(rows):,} pairs by {names.get(reason, 'a guard')}: {reason}", rows, len(rows))
            for reason, rows in sorted(data.excluded.rows_of().items(), key=lambda one: -len(one[1]))
        ]
        score_N = np.ones(data.N, np.float32)
        score_N[data.excluded.row_M] = 0
        return Finding(score_N, score_N == 0, groups)


@detector
class Broken(Detector):
    """Pairs that cannot be read."""

    name = "broken"
    title = "cannot be read"
    text = "Pictures that cannot be decoded, captions that are missing, blank or no UTF-8."
    ranks = False

    def find(self, data: AuditData, worst: float) -> Finding:
        score_N = np.ones(data.N, np.float32)
        score_N[data.reasons.row_M] = 0
        return Finding(score_N, score_N == 0)
