"""Statistics of pictures that guards compare: whitening, likeness, robust deviations."""

import torch

RIDGE = 0.01  # fraction of the mean variance that is added to each variance, against dominance of small ones


def whitening(seen_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean_D, white_DD): the features (x - mean_D) @ white_DD are nearly uncorrelated, of variance about 1."""
    mean_D = seen_SD.mean(0)
    covariance_DD = (seen_SD - mean_D).T @ (seen_SD - mean_D) / len(seen_SD)
    value_D, vector_DD = torch.linalg.eigh(covariance_DD.double())
    value_D = value_D.clamp(min=0) + RIDGE * value_D.mean() + 1e-6
    return mean_D, (vector_DD / value_D.sqrt()).float()


def alike(white_MD: torch.Tensor, usual: float) -> float:
    """Median cosine of a picture with its nearest one, after the mean of all is subtracted.

    1 if their norms are then small against the `usual` norm of a picture: they are near-duplicates.
    """
    left_MD = white_MD - white_MD.mean(0)
    length_M = left_MD.norm(dim=1)
    if len(white_MD) < 2 or length_M.median() ** 2 < 0.1 * usual**2:
        return 1.0
    unit_MD = left_MD / length_M.clamp(min=1e-6)[:, None]
    return float((unit_MD @ unit_MD.T).fill_diagonal_(-1).amax(1).median())


def robust(value_N: torch.Tensor) -> tuple[float, float]:
    """(median, 1.4826 times the median absolute deviation from it)."""
    middle = value_N.median()
    return float(middle), float(1.4826 * (value_N - middle).abs().median())
