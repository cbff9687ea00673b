"""What guards see of a picture: its pixels at a low resolution, and what random filters find anywhere in it. Taken on the device."""

from functools import lru_cache

import numpy as np
import torch

from pipeline import comm
from pipeline.guards.base import Pairs
from shards.loader import PlainBatches, batches

SIDE = 16  # pictures are looked at as SIDE x SIDE, means over areas
FINE, FILTERS = 32, 128  # random filters answer to pictures of FINE x FINE


def pixels(images_BCHW: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3 * SIDE * SIDE), 0 to 1: the pictures at SIDE x SIDE."""
    return torch.nn.functional.adaptive_avg_pool2d(images_BCHW.float() / 255, SIDE).flatten(1)


def filter_responses(images_BCHW: torch.Tensor) -> torch.Tensor:
    """float32 (B, FILTERS), 0 to 1: the strongest response of each random filter in the picture at FINE x FINE, over the highest possible."""
    filter_FCHW, found = random_filters().to(images_BCHW.device), []
    for part_BCHW in images_BCHW.split(64):  # 30 MB of responses at a time
        fine_BCHW = torch.nn.functional.adaptive_avg_pool2d(part_BCHW.float() / 255, FINE)
        found.append(torch.nn.functional.conv2d(fine_BCHW, filter_FCHW).amax((2, 3)))
    return torch.cat(found).clamp(min=0) / (27**0.5 / 2)


FEATURES = {"pixels": pixels, "filters": filter_responses}


@lru_cache
def random_filters() -> torch.Tensor:
    """float32 (FILTERS, 3, 3, 3), the same everywhere: of mean 0 and length 1."""
    numbers_FD = np.random.default_rng(0).normal(size=(FILTERS, 27))
    numbers_FD -= numbers_FD.mean(1, keepdims=True)
    numbers_FD /= np.linalg.norm(numbers_FD, axis=1, keepdims=True)
    return torch.from_numpy(numbers_FD.astype(np.float32)).reshape(FILTERS, 3, 3, 3)


def read_sample(pairs: Pairs, most: int) -> list[tuple]:
    """[(number, {features: uint8 (B, D), 255 = 1}, tokens int32 (B, T))]: this rank's batches of `most` random pairs.

    The batches are the same at any world size; what cannot be read is left out.
    """
    count = pairs.samples.index.samples
    row_S = np.sort(np.random.default_rng([pairs.seed, 3]).choice(count, min(most, count), replace=False))
    starts = range(0, len(row_S), pairs.batch_size)
    mine = list(enumerate(row_S[at : at + pairs.batch_size] for at in starts))[comm.rank() :: comm.world()]
    dataset, found = (PlainBatches(pairs.samples.scattered(), [(rows, rows) for _, rows in mine], pairs.views), [])
    for (number, _), batch in zip(mine, batches(dataset, workers=pairs.workers)):
        valid_B = batch.valid
        images_BCHW = batch.images[valid_B].to(pairs.device)
        seen = {
            name: taken(images_BCHW).mul(255).round().to(torch.uint8).cpu().numpy() for name, taken in FEATURES.items()
        }
        found.append((number, seen, batch.tokens[valid_B].numpy().astype(np.int32)))
    return found
