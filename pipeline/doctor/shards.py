"""Checks of the shards: whether they are what was indexed, can be read, and fit the cache."""

import math
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from pipeline.config.data import describe, open_cache, open_index, open_overlay
from pipeline.config.schema import Config, Data
from pipeline.doctor.footprint import Findings, human
from pipeline.doctor.samples import try_samples, unusable
from shards.errors import UserError
from shards.index.scan import fingerprint_of
from shards.index.shard_index import Shard, ShardIndex
from shards.samples.samples import Samples


def check_shards(config: Config, content: bool = False) -> Findings:
    """The shards are there as they were indexed, and samples of them can be read. On one rank of each host."""
    try:
        index = open_index(config.data)
        overlay = open_overlay(config.data, index)
        # Without a cache: single samples, not whole shards.
        samples = Samples(index, overlay, limits=config.data.limits)
        samples.verify(config.data.remote_timeout)
    except UserError as error:
        return [("fatal", "data", str(error))]
    found = [("ok", "data", f"{describe(index)}, fingerprint {index.fingerprint}")] + check_cache(config, index)
    if content:
        changed = changed_shards(index, config.data)
        if changed:
            found.append(
                (
                    "fatal",
                    "data",
                    f"{len(changed)} shard(s) do not hold what was indexed, the first: {changed[0]}; index them again "
                    "with --out NEW_FOLDER",
                )
            )
        else:
            found.append(("ok", "data", "every shard holds what was indexed, byte for byte"))
    return found + try_samples(samples, "data")


def check_bad_samples(data: Data, index: ShardIndex) -> Findings:
    """Whether the samples that the index found to be unusable are more than the run allows."""
    with ThreadPoolExecutor(8) as pool:
        bad = list(pool.map(lambda shard: Counter(unusable(shard.table).values()), index.shards))  # by reason
    views = sum(reasons.total() * int(times) for reasons, times in zip(bad, index.repetitions))
    if not views:
        return []
    fraction, limit = views / index.views, data.max_bad_fraction
    kinds: Counter[str] = sum(bad, Counter())
    most = ", ".join(f"{count:,} x {reason}" for reason, count in kinds.most_common(3))
    text = f"{kinds.total():,} samples, {fraction:.2%} of an epoch, cannot be used ({most})"
    text += f"; data.max_bad_fraction is {limit:g}"
    if fraction <= limit:
        return [("ok", "data", text)]
    enough = min(1.0, math.ceil(110 * fraction) / 100)
    text += f", and the run stops there; mend or leave out their shards, or set data.max_bad_fraction={enough:g}"
    return [("warning" if data.mask else "fatal", "data", text)]


def changed_shards(index: ShardIndex, data: Data) -> list[str]:
    """Paths of the shards whose bytes are not those that were indexed."""

    def same(shard: Shard) -> bool:
        return fingerprint_of(shard.path, shard.size, data.remote_timeout, data.allow_pipe) == shard.fingerprint

    with ThreadPoolExecutor(8) as pool:
        return [shard.path for shard, found in zip(index.shards, pool.map(same, index.shards)) if not found]


def check_cache(config: Config, index: ShardIndex) -> Findings:
    """Whether the cache of shards from behind URLs can hold what a batch is drawn from, and its disk can hold the
    cache."""
    sizes = index.shards.numbers("size")[index.shards.remote_S]
    if not len(sizes):
        return []
    try:
        cache = open_cache(config.data)
    except UserError as error:
        return [("fatal", "data", str(error))]
    # Each stream is inside one window at a time, and reads of the next are fetched ahead of it.
    total, mean = int(sizes.sum()), float(sizes.mean())
    windows = config.data.streams * (config.data.window / (index.samples / len(index.shards)) + 1) * mean
    needed = min(2 * windows, total)
    free = shutil.disk_usage(cache.folder).free + sum(path.stat().st_size for path in cache.folder.glob("*.tar"))
    text = (
        f"{len(sizes):,} shards of {human(total)} lie behind URLs; up to {human(cache.limit)} of them in "
        f"{cache.folder}, where {human(free)} are free; a batch and the next are drawn from about {human(needed)}"
    )
    if cache.limit < needed:
        return [("warning", "data", f"{text}; raise data.cache_gb, or shards are fetched again and again")]
    if free < min(cache.limit, total):
        return [("fatal", "data", f"{text}; lower data.cache_gb, or name another disk with data.cache")]
    return [("ok", "data", text)]
