"""What `safeclip score` reads: batches of pairs, with the pictures as the CLIP takes them and what their pixels say."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from pipeline.audit.pixels import GRID, signature
from pipeline.safety.score_files import Unread
from pipeline.safety.scoring import ShardBatches
from shards.errors import BadSample
from shards.samples.samples import Samples


@dataclass
class Rowset:
    """A batch of pairs that never crosses a shard. A row that could not be read is there, blank and with valid =
    False."""

    images: torch.Tensor  # (B, C, H, W)
    tokens: torch.Tensor  # int64 (T, L): of all captions, at least one a row
    caption_of: torch.Tensor  # int64 (T,), ascending: the row of each
    valid: torch.Tensor  # bool (B,)
    captions: list[str | None]  # (T,) None where there is none
    hashes: np.ndarray  # uint64 (B,)
    cells: np.ndarray  # uint32 (B, GRID * GRID)
    bad: list[Unread]


class Pairs(Dataset):
    """Item i: Rowset of `batches[i]`."""

    def __init__(
        self,
        samples: Samples,
        batches: ShardBatches,
        preprocess: Callable[[Image.Image], torch.Tensor],
        tokenize: Callable[[list[str]], torch.Tensor],
    ):
        self.samples, self.batches = samples, batches
        self.preprocess, self.tokenize = preprocess, tokenize

    def shards(self, i: int) -> list[int]:
        """Numbers of the shards that item i reads."""
        return [int(self.samples.index.place(self.batches[i][0][0])[0])]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Rowset:
        row_B, _ = self.batches[i]
        shard_B, position_B = self.samples.index.place(row_B)
        rows, shard = len(row_B), int(shard_B[0])
        images: list[torch.Tensor | None] = [None] * rows
        captions: list[list[str]] = [[]] * rows
        bad: list[Unread] = []
        hashes, cells = np.zeros(rows, np.uint64), np.zeros((rows, GRID * GRID), np.uint32)
        for row, position in enumerate(position_B.tolist()):
            try:
                captions[row] = self.samples.captions(shard, position)
                image = self.samples.image(shard, position)
                hashes[row], cells[row] = signature(image)
                images[row] = self.preprocess(image)
            except BadSample as error:
                bad.append((shard, position, self.samples.key(shard, position), str(error)))
        valid = torch.tensor([image is not None for image in images])
        some = next((image for image in images if image is not None), None)
        blank = torch.zeros_like(some) if some is not None else torch.zeros(3, 1, 1)
        pixels = torch.stack([blank if image is None else image for image in images])
        texts = [text for found in captions for text in found or [None]]
        caption_of = torch.tensor([row for row, found in enumerate(captions) for _ in found or [None]])
        tokens = self.tokenize([text or "" for text in texts])
        return Rowset(pixels, tokens, caption_of, valid, texts, hashes, cells, bad)
