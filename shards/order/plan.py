"""EpochPlan: the sample at (step, slot), as a pure function of a few numbers, without state or iteration.

So every sample of a view is seen exactly once an epoch (but for the last partial batch), a run resumes at any step for
nothing, and global batch k holds the same samples at any world size and worker count.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from shards.errors import UserError

ROUNDS = 8  # of the Feistel network: four (Luby and Rackoff 1988) still show on domains as small as a window
FEW = 12  # rows that plain ints take faster through the network than arrays

Whole = TypeVar("Whole", int, np.ndarray)  # an int, or an array of them


class EpochPlan:
    """Order of one view of the data in one epoch.

    The shards are permuted and their samples laid end to end; the first steps * batch_size of that line are cut into
    equal `streams`; each stream is shuffled inside windows of `window` samples; batch k takes the same number from each
    stream. A batch so touches few shards, whatever their size, and the shuffle needs no memory. A shard that is to be
    seen n times in an epoch stands n times in the permutation.
    """

    def __init__(
        self,
        counts_S: Sequence[int] | np.ndarray,
        *,
        seed: int,
        epoch: int,
        view: str,
        batch_size: int,
        streams: int = 8,
        window: int = 2048,
        pass_number: int = 0,
        repetitions_S: Sequence[int] | np.ndarray | None = None,
    ):
        """counts_S: samples of the view in each shard; repetitions_S: how often each is seen (None: once).
        `pass_number`: which pass over the view in this epoch. Raises UserError."""
        if batch_size % streams:
            raise UserError(
                f"data.streams: got {streams}, which does not divide train.batch_size {batch_size}; "
                "take a divisor of it"
            )
        name = f"{seed}/{epoch}/{view}/{pass_number}".encode()
        self.key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        counts_S = np.asarray(counts_S, np.int64)
        repetitions_S = (
            np.ones(len(counts_S), np.int64) if repetitions_S is None else np.asarray(repetitions_S, np.int64)
        )
        # P places in the permutation: each shard occurs repetitions_S times, numbered from 0 by repetition_P.
        first_S = np.cumsum(repetitions_S) - repetitions_S
        shard_P = np.repeat(np.arange(len(counts_S)), repetitions_S)
        order_P = np.random.Generator(np.random.Philox(self.key)).permutation(len(shard_P))
        self.shard_P, self.repetition_P = shard_P[order_P], (order_P - first_S[shard_P[order_P]])
        self.ends_P = np.cumsum(counts_S[self.shard_P])
        self.batch_size, self.streams, self.window = batch_size, streams, window
        self.steps = int((counts_S * repetitions_S).sum()) // batch_size
        self.stream_length = self.steps * (batch_size // streams)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard_B, nth_B, repetition_B): int64, this rank's rows of global batch `step`: sample nth_B of the view
        within shard_B, which is seen for the time repetition_B (from 0) in this pass.

        Raises IndexError for a step outside 0 .. steps - 1, UserError when `world` does not divide the batch.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        if self.batch_size % world:
            raise UserError(
                f"train.batch_size: got {self.batch_size}, which {world} processes do not divide; "
                "take a multiple of their number"
            )
        rows = self.batch_size // world
        at_B, left_B, tweak_B, start_B = self.window_of(step, np.arange(rank * rows, (rank + 1) * rows))
        line_B = start_B + permute(at_B, np.minimum(self.window, left_B), self.key, tweak_B)
        place_B = np.searchsorted(self.ends_P, line_B, side="right")
        before_B = np.where(place_B > 0, self.ends_P[place_B - 1], 0)
        return self.shard_P[place_B], line_B - before_B, self.repetition_P[place_B]

    def slot(self, step: int, slot: int) -> tuple[int, int, int]:
        """(shard, nth, again) of row `slot` of global batch `step`, as in `batch`. Raises IndexError."""
        if not (0 <= step < self.steps and 0 <= slot < self.batch_size):
            raise IndexError(f"step {step} of {self.steps}, slot {slot} of {self.batch_size}")
        at, left, tweak, start = self.window_of(step, slot)
        line = start + permute_one(at, min(self.window, left), self.key, tweak)
        place = int(self.ends_P.searchsorted(line, side="right"))
        before = int(self.ends_P[place - 1]) if place else 0
        return int(self.shard_P[place]), line - before, int(self.repetition_P[place])

    def window_of(self, step: int, slot: Whole) -> tuple[Whole, Whole, Whole, Whole]:
        """Of a slot: its place in its window, the samples of the stream from the window's
        begin on, the window's number, its begin on the line."""
        each = self.batch_size // self.streams
        stream, at = slot // each, step * each + slot % each
        window, within = at // self.window, at % self.window
        start = window * self.window
        return within, self.stream_length - start, stream * (1 << 32) + window, stream * self.stream_length + start


def permute(at_B: np.ndarray, length_B: np.ndarray, key: int, tweak_B: np.ndarray) -> np.ndarray:
    """int64 (B,): where a pseudorandom permutation of 0 .. length - 1, chosen by (key, tweak), sends `at`. Elementwise.

    A Feistel network over the next power of four, walked until it lands inside (cycle walking: Black and Rogaway 2002).
    """
    bits_B = np.frexp(np.maximum(length_B - 1, 1).astype(np.float64))[1]  # bit length, exact below 2**53
    half_B = ((bits_B + 1) // 2).astype(np.uint64)
    tweak_B = mix(tweak_B.astype(np.uint64) ^ np.uint64(key))
    result_B, todo = at_B.astype(np.uint64), np.arange(len(at_B))
    while len(todo) > FEW:
        result_B[todo] = feistel(result_B[todo], half_B[todo], tweak_B[todo])
        todo = todo[result_B[todo] >= length_B[todo].astype(np.uint64)]
    for i in todo.tolist():
        result_B[i] = walk(*(x_B[i].item() for x_B in (result_B, length_B, half_B, tweak_B)))
    return result_B.astype(np.int64)


def permute_one(at: int, length: int, key: int, tweak: int) -> int:
    """`permute` of plain ints."""
    half = (max(length - 1, 1).bit_length() + 1) // 2
    return walk(at, length, half, mix(tweak ^ key))


def walk(at: int, length: int, half: int, tweak: int) -> int:
    """Plain int: through the network until it lands below `length`."""
    at = feistel(at, half, tweak)
    while at >= length:
        at = feistel(at, half, tweak)
    return at


BITS = (1 << 64) - 1  # an array drops by itself what is above 64 bits, an int does not


def feistel(x: Whole, half: Whole, tweak: Whole) -> Whole:
    """x of 2 * half bits through the network; ints, or uint64 arrays."""
    low = (1 << half) - 1
    left, right = x >> half, x & low
    for number in range(ROUNDS):
        left, right = right, left ^ (mix(right ^ (tweak + number)) & low)
    return (left << half) | right


def mix(x: Whole) -> Whole:
    """The SplitMix64 finaliser: 64 bits in, 64 well-mixed bits out (Steele, Lea and Flood 2014); an int, or a uint64
    array."""
    x = (x + 0x9E3779B97F4A7C15) & BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)
