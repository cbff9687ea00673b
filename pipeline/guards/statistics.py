"""Statistics of pictures and captions that guards compare: whitening, tf-idf, robust deviations."""

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags

from pipeline.guards.features import SIDE

RIDGE = 0.01  # of the mean variance of a number, added to each: what hardly varies must not dominate


def whitening(seen_SD: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean_D, white_DD): (x - mean_D) @ white_DD has numbers of about variance 1, and hardly correlated.

    Of pixels the covariance is averaged over the eight rotations and reflections of a square: natural pictures have these symmetries,
    roughly, and a trigger does not, so it cannot hide by what it adds to the covariance itself.
    """
    mean_D = seen_SD.mean(0)
    covariance_DD = (seen_SD - mean_D).T @ (seen_SD - mean_D) / len(seen_SD)
    if name == "pixels":
        place = np.arange(3 * SIDE * SIDE).reshape(3, SIDE, SIDE)
        turned = [np.rot90(one, turn, (1, 2)).ravel() for one in (place, place[:, :, ::-1]) for turn in range(4)]
        covariance_DD = sum(covariance_DD[order][:, order] for order in map(torch.from_numpy, map(np.copy, turned))) / 8
    value_D, vector_DD = torch.linalg.eigh(covariance_DD.double())
    value_D = value_D.clamp(min=0) + RIDGE * value_D.mean() + 1e-6
    return mean_D, (vector_DD / value_D.sqrt()).float()


def alike(pixel_SD: torch.Tensor, row_M: np.ndarray) -> float:
    """Median cosine of a picture with the one of the others that is most like it, once the mean of all is taken off.

    1 where next to nothing is left of them: they are one picture, many times.
    """
    left_MD = pixel_SD[row_M] - pixel_SD[row_M].mean(0)
    length_M = left_MD.norm(dim=1)
    if len(row_M) < 2 or length_M.median() ** 2 < 0.1 * pixel_SD.norm(dim=1).median() ** 2:
        return 1.0
    unit_MD = left_MD / length_M.clamp(min=1e-6)[:, None]
    return float((unit_MD @ unit_MD.T).fill_diagonal_(-1).amax(1).median())


def tf_idf(token_ST: np.ndarray) -> csr_matrix:
    """csr float32 (S, tokens), rows of length 1: which tokens a caption has, the rarer the heavier."""
    row_N = np.repeat(np.arange(len(token_ST)), token_ST.shape[1])
    has_ST = csr_matrix((np.ones(token_ST.size, np.float32), (row_N, token_ST.ravel())))
    has_ST.data[:] = 1  # however often
    count_T = np.maximum(1, np.asarray(has_ST.sum(0)).ravel())
    has_ST = has_ST @ diags(np.log(len(token_ST) / count_T).astype(np.float32))
    length_S = np.sqrt(np.asarray(has_ST.multiply(has_ST).sum(1)).ravel())
    return diags(1 / np.maximum(length_S, 1e-6)) @ has_ST


def words(caption_MT: csr_matrix) -> float:
    """Mean cosine of the captions of different rows."""
    rows, total = caption_MT.shape[0], np.asarray(caption_MT.sum(0)).ravel()
    own = caption_MT.multiply(caption_MT).sum()
    return float((total @ total - own) / max(1, rows * (rows - 1)))


def robust(value_N: torch.Tensor) -> tuple[float, float]:
    """(median, 1.4826 times the median absolute deviation from it)."""
    middle = value_N.median()
    return float(middle), float(1.4826 * (value_N - middle).abs().median())
