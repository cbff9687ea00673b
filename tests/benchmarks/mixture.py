"""The mixture at a billion scores: histogram, fit, exact selection; scikit-learn's at three million beside it.

python -m tests.benchmarks.mixture [--scores 1e9] [--sklearn 3e6]

The scores are 1/32 of the number, drawn from two Gaussians and gone over 32 times; what is timed is the work on all of
them. Last line: one JSON object, seconds, and nanoseconds a score beside reading the scores once (their sum).
"""

import argparse
import json
import time

import numpy as np
from sklearn.mixture import GaussianMixture

from pipeline.safety.mixture import fit_mixture, histogram
from pipeline.safety.selection import kth_largest

REPEAT = 32


def timed(function, *args):
    started = time.monotonic()
    return function(*args), time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=float, default=1e9)
    parser.add_argument("--sklearn", type=float, default=3e6)
    args = parser.parse_args()
    rng, count = np.random.default_rng(0), int(args.scores) // REPEAT
    part_N = rng.normal(0.25, 0.08, count).astype(np.float32)
    low = rng.random(count) < 0.1
    part_N[low] = rng.normal(0.05, 0.06, int(low.sum()))
    counts_K, histogram_s = 0, 0.0
    _, sum_s = timed(lambda: [part_N.sum() for _ in range(REPEAT)])
    for _ in range(REPEAT):
        found_K, seconds = timed(histogram, part_N, -1.0, 1.0)
        counts_K, histogram_s = counts_K + found_K, histogram_s + seconds
    mixture, fit_s = timed(fit_mixture, counts_K, -1.0, 1.0)
    _, select_s = timed(lambda: [kth_largest(part_N, count // 2) for _ in range(REPEAT)])
    few = part_N[: int(args.sklearn), None].astype(np.float64)
    theirs, sklearn_s = timed(GaussianMixture(2, random_state=0).fit, few)
    ours, ours_s = timed(lambda: fit_mixture(histogram(few[:, 0], -1.0, 1.0), -1.0, 1.0))
    total = count * REPEAT
    figures = {
        "scores": total,
        "read_s": round(sum_s, 2),
        "histogram_s": round(histogram_s, 2),
        "histogram_ns_a_score": round(histogram_s / total * 1e9, 2),
        "fit_s": round(fit_s, 3),
        "select_s": round(select_s, 2),
        "mixture": {key: np.round(getattr(mixture, key), 4).tolist() for key in ("mean", "std", "weight")},
        "sklearn": {
            "scores": len(few),
            "seconds": round(sklearn_s, 2),
            "iterations": int(theirs.n_iter_),
            "mean": np.sort(theirs.means_[:, 0]).round(4).tolist(),
            "weight": theirs.weights_[np.argsort(theirs.means_[:, 0])].round(4).tolist(),
        },
        "ours_on_the_same": {
            "seconds": round(ours_s, 3),
            "mean": np.round(ours.mean, 4).tolist(),
            "weight": np.round(ours.weight, 4).tolist(),
        },
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
