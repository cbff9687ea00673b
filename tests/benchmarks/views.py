"""How well single views of the pictures, and means of them, tell poison from clean pairs in a trained model.

python -m tests.benchmarks.views RUN       its newest checkpoint; RUN was trained with data.overlay=DIR

Prints a line for each view or mean, then one JSON object: for each kind of poison the AUROC of the cosine (clean pairs above poison) and
the percentage that would pass at the run's cap. tests/benchmarks/views.json is that of the rule before the views, which poison had passed:
configs/quickstart.yaml run.seed=5 data.overlay=data/shapes_attack_seed5 data.clip_mix=0 data.clip_paste=0 selection.coarse=1
selection.crop=1 selection.copies=null.
"""

import json
import sys

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from pipeline import comm
from pipeline.data import open_index, open_samples
from pipeline.evaluation.run import load_run
from pipeline.evaluation.selection_quality import poison_rows
from pipeline.safety.scoring import embed, shard_batches
from pipeline.safety.selection import select_top
from pipeline.safety.views import ScoredViews
from pipeline.training.start import make_views

COARSE, MIDDLE = ScoredViews(coarse=0.1875), ScoredViews(crop=0.6)
VIEWS = {
    "plain": lambda images: images,
    "coarse": lambda images: COARSE(images)[1],
    "middle": lambda images: MIDDLE(images)[1],
    "mirrored": lambda images: images.flip(-1),
}
MEANS = (
    ("plain", "coarse"),
    ("plain", "middle"),
    ("plain", "coarse", "middle"),
    ("plain", "coarse", "middle", "mirrored"),
)


def main(run_dir):
    config, _, towers = load_run(run_dir)
    index = open_index(config.data)
    samples, views, cos = open_samples(config.data, index), make_views(config), {}
    pairs = [(rows, rows) for _, rows in shard_batches(index.offsets, range(len(index.shards)), 512)]
    for name, look in VIEWS.items():
        views.scored = lambda images: [look(images)]
        found = [cos_B for *_, cos_B in embed(towers, samples, views, pairs, comm.device())]
        cos[name] = torch.cat(found).cpu().numpy()
    scores = cos | {" + ".join(names): np.mean([cos[name] for name in names], 0) for names in MEANS}
    clean_N = np.ones(index.samples, bool)
    clean_N[poison_rows(samples.overlay, index)] = False
    result = {}
    for name, score_N in scores.items():
        passing_N, result[name] = select_top(score_N, int(config.selection.cap * index.samples)), {}
        for kind in samples.overlay.kinds:
            rows = poison_rows(samples.overlay, index, kind)
            truth = np.r_[np.ones(clean_N.sum()), np.zeros(len(rows))]
            auroc = roc_auc_score(truth, np.r_[score_N[clean_N], score_N[rows]])
            result[name][kind] = {"auroc": round(auroc, 4), "passing": round(100 * float(passing_N[rows].mean()), 1)}
        print(name, result[name])
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
