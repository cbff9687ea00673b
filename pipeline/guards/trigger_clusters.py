"""Trigger clusters: pictures that share one thing and nothing else, under captions that resemble each other.

The trigger of a backdoor adds the same pixels to pictures that differ in all else. Natural pictures are whitened: their
pixels turned into numbers without correlation, of variance 1. There a trigger is a constant vector t that is long, for
it follows none of the correlations of natural pictures. Two pictures that carry it have a cosine of about t.t / (D +
t.t), two others one of 0 +- 1 / sqrt(D). So:

1. Of some sampled pictures (seeds) the near ones are found: those of a cosine beyond `near` deviations.
2. A seed with `least` near pictures gives a cluster. Its mean is the matched filter of what they share, the linear
   detector of the highest signal-to-noise ratio (Turin 1960); the response of a member is taken without the member
   itself.
3. A cluster is a trigger if the median response of its members stands out by `clear` robust deviations, hardly a
   picture responds half as much (a colour or an edge comes in all degrees, a trigger is there or not), its pictures are
   not alike once what they share is taken off (series of look-alikes are), and its captions are more alike than those
   of random pairs (under a watermark they are not).
4. A pair is excluded if its picture's response is more than half that median.

All of this is done twice: with pixels, and with the strongest responses of random 3 x 3 filters anywhere in the picture
(Saxe et al. 2011), in which a patch leaves the same trace wherever it is placed.

Assumes    a trigger that adds something, in at least `least` of the sampled pictures. A warp or a tone curve adds no
           constant.
Source     the filter is that of Tran, Li and Madry 2018 (spectral signatures), on whitened pixels of unlabelled
           pictures in place of the representation that a poisoned model has learnt of one class.
Cost       up to 5 * seeds * sample * (768 + 128) multiplications on rank 0, before the first CLIP step, and one look at
           every picture.
Evidence   tests/benchmarks/comparison.md.

Legend: S sampled pairs, Q seeds, D numbers of a picture, M members, T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix

from pipeline import comm
from pipeline.guards.base import Guard, Pairs
from pipeline.guards.features import FEATURES, read_sample
from pipeline.guards.statistics import alike, robust, tf_idf, whitening, words

AT_ONCE = 256  # seeds
COMPARED, MEMBERS = (16, 256)  # of a cluster, whose pictures and whose captions are compared with each other


class TriggerClusters(Guard):
    name = "trigger_clusters"
    reason = "its picture carries what a cluster of pictures shares"
    dtype = np.bool_

    @dataclass(frozen=True)
    class Settings:
        sample: int = 65_536
        """Pairs in which clusters are looked for, at most."""
        seeds: int = 8_192
        """Sampled pictures whose near ones are found, at most."""
        near: float = 6.0
        """Robust deviations of the cosines of random pictures, beyond which two are near."""
        least: int = 8
        """Near pictures of a seed."""
        clear: float = 10.0
        """Robust deviations of all responses by which those of a cluster stand out."""
        between: float = 0.2
        """Most pictures that respond near half as much as a cluster (0.35 to 0.65), for each that responds more."""
        alike: float = 0.35
        """Highest median cosine of members with the one most like them, once what all share is taken off."""
        words: float = 1.7
        """Least similarity of a cluster's captions (cosine of tf-idf vectors), as a multiple of that of random pairs."""

    BOUNDS = {
        "sample": (2, None),
        "seeds": (1, None),
        "near": (0, None),
        "least": (2, None),
        "clear": (0, None),
        "between": (0, None),
        "alike": (-1, 1),
        "words": (0, None),
    }

    def learn(self, pairs: Pairs) -> dict:
        parts = comm.gather_objects(read_sample(pairs, self.settings.sample))
        clusters = comm.on_main(self.find, sum(parts, []))
        self.filters = [(c["features"], torch.tensor(c["weight"], device=pairs.device), c["cut"]) for c in clusters]
        told = ("features", "pictures", "clear", "between", "alike", "words")
        return {"clusters": [{key: cluster[key] for key in told} for cluster in clusters]}

    def find(self, parts: list) -> list[dict]:
        """The clusters of a sample, the clearest first. parts: as of features.read_sample."""
        parts = sorted(parts, key=lambda part: part[0])
        caption_ST = tf_idf(np.concatenate([tokens for _, _, tokens in parts]))
        found, pixel_SD, free_S = [], None, np.ones(caption_ST.shape[0], bool)
        for name in FEATURES:
            seen_SD = np.concatenate([features[name] for _, features, _ in parts])
            seen_SD = torch.from_numpy(seen_SD).to(comm.device()).float() / 255
            mean_D, white_DD = whitening(seen_SD, name)
            white_SD = (seen_SD - mean_D) @ white_DD
            pixel_SD = white_SD if pixel_SD is None else pixel_SD
            for filter_D, threshold, about in find_clusters(white_SD, pixel_SD, caption_ST, self.settings, free_S):
                weight_D = white_DD @ filter_D
                cut = threshold + float(mean_D @ weight_D)
                found.append({"features": name, "weight": weight_D.cpu().numpy(), "cut": cut, **about})
                free_S &= (white_SD @ filter_D <= threshold).cpu().numpy()  # what pixels tell needs no other features
        return sorted(found, key=lambda cluster: -cluster["clear"])

    def numbers(self, images_BCHW: torch.Tensor) -> np.ndarray:
        """bool (B,): whether a picture is excluded."""
        excluded_B = torch.zeros(len(images_BCHW), dtype=torch.bool, device=images_BCHW.device)
        seen = {name: FEATURES[name](images_BCHW) for name in {name for name, _, _ in self.filters}}
        for name, weight_D, cut in self.filters:
            excluded_B |= seen[name] @ weight_D > cut
        return excluded_B.cpu().numpy()

    def kept(self, number_N, valid_N, offsets_S):
        for start, stop in zip(offsets_S, offsets_S[1:]):
            yield ~(number_N[start:stop] & valid_N[start:stop])


def find_clusters(
    white_SD: torch.Tensor,
    pixel_SD: torch.Tensor,
    caption_ST: csr_matrix,
    settings: TriggerClusters.Settings,
    free_S: np.ndarray,
) -> list[tuple]:
    """[(filter_D, threshold of the response, {"pictures", "clear", "between", "alike", "words"})] of the triggers in a sample.

    white_SD: whitened features in which clusters are looked for; pixel_SD: whitened pixels, in which pictures are compared; caption_ST:
    tf_idf; free_S: bool, the pictures that may be seeds.
    """
    rng, found = np.random.default_rng(0), []
    seed_Q = np.sort(rng.permutation(len(white_SD))[: settings.seeds])
    any_words = words(caption_ST[rng.permutation(len(white_SD))[:1000]])
    candidates = list(clusters_of_seeds(white_SD, seed_Q[free_S[seed_Q]], settings, rng))
    covered_S = np.zeros(len(white_SD), bool)
    for filter_D, threshold, row_M, about in sorted(candidates, key=lambda one: -one[3]["clear"]):
        if covered_S[row_M].mean() > 0.5:
            continue
        some = rng.permutation(row_M)
        about["alike"] = alike(pixel_SD, some[:COMPARED])
        about["words"] = words(caption_ST[some[:MEMBERS]]) / max(any_words, 1e-9)
        if about["alike"] < settings.alike and about["words"] > settings.words:
            covered_S[row_M] = True
            found.append((filter_D, threshold, about))
    return found


def clusters_of_seeds(
    white_SD: torch.Tensor, seed_Q: np.ndarray, settings: TriggerClusters.Settings, rng
) -> Iterator[tuple]:
    """Yield (filter_D, threshold, rows of its pictures, {"pictures", "clear", "between"}) of each seed whose cluster stands out clearly."""
    size, device = len(white_SD), white_SD.device
    length_S = white_SD.norm(dim=1).clamp(min=1e-6)
    unit_SD = white_SD / length_S[:, None]
    one, other = rng.integers(0, size, (2, 20_000))
    _, deviation = robust((unit_SD[one] * unit_SD[other]).sum(1)[torch.from_numpy(one != other)])
    some = torch.from_numpy(rng.permutation(size)[:4096]).to(device)
    for at in range(0, len(seed_Q), AT_ONCE):
        in_QS = unit_SD[seed_Q[at : at + AT_ONCE]] @ unit_SD.T > settings.near * deviation
        in_QS = in_QS[in_QS.sum(1) > settings.least]  # itself too
        for _ in range(2):  # the second time of what the first filter found
            count_Q = in_QS.sum(1).clamp(min=1)
            filter_QD = in_QS.float() @ white_SD / count_Q[:, None]
            response_QS = filter_QD @ white_SD.T
            # The mean response of the members, of each without its own part in the filter.
            own_Q = (in_QS * length_S**2).sum(1) / count_Q
            top_Q = (count_Q * filter_QD.square().sum(1) - own_Q) / (count_Q - 1).clamp(min=1)
            middle_Q = response_QS[:, some].median(1).values
            spread_Q = 1.4826 * (response_QS[:, some] - middle_Q[:, None]).abs().median(1).values
            part_QS = (response_QS - middle_Q[:, None]) / (top_Q - middle_Q).clamp(min=1e-9)[:, None]
            in_QS = part_QS > 0.5
        clear_Q, pictures_Q = ((top_Q - middle_Q) / spread_Q.clamp(min=1e-9), in_QS.sum(1))
        between_Q = ((part_QS > 0.35) & (part_QS <= 0.65)).sum(1) / (part_QS > 0.65).sum(1).clamp(min=1)
        good_Q = (clear_Q > settings.clear) & (pictures_Q >= settings.least) & (between_Q < settings.between)
        for q in good_Q.nonzero()[:, 0].tolist():
            about = {"pictures": int(pictures_Q[q]), "clear": float(clear_Q[q]), "between": float(between_Q[q])}
            threshold = float(middle_Q[q] + top_Q[q]) / 2
            yield filter_QD[q], threshold, np.flatnonzero(in_QS[q].cpu().numpy()), about
