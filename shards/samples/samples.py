"""Samples: (shard, position) -> a picture and a caption, with the attack overlay applied while reading."""

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.samples.decode import Limits, decode_caption, decode_image
from shards.samples.overlay import Overlay, Poison, Trigger
from shards.storage.cache import Cache
from shards.storage.captions import usable
from shards.storage.reader import Reader
from shards.storage.remote import TIMEOUT


class Samples:
    """The pictures and captions of an index, decoded. Cheap to pickle: files are opened where they are read.

    With an `overlay` the rows that the attack names come back poisoned; the shards
    stay as they are.
    """

    def __init__(
        self, index: ShardIndex, overlay: Overlay | None = None, cache: Cache | None = None, limits: Limits = Limits()
    ):
        """`cache`: through which whole shards from behind URLs are read (see shards.storage.reader)."""
        self.index, self.overlay, self.limits = index, overlay, limits
        self.reader = Reader(index, cache)
        self.source = Samples(ShardIndex.load(overlay.source_index), cache=cache) if overlay else None
        if overlay and self.source.index.fingerprint != overlay.source_fingerprint:
            raise UserError(
                f"overlay: takes pictures from {overlay.source_index}, which holds other shards than when it was made; "
                "make it again with `safeclip attack`"
            )

    def verify(self, timeout: float = TIMEOUT, stop: Callable[[], bool] = lambda: False) -> None:
        """`ShardIndex.verify` of all shards that are read, those of the overlay included. Raises UserError."""
        self.index.verify(timeout, stop)
        if self.source:
            self.source.verify(timeout, stop)

    def scattered(self) -> "Samples":
        """The same samples, for reading a few of many shards: remote shards are not fetched whole, but those of
        commands."""
        other = copy.copy(self)
        other.reader = Reader(self.index, self.reader.cache, whole=False)
        other.source = self.source and self.source.scattered()
        return other

    def replacement(self, shard: int, position: int) -> tuple[Poison | None, Trigger | None]:
        """What stands in place of this pair, and the trigger on it; each may be None."""
        poison = self.overlay.get(shard, position) if self.overlay else None
        return poison, self.overlay.trigger(poison.kind) if poison else None

    def pixels(self, shard: int, position: int, least: float | None = None) -> np.ndarray:
        """uint8 (H, W, 3), RGB; with `least` perhaps of a smaller picture, whose shorter side has so many pixels or
        more. Raises BadSample."""
        poison, trigger = self.replacement(shard, position)
        if poison and poison.source:
            return self.source.pixels(*poison.source)
        data = self.reader.image_bytes(shard, position)
        pixels_HWC = decode_image(data, self.limits, None if trigger else least)
        return np.array(trigger.apply(Image.fromarray(pixels_HWC), (shard, position))) if trigger else pixels_HWC

    def image(self, shard: int, position: int) -> Image.Image:
        """The same as a PIL RGB picture. Raises BadSample."""
        return Image.fromarray(self.pixels(shard, position))

    def captions(self, shard: int, position: int) -> list[str]:
        """All usable captions, at most captions.MAX_CAPTIONS. Raises BadSample where there is none."""
        poison, _ = self.replacement(shard, position)
        if poison:
            return [poison.caption]
        return usable(self.reader.texts(shard, position), partial(decode_caption, limits=self.limits))

    def caption(self, shard: int, position: int) -> str:
        """The first caption. Raises BadSample."""
        return self.captions(shard, position)[0]

    def label(self, shard: int, position: int) -> int:
        """The class number, for an index built with text="cls". Raises ValueError."""
        return int(self.reader.texts(shard, position)[0])

    def key(self, shard: int, position: int) -> str:
        """The sample's name in its shard, for people."""
        return self.index.table(shard).keys[position]
