"""The pairs that suspicion and marks learn from: small pictures, textures and captions, and what tells some of the pictures from the others.

Ridge regression, each picture judged by one of FOLDS that has not seen it. Legend: S sampled pairs, B pairs, N some of them, D numbers of a picture
(PIXELS of a small one, TEXTURES of its texture, or both), F folds, C kinds of pictures, L tokens, T terms.
"""

import io
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csr_matrix

from pipeline import comm
from pipeline.safety.words import terms
from shards.loader import PlainBatches, batches
from shards.storage import write_bytes

SAMPLE = 65_536  # pairs, at most
SIDE = 16
PIXELS = 3 * SIDE**2
TEXTURES = 512  # filters that pictures of FINE x FINE pixels are asked with
FINE = 32
STRONGEST = 2.6  # answer of a filter to a picture: half the root of its 27 numbers
FOLDS = 5
RIDGE = 0.1  # of the mean variance of a number, added to the covariance
FLAT = 1e-6  # variance of a number that is added, so that flat pictures can be fitted: a quarter of a grey level


def small(images_BCHW):
    """float32 (B, D): the pictures at SIDE x SIDE pixels, means over areas, from 0 to 1."""
    return torch.nn.functional.adaptive_avg_pool2d(images_BCHW.float() / 255, SIDE).flatten(1)


def textures(images_BCHW):
    """float32 (B, TEXTURES), 0 to 1: the strongest answer of each of some random filters of 3 x 3 pixels anywhere in the picture at FINE x FINE pixels.

    What is in a picture answers wherever it stands. Random filters will do, and know nothing of the data (Saxe et al. 2011)."""
    filter_TCHW, found = torch.from_numpy(random_filters()).to(images_BCHW.device), []
    for part_BCHW in images_BCHW.split(64):  # 120 MB of answers at a time
        fine_BCHW = torch.nn.functional.adaptive_avg_pool2d(part_BCHW.float() / 255, FINE)
        found.append(torch.nn.functional.conv2d(fine_BCHW, filter_TCHW).amax((2, 3)))
    return torch.cat(found).clamp(min=0) / STRONGEST


@lru_cache
def random_filters():
    """float32 (TEXTURES, 3, 3, 3), the same everywhere: of mean 0 and length 1."""
    numbers_TD = np.random.default_rng(0).normal(size=(TEXTURES, 27))
    numbers_TD -= numbers_TD.mean(1, keepdims=True)
    numbers_TD /= np.linalg.norm(numbers_TD, axis=1, keepdims=True)
    return numbers_TD.astype(np.float32).reshape(TEXTURES, 3, 3, 3)


def fold_of(row_B):
    """The fold of each row (int64 array or tensor): spread, so that neighbouring pairs, which are often alike, lie in different ones."""
    return (row_B * 2_654_435_761 >> 16) % FOLDS


class Sample:
    """Pairs that the classifiers learn from. row_S: int64 rows over all shards; x_SD: uint8, their small pictures; token_SL: their captions;
    texture_SD: uint8, their textures, which become a sample of their own.

    Captions and textures are what marks are found by; without captions a group need share no word."""

    def __init__(self, row_S, x_SD, token_SL=None, texture_SD=None):
        self.row_S, self.fold_S = row_S, fold_of(row_S)
        self.has_ST = None if token_SL is None else terms(token_SL)
        self.textures = None if texture_SD is None else Sample(row_S, texture_SD)
        self.x_SD = x_SD.astype(np.float32) / np.float32(255)
        self.mean_D = self.x_SD.mean(0, dtype=np.float64).astype(np.float32)
        self.x_SD -= self.mean_D
        self.gram_FDD = self.grams(np.ones(len(row_S), bool))

    def grams(self, those_S):
        """float32 (F, D, D): sums of products over the pictures of bool those_S, fold by fold."""
        return np.stack([x.T @ x for x in (self.x_SD[those_S & (self.fold_S == fold)] for fold in range(FOLDS))])

    def looks(self):
        """float32 (S, D): the small pictures, and their textures where they are known."""
        parts = filter(None, (self, self.textures))
        return torch.from_numpy(np.concatenate([part.x_SD + part.mean_D for part in parts], 1))


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
    """(median, 1.4826 times the median absolute deviation from it), of each column where there are some; zeros of nothing."""
    if not len(values):
        return 0.0, 0.0
    middle = np.median(values, 0)
    return middle, 1.4826 * np.median(np.abs(values - middle), 0)


def sample_of_run(folder, samples, views, batch_size, workers, seed):
    """Sample, on rank 0 (None elsewhere): SAMPLE random pairs, read once a run and kept in `folder`. All ranks call."""
    path, index = Path(folder) / "looks.npz", samples.index
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
        rows, pictures, captions = [np.zeros(0, np.int64)], [np.zeros((0, PIXELS + TEXTURES), np.uint8)], []
        for batch in batches(PlainBatches(samples.scattered(), pairs, views), workers=workers):
            rows.append(batch.rows[batch.valid].numpy())
            # One by one: a picture's texture must not depend on what else is in the batch.
            looks = [torch.cat([small(one), textures(one)], 1) for one in batch.images[batch.valid].split(1)]
            pictures += [(look * 255).round().to(torch.uint8).numpy() for look in looks]
            captions.append(batch.tokens[batch.valid].numpy().astype(np.int32))
        parts = comm.gather_objects((np.concatenate(rows), np.concatenate(pictures), captions))

        def keep():
            file = io.BytesIO()
            row_S, look_SD = (np.concatenate(part) for part in list(zip(*parts))[:2])
            token_SL = np.concatenate(
                [one for *_, captions in parts for one in captions] or [np.zeros((0, 1), np.int32)]
            )
            np.savez(file, row_S=row_S, look_SD=look_SD, token_SL=token_SL, **made)
            write_bytes(path, file.getvalue())

        comm.on_main(keep)
    return load_sample(path, **made) if comm.is_main() else None


@lru_cache(maxsize=1)  # the same at every split
def load_sample(path, fingerprint, seed):
    """Sample that was kept in the file. Raises LookupError where there is none of these shards and this seed."""
    try:
        found = np.load(path, allow_pickle=False)
        if str(found["fingerprint"]) == fingerprint and int(found["seed"]) == seed:
            look_SD = found["look_SD"]
            return Sample(found["row_S"], look_SD[:, :PIXELS], found["token_SL"], look_SD[:, PIXELS:])
    except (OSError, ValueError, KeyError, BadZipFile):
        pass
    raise LookupError(path)
