"""Batches: plan + reader + decode + augment, in the worker processes of torch's DataLoader.

A batch is a pure function of its number, so any number of workers gives the same batches in the same order, and
starting at batch k reads nothing of the batches before it. Legend: B rows of this rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from torch.utils.data import Dataset

from shards.order.plan import EpochPlan
from shards.order.safe_mask import SafeMask
from shards.samples.samples import Samples
from shards.views.augment import coloured, for_views, image_view, least_side, plain_view, sample_rng
from shards.views.batch import Batch, View, Views, collate

Item = TypeVar("Item")
Rows = Sequence[int] | np.ndarray


class TrainStep(Protocol):
    """pipeline.training.curriculum.Step, which stands below this: batch `number` of `plan`, over the `view` of `mask`
    (None: of all pairs)."""

    @property
    def loss(self) -> str: ...

    @property
    def view(self) -> str: ...

    @property
    def plan(self) -> EpochPlan: ...

    @property
    def number(self) -> int: ...

    @property
    def pass_number(self) -> int: ...

    @property
    def mask(self) -> SafeMask | None: ...


@dataclass(frozen=True)
class TrainJob:
    """A batch of a step to read: samples by shard and position, in the views that the loss takes. Small to send."""

    loss: str
    seed: int
    epoch: int
    pass_number: int
    shard_B: np.ndarray
    position_B: np.ndarray
    repetition_B: np.ndarray

    def read(self, samples: Samples, views: Views) -> Batch:
        kinds, size = views.of[self.loss], views.size
        least = max(least_side(size, view.crop_min) for view in kinds)

        def read(row: int, shard: int, position: int) -> list[tuple]:
            image, captions = for_views(samples.pixels(shard, position, least)), samples.captions(shard, position)
            found = []
            for number, view in enumerate(kinds, 1):
                # Other views in each pass of the epoch, and for each repetition within a pass.
                key = self.pass_number * 4 + number + (int(self.repetition_B[row]) << 32)
                rng = sample_rng(self.seed, self.epoch, shard, position, key)
                pixels, colour = view.picture(image, size, rng)
                picture = pixels if views.on_device else coloured(pixels, colour)
                caption = captions[0] if len(captions) == 1 else captions[rng.integers(len(captions))]
                text = views.caption(view, number, caption, rng, self.seed, shard, position)
                found.append((picture, [text], colour))
            return found

        return collate(samples, views, self.shard_B, self.position_B, read, len(kinds), views.on_device)


@dataclass(frozen=True)
class PlainJob:
    """A batch of pairs to read as they are scored: the pictures of the rows row_B, all captions of caption_row_B.
    scored_as: of Views."""

    row_B: np.ndarray
    caption_row_B: np.ndarray
    scored_as: tuple[int, int] | None

    def read(self, samples: Samples, views: Views) -> Batch:
        shard_B, position_B = samples.index.place(self.row_B)
        caption_place_B = list(zip(*(place.tolist() for place in samples.index.place(self.caption_row_B))))
        size, view, scored_as = views.size, View(), self.scored_as
        if scored_as:
            view = views.of["clip"][0]
        least = least_side(size, view.crop_min)

        def read(row: int, shard: int, position: int) -> list[tuple]:
            pixels_HWC = samples.pixels(shard, position, least)
            captions = samples.captions(*caption_place_B[row])
            if not scored_as:
                return [(plain_view(pixels_HWC, size), captions)]
            seed, epoch = scored_as
            # Views are numbered from 1 in training: 0 is another draw. The caption's variant is the first.
            rng = sample_rng(seed, epoch, shard, position, 0)
            picture = image_view(pixels_HWC, size, rng, view.augment)
            place = caption_place_B[row]
            return [(picture, [views.caption(view, 1, caption, rng, seed, *place) for caption in captions])]

        return collate(samples, views, shard_B, position_B, read, 1)


class JobBatches(Dataset[Batch], ABC):
    """Item i: the batch that job(i) reads. Another process can read it too, given the job alone."""

    samples: Samples
    views: Views

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def job(self, i: int) -> TrainJob | PlainJob: ...

    def __getitem__(self, i: int) -> Batch:
        return self.job(i).read(self.samples, self.views)


class TrainBatches(JobBatches):
    """Item i: the batch of the epoch's i-th step, in the views that its loss takes."""

    def __init__(
        self,
        samples: Samples,
        steps: Sequence[TrainStep],
        views: Views,
        *,
        seed: int,
        epoch: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.samples, self.steps, self.views = samples, steps, views
        self.seed, self.epoch, self.rank, self.world = seed, epoch, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def shards(self, i: int) -> list[int]:
        """Numbers of the shards that item i reads."""
        return np.unique(self.steps[i].plan.batch(self.steps[i].number, self.rank, self.world)[0]).tolist()

    def job(self, i: int) -> TrainJob:
        step = self.steps[i]
        shard_B, nth_B, repetition_B = step.plan.batch(step.number, self.rank, self.world)
        position_B = step.mask.locate(step.view, shard_B, nth_B) if step.mask else nth_B
        return TrainJob(step.loss, self.seed, self.epoch, step.pass_number, shard_B, position_B, repetition_B)


class PlainBatches(JobBatches):
    """Item i: the rows of `batches[i]` = (row_B, caption_row_B), as pairs are scored: the pictures of the first, all
    captions of the second.

    Rows are numbers over all shards; a pair as it is has the same row twice. A bad sample is reported by the row of its
    picture. Un-augmented, or with views.scored_as in an augmented view of that epoch.
    """

    def __init__(self, samples: Samples, batches: Sequence[tuple[Rows, Rows]], views: Views):
        self.samples, self.batches, self.views = samples, batches, views

    def __len__(self) -> int:
        return len(self.batches)

    def shards(self, i: int) -> list[int]:
        """Numbers of the shards that item i reads."""
        return np.unique(self.samples.index.place(np.asarray(self.batches[i][0]))[0]).tolist()

    def job(self, i: int) -> PlainJob:
        row_B, caption_row_B = (np.asarray(rows, np.int64) for rows in self.batches[i])
        return PlainJob(row_B, caption_row_B, self.views.scored_as)
