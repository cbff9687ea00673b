"""Embeddings of many pictures or texts. The ranks share the batches, and every rank receives all embeddings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.distributed import comm
from shards.errors import BadSample
from shards.samples.overlay import Trigger
from shards.samples.samples import Samples
from shards.views.augment import plain_view
from shards.views.batch import Views
from shards.views.readers import batches

Item = TypeVar("Item")


@dataclass
class Encoder:
    """The two towers of a model in eval mode. towers: model.Towers or an engine of it; views: picture size and
    tokenizer."""

    towers: torch.nn.Module
    views: Views
    device: torch.device
    batch_size: int = 256
    workers: int = 0

    def pictures(self, samples: Samples, places: list[tuple[int, int]], trigger: Trigger | None = None) -> torch.Tensor:
        """float32 (N, D), unit length: the pictures at `places`, (shard, position) each, with `trigger` applied if
        there is one.

        A row of zeros stands for a picture that cannot be read.
        """
        parts = split(places, self.batch_size)
        dataset = PictureBatches(samples, parts, self.views.size, trigger)

        def encode(images_BCHW: torch.Tensor, readable_B: torch.Tensor) -> torch.Tensor:
            return self.towers(images_BCHW, None)[0].masked_fill(~readable_B[:, None], 0)

        return self.shared(dataset, [len(part) for part in parts], encode)

    def texts(self, texts: list[str]) -> torch.Tensor:
        """float32 (N, D), unit length."""
        parts = split(texts, self.batch_size)
        dataset = TokenBatches(parts, self.views.tokenize)
        return self.shared(dataset, [len(part) for part in parts], lambda tokens: self.towers(None, tokens)[1])

    @torch.no_grad()
    def scale(self) -> torch.Tensor:
        """The model's logit scale, and bias if it has one (as model.Towers gives them), which under ZeRO-3 only a
        forward pass gives. All ranks call."""
        return self.towers(None, self.views.tokenize([""]).to(self.device))[2]

    @torch.no_grad()
    def shared(
        self, dataset: Dataset[tuple[torch.Tensor, ...]], sizes: list[int], encode: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """(N, D): encode(*item) of every item of `dataset`, in order; item i has sizes[i] rows. Rank r encodes items r,
        r + world, ...

        All ranks encode equally often, for under ZeRO-3 a forward pass is collective; a result too many is dropped.
        """
        world, count = comm.world(), len(sizes)
        turns = [list(range(rank, count, world)) for rank in range(world)]
        mine = turns[comm.rank()]
        again = [0] * (len(turns[0]) - len(mine))
        reading = batches(torch.utils.data.Subset(dataset, mine + again), workers=self.workers)
        found = [encode(*(part.to(self.device) for part in item)).float() for item in reading]
        local_MD = torch.cat(found[: len(mine)]) if mine else found[0][:0]
        gathered_ND = comm.all_gather_rows(local_MD, [sum(sizes[i] for i in turn) for turn in turns])
        starts = np.concatenate([[0], np.cumsum(sizes)])
        row_N = np.concatenate([np.arange(starts[i], starts[i + 1]) for turn in turns for i in turn])
        image_ND = torch.empty_like(gathered_ND)
        image_ND[torch.from_numpy(row_N).to(gathered_ND.device)] = gathered_ND
        return image_ND


class PictureBatches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Item i: the pictures at parts[i] = [(shard, position), ...] as uint8 (B, C, H, W), and bool (B,), which of them
    can be read."""

    def __init__(self, samples: Samples, parts: list[list[tuple[int, int]]], size: int, trigger: Trigger | None):
        self.samples, self.parts, self.size, self.trigger = samples, parts, size, trigger

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = np.zeros((len(self.parts[i]), self.size, self.size, 3), np.uint8)
        readable_B = torch.ones(len(images), dtype=torch.bool)
        for row, place in enumerate(self.parts[i]):
            try:
                image = self.samples.image(*place)
            except BadSample:
                readable_B[row] = False
                continue
            images[row] = plain_view(self.trigger.apply(image, place) if self.trigger else image, self.size)
        return torch.from_numpy(images).permute(0, 3, 1, 2), readable_B


class TokenBatches(Dataset[tuple[torch.Tensor]]):
    """Item i: a tuple of the tokens, int64 (B, L), of the texts parts[i]."""

    def __init__(self, parts: list[list[str]], tokenize: Callable[[list[str]], torch.Tensor]):
        self.parts, self.tokenize = parts, tokenize

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> tuple[torch.Tensor]:
        return (self.tokenize(self.parts[i]),)


def split(items: list[Item], size: int) -> list[list[Item]]:
    """Lists of `size` items each, the last of fewer."""
    return [items[at : at + size] for at in range(0, len(items), size)]
