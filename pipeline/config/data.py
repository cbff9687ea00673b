"""The data that a config names: one index of all sources, and the samples, read through a cache where shards lie behind
URLs."""

import os
from pathlib import Path

from pipeline.attacks import load_trigger
from pipeline.config.schema import Data
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import Overlay
from shards.samples.samples import Samples
from shards.storage.cache import Cache, default_folder


def open_index(data: Data) -> ShardIndex:
    """The index of a config: data.index, or all of data.sources with their weights. Raises UserError."""
    if data.sources:
        index = ShardIndex.merged({name: (source.index, source.weight) for name, source in data.sources.items()})
    else:
        index = ShardIndex.load(data.index)
    index.shards.refuse_pipe(data.allow_pipe)
    return index


def open_overlay(data: Data, index: ShardIndex, folder: Path | str | None = None) -> Overlay | None:
    """The overlay in `folder`, by default the one that the config names. Raises UserError."""
    folder = folder or data.overlay
    return Overlay.load(folder, index, load_trigger) if folder else None


def open_samples(data: Data, index: ShardIndex, poisoned: bool = True) -> Samples:
    """Samples of the index, if `poisoned` by the overlay of the config, where there is one. Raises UserError."""
    cache = open_cache(data) if index.shards.remote_S.any() else None
    return Samples(index, open_overlay(data, index) if poisoned else None, cache, data.limits)


def open_cache(data: Data) -> Cache:
    """Raises UserError."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return Cache(data.cache or default_folder(), int(data.cache_gb * 1e9), data.remote_timeout, data.allow_pipe, ranks)


def describe(index: ShardIndex) -> str:
    """What an index holds, in a few words."""
    text = f"{index.samples:,} pairs in {len(index.shards):,} shards"
    return text + (f" ({index.views:,} an epoch by the sources' weights)" if index.views != index.samples else "")
