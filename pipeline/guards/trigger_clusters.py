"""Trigger clusters: pictures that share one thing and nothing else, under captions that resemble each other.

The trigger of a backdoor adds the same pixels to pictures that differ in all else. Natural pictures are whitened: their pixels turned into
numbers without correlation, of variance 1. There a trigger is a constant vector t that is long, for it follows none of the correlations of
natural pictures. Two pictures that carry it have a cosine of about t.t / (D + t.t), two others one of 0 +- 1 / sqrt(D). So:

1. Of some sampled pictures (seeds) the near ones are found: those of a cosine beyond `near` deviations.
2. A seed with `least` near pictures gives a cluster. Its mean is the matched filter of what they share, the linear detector of the highest
   signal-to-noise ratio (Turin 1960); the response of a member is taken without the member itself.
3. A cluster is a trigger if the median response of its members stands out by `clear` robust deviations, hardly a picture responds half as
   much (a colour or an edge comes in all degrees, a trigger is there or not), its pictures are not alike once what they share is taken off
   (series of look-alikes are), and its captions are more alike than those of random pairs (under a watermark they are not).
4. A pair is excluded if its picture's response is more than half that median.

All of this is done twice: with pixels, and with the strongest responses of random 3 x 3 filters anywhere in the picture (Saxe et al. 2011),
in which a patch leaves the same trace wherever it is placed.

Assumes    a trigger that adds something, in at least `least` of the sampled pictures. A warp or a tone curve adds no constant.
Source     the filter is that of Tran, Li and Madry 2018 (spectral signatures), on whitened pixels of unlabelled pictures in place of the
           representation that a poisoned model has learnt of one class.
Cost       2 * seeds * sample * (768 + 128) multiplications on rank 0, before the first CLIP step, and one look at every picture.
Evidence   tests/benchmarks/comparison.md.

Legend: S sampled pairs, D numbers of a picture, M members, T tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix

from pipeline import comm
from pipeline.guards.base import Guard, Pairs
from pipeline.guards.features import FEATURES, read_sample
from pipeline.guards.statistics import alike, robust, tf_idf, whitening, words

COMPARED, MEMBERS = 16, 256  # of a cluster, whose pictures and whose captions are compared with each other


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
        between: float = 0.3
        """Most pictures whose response is near half of a cluster's (0.35 to 0.65 of it), for each with more: a trigger is there or not."""
        alike: float = 0.35
        """Highest median cosine of some members with the one most like it, once what all share is taken off: else they are look-alikes."""
        words: float = 1.7
        """Least similarity of a cluster's captions, as a multiple of that of random pairs' (cosine of tf-idf vectors)."""

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
            for filter_D, threshold, about in find_clusters(white_SD, pixel_SD, caption_ST, self.settings, free_S.copy()):
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
    white_SD: torch.Tensor, pixel_SD: torch.Tensor, caption_ST: csr_matrix, settings: TriggerClusters.Settings, free_S: np.ndarray
) -> list[tuple]:
    """[(filter_D, threshold of the response, {"pictures", "clear", "alike", "words"})] of the triggers in a sample.

    white_SD: whitened features in which clusters are looked for; pixel_SD: whitened pixels, in which pictures are compared; caption_ST:
    tf_idf; free_S: bool, the pictures that are of no cluster yet, changed in place.
    """
    rng, size, found = np.random.default_rng(0), len(white_SD), []
    length_S = white_SD.norm(dim=1).clamp(min=1e-6)
    unit_SD = white_SD / length_S[:, None]
    one, other = rng.integers(0, size, (2, 20_000))
    _, deviation = robust((unit_SD[one] * unit_SD[other]).sum(1)[torch.from_numpy(one != other)])
    near = near_pictures(unit_SD, np.sort(rng.permutation(size)[: settings.seeds]), settings.near * deviation, settings.least)
    any_words = words(caption_ST[rng.permutation(size)[:1000]])
    for seed, row_M in sorted(near.items(), key=lambda one: (-len(one[1]), one[0])):
        if not free_S[seed]:
            continue
        free_S[row_M] = False
        for _ in range(2):  # the second time of all that the first filter found
            filter_D = white_SD[row_M].mean(0)
            response_S = white_SD @ filter_D
            # Of a member without its own part in the filter.
            own_M = (response_S[row_M] * len(row_M) - length_S[row_M] ** 2) / max(1, len(row_M) - 1)
            (middle, spread), top = robust(response_S), float(own_M.median())
            part_S = ((response_S - middle) / max(1e-9, top - middle)).cpu().numpy()
            row_M = np.flatnonzero(part_S > 0.5)
        clear = (top - middle) / max(spread, 1e-9)
        if len(row_M) < settings.least or clear < settings.clear:
            continue
        free_S[row_M] = False
        some = rng.permutation(row_M)
        between = float(((part_S > 0.35) & (part_S <= 0.65)).sum() / max(1, (part_S > 0.65).sum()))
        about = {"pictures": len(row_M), "clear": clear, "between": between, "alike": alike(pixel_SD, some[:COMPARED])}
        about["words"] = words(caption_ST[some[:MEMBERS]]) / max(any_words, 1e-9)
        if between < settings.between and about["alike"] < settings.alike and about["words"] > settings.words:
            found.append((filter_D, middle + (top - middle) / 2, about))
    return found


def near_pictures(unit_SD: torch.Tensor, seed_Q: np.ndarray, least_cosine: float, least: int) -> dict[int, np.ndarray]:
    """{seed: int (M,) rows}: of the rows seed_Q those with `least` others of a higher cosine, and these and itself."""
    near = {}
    for at in range(0, len(seed_Q), 1024):
        near_QS = (unit_SD[seed_Q[at : at + 1024]] @ unit_SD.T > least_cosine).cpu().numpy()
        for row in np.flatnonzero(near_QS.sum(1) > least):
            near[int(seed_Q[at + row])] = np.flatnonzero(near_QS[row])
    return near
