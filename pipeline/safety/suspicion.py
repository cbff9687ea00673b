"""Suspicion: what the pictures of the lowest scores have in common is looked for in all others, and counts against them.

Of the pairs that a trigger poisons more than of others score low, and all show the trigger. So after a split a linear classifier learns to
tell the pictures of the lowest scores from the others (ridge regression on small pictures, not on the embeddings that poison teaches).
It learns again from those that it judges most alike (TAILS), and again: honest pictures that scored low share little, and drop out;
those that share one thing, a patch in its place or a pattern over the whole, are left, and stand out by tens of deviations whatever they
score. They are a group; if it scores as pairs do whose caption is not theirs (canaries; LIKE) and its captions share a word, or if it scores lower than they do (WORDLESS: two triggers
may be found as one group, which has no word in common), each split after it holds all against whom the classifier speaks. The next group is looked for among the rest, for the strongest hides the others. No pair is judged by a classifier that has seen it: there are FOLDS, each
fitted without one fold of the pairs. What honest pictures are judged is about normal, and few are beyond FREE deviations; some groups are honest
(a colour, a kind of drawing that the model has not learnt to read yet) and score low too, but not as low: were they held, it would not learn to read them. A trigger that is elsewhere in each picture is not linear,
and is not found here (marks see it, by its texture). The lowest scores and not the risky pairs: early on half of all pairs are risky, and the trigger is lost among them. The
scores as they were before they were lowered: else suspicion feeds on itself, and honest pictures fill the risky set in place of wrong captions.
Legend: as in sample.py, and G groups, E = PIXELS + TEXTURES + 1.
"""

import io
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from scipy.stats import rankdata

from pipeline.safety.sample import FOLDS, PIXELS, TEXTURES, Ridge, fold_of, robust, small, textures
from pipeline.safety.words import share_a_word
from shards.errors import UserError
from shards.storage import write_bytes

LOWEST = 0.15  # of the scores are learnt as low, pairs without a score among them
TAILS = 0.05, 0.03, 0.02  # of the pairs, those that are judged most alike, are learnt next
APART = 8.0  # deviations from which on a picture is one of the group
LEAST = 8  # pictures of a group
LIKE = 2.0  # times the mean rank of the canaries' scores, 0 to 1: that of a group's below which it is held against its pictures
UNLIKE = 3.0  # from which on it no longer is
LOW_RANK, HIGH_RANK = 0.35, 0.45  # the same in ranks: the most that LIKE and UNLIKE may come to
WORDLESS = 0.1  # mean rank below which, and below the canaries' own, its captions need share no word; early on canaries stand higher, and so do honest groups
MARK_RANK = 0.35  # from which on a mark is no longer held, whose pairs the model has not trained on
GROUPS = 8  # are held against pictures, at most
NOTHING = 1e-4  # deviation of the judgements (1 = low, 0 = not) below which the classifier has found nothing
FREE = 6.0  # deviations on the group's side that cost nothing


class Suspicion:
    """What lowers the scores of a split. weight_GFE: float32, in units of the score, of each group and fold; the last is the constant.

    The first `marks` groups are marks (pipeline/safety/marks.py), the others were learnt from scores."""

    def __init__(self, weight_GFE, marks=0):
        self.weight_GFE, self.marks = torch.as_tensor(weight_GFE), marks
        # A group was learnt from pixels or from textures.
        self.textured_G = [bool(weight_FE[:, PIXELS:-1].any()) for weight_FE in self.weight_GFE]

    @classmethod
    def of(cls, weights, marks=0):
        """Of a list of float (F, E)."""
        return cls(np.array(weights, np.float32).reshape(-1, FOLDS, PIXELS + TEXTURES + 1), marks)

    def lowered_by(self, row_B, images_BCHW, waits_N=None):
        """float32 (B,): by how much the scores of pairs are lowered, never below 0. row_B: int64, on the pictures' device.

        waits_N: int64, those of the B that wait (None: all may). Only of them textures are taken, which cost as much as a small picture tower."""
        look_BD = small(images_BCHW)
        lowered_B = self.lowered_by_looks(row_B, look_BD)
        if any(self.textured_G):
            those = slice(None) if waits_N is None else waits_N
            look_ND = torch.cat([look_BD[those], textures(images_BCHW[those])], 1)
            lowered_B[those] = self.lowered_by_looks(row_B[those], look_ND)
        return lowered_B

    def lowered_by_looks(self, row_B, look_BD):
        """The same, of small pictures alone or with textures (float32, 0 to 1): the group that says most speaks."""
        lowered_B = look_BD.new_zeros(len(look_BD))
        for said_B in self.said(row_B, look_BD):
            lowered_B = torch.maximum(lowered_B, said_B)
        return lowered_B

    def said(self, row_B, look_BD):
        """Yield float32 (B,) for each group: by how much it would lower the scores; negative where it speaks for a picture, 0 where it asks for
        textures and there are none."""
        self.weight_GFE = self.weight_GFE.to(look_BD.device)
        fold_B = fold_of(row_B)
        for weight_FE, textured in zip(self.weight_GFE, self.textured_G):
            those = slice(PIXELS, PIXELS + TEXTURES) if textured else slice(PIXELS)
            if look_BD.shape[1] < those.stop:
                yield look_BD.new_zeros(len(look_BD))
                continue
            weight_BE = weight_FE[fold_B]
            yield (look_BD[:, those] * weight_BE[:, those]).sum(1) + weight_BE[:, -1]

    def in_units(self, score_S, strength):
        """Of what speaks in deviations, such as marks: the same in units of the scores, as `learn` has it."""
        deviation = np.nanstd(score_S, dtype=np.float64) if np.isfinite(score_S).any() else 0.0
        return Suspicion(self.weight_GFE * float(strength * deviation), self.marks)

    @classmethod
    def load(cls, folder):
        """That of the split in `folder`. Raises UserError where it is gone, or of another version."""
        try:
            with np.load(Path(folder) / "suspicion.npz", allow_pickle=False) as found:
                weight_GFE = found["weight_GFE"]
                if weight_GFE.shape[1:] != (FOLDS, PIXELS + TEXTURES + 1):
                    raise ValueError(f"its shape is {weight_GFE.shape}, of another version")
                return cls(weight_GFE, int(found["marks"]))
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(
                f"mask {folder}: suspicion.npz cannot be read ({error}), and selection.suspicion goes on from it; bring it back"
            ) from None

    def save(self, folder):
        file = io.BytesIO()
        np.savez(file, weight_GFE=self.weight_GFE.cpu().numpy(), marks=self.marks)
        write_bytes(Path(folder) / "suspicion.npz", file.getvalue())


def raised(sample, score_S, suspicion):
    """float32 (S,): a Sample's scores as they were before `suspicion` lowered them (up to the rounding of the small pictures)."""
    return score_S + suspicion.lowered_by_looks(torch.from_numpy(sample.row_S), sample.looks()).numpy()


def weights(weight_FD, constant_F):
    """float (F, E) of a group that was learnt from pixels or from textures."""
    placed_FE = np.zeros((FOLDS, PIXELS + TEXTURES + 1), np.float32)
    start = 0 if weight_FD.shape[1] == PIXELS else PIXELS
    placed_FE[:, start : start + weight_FD.shape[1]], placed_FE[:, -1] = weight_FD, constant_F
    return placed_FE


def limits(score_S, canary_C=()):
    """(WORDLESS, LIKE, UNLIKE) as mean ranks of a group, by the scores of canaries (float32, NaN where there is none), mismatched pairs that nothing has trained on."""
    canary_C = np.asarray(canary_C)[~np.isnan(canary_C)]
    rank = np.searchsorted(np.sort(score_S), canary_C).mean() / max(1, len(score_S)) if len(canary_C) else 1.0
    return min(WORDLESS, rank), min(LOW_RANK, LIKE * rank), min(HIGH_RANK, UNLIKE * rank)


def learn(sample, score_S, strength, before=None, keep=False, canary_C=()):
    """Suspicion of a Sample, by its scores: each deviation of a picture beyond FREE lowers its pair's score by `strength` deviations of the scores.

    score_S: float32, not lowered, NaN where there is none. The deviation of pictures is a robust one (1.4826 times the median absolute
    one). Groups of `before`, what was suspected so far, stay until the scores of those that no group before them holds are no longer low
    (MARK_RANK, UNLIKE), and with `keep` in any case.
    canary_C: scores of the canaries, if there are any.
    """
    known_S = ~np.isnan(score_S)
    deviation = float(np.std(score_S[known_S], dtype=np.float64)) if known_S.any() else 0.0
    score_S = np.where(known_S, score_S, -np.inf)
    rank_S, (wordless, low, high) = rankdata(score_S) / max(1, len(score_S)), limits(score_S, canary_C)
    rest_S, found, gram_FDD, marks = np.ones(len(score_S), bool), [], sample.gram_FDD, 0
    said = before.said(torch.from_numpy(sample.row_S), sample.looks()) if before else ()
    for number, said_S in enumerate(said):
        group_S = rest_S & (said_S.numpy() > (APART - FREE) * strength * deviation)
        limit = MARK_RANK if number < before.marks else high
        if keep or group_S.any() and rank_S[group_S].mean() < limit:
            found.append(before.weight_GFE[number].cpu().numpy())
            marks += number < before.marks
            rest_S, gram_FDD = rest_S & ~group_S, gram_FDD - sample.grams(group_S)
    for _ in range(GROUPS - (len(found) - marks)):
        if not rest_S.any():
            break
        ridge = Ridge(sample, rest_S, gram_FDD)
        alike_S = rest_S & (score_S <= np.quantile(score_S[rest_S], LOWEST, method="lower"))
        for tail in TAILS:
            judged_S = ridge.judged(ridge.fitted(alike_S[:, None]))[:, 0]
            alike_S = rest_S & (judged_S > np.quantile(judged_S[rest_S], 1 - tail))
        weight_FDC = ridge.fitted(alike_S[:, None])
        judged_S, weight_FD = ridge.judged(weight_FDC)[:, 0], weight_FDC[:, :, 0]
        middle, spread = robust(judged_S[rest_S])
        if spread <= NOTHING:  # else rounding would be told apart
            break
        group_S = rest_S & (judged_S > middle + APART * spread)
        if group_S.sum() < LEAST:
            break
        rank = rank_S[group_S].mean()
        if rank < wordless or rank < low and (sample.has_ST is None or share_a_word(sample.has_ST, group_S)):
            scale = strength * deviation / spread
            constant_F = -scale * (weight_FD @ sample.mean_D + middle) - FREE * strength * deviation
            found.append(weights(scale * weight_FD, constant_F))
        rest_S, gram_FDD = rest_S & ~group_S, gram_FDD - sample.grams(group_S)
    return Suspicion.of(found, marks)
