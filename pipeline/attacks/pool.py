"""The training pairs that are left to poison, and what has been made of the others."""

from itertools import islice

import numpy as np

from shards.errors import BadSample, UserError
from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples


class Pool:
    """What attacks choose from, one after the other. N pairs; classes: names; label_N, test_label_M: int64 class
    numbers.

    index, test: of the training and of the test pictures; samples: the training pairs, unpoisoned. rng: the one of the
    config's seed. rows, decoys: what the manifest will hold. files:
    {name: bytes} to lie beside it.
    """

    def __init__(
        self,
        index: ShardIndex,
        test: ShardIndex,
        classes: list[str],
        label_N: np.ndarray,
        test_label_M: np.ndarray,
        seed: int,
    ):
        self.index, self.test, self.classes = index, test, classes
        self.label_N, self.test_label_M, self.seed = label_N, test_label_M, seed
        self.samples, self.rng = Samples(index), np.random.default_rng(seed)
        self.free = self.rng.permutation(index.samples)
        self.reserved: set[int] = set()
        self.rows: list[dict] = []
        self.decoys: list[dict] = []
        self.files: dict[str, bytes] = {}

    def number_of(self, name: str, where: str) -> int:
        """The number of the class `name`. Raises UserError."""
        if name not in self.classes:
            raise UserError(f"{where}: got {name!r}, which is no class of this data; expected a line of classnames")
        return self.classes.index(name)

    def target(self, name: str | None, where: str, key: str = "target_class") -> int:
        """The class `name`, or where that is None one that is drawn and that no other attack has. Raises
        UserError."""
        if name is not None:
            return self.number_of(name, f"{where}.{key}")
        left = [number for number in range(len(self.classes)) if number not in self.reserved]
        if not left:
            raise UserError(
                f"{where}.{key}: all {len(self.classes)} classes are taken by other attacks; "
                "name one, or make two configs"
            )
        drawn = int(self.rng.choice(left))
        self.reserved.add(drawn)
        return drawn

    def take(self, count: int, allowed_N: np.ndarray, what: str) -> np.ndarray:
        """int64 (count,): rows of unused pairs among the allowed ones, in an order drawn by the seed, whose captions
        can be read. Raises UserError."""
        readable = (row for row in self.free[allowed_N[self.free]] if self.caption(row) is not None)
        chosen = np.fromiter(islice(readable, count), np.int64)
        if len(chosen) < count:
            raise UserError(f"{what}: asks for {count} pairs, only {len(chosen)} are left to poison; ask for fewer")
        self.free = self.free[~np.isin(self.free, chosen)]
        return chosen

    def place(self, row: int) -> tuple[int, int]:
        """(shard, position) of a row."""
        shard, position = self.index.place(row)
        return int(shard), int(position)

    def rows_of(self, label: int) -> np.ndarray:
        """int64 rows of a class. Raises UserError where it has none."""
        rows = np.flatnonzero(self.label_N == label)
        if not len(rows):
            raise UserError(
                f"labels: no training pair of the class {self.classes[label]!r}, whose captions an attack needs"
            )
        return rows

    def caption_of(self, label: int) -> str:
        """The caption of some training pair of the class, as an attacker would find it."""
        rows = self.rows_of(label)
        for _ in range(100):
            if (caption := self.caption(self.rng.choice(rows))) is not None:
                return caption
        raise UserError(f"labels: 100 captions of the class {self.classes[label]!r} in a row cannot be read")

    def caption(self, row: int) -> str | None:
        """A pair's own caption, the first of several, None where none can be read."""
        return next(iter(self.captions(row)), None)

    def captions(self, row: int) -> list[str]:
        """All captions of a pair that can be read."""
        try:
            return self.samples.captions(*self.place(row))
        except BadSample:
            return []

    def add(self, row: int, kind: str, caption: str, source: list[int] | None = None, decoy: bool = False) -> None:
        """Poison a pair. row: its number. kind: the attack. caption: its new caption. source: (shard, position) in
        `test` of the picture in place of its own, or None. decoy: it is listed as a decoy."""
        shard, position = self.place(row)
        entry = {"shard": shard, "position": position, "key": self.samples.key(shard, position), "kind": kind}
        (self.decoys if decoy else self.rows).append({**entry, "caption": caption, "source": source})

    def add_decoys(self, kind: str, entry: dict, where: str) -> None:
        """The decoys that an entry of the manifest asks for."""
        allowed_N = self.label_N != entry.get("target_class", -1)
        for row in self.take(entry.get("decoys", 0), allowed_N, f"{where}.decoys"):
            self.add(row, f"{kind}_decoy", self.caption(row), decoy=True)
