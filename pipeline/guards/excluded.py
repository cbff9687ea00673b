"""Pairs that the guards of a run exclude: found once, after the first scoring, and saved as one mask per guard."""

from pathlib import Path

import numpy as np

from pipeline.distributed import comm, hosts
from pipeline.guards.base import Guard, Pairs
from pipeline.safety.scoring import assign_shards, shard_batches
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SafeMask, byte_starts
from shards.storage.prefetch import fetched_ahead
from shards.views.loader import PlainBatches, batches


class Excluded:
    """masks: {guard's name: SafeMask of the pairs that it does not exclude}."""

    def __init__(self, guards: list[Guard], masks: dict[str, SafeMask]):
        self.guards, self.masks = guards, masks
        self.counts_S = next(iter(masks.values())).counts_S
        self.bits = np.bitwise_and.reduce([mask.bits for mask in masks.values()])
        self.count = int(SafeMask(self.counts_S, self.bits).counts("risky").sum())

    def apply(self, score_N: np.ndarray) -> None:
        """Remove the scores of excluded pairs from the shared vector: they become NaN. All ranks call."""
        kept, starts = SafeMask(self.counts_S, self.bits), np.concatenate([[0], np.cumsum(self.counts_S)])
        shards = np.flatnonzero(kept.counts("risky")).tolist()
        comm.barrier()  # until all have read the vector
        for shard in shards:
            score_N[starts[shard] : starts[shard + 1]][~kept.shard_flags(shard)] = np.nan
        comm.barrier()

    def of_shard(self, shard: int) -> dict[int, str]:
        """{position: reason} of the excluded pairs of a shard; of the first guard, where several exclude one."""
        return {
            position: guard.reason
            for guard in reversed(self.guards)
            for position in self.masks[guard.name].positions(shard, "risky").tolist()
        }

    def line(self) -> str:
        """For people: how many pairs each guard excludes."""
        return ", ".join(f"{name} {int(mask.counts('risky').sum()):,}" for name, mask in self.masks.items())


def guards_folder(run_dir: str | Path) -> Path:
    """Where a run keeps what its guards exclude."""
    return Path(run_dir) / "masks" / "guards"


def find_excluded(folder: Path, guards: list[Guard], pairs: Pairs, score_N: np.ndarray) -> Excluded:
    """Run the guards on the first scores of all pairs and save their masks in `folder`. All ranks call."""
    about = [guard.learn(pairs, score_N) for guard in guards]
    masks = picture_pass(guards, pairs)
    for guard, mask, entries in zip(guards, masks, about):
        made = {"fingerprint": pairs.samples.index.fingerprint, "settings": guard.settings.model_dump(), **entries}
        comm.on_rank0(mask.save, folder / guard.name, made)
    return Excluded(guards, {guard.name: mask for guard, mask in zip(guards, masks)})


def load_excluded(folder: Path, guards: list[Guard], fingerprint: str) -> Excluded:
    """Load what find_excluded saved. Raises UserError if it is missing or of other data."""
    return Excluded(guards, {guard.name: SafeMask.load(folder / guard.name, fingerprint)[0] for guard in guards})


def picture_pass(guards: list[Guard], pairs: Pairs) -> list[SafeMask]:
    """SafeMask of each guard, the same on every rank, in one pass that decodes every picture once. All ranks call."""
    index = pairs.samples.index
    owned = assign_shards(index.counts, comm.world())
    shards = owned[comm.rank()]
    first, last = index.offsets[[shards.start, shards.stop]]
    numbers, valid_M = [np.zeros(last - first, guard.dtype) for guard in guards], np.zeros(last - first, bool)
    todo = [shard_batches(index.offsets, shards, pairs.batch_size) for shards in owned]
    dataset = PlainBatches(pairs.samples, [(rows, rows) for _, rows in todo[comm.rank()]], pairs.views)
    reading, rounds = fetched_ahead(batches(dataset, workers=pairs.workers), dataset), max(map(len, todo))
    for number in range(rounds):
        if number < len(dataset):
            batch = next(reading)
            row_B, images_BCHW = batch.rows.numpy() - first, batch.images.to(pairs.device)
            valid_M[row_B] = batch.valid.numpy()
            for number_M, guard in zip(numbers, guards):
                number_M[row_B] = guard.numbers(images_BCHW)
        pairs.each_round(number + 1, rounds)
    return [gathered(~guard.excluded(number_M, valid_M), owned, index) for guard, number_M in zip(guards, numbers)]


def gathered(kept_M: np.ndarray, owned: list[range], index: ShardIndex) -> SafeMask:
    """The mask of all ranks' flags, one copy of the bits per host. kept_M: of the shards owned[rank]. All ranks
    call."""
    starts, shards = byte_starts(index.counts), owned[comm.rank()]
    mask = SafeMask(index.counts, hosts.host_array(int(starts[-1]), np.uint8))
    for shard in shards:
        start, stop = index.offsets[[shard, shard + 1]] - index.offsets[shards.start]
        mask.shard_bits(shard)[:] = np.packbits(kept_M[start:stop])
    hosts.share_between_hosts(mask.bits, [(starts[some.start], starts[some.stop]) for some in owned])
    return mask
