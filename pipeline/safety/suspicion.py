"""Suspicion: what the pictures of the lowest scores have in common is looked for in all others, and counts against them.

Of the pairs that a trigger poisons more than of others score low, and all show the trigger. So after a split a linear classifier learns to
tell the pictures of the lowest scores from the others (ridge regression on small pictures, not on the embeddings that poison teaches).
It learns again from those that it judges most alike (TAILS), and again: honest pictures that scored low share little, and drop out;
those that share one thing, a patch in its place or a pattern over the whole, are left, and stand out by tens of deviations whatever they
score. They are a group; if it scores low (LOW_RANK) and its captions share a word, each split after it holds all against whom the classifier speaks. The next group
is looked for among the rest, for the strongest hides the others. No pair is judged by a classifier that has seen it: there are FOLDS, each
fitted without one fold of the pairs. What honest pictures are judged is about normal, and few are beyond FREE deviations; some groups are honest
(a colour, a kind of drawing that the model has not learnt to read yet) and wait until it has. A trigger that is elsewhere in each picture is not linear,
and is not found. The lowest scores and not the risky pairs: early on half of all pairs are risky, and the trigger is lost among them. The
scores as they were before they were lowered: else suspicion feeds on itself, and honest pictures fill the risky set in place of wrong captions.
Legend: S sampled pairs, B pairs, D = 3 SIDE^2 numbers of a small picture, F folds, G groups, C kinds of pictures, E = D + 1.
"""

import io
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_matrix
from scipy.stats import rankdata

from pipeline import comm
from pipeline.safety.words import share_a_word, terms
from shards.errors import UserError
from shards.loader import PlainBatches, batches
from shards.storage import write_bytes

SAMPLE = 65_536  # pairs that the classifiers learn from, at most
SIDE = 16
FOLDS = 5
RIDGE = 0.1  # of the mean variance of a number, added to the covariance
LOWEST = 0.15  # of the scores are learnt as low, pairs without a score among them
TAILS = 0.05, 0.03, 0.02  # of the pairs, those that are judged most alike, are learnt next
APART = 8.0  # deviations from which on a picture is one of the group
LEAST = 8  # pictures of a group
LOW_RANK = 0.35  # mean rank of a group's scores, 0 to 1, below which it is held against its pictures
HIGH_RANK = 0.45  # from which on it no longer is
MARK_RANK = 0.35  # the same for a mark, whose pairs the model has not trained on
GROUPS = 8  # are held against pictures, at most
FLAT = 1e-6  # variance of a number that is added, so that flat pictures can be fitted: a quarter of a grey level
NOTHING = 1e-4  # deviation of the judgements (1 = low, 0 = not) below which the classifier has found nothing
FREE = 6.0  # deviations on the group's side that cost nothing


def small(images_BCHW):
    """float32 (B, D): the pictures at SIDE x SIDE pixels, means over areas, from 0 to 1."""
    return torch.nn.functional.adaptive_avg_pool2d(images_BCHW.float() / 255, SIDE).flatten(1)


def fold_of(row_B):
    """The fold of each row (int64 array or tensor): spread, so that neighbouring pairs, which are often alike, lie in different ones."""
    return (row_B * 2_654_435_761 >> 16) % FOLDS


class Suspicion:
    """What lowers the scores of a split. weight_GFE: float32, in units of the score, of each group and fold; the last is the constant.

    The first `marks` groups are marks (pipeline/safety/marks.py), the others were learnt from scores."""

    def __init__(self, weight_GFE, marks=0):
        self.weight_GFE, self.marks = torch.as_tensor(weight_GFE), marks

    @classmethod
    def of(cls, sample, weights, marks=0):
        """Of a list of float (F, E)."""
        return cls(np.array(weights, np.float32).reshape(-1, FOLDS, sample.x_SD.shape[1] + 1), marks)

    def lowered_by(self, row_B, images_BCHW):
        """float32 (B,): by how much the scores of pairs are lowered, never below 0. row_B: int64, on the pictures' device."""
        return self.lowered_by_small(row_B, small(images_BCHW))

    def lowered_by_small(self, row_B, small_BD):
        """The same, of small pictures (float32, 0 to 1): the group that says most speaks."""
        lowered_B = small_BD.new_zeros(len(small_BD))
        for said_B in self.said(row_B, small_BD):
            lowered_B = torch.maximum(lowered_B, said_B)
        return lowered_B

    def said(self, row_B, small_BD):
        """Yield float32 (B,) for each group: by how much it would lower the scores; negative where it speaks for a picture."""
        self.weight_GFE = self.weight_GFE.to(small_BD.device)
        fold_B = fold_of(row_B)
        for weight_FE in self.weight_GFE:
            weight_BE = weight_FE[fold_B]
            yield (small_BD * weight_BE[:, :-1]).sum(1) + weight_BE[:, -1]

    @classmethod
    def load(cls, folder):
        """That of the split in `folder`. Raises UserError where it is gone, or of another version."""
        try:
            with np.load(Path(folder) / "suspicion.npz", allow_pickle=False) as found:
                return cls(found["weight_GFE"], int(found["marks"]))
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(
                f"mask {folder}: suspicion.npz cannot be read ({error}), and selection.suspicion goes on from it; bring it back"
            ) from None

    def save(self, folder):
        file = io.BytesIO()
        np.savez(file, weight_GFE=self.weight_GFE.cpu().numpy(), marks=self.marks)
        write_bytes(Path(folder) / "suspicion.npz", file.getvalue())


class Sample:
    """Pairs that the classifiers learn from. row_S: int64 rows over all shards; small_SD: uint8, their small pictures; token_SL: their captions.

    Without captions a group need share no word."""

    def __init__(self, row_S, small_SD, token_SL=None):
        self.row_S, self.fold_S = row_S, fold_of(row_S)
        self.has_ST = None if token_SL is None else terms(token_SL)
        self.x_SD = small_SD.astype(np.float32) / np.float32(255)
        self.mean_D = self.x_SD.mean(0, dtype=np.float64).astype(np.float32)
        self.x_SD -= self.mean_D
        self.gram_FDD = self.grams(np.ones(len(row_S), bool))

    def grams(self, those_S):
        """float32 (F, D, D): sums of products over the pictures of bool those_S, fold by fold."""
        return np.stack([x.T @ x for x in (self.x_SD[those_S & (self.fold_S == fold)] for fold in range(FOLDS))])

    def raised(self, score_S, suspicion):
        """float32 (S,): the sample's scores as they were before `suspicion` lowered them (up to the rounding of the small pictures)."""
        return score_S + suspicion.lowered_by_small(torch.from_numpy(self.row_S), self.small()).numpy()

    def small(self):
        return torch.from_numpy(self.x_SD + self.mean_D)

    def in_units(self, marks, score_S, strength):
        """Suspicion: `marks`, which speak in deviations, in units of the scores, as `learn` has it."""
        deviation = np.nanstd(score_S, dtype=np.float64) if np.isfinite(score_S).any() else 0.0
        return Suspicion(marks.weight_GFE * float(strength * deviation), marks.marks)

    def learn(self, score_S, strength, before=None, keep=False):
        """Suspicion, of the sample's scores: each deviation of a picture beyond FREE lowers its pair's score by `strength` deviations of the scores.

        score_S: float32, not lowered, NaN where there is none. The deviation of pictures is a robust one (1.4826 times the median absolute
        one). Groups of `before`, what was suspected so far, stay until their scores are no longer low (MARK_RANK, HIGH_RANK), and with `keep` in any case.
        """
        known_S = ~np.isnan(score_S)
        deviation = float(np.std(score_S[known_S], dtype=np.float64)) if known_S.any() else 0.0
        score_S = np.where(known_S, score_S, -np.inf)
        rank_S = rankdata(score_S) / max(1, len(score_S))
        rest_S, found, gram_FDD, marks = np.ones(len(score_S), bool), [], self.gram_FDD, 0
        said = before.said(torch.from_numpy(self.row_S), self.small()) if before else ()
        for number, said_S in enumerate(said):
            group_S = said_S.numpy() > (APART - FREE) * strength * deviation
            limit = MARK_RANK if number < before.marks else HIGH_RANK
            if keep or group_S.any() and rank_S[group_S].mean() < limit:
                found.append(before.weight_GFE[number].cpu().numpy())
                marks += number < before.marks
                group_S &= rest_S
                rest_S, gram_FDD = rest_S & ~group_S, gram_FDD - self.grams(group_S)
        for _ in range(GROUPS - (len(found) - marks)):
            if not rest_S.any():
                break
            ridge = Ridge(self, rest_S, gram_FDD)
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
            if rank_S[group_S].mean() < LOW_RANK and (self.has_ST is None or share_a_word(self.has_ST, group_S)):
                scale = strength * deviation / spread
                constant_F = -scale * (weight_FD @ self.mean_D + middle) - FREE * strength * deviation
                found.append(np.c_[scale * weight_FD, constant_F])
            rest_S, gram_FDD = rest_S & ~group_S, gram_FDD - self.grams(group_S)
        return Suspicion.of(self, found, marks)


class Ridge:
    """Ridge regression of C questions of yes or no on the pictures of `rest_S`, once without each fold."""

    def __init__(self, sample, rest_S, gram_FDD):
        self.x_SD, self.fold_S, self.rest = sample.x_SD, sample.fold_S, rest_S.sum()
        gram_DD = gram_FDD.sum(0, dtype=np.float64)
        variance = np.trace(gram_DD) / len(gram_DD) + FLAT * self.rest
        ridge_DD = RIDGE * variance * np.eye(len(gram_DD))
        self.factors = [cho_factor(gram_DD - gram + ridge_DD) for gram in gram_FDD]
        self.sum_FD = np.stack([self.x_SD[rest_S & (self.fold_S == f)].sum(0, dtype=np.float64) for f in range(FOLDS)])

    def fitted(self, yes_SC):
        """float32 (F, D, C): what tells the pictures of bool yes_SC (dense or sparse), some of the rest, from the others."""
        row_N, of_N = yes_SC.nonzero()
        kinds = yes_SC.shape[1]
        place = self.fold_S[row_N] * kinds + of_N, row_N
        yes_MS = csr_matrix((np.ones(len(row_N), np.float32), place), shape=(FOLDS * kinds, len(self.x_SD)))
        share_C = np.bincount(of_N, minlength=kinds) / self.rest
        sum_FCD = (yes_MS @ self.x_SD).reshape(FOLDS, kinds, -1) - share_C[:, None] * self.sum_FD[:, None]
        sum_CD = sum_FCD.sum(0)
        return np.stack(
            [cho_solve(factor, (sum_CD - one_CD).T) for factor, one_CD in zip(self.factors, sum_FCD)]
        ).astype(np.float32)

    def judged(self, weight_FDC, row_N=slice(None)):
        """float32 (N, C): how much pictures, all or those of row_N, are of each kind, by the weights that were fitted without them."""
        x_ND, fold_N = self.x_SD[row_N], self.fold_S[row_N]
        judged_NC = np.empty((len(x_ND), weight_FDC.shape[2]), np.float32)
        for fold in range(FOLDS):
            judged_NC[fold_N == fold] = x_ND[fold_N == fold] @ weight_FDC[fold]
        return judged_NC


def robust(values):
    """(median, 1.4826 times the median absolute deviation from it); zeros of nothing."""
    if not len(values):
        return 0.0, 0.0
    middle = np.median(values)
    return middle, 1.4826 * np.median(np.abs(values - middle))


def sample_of_run(folder, samples, views, batch_size, workers, seed):
    """Sample, on rank 0 (None elsewhere): SAMPLE random pairs, read once a run and kept in `folder`. All ranks call."""
    path, index = Path(folder) / "small.npz", samples.index
    made = {"fingerprint": index.fingerprint, "seed": seed}

    def there():
        try:
            return bool(load_sample(path, **made))
        except LookupError:
            return False

    if not comm.on_main(there):
        row_S = np.random.default_rng([seed, 3]).choice(index.samples, min(SAMPLE, index.samples), replace=False)
        mine = np.array_split(np.sort(row_S), comm.world())[comm.rank()]
        pairs = [(mine[at : at + batch_size],) * 2 for at in range(0, len(mine), batch_size)]
        rows, pictures, captions = [np.zeros(0, np.int64)], [np.zeros((0, 3 * SIDE**2), np.uint8)], []
        for batch in batches(PlainBatches(samples.scattered(), pairs, views), workers=workers):
            rows.append(batch.rows[batch.valid].numpy())
            pictures.append((small(batch.images[batch.valid]) * 255).round().to(torch.uint8).numpy())
            captions.append(batch.tokens[batch.valid].numpy().astype(np.int32))
        parts = comm.gather_objects((np.concatenate(rows), np.concatenate(pictures), captions))

        def keep():
            file = io.BytesIO()
            row_S, small_SD = (np.concatenate(part) for part in list(zip(*parts))[:2])
            token_SL = np.concatenate(
                [one for *_, captions in parts for one in captions] or [np.zeros((0, 1), np.int32)]
            )
            np.savez(file, row_S=row_S, small_SD=small_SD, token_SL=token_SL, **made)
            write_bytes(path, file.getvalue())

        comm.on_main(keep)
    return load_sample(path, **made) if comm.is_main() else None


@lru_cache(maxsize=1)  # the same at every split
def load_sample(path, fingerprint, seed):
    """Sample that was kept in the file. Raises LookupError where there is none of these shards and this seed."""
    try:
        found = np.load(path, allow_pickle=False)
        if str(found["fingerprint"]) == fingerprint and int(found["seed"]) == seed:
            return Sample(found["row_S"], found["small_SD"], found["token_SL"])
    except (OSError, ValueError, KeyError, BadZipFile):
        pass
    raise LookupError(path)
