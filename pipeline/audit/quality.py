"""What the optional package cleanvision measures of every picture, one decoded picture at a time.

Measures, hashes, scores and thresholds are cleanvision's (github.com/cleanlab/cleanvision). Pictures are decoded by
shards.samples.decode, batch by batch in worker processes; a few numbers of each are kept.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from pipeline.audit.data import AuditData
from pipeline.safety.scoring import ShardBatches
from pipeline.training.signals import ignore
from shards.errors import BadSample
from shards.progress import progress
from shards.samples.samples import Samples
from shards.storage.prefetch import fetched_ahead
from shards.views.readers import batches

if TYPE_CHECKING:
    import pandas as pd

BATCH = 256
WORKERS = 8  # at most; none below WORKERS batches
LARGE = 1024  # pixels of the longer side, above which a smaller copy is measured, for memory
KINDS = ("dark", "light", "blurry", "low_information", "odd_size", "odd_aspect_ratio", "grayscale")
COPIES = ("exact_duplicates", "near_duplicates")  # cleanvision's names


def seen(pixels_HWC: np.ndarray) -> Image.Image:
    """The picture for cleanvision, which knows a greyscale one by its mode: "L" where the channels are equal."""
    grey = (pixels_HWC == pixels_HWC[..., :1]).all()
    return Image.fromarray(np.ascontiguousarray(pixels_HWC[..., 0]) if grey else pixels_HWC)


@dataclass
class Measured:
    """M pictures that were decoded. frame: a row for each, its index their rows over all shards; hash_M2: uint64, of
    COPIES."""

    frame: "pd.DataFrame"
    hash_M2: np.ndarray


class Measures(Dataset):
    """Item i: Measured of batch i, with cleanvision's raw values."""

    def __init__(self, samples: Samples, todo: ShardBatches):
        from cleanvision.issue_managers.duplicate_issue_manager import DuplicateIssueManager
        from cleanvision.issue_managers.image_property_issue_manager import ImagePropertyIssueManager

        self.samples, self.todo = samples, todo
        self.hashes = DuplicateIssueManager().params
        # dark and light are two readings of one property
        self.properties = {one.name: one for one in ImagePropertyIssueManager().image_properties.values()}

    def shards(self, i: int) -> list[int]:
        """Numbers of the shards that item i reads."""
        return [int(self.samples.index.place(self.todo[i][0][0])[0])]

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, i: int) -> Measured:
        import pandas as pd

        row_B, _ = self.todo[i]
        rows, values, hashes = [], [], []
        for row, shard, position in zip(row_B.tolist(), *(place.tolist() for place in self.samples.index.place(row_B))):
            try:
                pixels_HWC = self.samples.pixels(shard, position)
            except BadSample:
                continue
            measured, hashed = self.measure(seen(pixels_HWC))
            rows.append(row)
            values.append(measured)
            hashes.append(hashed)
        return Measured(pd.DataFrame(values, index=rows), np.array(hashes, np.uint64).reshape(-1, len(COPIES)))

    def measure(self, image: Image.Image) -> tuple[dict, list[int]]:
        """({property: value}, [hash of each of COPIES]): size, shape and exact hash of the picture, all else of a copy
        of at most LARGE pixels a side."""
        from cleanvision.issue_managers.duplicate_issue_manager import get_hash

        small = image
        if max(image.size) > LARGE:
            small = image.copy()
            small.thumbnail((LARGE, LARGE))
        values: dict = {}
        for name, measure in self.properties.items():
            values |= measure.calculate(image if name in ("size", "aspect_ratio") else small)
        hashes = [get_hash(picture, self.hashes[kind]) for kind, picture in zip(COPIES, (image, small))]
        return values, [int(text[:16], 16) for text in hashes]


def measures(data: AuditData) -> Measured:
    """Of all pictures with a score. frame: cleanvision's columns is_KIND_issue and KIND_score. Made once."""
    if "cleanvision" not in data.cache:
        data.cache["cleanvision"] = measure_all(data)
    return data.cache["cleanvision"]


def measure_all(data: AuditData) -> Measured:
    import pandas as pd
    from cleanvision.issue_managers.image_property_issue_manager import ImagePropertyIssueManager

    samples = data.all_samples()
    todo = ShardBatches(samples.index.offsets, range(len(samples.index.counts)), BATCH)
    dataset = Measures(samples, todo)
    workers = min(WORKERS, os.cpu_count() or 1) if len(todo) >= WORKERS else 0
    reading = fetched_ahead(batches(dataset, 0, workers, ignore), dataset)
    parts = list(progress(reading, len(todo), "batches of pictures measured"))
    frame, hash_M2 = pd.concat([part.frame for part in parts]), np.concatenate([part.hash_M2 for part in parts])
    scored_M = ~np.isnan(data.score_N[frame.index])
    frame, hash_M2 = frame[scored_M], hash_M2[scored_M]
    manager = ImagePropertyIssueManager()
    manager.issues = pd.DataFrame(index=frame.index)
    if len(frame):
        manager.update_issues(frame, list(KINDS))
    return Measured(manager.issues, hash_M2)
