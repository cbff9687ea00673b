"""Feature views of a picture for guards, computed on the device: low-resolution pixels, and random-filter features."""

from functools import lru_cache

import numpy as np
import torch

from pipeline.distributed import comm
from pipeline.guards.base import Pairs
from shards.views.loader import PlainBatches, batches

SIDE = 16  # pixels: pictures are average-pooled to SIDE x SIDE
FINE, FILTERS = 32, 128  # random filters: pictures are average-pooled to FINE x FINE


def pixels(images_BCHW: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3 * SIDE * SIDE), 0 to 1: pictures at SIDE x SIDE."""
    return torch.nn.functional.adaptive_avg_pool2d(images_BCHW.float() / 255, SIDE).flatten(1)


def filter_responses(images_BCHW: torch.Tensor) -> torch.Tensor:
    """float32 (B, FILTERS), 0 to 1: random-filter features, the maximum response of each filter in the picture at
    FINE x FINE, over the largest possible one."""
    filter_FCHW, found = random_filters().to(images_BCHW.device), []
    for part_BCHW in images_BCHW.split(16):  # 7 MB of responses at a time
        fine_BCHW = torch.nn.functional.adaptive_avg_pool2d(part_BCHW.float() / 255, FINE)
        found.append(torch.nn.functional.conv2d(fine_BCHW, filter_FCHW).amax((2, 3)))
    return torch.cat(found).clamp(min=0) / (27**0.5 / 2)


FEATURES = {"pixels": pixels, "filters": filter_responses}


@lru_cache
def random_filters() -> torch.Tensor:
    """float32 (FILTERS, 3, 3, 3): fixed random filters of mean 0 and norm 1."""
    numbers_FD = np.random.default_rng(0).normal(size=(FILTERS, 27))
    numbers_FD -= numbers_FD.mean(1, keepdims=True)
    numbers_FD /= np.linalg.norm(numbers_FD, axis=1, keepdims=True)
    return torch.from_numpy(numbers_FD.astype(np.float32)).reshape(FILTERS, 3, 3, 3)


def read_features(pairs: Pairs, row_S: np.ndarray) -> dict[str, np.ndarray]:
    """{feature view: uint8 (S, D), 255 = 1} of the pictures of these rows, in order, on every rank; unreadable ones are
    left out.

    Each rank reads a part of the batches, which are the same at any world size.
    """
    batch_rows = [row_S[at : at + pairs.batch_size] for at in range(0, len(row_S), pairs.batch_size)]
    mine, found = range(len(batch_rows))[comm.rank() :: comm.world()], []
    rows = [(batch_rows[number], batch_rows[number]) for number in mine]
    dataset = PlainBatches(pairs.samples.scattered(), rows, pairs.views)
    for number, batch in zip(mine, batches(dataset, workers=pairs.workers)):
        images_BCHW = batch.images[batch.valid].to(pairs.device)
        seen = {name: (255 * taken(images_BCHW)).round().to(torch.uint8) for name, taken in FEATURES.items()}
        found.append((number, {name: seen_BD.cpu().numpy() for name, seen_BD in seen.items()}))
    parts = sorted(sum(comm.gather_objects(found), []), key=lambda part: part[0])
    if not parts:
        return {name: np.zeros((0, 1), np.uint8) for name in FEATURES}
    return {name: np.concatenate([seen[name] for _, seen in parts]) for name in FEATURES}


def distinct(seen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features without exact duplicates, whose common features would hide those of a trigger."""
    _, first = np.unique(seen["pixels"], axis=0, return_index=True)
    return {name: seen_SD[np.sort(first)] for name, seen_SD in seen.items()}
