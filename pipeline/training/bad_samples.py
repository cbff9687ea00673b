"""Samples that cannot be used: written down, counted over all ranks, and too many of them stop the run."""

import numpy as np

from pipeline.distributed import comm
from shards.errors import UserError

PATIENCE = 10_000  # the fraction is one of so many samples at least: the first to be read may be the worst


def record(run, bad):
    """Write the bad samples that the ranks met to rank 0's bad_samples.jsonl, say how many there are now; returns how many they
    met."""
    everyone = [sample for rank in comm.gather_objects(bad) for sample in rank]
    if run.bad_samples:
        before = len(run.bad_samples.seen)
        for sample in sorted(set(everyone)):
            run.bad_samples.add(*sample)
        if len(run.bad_samples.seen) > before:
            run.logger.say(f"  samples that cannot be used ({run.bad_samples.path.name}): {run.bad_samples.summary()}")
    return len(everyone)


def bad_so_far(run, pending=0):
    """(rows, most): training rows of all ranks that could not be used, and how many may be. `pending`: not recorded yet
    on this rank."""
    most = run.config.data.max_bad_fraction * max(run.state["sample_views"], min(PATIENCE, run.index.samples))
    return run.state["bad_rows"] + int(comm.all_reduce_sum(np.array([pending]))[0]), most


def stop_where_bad(run, failed, most):
    """Raise UserError on every rank when more samples failed than `most`; what was done until now is saved."""
    if failed > most:
        run.saver.wait()
        comm.on_rank0(refuse, run)


def refuse(run):
    limit = run.config.data.max_bad_fraction
    raise UserError(
        f"data.max_bad_fraction: more than {limit:.2%} of the samples that were read cannot be used "
        f"({run.bad_samples.summary()}); {run.bad_samples.path} names them. "
        "Mend their shards, or continue without them with a larger data.max_bad_fraction"
    )
