"""Fitting an optimised trigger on a surrogate CLIP: any that `safeclip score --model` opens, a run or an open_clip
local directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch  # which takes seconds to load

    from pipeline.attacks.optimised_trigger import Optimised  # which imports this module

TEMPERATURE = 0.07  # CLIP's at the start of its training


class Surrogate:
    """A CLIP, and its square pictures as a smooth function of pixels. size: pixels of their side; text_KD: unit text of
    each class."""

    def __init__(self, model: str, captions: list[list[str]]):
        """`captions`: a list for each class, whose text is the mean of their embeddings. Raises
        UserError."""
        import torch
        from torch.nn.functional import normalize

        from pipeline.audit.models import load_scorer
        from pipeline.distributed import comm

        self.device, self.scorer = comm.device(), load_scorer(model)
        self.blank_1L = self.scorer.tokenize([""]).to(self.device)
        ends = [self.scorer.preprocess(Image.new("RGB", (64, 64), colour)) for colour in ("black", "white")]
        # What it makes of a pixel is a line between what it makes of black and of white.
        self.black_CHW, white_CHW = (end.to(self.device).float() for end in ends)
        self.range_CHW, self.size = white_CHW - self.black_CHW, white_CHW.shape[-1]
        blank_1CHW = self.scorer.preprocess(Image.new("RGB", (64, 64)))[None].to(self.device)
        with torch.no_grad():
            texts = [self.scorer.encode(blank_1CHW, self.scorer.tokenize(one).to(self.device))[1] for one in captions]
        self.text_KD = normalize(torch.stack([text_BD.mean(0) for text_BD in texts]), dim=-1)

    def logits(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, K) of float pixels in 0..1, differentiable."""
        image_BD, _ = self.scorer.encode(self.black_CHW + self.range_CHW * pixels_BCHW, self.blank_1L)
        return image_BD @ self.text_KD.T / TEMPERATURE


def fit(
    trigger: Optimised, rng: np.random.Generator, captions: list[list[str]], target: int, pictures: list[Image.Image]
) -> tuple[np.ndarray, float]:
    """(uint8 (3, cells, cells), success) of a trigger: its colours, and the fraction of the
    pictures read as the target.

    captions: a list for each class, of which number `target` is the target's; pictures: RGB.
    Minimises the cross-entropy of the target among the classes by Adam over random batches, and with `random_place`
    over random places. On a CPU the same bytes for the same number of threads; another device may round otherwise.
    Raises UserError.
    """
    import torch

    from shards.views.augment import plain_view

    surrogate = Surrogate(trigger.surrogate, captions)
    views_NHWC = np.stack([plain_view(picture, surrogate.size) for picture in pictures])
    pixels_NCHW = torch.from_numpy(views_NHWC).permute(0, 3, 1, 2)
    start_CGG = rng.normal(size=(3, trigger.cells, trigger.cells)).astype(np.float32)
    free_CGG = torch.tensor(start_CGG, device=surrogate.device, requires_grad=True)
    optimizer = torch.optim.Adam([free_CGG], lr=trigger.lr)
    for _ in range(trigger.steps):
        rows = torch.from_numpy(rng.integers(len(pictures), size=min(trigger.batch, len(pictures))))
        pixels_BCHW = pixels_NCHW[rows].to(surrogate.device).float() / 255
        logits_BK = surrogate.logits(put_on(trigger, pixels_BCHW, torch.sigmoid(free_CGG), rng))
        wanted_B = torch.full((len(rows),), target, device=surrogate.device)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits_BK, wanted_B).backward()
        optimizer.step()
    colours_CGG = (255 * torch.sigmoid(free_CGG.detach())).round()
    hits = 0
    with torch.no_grad():
        for pixels_BCHW in pixels_NCHW.split(trigger.batch):
            triggered = put_on(trigger, pixels_BCHW.to(surrogate.device).float() / 255, colours_CGG / 255, rng)
            hits += int((surrogate.logits(triggered).argmax(1) == target).sum())
    return colours_CGG.to(torch.uint8).cpu().numpy(), hits / len(pictures)


def put_on(
    trigger: Optimised, pixels_BCHW: torch.Tensor, colours_CGG: torch.Tensor, rng: np.random.Generator
) -> torch.Tensor:
    """What Optimised.draw does, on square float pixels in 0..1 and with gradients of the colours in 0..1."""
    import torch

    size = pixels_BCHW.shape[-1]
    if trigger.form == "perturbation":
        whole_CHW = torch.nn.functional.interpolate(colours_CGG[None], (size, size), mode="bilinear", antialias=True)[0]
        return (pixels_BCHW + trigger.strength * (255 * whole_CHW - 128) / 127).clamp(0, 1)
    side = max(1, round(trigger.size * size))
    square_CSS = torch.nn.functional.interpolate(colours_CGG[None], (side, side), mode="nearest-exact")[0]
    corner_B2 = np.tile([trigger.top * size, trigger.left * size], (len(pixels_BCHW), 1))
    if trigger.random_place:
        corner_B2 = rng.uniform(0, size - side, corner_B2.shape)
    pixels_BCHW = pixels_BCHW.clone()
    for row, (top, left) in enumerate(np.minimum(np.round(corner_B2), size - side).astype(int).tolist()):
        pixels_BCHW[row, :, top : top + side, left : left + side] = square_CSS
    return pixels_BCHW
