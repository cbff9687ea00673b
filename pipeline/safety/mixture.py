"""Mixture of two Gaussians, fitted to a histogram of all scores, and the threshold of its posterior.

Counts are integers, whose sum over ranks does not round, so the mixture is the same bit for bit at every world size.
"""

from dataclasses import asdict, dataclass

import numpy as np

BINS = 65_536
PIECE = 1 << 18  # scores at a time; temporaries of this size fit the processor's cache
COARSE = 1_024  # groups of bins on which the starting points are compared
EM_STEPS = 20
# Starting points of EM: this fraction of the lowest scores is one component, the others are the other.
STARTS = (0.1, 0.3, 0.5, 0.7, 0.9)
SATURATED = 53 * np.log(2)  # log-odds from which on the posterior is 1 in float64


class DegenerateFit(Exception):
    """The scores are not a mixture of two components, or its posterior has no threshold."""


@dataclass(frozen=True)
class Mixture:
    """Two Gaussians, the one with the lower mean first.

    mean, std, weight: (low, high); log_likelihood: mean over the scores, in nats.
    """

    mean: tuple[float, float]
    std: tuple[float, float]
    weight: tuple[float, float]
    log_likelihood: float

    def log_odds(self, scores: np.ndarray) -> np.ndarray:
        """Log of the weighted density of the higher component over that of the lower one, float64. NaN stays NaN."""
        scores = np.asarray(scores, np.float64)
        low, high = (
            np.log(w) - np.log(s) - 0.5 * ((scores - m) / s) ** 2 for m, s, w in zip(self.mean, self.std, self.weight)
        )
        return high - low

    def posterior(self, scores: np.ndarray) -> np.ndarray:
        """Posterior probability of the higher component, in the shape of `scores`. NaN stays NaN."""
        return 1 / (1 + np.exp(np.clip(-self.log_odds(scores), -700, 700)))

    def rank(self, scores: np.ndarray) -> np.ndarray:
        """Ranking by posterior, float32: log-odds, clipped where the posterior is 1 in float64."""
        return np.minimum(self.log_odds(scores), SATURATED).astype(np.float32)

    def to_dict(self) -> dict[str, list[float] | float]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "Mixture":
        mean, std, weight = (tuple(values[key]) for key in ("mean", "std", "weight"))
        return cls(mean, std, weight, values["log_likelihood"])


def histogram(scores_N: np.ndarray, low: float, high: float, bins: int = BINS) -> np.ndarray:
    """int64 (bins,): counts of the scores in equal bins from `low` to `high`.

    Scores outside are counted in the end bins, NaN is not counted. Works in float32 on pieces; histograms of parts add
    up to that of the whole.
    """
    counts_K = np.zeros(bins + 1, np.int64)
    for start in range(0, len(scores_N), PIECE):
        number = (np.asarray(scores_N[start : start + PIECE], np.float32) - np.float32(low)) * np.float32(
            bins / (high - low)
        )
        np.clip(number, 0, bins - 1, out=number)
        number[np.isnan(number)] = bins
        counts_K += np.bincount(number.astype(np.int64), minlength=bins + 1)
    return counts_K[:-1]


def fit_mixture(counts_K: np.ndarray, low: float, high: float) -> Mixture:
    """Mixture of maximum likelihood for the scores of a `histogram`, over several fixed starting points.

    Starting points are compared on groups of bins, and the best one is refined on all bins. Raises DegenerateFit if
    there are too few different scores for two components, or one component vanishes.
    """
    counts_K = np.asarray(counts_K)
    width = (high - low) / len(counts_K)
    used = np.flatnonzero(counts_K)
    if len(used) < 3:
        raise DegenerateFit(f"{len(used)} different score(s), at least 3 are needed")
    x, n = low + (used + 0.5) * width, counts_K[used].astype(np.float64)
    mean = (n * x).sum() / n.sum()
    spread = np.sqrt((n * (x - mean) ** 2).sum() / n.sum())
    floor = (width / 2) ** 2
    few_x, few_n = grouped(x, n, used // max(1, len(counts_K) // COARSE))
    rank = np.cumsum(few_n) / few_n.sum()
    best = None
    for fraction in STARTS:
        lower = rank <= max(fraction, rank[0])
        if lower.all():
            continue
        start = np.stack([moments(few_x, few_n, lower, floor), moments(few_x, few_n, ~lower, floor)])
        theta, likelihood = maximum(few_x, few_n, start, floor)
        if best is None or likelihood > best[1] + 1e-12:
            best = theta, likelihood
    if best is None:  # all scores in one group
        lower = np.arange(len(x)) < len(x) // 2
        best = np.stack([moments(x, n, lower, floor), moments(x, n, ~lower, floor)]), None
    theta, likelihood = maximum(x, n, best[0], floor)
    w, m, v = theta.T
    order = np.argsort(m)
    if w.min() * n.sum() < 2 or m[order[1]] - m[order[0]] < 1e-6 * spread:
        raise DegenerateFit("one component vanished")
    return Mixture(
        tuple(m[order].tolist()), tuple(np.sqrt(v[order]).tolist()), tuple(w[order].tolist()), float(likelihood)
    )


def fit_sklearn(scores_N: np.ndarray) -> Mixture:
    """Mixture by sklearn.mixture.GaussianMixture(2, random_state=0) of the scores from the highest to the lowest, as in
    the released recipe: its start depends on their order.

    It holds all scores in memory and stops at its default tolerance, before the maximum. Raises DegenerateFit if there
    are fewer than 3 different scores.
    """
    from sklearn.mixture import GaussianMixture

    x_N1 = np.sort(scores_N[~np.isnan(scores_N)])[::-1, None]
    if len(np.unique(x_N1[: 1 << 16])) < 3 and len(np.unique(x_N1)) < 3:
        raise DegenerateFit("fewer than 3 different scores")
    found = GaussianMixture(2, random_state=0).fit(x_N1)
    order = np.argsort(found.means_[:, 0])
    parts = found.means_[order, 0], np.sqrt(found.covariances_[order, 0, 0]), found.weights_[order]
    mean, std, weight = (tuple(part.tolist()) for part in parts)
    return Mixture(mean, std, weight, float(found.lower_bound_))


def grouped(x: np.ndarray, n: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(centres of mass, counts) of the scores in each `group`."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    total = np.add.reduceat(n, first)
    return np.add.reduceat(n * x, first) / total, total


def moments(x: np.ndarray, n: np.ndarray, where: np.ndarray, floor: float) -> np.ndarray:
    """(weight, mean, variance) of the scores `where`."""
    total = n[where].sum()
    mean = (n[where] * x[where]).sum() / total
    return np.array([total / n.sum(), mean, max(2 * floor, (n[where] * (x[where] - mean) ** 2).sum() / total)])


def maximum(x: np.ndarray, n: np.ndarray, theta: np.ndarray, floor: float) -> tuple[np.ndarray, float]:
    """(theta, mean log-likelihood) of the local maximum reached from `theta` (2, 3: weight, mean, variance).

    EM converges slowly when the components overlap, so a few steps of EM are followed by BFGS on the same likelihood.
    """
    from scipy.optimize import minimize  # here: every start would wait for it

    centre = (n * x).sum() / n.sum()
    unit = np.sqrt((n * (x - centre) ** 2).sum() / n.sum())
    z, fraction, least = (x - centre) / unit, n / n.sum(), floor / unit**2
    theta = np.stack([theta[:, 0], (theta[:, 1] - centre) / unit, theta[:, 2] / unit**2], 1)
    for _ in range(EM_STEPS):
        _, weight, first, second = expect(z, fraction, theta)
        theta = np.stack([weight, first / weight, np.maximum(2 * least, second / weight - (first / weight) ** 2)], 1)
    found = minimize(
        loss, pack(theta, least), (z, fraction, least), method="BFGS", jac=True, options={"gtol": 1e-10, "maxiter": 500}
    )
    weight, mean, variance = unpack(found.x, least).T
    return np.stack([weight, centre + unit * mean, unit**2 * variance], 1), float(-found.fun - np.log(unit))


def expect(z: np.ndarray, fraction: np.ndarray, theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """E-step: (mean log-likelihood, weight, first, second), the last three the weight and the raw moments of each
    component by posterior."""
    weight, mean, variance = theta.T[:, :, None]
    log_p = np.log(weight) - 0.5 * (np.log(2 * np.pi * variance) + (z - mean) ** 2 / variance)
    top = log_p.max(0)
    p = np.exp(log_p - top)
    total = p.sum(0)
    part = fraction * p / total
    likelihood = float((fraction * (top + np.log(total))).sum())
    return likelihood, np.maximum(part.sum(1), 1e-300), (part * z).sum(1), (part * z**2).sum(1)


def loss(packed: np.ndarray, z: np.ndarray, fraction: np.ndarray, least: float) -> tuple[float, np.ndarray]:
    """(negative mean log-likelihood, its gradient) in the coordinates of `pack`."""
    theta = unpack(packed, least)
    likelihood, weight, first, second = expect(z, fraction, theta)
    _, mean, variance = theta.T
    square = second - 2 * mean * first + mean**2 * weight
    by_mean = (first - mean * weight) / variance
    by_variance = 0.5 * (square / variance - weight) * (variance - least) / variance
    return -likelihood, -np.concatenate([[weight[0] - theta[0, 0]], by_mean, by_variance])


def pack(theta: np.ndarray, least: float) -> np.ndarray:
    """Unconstrained coordinates of theta: log-odds of the weight, means, logs of the variances minus `least`."""
    return np.concatenate([[np.log(theta[0, 0] / theta[1, 0])], theta[:, 1], np.log(theta[:, 2] - least)])


def unpack(packed: np.ndarray, least: float) -> np.ndarray:
    """theta of the coordinates of `pack`."""
    weight = 1 / (1 + np.exp(-np.clip(packed[0], -30, 30)))
    return np.stack([[weight, 1 - weight], packed[1:3], least + np.exp(np.clip(packed[3:], -60, 60))], 1)


def posterior_threshold(mixture: Mixture, posterior: float = 0.9) -> float:
    """Score at which the posterior of the higher component reaches `posterior`: pairs at or above it are safe.

    The log-odds are a parabola in the score. If the higher component is the wider one, the parabola opens upwards and
    the posterior rises again at the lowest scores, which must not be safe, so the threshold is the upper root. If it is
    the narrower one, the posterior falls again at the highest scores, which stay safe, so it is the lower root. Raises
    DegenerateFit if there is no such score.
    """
    (m0, m1), (s0, s1), (w0, w1) = mixture.mean, mixture.std, mixture.weight
    a = 0.5 / s0**2 - 0.5 / s1**2
    b = m1 / s1**2 - m0 / s0**2
    c = 0.5 * (m0 / s0) ** 2 - 0.5 * (m1 / s1) ** 2 + np.log(w1 * s0 / (w0 * s1)) - np.log(posterior / (1 - posterior))
    if abs(a) * max(s0, s1) ** 2 < 1e-12:
        if b <= 0:
            raise DegenerateFit("the components coincide")
        return float(-c / b)
    if b * b < 4 * a * c:
        raise DegenerateFit(f"the posterior is {'above' if a > 0 else 'below'} {posterior} everywhere")
    q = -0.5 * (b + np.copysign(np.sqrt(b * b - 4 * a * c), b))  # the stable form: no cancellation for a near 0
    roots = sorted((q / a, c / q))
    return float(roots[1] if a > 0 else roots[0])
