"""Whether the cosines of the training pass could stand for those of a scoring pass: both at every split of one run.

python -m tests.benchmarks.reuse configs/quickstart.yaml run.dir=runs/reuse preset=paper data.overlay=data/shapes_attack_seed0

The run is trained as always. Beside it each pair's cosine is noted when a step trains on it (its augmented view, the weights of that
moment, batch statistics), and at the next split the safe set of those is compared with that of the scoring pass: rank
correlation, Jaccard, and the poison in either (known here from the overlay only). Pairs that no step saw keep the pass's cosine.
Last line: one JSON object, a list with one entry a split.
"""

import argparse
import json

import numpy as np
from scipy.stats import spearmanr

from pipeline import comm
from pipeline.configfile import load_config
from pipeline.data import open_index, open_overlay
from pipeline.safety.selection import select_top
from pipeline.training import run as running
from pipeline.training import splitting


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_args()
    config = load_config(args.config, [*args.overrides, "evaluation.test=null"])
    index = open_index(config.data)
    places = open_overlay(config.data, index).poison
    is_poison_N = np.zeros(index.samples, bool)
    is_poison_N[[index.offsets[shard] + position for shard, position in places]] = True
    trained_N, found = np.full(index.samples, np.nan, np.float32), []
    step, split_pairs = running.train_step, splitting.split_pairs

    def noting_step(engine, pools, batch, kind):
        def noting(images, tokens):
            image_BD, text_BD, scale = engine(images, tokens)
            rows = len(batch.rows)  # of a unimodal step the first views
            trained_N[batch.rows.numpy()] = (image_BD[:rows] * text_BD[:rows]).sum(1).detach().float().cpu().numpy()
            return image_BD, text_BD, scale

        class Noting:
            __call__ = staticmethod(noting)

            def __getattr__(self, name):
                return getattr(engine, name)

        return step(Noting(), pools, batch, kind)

    def comparing_split(cos_N, counts_S, selection, number, first_share, before, canary_C, live):
        split = split_pairs(cos_N, counts_S, selection, number, first_share, before, canary_C, live)
        seen_N = ~np.isnan(trained_N)
        safe = {"pass": select_top(cos_N, round(split.share * len(cos_N)))}
        safe["trained"] = select_top(np.where(seen_N, trained_N, cos_N), round(split.share * len(cos_N)))
        both, either = safe["pass"] & safe["trained"], safe["pass"] | safe["trained"]
        row = {
            "split": number,
            "share": round(split.share, 4),
            "seen": round(float(seen_N.mean()), 4),
            "rank_correlation": round(float(spearmanr(cos_N[seen_N], trained_N[seen_N])[0]), 4),
            "jaccard": round(float(both.sum() / either.sum()), 4),
            "poison_passed_of_all": {
                name: round(float(chosen[is_poison_N].mean()), 4) for name, chosen in safe.items()
            },
        }
        if number:  # before the first split no pair was risky
            risky_N = ~mask_before[0] & seen_N
            row["cosine_higher_than_the_pass"] = {
                "safe": round(float(np.nanmean((trained_N - cos_N)[mask_before[0] & seen_N])), 4),
                "risky": round(float(np.nanmean((trained_N - cos_N)[risky_N])), 4) if risky_N.any() else None,
            }
        mask_before[:] = [safe["pass"]]
        found.append(row)
        print(json.dumps(row), flush=True)
        trained_N[:] = np.nan
        return split

    mask_before = []
    running.train_step, splitting.split_pairs = noting_step, comparing_split
    comm.init()
    running.train(config)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
