"""One global two-component Gaussian mixture, fitted to an integer histogram, and the one cut that follows from it.

Integer counts sum without rounding, so every rank and every world size gets the same mixture, bit for bit (METHOD trap 3).
"""

from dataclasses import asdict, dataclass

import numpy as np

BINS = 65_536
CONVERGED = (
    1e-12  # gain in mean log-likelihood below which EM stops; the usual 1e-3 stops far too early (METHOD trap 2)
)
ITERATIONS = 2_000


class DegenerateFit(Exception):
    """The scores are no mixture of two, or its components give no cut."""


@dataclass(frozen=True)
class Mixture:
    """Two Gaussians, the lower mean first. mean, std, weight: (low, high); log_likelihood: mean over the scores, in nats."""

    mean: tuple
    std: tuple
    weight: tuple
    log_likelihood: float

    def posterior(self, scores):
        """Probability that a score comes from the higher component; the shape of `scores`, NaN stays NaN."""
        scores = np.asarray(scores, np.float64)
        low, high = (
            np.log(w) - np.log(s) - 0.5 * ((scores - m) / s) ** 2 for m, s, w in zip(self.mean, self.std, self.weight)
        )
        return 1 / (1 + np.exp(np.clip(low - high, -700, 700)))

    def to_dict(self):
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values):
        return cls(*(tuple(values[key]) for key in ("mean", "std", "weight")), values["log_likelihood"])


def histogram(scores_N, low, high, bins=BINS):
    """int64 (bins,): counts of the scores in equal bins from `low` to `high`; what lies outside goes to the end bins, NaN nowhere."""
    scores = np.asarray(scores_N)
    scores = scores[~np.isnan(scores)].astype(np.float64)
    number = np.clip(np.floor((scores - low) * (bins / (high - low))), 0, bins - 1).astype(np.int64)
    return np.bincount(number, minlength=bins)


def fit_mixture(counts_K, low, high):
    """Mixture of the scores behind a `histogram`: EM to convergence from several fixed starts, the best likelihood wins.

    Raises DegenerateFit when there are too few different scores for two components, or one of them vanishes.
    """
    counts_K = np.asarray(counts_K)
    width = (high - low) / len(counts_K)
    used = np.flatnonzero(counts_K)
    if len(used) < 3:
        raise DegenerateFit(f"{len(used)} different score(s), at least 3 are needed")
    x, n = low + (used + 0.5) * width, counts_K[used].astype(np.float64)
    mean = (n * x).sum() / n.sum()
    spread = np.sqrt((n * (x - mean) ** 2).sum() / n.sum())
    rank = np.cumsum(n) / n.sum()
    floor = (width / 2) ** 2
    best = None
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        # The lowest `share` of the scores is one component to begin with, the rest the other.
        lower = rank <= max(share, rank[0])
        if lower.all():
            continue
        start = np.concatenate([moments(x, n, lower, floor), moments(x, n, ~lower, floor)])
        theta, likelihood = em(x, n, start.reshape(2, 3), floor)
        if best is None or likelihood > best[1] + 1e-12:
            best = theta, likelihood
    (w, m, v), likelihood = best[0].T[[0, 1, 2]], best[1]
    order = np.argsort(m)
    if w.min() * n.sum() < 2 or m[order[1]] - m[order[0]] < 1e-6 * spread:
        raise DegenerateFit("one component vanished")
    return Mixture(
        tuple(m[order].tolist()), tuple(np.sqrt(v[order]).tolist()), tuple(w[order].tolist()), float(likelihood)
    )


def moments(x, n, where, floor):
    """(weight, mean, variance) of the scores `where`."""
    total = n[where].sum()
    mean = (n[where] * x[where]).sum() / total
    return np.array([total / n.sum(), mean, max(floor, (n[where] * (x[where] - mean) ** 2).sum() / total)])


def em(x, n, theta, floor):
    """(theta, mean log-likelihood) at the fixed point of EM from `theta` (2, 3: weight, mean, variance).

    Two plain EM steps give a direction; a step along it is taken when it does not lower the likelihood (SQUAREM, Varadhan and
    Roland 2008): the same fixed point in far fewer steps.
    """
    before = -np.inf
    for _ in range(ITERATIONS):
        one, here = em_step(x, n, theta, floor)
        if here - before < CONVERGED:
            break
        before = here
        two, _ = em_step(x, n, one, floor)
        r, v = pack(one) - pack(theta), pack(two) - 2 * pack(one) + pack(theta)
        length = np.linalg.norm(v)
        theta = two
        if length > 1e-14:
            step = max(1.0, np.linalg.norm(r) / length)
            leap = unpack(pack(one) - r + 2 * step * r + step**2 * v, floor)
            landed, there = em_step(x, n, leap, floor)
            _, plain = em_step(x, n, two, floor)
            if np.isfinite(there) and there >= plain:
                theta = landed
    return theta, here


def em_step(x, n, theta, floor):
    """(theta after one step of EM, mean log-likelihood before it)."""
    log_p = np.log(theta[:, :1]) - 0.5 * (np.log(2 * np.pi * theta[:, 2:]) + (x - theta[:, 1:2]) ** 2 / theta[:, 2:])
    top = log_p.max(0)
    p = np.exp(log_p - top)
    total = p.sum(0)
    likelihood = (n * (top + np.log(total))).sum() / n.sum()
    share = n * p / total
    weight = np.maximum(share.sum(1), 1e-300)
    mean = (share * x).sum(1) / weight
    variance = np.maximum(floor, (share * (x - mean[:, None]) ** 2).sum(1) / weight)
    return np.stack([np.clip(weight / n.sum(), 1e-12, 1), mean, variance], 1), likelihood


def pack(theta):
    """Free coordinates of theta: log-odds of the weight, means, log-variances."""
    return np.concatenate([[np.log(theta[0, 0] / theta[1, 0])], theta[:, 1], np.log(theta[:, 2])])


def unpack(packed, floor):
    weight = 1 / (1 + np.exp(-np.clip(packed[0], -30, 30)))
    return np.stack([[weight, 1 - weight], packed[1:3], np.maximum(floor, np.exp(np.clip(packed[3:], -60, 60)))], 1)


def upper_cut(mixture, posterior=0.9):
    """The ONE cut: pairs with a score of at least this are safe. Raises DegenerateFit when there is none.

    log p_high - log p_low is a parabola in the score. Where the higher component is the wider one it opens upwards: its tail
    takes the lowest scores too, which must not be safe (METHOD trap 1), so the cut is the upper root. Where it is the narrower
    one, the posterior falls again above it; those pairs match best and stay safe, so the cut is the lower root.
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
