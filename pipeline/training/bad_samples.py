"""Samples that cannot be read: recorded, counted over all ranks, and an error when there are too many."""

import json
import logging
from collections import Counter
from typing import NoReturn

import numpy as np

from pipeline.distributed import comm
from pipeline.safety.score_files import Unread
from pipeline.training.start import Run
from shards.errors import UserError
from shards.samples.bad_samples import part_of, summary

logger = logging.getLogger(__name__)

MOST_REASONS = 100  # of a rank that are counted over all ranks
MIN_SAMPLES = 10_000  # denominator of the fraction while fewer samples have been read


def record(run: Run, bad: list[Unread]) -> int:
    """Add the bad samples of all ranks to RUN/bad_samples, each once, and log a summary. All ranks call.

    bad: (shard, position, key, reason) of this rank; each goes to the rank that writes its file. Returns the number of
    all ranks' entries, repeated ones included.
    """
    total = int(comm.all_reduce_sum(np.array([len(bad)]))[0])
    if not total:
        return 0
    to: list[list[Unread]] = [[] for _ in range(comm.world())]
    for sample in set(bad):
        to[part_of(sample[0]) % comm.world()].append(sample)
    sent = [np.frombuffer(json.dumps(samples).encode(), np.uint8) for samples in to]
    here = [tuple(sample) for part in comm.exchange(sent) for sample in json.loads(part.tobytes())]
    new = run.bad_samples.add(here)
    if comm.all_reduce_max(new)[0]:
        said = reasons(run)
        if comm.is_rank0():
            logger.warning(f"samples that cannot be used ({run.bad_samples.folder.name}/): {said}")
    return total


def reasons(run: Run) -> str:
    """The reasons by count, of all ranks. All ranks call."""
    own = run.bad_samples.reasons().most_common(MOST_REASONS)
    counts: Counter[str] = Counter()
    for found in comm.gather_objects(own):
        counts.update(dict(found))
    return summary(counts)


def bad_so_far(run: Run, pending: int = 0) -> tuple[int, float]:
    """(rows, limit): unusable training rows of all ranks, and how many are allowed. pending: of this rank, not recorded
    yet."""
    read = run.state["step"] * run.config.train.batch_size
    limit = run.config.data.max_bad_fraction * max(read, min(MIN_SAMPLES, run.index.samples))
    return run.state["bad_rows"] + int(comm.all_reduce_sum(np.array([pending]))[0]), limit


def stop_where_bad(run: Run, failed: int, limit: float) -> None:
    """Raise UserError on every rank if more than `limit` samples failed, after the pending save."""
    if failed > limit:
        run.saver.wait()
        comm.on_rank0(refuse, run, reasons(run))


def refuse(run: Run, said: str) -> NoReturn:
    limit = run.config.data.max_bad_fraction
    raise UserError(
        f"data.max_bad_fraction: more than {limit:.2%} of the samples that were read cannot be used "
        f"({said}); {run.bad_samples.folder} names them. "
        "Mend their shards, or continue without them with a larger data.max_bad_fraction"
    )
