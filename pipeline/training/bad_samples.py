"""Samples that cannot be read: recorded, counted over all ranks, and an error when there are too many."""

import logging
from typing import NoReturn

import numpy as np

from pipeline.distributed import comm
from pipeline.safety.score_files import Unread
from pipeline.training.start import Run
from shards.errors import UserError

logger = logging.getLogger(__name__)

MIN_SAMPLES = 10_000  # denominator of the fraction while fewer samples have been read


def record(run: Run, bad: list[Unread]) -> int:
    """Add the bad samples of all ranks to bad_samples.jsonl, each once, and log a summary. All ranks call.

    bad: (shard, position, key, reason) of this rank. Returns the number of all ranks' entries, repeated ones included.
    """
    everyone = [sample for rank in comm.gather_objects(bad) for sample in rank]
    if run.bad_samples:
        before = len(run.bad_samples.seen)
        for sample in sorted(set(everyone)):
            run.bad_samples.add(*sample)
        if len(run.bad_samples.seen) > before:
            logger.warning(f"samples that cannot be used ({run.bad_samples.path.name}): {run.bad_samples.summary()}")
    return len(everyone)


def bad_so_far(run: Run, pending: int = 0) -> tuple[int, float]:
    """(rows, limit): unusable training rows of all ranks, and how many are allowed. pending: of this rank, not recorded
    yet."""
    limit = run.config.data.max_bad_fraction * max(run.state["sample_views"], min(MIN_SAMPLES, run.index.samples))
    return run.state["bad_rows"] + int(comm.all_reduce_sum(np.array([pending]))[0]), limit


def stop_where_bad(run: Run, failed: int, limit: float) -> None:
    """Raise UserError on every rank if more than `limit` samples failed, after the pending save."""
    if failed > limit:
        run.saver.wait()
        comm.on_rank0(refuse, run)


def refuse(run: Run) -> NoReturn:
    limit = run.config.data.max_bad_fraction
    raise UserError(
        f"data.max_bad_fraction: more than {limit:.2%} of the samples that were read cannot be used "
        f"({run.bad_samples.summary()}); {run.bad_samples.path} names them. "
        "Mend their shards, or continue without them with a larger data.max_bad_fraction"
    )
