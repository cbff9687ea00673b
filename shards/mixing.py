"""Views mixed with another picture of the batch: faintly over the whole of it (mixup, Zhang et al. 2018), or in a square (CutMix, Yun et al. 2019).

The caption stays the view's own. A model trained so reads past a faint pattern and a foreign square, and sees those of a poisoned picture on
others, under other captions, too: strong mixing was found to take the force out of backdoors (Borgnia et al. 2021). Two rows of a batch that
stand side by side, 2n and 2n + 1, are each other's: no rank needs another's pictures. Legend: B rows, C channels, H, W pixels.
"""

from dataclasses import dataclass

import torch

FAINT = 0.4  # of its strength, at most, lies the other picture over a view
LEAST, MOST = 0.1, 0.4  # of the side, that the square has


@dataclass(frozen=True)
class Mixing:
    """mix, paste: probability that another picture lies over a view, and that a square of it stands in the view."""

    mix: float = 0.0
    paste: float = 0.0

    def __bool__(self):
        return bool(self.mix or self.paste)

    def draw(self, rng):
        """(strength, left, top, side): of the picture over the view, and of the square in it, as shares of the view's side; 0 = none."""
        mix, paste = rng.random(2)
        strength = rng.uniform(0, FAINT) if mix < self.mix else 0.0
        side = rng.uniform(LEAST, MOST) if paste < self.paste else 0.0
        left, top = rng.uniform(0, 1 - side, 2)
        return strength, left, top, side


def mixed(images_BCHW, mixing_B4, valid_B):
    """uint8: the views, each mixed with its neighbour as was drawn for it, and left alone where the neighbour could not be read. B is even."""
    x = images_BCHW.float()
    other, there_B = (rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) for rows in (x, valid_B))
    strength, left, top, side = (mixing_B4 * there_B[:, None]).t()[:, :, None, None, None]
    at_W = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]
    across, down = (at_W >= left) & (at_W < left + side), (at_W >= top) & (at_W < top + side)
    return torch.where(across & down.mT, other, x + strength * (other - x)).round().to(torch.uint8)
