"""Linear probe: logistic regression on frozen image embeddings (Radford et al. 2021, section 3.2; Kornblith et al.
2019)."""

from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.config.schema import Config
from pipeline.evaluation.encoding import Encoder
from pipeline.evaluation.testset import TestSet, read_labels, same_shards
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples

MOST = 10_000  # training pictures


def linear_probe(
    encoder: Encoder, image_ND: torch.Tensor, test: TestSet, samples: Samples, labels: Samples, seed: int
) -> float | None:
    """Top-1 accuracy on the test pictures; the classifier learns from at most MOST clean training pictures. None
    where these are of fewer than two classes. Pictures that cannot be read are left out.

    image_ND: embeddings of the test pictures of `test`. samples: the run's training pairs; poisoned
    pairs and decoys of its overlay are left out. labels: Samples of the same shards indexed with text="cls". Embeddings
    are of unit length and then standardised; scikit-learn's default L2 penalty (C = 1).
    """
    place_M = chosen_places(samples, seed)
    label_M = read_labels(labels, place_M)
    image_MD = encoder.pictures(samples, place_M)
    seen_M, seen_N = (embedded.any(1).cpu().numpy() for embedded in (image_MD, image_ND))
    if len(np.unique(label_M[seen_M])) < 2:
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=0))
    probe.fit(image_MD.cpu().numpy()[seen_M], label_M[seen_M])
    return float(probe.score(image_ND.cpu().numpy()[seen_N], test.label_N[seen_N]))


def chosen_places(samples: Samples, seed: int) -> list[tuple[int, int]]:
    """(shard, position) of at most MOST clean training pairs, drawn by `seed`, in order."""
    index = samples.index
    clean_N = np.ones(index.samples, bool)
    if samples.overlay:
        altered = list(samples.overlay.poison)
        clean_N[[index.offsets[shard] + position for shard, position in altered]] = False
    rows = np.random.default_rng([seed, MOST]).permutation(np.flatnonzero(clean_N))[:MOST]
    return list(zip(*(part.tolist() for part in index.place(np.sort(rows)))))


def open_labels(config: Config, index: ShardIndex) -> Samples | None:
    """Samples of the training labels: evaluation.labels, or the folder `labels` beside data.index; None where there is
    none.

    Raises UserError when they are of other shards than `index`.
    """
    folder = config.evaluation.labels
    if folder is None:
        beside = Path(config.data.index).parent / "labels"
        if not config.data.index or not (beside / "index.json").exists():
            return None
        folder = str(beside)
    labels = ShardIndex.load(folder)
    if not same_shards(labels, index):
        raise UserError(
            f"evaluation.labels: {folder} indexes other shards than the training data; "
            "index the same shards with --text cls"
        )
    return Samples(labels)
