"""Agreement: a score that asks other pairs too, for a model that has learnt a poisoned pair gives it a high cosine of its own.

Voters are a few thousand pairs, drawn once a run and embedded anew at every split. With x, t the unit embeddings of a pair's picture and
caption, s the logit scale, and x_V, t_V those of the voters, three terms are taken:
    contrast  s x.t - (log mean_V exp(s x.t_V) + log mean_V exp(s t.x_V)) / 2    is it the caption of this picture rather than of any?
    pictures  mean of x.x_V over the NEAREST voters by caption                   does it look like what has such captions?
    captions  mean of t.t_V over the NEAREST voters by picture                   is it called what such pictures are called?
each is standardised by its mean and deviation over the voters, and their mean is the score. A pair is not its own voter, and near copies
of its picture are none either: a poisoned picture stands under several captions, and would vouch for itself (METHOD). Poison finds few to
vouch for it as long as its pictures are near other pictures of what they show, not near each other.
A picture's embedding is the mean over its views (pipeline/safety/views.py), and shorter the less they agree. Legend: B pairs, V voters, D embedding, 3 terms.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.safety.selection import RANGES

NEAREST = 8
COPY = 0.995  # pictures of a higher cosine are copies of one another


@dataclass
class Voters:
    """row_V: int64 rows over all shards; image_VD, text_VD: float32, the captions' of length 1; scale: the logit scale; mean_3, std_3: float32, of the terms."""

    row_V: torch.Tensor
    image_VD: torch.Tensor
    text_VD: torch.Tensor
    scale: float
    mean_3: torch.Tensor | None = None
    std_3: torch.Tensor | None = None

    def terms(self, row_B, image_BD, text_BD):
        """float32 (B, 3): contrast, pictures and captions of pairs, not standardised."""
        by_image_BV, by_text_BV = image_BD @ self.image_VD.T, text_BD @ self.text_VD.T
        own_BV = row_B[:, None] == self.row_V
        near_text_BK = self.nearest(by_text_BV.masked_fill(own_BV, -2))
        length_BV = image_BD.norm(dim=1)[:, None] * self.image_VD.norm(dim=1)
        near_image_BK = self.nearest(by_image_BV.masked_fill(own_BV | (by_image_BV > COPY * length_BV), -2))
        contrast_B = self.scale * (image_BD * text_BD).sum(1) - 0.5 * (
            torch.logsumexp(self.scale * image_BD @ self.text_VD.T, 1)
            + torch.logsumexp(self.scale * text_BD @ self.image_VD.T, 1)
        )
        pictures_B, captions_B = by_image_BV.gather(1, near_text_BK), by_text_BV.gather(1, near_image_BK)
        return torch.stack([contrast_B, pictures_B.mean(1), captions_B.mean(1)], 1)

    @staticmethod
    def nearest(by_BV):
        return by_BV.topk(min(NEAREST, by_BV.shape[1]), 1).indices

    def standardise(self, mean_3=None, std_3=None):
        """Take the terms' mean and deviation from the voters themselves, or those that rank 0 has found; returns both as lists."""
        if mean_3 is None:
            parts = zip(*(x.split(1024) for x in (self.row_V, self.image_VD, self.text_VD)))
            terms_V3 = torch.cat([self.terms(*part) for part in parts]).double()
            mean_3, std_3 = terms_V3.mean(0).tolist(), terms_V3.std(0, correction=0).clamp_min(1e-6).tolist()
        self.mean_3, self.std_3 = (torch.tensor(x, device=self.image_VD.device) for x in (mean_3, std_3))
        return mean_3, std_3

    def score(self, row_B, image_BD, text_BD):
        """float32 (B,): the mean of the standardised terms, cut off at the range of the score."""
        standard_B3 = (self.terms(row_B, image_BD, text_BD) - self.mean_3) / self.std_3
        return standard_B3.mean(1).clamp(*RANGES["agreement"])


def choose_voters(samples, count, seed):
    """int64 (V,): sorted rows of `count` voters (all pairs where there are fewer), the same on every rank and at every split."""
    return np.sort(np.random.default_rng([seed, 1, count]).choice(samples, min(count, samples), replace=False))
