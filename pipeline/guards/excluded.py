"""Pairs that the guards of a run exclude: found once, in the first scoring, and saved as one mask per guard."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.distributed import comm, hosts
from pipeline.guards.base import Guard
from pipeline.guards.features import take
from pipeline.guards.sample import Sample
from pipeline.safety.score_files import ScoreFiles, Unread
from pipeline.safety.scoring import Reading, Scored, score_all_pairs
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SafeMask, byte_starts
from shards.storage.files import read_json

Watch = Callable[[str], Callable[[int, int], None]]  # name of a phase -> what is called after each of its rounds


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


def load_excluded(folder: Path, guards: list[Guard], fingerprint: str) -> Excluded:
    """Load what `score_and_exclude` saved. Raises UserError if it is missing or of other data."""
    return Excluded(guards, {guard.name: SafeMask.load(folder / guard.name, fingerprint)[0] for guard in guards})


def are_saved(folder: Path, guards: list[Guard], index: ShardIndex, made: Mapping) -> bool:
    """Whether the masks of the guards in `folder` are complete, of these data, and of this model and config."""
    try:
        found = [read_json(folder / guard.name / "mask.json") for guard in guards]
    except (OSError, ValueError):
        return False
    return all(about.get("fingerprint") == index.fingerprint and made.items() <= about.items() for about in found)


def score_and_exclude(
    guards: list[Guard], folder: Path, reading: Reading, files: ScoreFiles, seed: int, watch: Watch
) -> tuple[np.ndarray, list[Unread], Excluded]:
    """(score_N, bad) of scoring.score_all_pairs, and what the guards exclude, in one pass that decodes each picture
    once. All ranks call.

    A random sample is scored first, and the guards learn on it; then all others, and the numbers that guards need are
    taken from the same pictures. The guards' masks are saved in `folder`.
    """
    samples, device = reading.samples, reading.device
    size = max(guard.sampled(samples.index.samples) for guard in guards)
    names = dict.fromkeys(name for guard in guards for name in guard.features)
    sample = Sample(folder / "sample", samples, size, names, seed)
    sample.score(reading, files.made, watch("sample"))
    about = []
    for guard in guards:
        about.append(guard.learn(sample, device))
        sample.learnt.append(guard)
    numbers = GuardNumbers(guards, sample, samples.index, device)
    score_N, bad = score_all_pairs(*reading, files, watch("scoring"), numbers)
    masks = numbers.masks(watch("guards"))
    for guard, mask, entries in zip(guards, masks, about):
        made = {
            "fingerprint": samples.index.fingerprint,
            "settings": guard.settings.model_dump(),
            **files.made,
            **entries,
        }
        comm.on_rank0(mask.save, folder / guard.name, made)
    if comm.is_rank0():
        shutil.rmtree(sample.folder, ignore_errors=True)
    return score_N, bad, Excluded(guards, {guard.name: mask for guard, mask in zip(guards, masks)})


class GuardNumbers:
    """The guards' numbers of all pairs, as scoring.PictureNumbers."""

    def __init__(self, guards: list[Guard], sample: Sample, index: ShardIndex, device: torch.device):
        self.guards, self.sample, self.index, self.device = guards, sample, index, device
        self.features = tuple(dict.fromkeys(name for guard in guards for name in guard.features))
        self.names, self.row_K = tuple(guard.name for guard in guards), sample.row_K

    def begin(self, owned: Sequence[range]) -> None:
        shards = owned[comm.rank()]
        self.owned, self.first = owned, int(self.index.offsets[shards.start])
        pairs = int(self.index.offsets[shards.stop]) - self.first
        self.of_guard = {guard.name: np.zeros(pairs, guard.dtype) for guard in self.guards}
        self.valid_M = np.zeros(pairs, bool)

    def take(self, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.of(take(images_BCHW, self.features), len(images_BCHW))

    def of(self, seen: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """Numbers of pictures with these features; a guard that needs none has found nothing to look for."""
        return {
            guard.name: guard.numbers(seen)
            if guard.features
            else torch.from_numpy(np.zeros(count, guard.dtype)).to(self.device)
            for guard in self.guards
        }

    def known(self, shard: int) -> list[Scored]:
        found = self.sample.scored(*self.index.offsets[[shard, shard + 1]].tolist())
        parts = []
        for part in found:
            seen = {name: part.numbers[name].to(self.device) for name in self.features}
            parts.append(Scored(part.row_B, part.cos_B, part.bad, self.of(seen, len(part.row_B))))
        return parts

    def keep(self, shard: int, cos_P: np.ndarray, numbers: Mapping[str, np.ndarray]) -> None:
        start, stop = (self.index.offsets[[shard, shard + 1]] - self.first).tolist()
        self.valid_M[start:stop] = ~np.isnan(cos_P)
        for name, number_P in numbers.items():
            self.of_guard[name][start:stop] = number_P

    def masks(self, each_round: Callable[[int, int], None]) -> list[SafeMask]:
        """SafeMask of what each guard does not exclude, the same on every rank. All ranks call."""
        return [
            gathered(~guard.excluded(self.of_guard[guard.name], self.valid_M, each_round), self.owned, self.index)
            for guard in self.guards
        ]


def gathered(kept_M: np.ndarray, owned: Sequence[range], index: ShardIndex) -> SafeMask:
    """The mask of all ranks' flags, one copy of the bits per host. kept_M: of the shards owned[rank]. All ranks
    call."""
    starts, shards = byte_starts(index.counts), owned[comm.rank()]
    mask = SafeMask(index.counts, hosts.host_array(int(starts[-1]), np.uint8))
    for shard in shards:
        start, stop = index.offsets[[shard, shard + 1]] - index.offsets[shards.start]
        mask.shard_bits(shard)[:] = np.packbits(kept_M[start:stop])
    hosts.share_between_hosts(mask.bits, [(starts[some.start], starts[some.stop]) for some in owned])
    return mask
