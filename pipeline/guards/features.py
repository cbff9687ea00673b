"""What guards see of a picture: its pixels at a low resolution, and what random filters find anywhere in it. Taken on
the device."""

from functools import lru_cache

import numpy as np
import torch

from pipeline.distributed import comm
from pipeline.guards.base import Pairs
from shards.views.loader import PlainBatches, batches

SIDE = 16  # pictures are looked at as SIDE x SIDE, means over areas
FINE, FILTERS = 32, 128  # random filters answer to pictures of FINE x FINE


def pixels(images_BCHW: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3 * SIDE * SIDE), 0 to 1: the pictures at SIDE x SIDE."""
    return torch.nn.functional.adaptive_avg_pool2d(images_BCHW.float() / 255, SIDE).flatten(1)


def filter_responses(images_BCHW: torch.Tensor) -> torch.Tensor:
    """float32 (B, FILTERS), 0 to 1: the strongest response of each random filter in the picture at FINE x FINE, over
    the highest possible."""
    filter_FCHW, found = random_filters().to(images_BCHW.device), []
    for part_BCHW in images_BCHW.split(16):  # 7 MB of responses at a time
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


def read_features(pairs: Pairs, row_S: np.ndarray) -> dict[str, np.ndarray]:
    """{features: uint8 (S, D), 255 = 1} of the pictures of these rows, in their order, on every rank; what cannot be
    read is left out.

    All ranks read a part of the batches, which are the same at any world size.
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
