"""What the guards of a run exclude: found once, in one look at every picture, and kept as a mask of each guard beside those of the rounds."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipeline import comm
from pipeline.guards.base import Guard, Pairs
from pipeline.safety.scoring import assign_shards, shard_batches
from pipeline.safety.split import broadcast_mask
from shards.ahead import fetched_ahead
from shards.errors import UserError
from shards.index import ShardIndex
from shards.loader import PlainBatches, batches
from shards.masks import SafeMask


class Excluded:
    """mask: SafeMask of the pairs that no guard excludes. masks: {guard's name: its own}."""

    def __init__(self, guards: list[Guard], masks: dict[str, SafeMask], counts_S: np.ndarray):
        self.guards, self.masks = guards, masks
        bits = np.bitwise_and.reduce([mask.bits for mask in masks.values()])
        self.mask = SafeMask(counts_S, bits)

    def of_shard(self, shard: int, index: ShardIndex) -> list[tuple]:
        """[(shard, position, key, reason)] of the excluded pairs of a shard, each once."""
        found, keys = {}, index.table(shard).keys
        for guard in self.guards:
            for position in self.masks[guard.name].positions(shard, "risky").tolist():
                found.setdefault(position, (shard, position, keys[position], guard.reason))
        return [found[position] for position in sorted(found)]

    def line(self) -> str:
        """For people: how many pairs each guard excludes."""
        return ", ".join(f"{name} {int(mask.counts('risky').sum()):,}" for name, mask in self.masks.items())


def guards_folder(run_dir: str | Path) -> Path:
    """Where a run keeps what its guards exclude."""
    return Path(run_dir) / "masks" / "guards"


def excluded_of_run(folder: Path, guards: list[Guard], pairs: Pairs) -> Excluded | None:
    """What the guards exclude; None where there are none. What is kept in `folder` of the same settings is used. All ranks call."""
    index, seed = pairs.samples.index, pairs.seed
    made = {
        guard.name: {"fingerprint": index.fingerprint, "seed": seed, "settings": asdict(guard.settings)}
        for guard in guards
    }
    missing = [guard for guard in guards if not comm.on_main(is_kept, folder / guard.name, made[guard.name])]
    if missing:
        about = {guard.name: guard.learn(pairs) for guard in missing}
        for guard, mask in zip(missing, find(missing, pairs)):
            comm.on_main(mask.save, folder / guard.name, {**made[guard.name], **about[guard.name]})
    masks = {guard.name: SafeMask.load(folder / guard.name)[0] for guard in guards}
    return Excluded(guards, masks, index.counts) if guards else None


def is_kept(folder: Path, made: dict) -> bool:
    try:
        return made.items() <= SafeMask.load(folder)[1].items()
    except UserError:
        return False


def find(guards: list[Guard], pairs: Pairs) -> list[SafeMask]:
    """A SafeMask of each guard, the same on every rank: every picture is decoded once. All ranks call."""
    index = pairs.samples.index
    owned = assign_shards(index.counts, comm.world())
    numbers = [comm.host_array(index.samples, guard.dtype) for guard in guards]
    valid_N = comm.host_array(index.samples, np.bool_)
    rows = [(rows, rows) for _, rows in shard_batches(index.offsets, owned[comm.rank()], pairs.batch_size)]
    dataset = PlainBatches(pairs.samples, rows, pairs.views)
    for batch in fetched_ahead(batches(dataset, workers=pairs.workers), dataset):
        row_B, images_BCHW = batch.rows.numpy(), batch.images.to(pairs.device)
        valid_N[row_B] = batch.valid.numpy()
        for number_N, guard in zip(numbers, guards):
            number_N[row_B] = guard.numbers(images_BCHW)
    for array in [*numbers, valid_N]:
        comm.share_between_hosts(array, [(index.offsets[s.start], index.offsets[s.stop]) for s in owned])

    def kept(guard, number_N):
        return broadcast_mask(guard.kept(number_N, valid_N, index.offsets) if comm.is_main() else (), index.counts)

    return [kept(guard, number_N) for guard, number_N in zip(guards, numbers)]
