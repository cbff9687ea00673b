"""Suspicion: what the pictures of the lowest scores have in common is looked for in all others, and counts against them.

Of the pairs that a trigger poisons most score low, and they show what the few that pass show too: the trigger. So after a split a linear
classifier learns to tell the pictures of the lowest scores from the others (ridge regression on small pictures, not on the embeddings that
poison teaches), and at the next split a pair's score is lowered by how far its picture stands out on their side. No pair is judged by a
classifier that has seen it: there are FOLDS, each fitted without one fold of the pairs. What honest pictures are judged is about normal, and
few of them are beyond FREE deviations; a trigger that is the same in all its pictures, a patch in its place or a pattern over the whole,
stands out by many. One that is elsewhere in each picture is not linear, and does not. The lowest scores and not the risky pairs: early on
half of all pairs are risky, and the trigger is lost among them. The scores as they were before they were lowered: else suspicion feeds on
itself, and honest pictures fill the risky set in place of wrong captions.
Legend: S sampled pairs, B pairs, D = 3 SIDE^2 numbers of a small picture, F folds.
"""

import io
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from pipeline import comm
from shards.errors import UserError
from shards.loader import PlainBatches, batches
from shards.storage import write_bytes

SAMPLE = 65_536  # pairs that the classifiers learn from, at most
SIDE = 16
FOLDS = 5
RIDGE = 0.01  # of the mean variance of a number, added to the covariance
LOWEST = 0.15  # of the scores are learnt as low, pairs without a score among them
FLAT = 1e-6  # variance of a number that is added, so that flat pictures can be fitted: a quarter of a grey level
NOTHING = 1e-4  # deviation of the judgements (1 = low, 0 = not) below which the classifier has found nothing
FREE = 3.0  # deviations on the risky side that cost nothing


def small(images_BCHW):
    """float32 (B, D): the pictures at SIDE x SIDE pixels, means over areas, from 0 to 1."""
    return torch.nn.functional.adaptive_avg_pool2d(images_BCHW.float() / 255, SIDE).flatten(1)


def fold_of(row_B):
    """The fold of each row (int64 array or tensor): spread, so that neighbouring pairs, which are often alike, lie in different ones."""
    return (row_B * 2_654_435_761 >> 16) % FOLDS


class Suspicion:
    """What lowers the scores of a split. weight_FE: float32 (F, D + 1), in units of the score; the last is the constant."""

    def __init__(self, weight_FE):
        self.weight_FE = torch.as_tensor(weight_FE)

    def lowered_by(self, row_B, images_BCHW):
        """float32 (B,): by how much the scores of pairs are lowered, never below 0. row_B: int64, on the pictures' device."""
        return self.lowered_by_small(row_B, small(images_BCHW))

    def lowered_by_small(self, row_B, small_BD):
        """The same, of small pictures (float32, 0 to 1)."""
        self.weight_FE = self.weight_FE.to(small_BD.device)
        weight_BE = self.weight_FE[fold_of(row_B)]
        return ((small_BD * weight_BE[:, :-1]).sum(1) + weight_BE[:, -1]).clamp_min(0)

    @classmethod
    def load(cls, folder):
        """That of the split in `folder`. Raises UserError where it is gone."""
        try:
            return cls(np.load(Path(folder) / "suspicion.npy", allow_pickle=False))
        except (OSError, ValueError) as error:
            raise UserError(
                f"mask {folder}: suspicion.npy cannot be read ({error}), and selection.suspicion goes on from it; bring it back"
            ) from None

    def save(self, folder):
        file = io.BytesIO()
        np.save(file, self.weight_FE.cpu().numpy(), allow_pickle=False)
        write_bytes(Path(folder) / "suspicion.npy", file.getvalue())


class Sample:
    """Pairs that the classifiers learn from. row_S: int64 rows over all shards; small_SD: uint8, their small pictures."""

    def __init__(self, row_S, small_SD):
        self.row_S, self.fold_S = row_S, fold_of(row_S)
        self.x_SD = small_SD.astype(np.float32) / np.float32(255)
        self.mean_D = self.x_SD.mean(0, dtype=np.float64).astype(np.float32)
        self.x_SD -= self.mean_D
        self.gram_FDD = np.stack([x.T @ x for x in (self.x_SD[self.fold_S == fold] for fold in range(FOLDS))])

    def raised(self, score_S, suspicion):
        """float32 (S,): the sample's scores as they were before `suspicion` lowered them (up to the rounding of the small pictures)."""
        small_SD = torch.from_numpy(self.x_SD + self.mean_D)
        return score_S + suspicion.lowered_by_small(torch.from_numpy(self.row_S), small_SD).numpy()

    def learn(self, score_S, strength, deviation):
        """Suspicion, of the sample's scores: each deviation beyond FREE lowers a score by `strength` times `deviation`.

        score_S: float32, not lowered, NaN where there is none. The deviation of pictures is a robust one, of what those of the higher scores are judged
        (1.4826 times the median absolute one); `deviation` is that of the scores.
        """
        score_S = np.where(np.isnan(score_S), -np.inf, score_S)
        low_S = score_S <= np.quantile(score_S, LOWEST, method="lower")
        target_S = (low_S - low_S.mean()).astype(np.float32)
        sum_FD = np.stack([self.x_SD[self.fold_S == f].T @ target_S[self.fold_S == f] for f in range(FOLDS)])
        gram_DD, sum_D = self.gram_FDD.sum(0, dtype=np.float64), sum_FD.sum(0, dtype=np.float64)
        variance = np.trace(gram_DD) / len(gram_DD) + FLAT * len(score_S)
        ridge_DD = RIDGE * variance * np.eye(len(gram_DD))
        weight_FD = np.stack(
            [np.linalg.solve(gram_DD - gram + ridge_DD, sum_D - one) for gram, one in zip(self.gram_FDD, sum_FD)]
        )
        judged_S = np.empty(len(score_S))
        for fold in range(FOLDS):
            judged_S[self.fold_S == fold] = self.x_SD[self.fold_S == fold] @ weight_FD[fold]
        middle, spread = robust(judged_S[~low_S])
        scale = strength * deviation / spread if spread > NOTHING else 0.0  # else rounding would be told apart
        constant_F = -scale * (weight_FD @ self.mean_D + middle) - FREE * strength * deviation
        return Suspicion(np.c_[scale * weight_FD, constant_F].astype(np.float32))


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
        rows, pictures = [np.zeros(0, np.int64)], [np.zeros((0, 3 * SIDE**2), np.uint8)]
        for batch in batches(PlainBatches(samples.scattered(), pairs, views), workers=workers):
            rows.append(batch.rows[batch.valid].numpy())
            pictures.append((small(batch.images[batch.valid]) * 255).round().to(torch.uint8).numpy())
        parts = comm.gather_objects((np.concatenate(rows), np.concatenate(pictures)))

        def keep():
            file = io.BytesIO()
            row_S, small_SD = (np.concatenate(part) for part in zip(*parts))
            np.savez(file, row_S=row_S, small_SD=small_SD, **made)
            write_bytes(path, file.getvalue())

        comm.on_main(keep)
    return load_sample(path, **made) if comm.is_main() else None


@lru_cache(maxsize=1)  # the same at every split
def load_sample(path, fingerprint, seed):
    """Sample that was kept in the file. Raises LookupError where there is none of these shards and this seed."""
    try:
        found = np.load(path, allow_pickle=False)
        if str(found["fingerprint"]) == fingerprint and int(found["seed"]) == seed:
            return Sample(found["row_S"], found["small_SD"])
    except (OSError, ValueError, KeyError, BadZipFile):
        pass
    raise LookupError(path)
