"""Samples that cannot be used: written down, counted over all ranks, and too many of them stop the run."""

import numpy as np

from pipeline.distributed import comm
from shards.errors import UserError

PATIENCE = 10_000  # the share is one of so many samples at least: the first to be read may be the worst


def record(run, bad):
    """Write the bad samples that the ranks met into rank 0's ledger, say how many there are now; returns how many they
    met."""
    everyone = [sample for rank in comm.gather_objects(bad) for sample in rank]
    if run.ledger:
        before = len(run.ledger.seen)
        for sample in sorted(set(everyone)):
            run.ledger.add(*sample)
        if len(run.ledger.seen) > before:
            run.journal.say(f"  samples that cannot be used ({run.ledger.path.name}): {run.ledger.summary()}")
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
        f"({run.ledger.summary()}); {run.ledger.path} names them. "
        "Mend their shards, or go on without them with a larger data.max_bad_fraction"
    )
