"""The command line with a split that knows the poison, which no rule can better: python -m tests.benchmarks.oracle train CONFIG ..."""

import numpy as np
import torch

from pipeline import cli
from pipeline.evaluation.report import poison_rows
from pipeline.training import splitting

honest = splitting.scores_for


def scores_for(run, *rest):
    score_N, *others = honest(run, *rest)
    score_N[poison_rows(run.samples.overlay, run.index)] = np.nanmin(score_N)
    return score_N, *others


if __name__ == "__main__":
    torch.set_num_threads(1)
    splitting.scores_for = scores_for
    cli.main()
