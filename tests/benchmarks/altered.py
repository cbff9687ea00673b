"""The command line with a split that no setting makes: python -m tests.benchmarks.altered oracle|marks-alone|no-marks|no-textures train CONFIG ...

oracle: the split knows the poison; no rule can better it. marks-alone: suspicion learns no groups from scores, only marks are held against pairs. no-marks: the
contrary, and the slow epochs train on what would be marked.
no-textures: marks look at pixels alone, and so miss a patch that wanders, which is left to the scores.
"""

import sys

import numpy as np
import torch

from pipeline import cli
from pipeline.evaluation.selection_quality import poison_rows
from pipeline.safety import marks, suspicion
from pipeline.training import splitting

honest = splitting.scores_for


def scores_for(run, *rest):
    score_N, *others = honest(run, *rest)
    score_N[poison_rows(run.samples.overlay, run.index)] = np.nanmin(score_N)
    return score_N, *others


if __name__ == "__main__":
    torch.set_num_threads(1)
    what = sys.argv.pop(1)
    if what == "oracle":
        splitting.scores_for = scores_for
    elif what == "marks-alone":
        suspicion.GROUPS = 0
    elif what == "no-marks":
        marks.LOOKS = ()
    elif what == "no-textures":
        marks.LOOKS = marks.LOOKS[:1]
    else:
        sys.exit(f"{what}: expected oracle, marks-alone, no-marks or no-textures")
    cli.main()
