"""A test set in the CLIP_benchmark layout: class names, prompts, labelled pictures, and captions where it has some."""

from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config.schema import Evaluation
from shards.errors import BadSample, UserError
from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples


class TestSet:
    """ROOT/classnames.txt, ROOT/zeroshot_classification_templates.txt, ROOT/test_index (labels), ROOT/test_captions
    (may be absent).

    samples: the pictures. place_N: (shard, position) of each. label_N: int64 (N,), counted from 0.
    """

    __test__ = False  # not a pytest class

    def __init__(self, evaluation: Evaluation):
        """Raises UserError when the test set is missing, damaged or inconsistent."""
        self.root = Path(evaluation.test)
        self.classnames = read_lines(self.root / "classnames.txt")
        self.templates = read_lines(self.root / "zeroshot_classification_templates.txt")
        unfit = next((line for line in self.templates or [""] if "{c}" not in line), None)
        if unfit is not None:
            raise UserError(
                f"evaluation.test: {self.root}/zeroshot_classification_templates.txt: got {unfit!r}, expected prompts "
                "with {c} in place of the class name, one a line, such as `a photo of a {c}`"
            )
        self.samples = Samples(ShardIndex.load(evaluation.index or self.root / "test_index"))
        self.place_N = all_places(self.samples.index)
        if not self.place_N:
            raise UserError(f"evaluation.test: {self.root} has no pictures; expected a CLIP_benchmark folder")
        self.label_N = read_labels(self.samples, self.place_N)
        if self.label_N.max() >= len(self.classnames):
            raise UserError(
                f"evaluation.test: {self.root} has label {self.label_N.max()}, but classnames.txt names only "
                f"{len(self.classnames)} classes; the labels count from 0"
            )

    @cached_property
    def captions(self) -> list[list[str]] | None:
        """The captions of every picture, one a line of its text, or None where the test set has no captions.

        An unreadable text gives no caption. Raises UserError when the captions are of other shards than the pictures.
        """
        folder = self.root / "test_captions"
        if not folder.is_dir():
            return None
        samples = Samples(ShardIndex.load(folder))
        if not same_shards(samples.index, self.samples.index):
            raise UserError(
                f"evaluation.test: {folder} indexes other shards than {self.root / 'test_index'}; "
                f"index the same shards with `safeclip index SHARDS --text txt --out {folder}`"
            )
        captions = [read_captions(samples, *place) for place in self.place_N]
        return captions if any(captions) else None

    def row(self, shard: int, position: int) -> int:
        """The number of a picture over all shards."""
        return int(self.samples.index.offsets[shard] + position)


def all_places(index: ShardIndex) -> list[tuple[int, int]]:
    """(shard, position) of all samples of an index, in order."""
    return [(shard, position) for shard, count in enumerate(index.counts.tolist()) for position in range(count)]


def same_shards(index: ShardIndex, other: ShardIndex) -> bool:
    """Whether two indices, which may be of different texts, are of shards with the same content."""
    return index.shards.column("fingerprint").equals(other.shards.column("fingerprint"))


def read_captions(samples: Samples, shard: int, position: int) -> list[str]:
    try:
        texts = samples.captions(shard, position)
        return [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    except BadSample:
        return []


def read_labels(samples: Samples, places: list[tuple[int, int]]) -> np.ndarray:
    """int64 (N,): the labels at `places` of an index that was made with text="cls". Raises UserError."""
    label_N = np.zeros(len(places), np.int64)
    for row, place in enumerate(places):
        try:
            label_N[row] = samples.label(*place)
            wrong = f"label {label_N[row]}" if label_N[row] < 0 else ""
        except BadSample:
            wrong = "no label"
        except (ValueError, OverflowError) as error:
            wrong = str(error)
        if wrong:
            raise UserError(
                f"labels: {samples.index.shards[place[0]].path}: sample {samples.key(*place)!r}: {wrong}; expected "
                "class numbers from 0 on, index the shards with --text cls"
            )
    return label_N


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a text file of the test set. Raises UserError."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluation.test: cannot read {path}: {error}; expected a CLIP_benchmark folder") from None
    return [line for line in lines if line]
