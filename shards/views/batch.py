"""The views of a pair, and a batch of pairs.

Legend: B rows of this rank, V views, L tokens, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image

from shards.errors import BadSample
from shards.samples.colour import NUMBERS, as_numbers, coloured_batch
from shards.samples.samples import Samples
from shards.views.augment import Colour, ImageAugment, drawn_view, plain_view, sample_rng


@dataclass
class Batch:
    """One rank's rows of a batch. A row that could not be read is there, blank and with valid = False."""

    images: torch.Tensor  # uint8 (V*B, C, H, W), channels last in memory: all first views, then all second views
    tokens: torch.Tensor  # int64 (V*B, L), or (T, L) with caption_of
    valid: torch.Tensor  # bool (B,)
    rows: torch.Tensor  # int64 (B,): number of the sample over all shards
    bad: list[tuple[int, int, str, str]]  # shard, position, key, reason
    colours: torch.Tensor | None = None  # float32 (V*B, P): yet to be changed on the device (samples/colour.py)
    caption_of: torch.Tensor | None = None  # int64 (T,), ascending: the row of each caption, where rows have several

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`, and the colours changed."""
        there = (self.images, self.tokens, self.valid, self.colours, self.caption_of)
        images, tokens, valid, colours, caption_of = (
            None if x is None else x.to(device, non_blocking=True) for x in there
        )
        if colours is not None:
            images = coloured_batch(images, colours)
        return Batch(images, tokens, valid, self.rows, self.bad, caption_of=caption_of)

    def pin_memory(self) -> Batch:
        """For torch's DataLoader, which pins only what it knows: else a copy to the GPU waits for the step before."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        pinned: dict = {name: x.pin_memory() if torch.is_tensor(x) else x for name, x in found.items()}
        return Batch(**pinned)


@dataclass(frozen=True)
class View:
    """How one view of a sample is drawn. augment: None for the picture as it is; eda: (caption, rng) -> caption, None
    for the caption as it is."""

    augment: ImageAugment | None = None
    eda: Callable[[str, np.random.Generator], str] | None = None

    @property
    def crop_min(self) -> float:
        return self.augment.crop_min if self.augment else 1.0

    def picture(
        self, image: Image.Image | np.ndarray, size: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, Colour]:
        """(uint8 (size, size, 3), Colour): colours are drawn, and not changed yet."""
        if self.augment is None:
            return plain_view(image, size), Colour([], False, 0.0)
        return drawn_view(image, size, rng, self.augment)


@dataclass(frozen=True)
class Views:
    """How samples become rows: picture size in pixels, tokenizer (-> (N, L) int64), and the views that each
    loss takes."""

    size: int
    tokenize: Callable[[list[str]], torch.Tensor]
    of: dict[str, tuple[View, ...]]  # by loss
    on_device: bool = False  # the colours are changed where the batch goes to, not where it is read
    eda_once: bool = False  # a caption's variants are drawn once for the whole run, not in every epoch
    scored_as: tuple[int, int] | None = (
        None  # (seed, epoch): pairs are scored by an augmented view, the first of the CLIP loss; None: as they are
    )

    def caption(
        self, view: View, number: int, caption: str, rng: np.random.Generator, seed: int, shard: int, position: int
    ) -> str:
        """The caption of view `number` (from 1)."""
        if view.eda is None:
            return caption
        return view.eda(caption, sample_rng(seed, "run", shard, position, number) if self.eda_once else rng)


def collate(
    samples: Samples,
    views: Views,
    shard_B: np.ndarray,
    position_B: np.ndarray,
    read: Callable[[int, int, int], list[tuple]],
    count: int,
    drawn: bool = False,
) -> Batch:
    """Read every sample of a batch into `count` views; rows that fail stay, blank and invalid.

    read(row, shard, position): list of (picture, captions), or of (picture, captions, Colour), which is kept where it
    is `drawn` and not done yet; one caption where there are several views. Raises BadSample.
    """
    size, rows = views.size, len(shard_B)
    images = np.zeros((count, rows, size, size, 3), np.uint8)
    captions = [[[""] for _ in range(rows)] for _ in range(count)]
    colours_VBP = np.zeros((count, rows, NUMBERS), np.float32) if drawn else None
    valid, bad = np.zeros(rows, bool), []
    for row, (shard, position) in enumerate(zip(shard_B.tolist(), position_B.tolist())):
        try:
            for view, (picture, found, *colour) in enumerate(read(row, shard, position)):
                images[view, row], captions[view][row] = picture, found
                if drawn:
                    colours_VBP[view, row] = as_numbers(*colour)
            valid[row] = True
        except BadSample as error:
            images[:, row] = 0
            bad.append((shard, position, samples.key(shard, position), str(error)))
    tokens = views.tokenize([caption for view in captions for found in view for caption in found])
    caption_of = [row for view in captions for row, found in enumerate(view) for _ in found]
    pixels = torch.from_numpy(images.reshape(count * rows, size, size, 3)).permute(0, 3, 1, 2)
    numbers = torch.from_numpy(samples.index.offsets[shard_B] + position_B)
    colours = torch.from_numpy(colours_VBP.reshape(count * rows, NUMBERS)) if drawn else None
    several = torch.tensor(caption_of) if len(caption_of) > count * rows else None
    return Batch(pixels, tokens, torch.from_numpy(valid), numbers, bad, colours, several)
