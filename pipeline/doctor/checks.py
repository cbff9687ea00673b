"""safeclip doctor: what would go wrong with a run is found before GPU hours are spent. Nothing is trained,
and nothing written but what `ShardIndex.verify` keeps beside an index.

Each check gives findings: ("ok", "warning" or "fatal", what it is about, what was found and what to do). Started under
torchrun or srun it also checks what only the job itself can see: every host's view of the shards and the run directory,
and the network.
"""

import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config.data import open_index, open_overlay
from pipeline.config.schema import Config
from pipeline.distributed import comm
from pipeline.distributed.hosts import first_ranks
from pipeline.doctor.footprint import Findings, check_disk, check_memory, existing, measure
from pipeline.doctor.held_out import check_evaluation
from pipeline.doctor.model import check_model
from pipeline.doctor.shards import check_bad_samples, check_shards
from pipeline.safety.diagnosis import out_of_range
from pipeline.safety.round import mask_folder
from pipeline.training import checkpoint
from pipeline.training.curriculum import curriculum
from pipeline.training.lease import holder_of
from pipeline.training.run_dir import data_state, inspect
from pipeline.training.start import steps_per_epoch
from shards.errors import UserError
from shards.index.shard_index import ShardIndex

NETWORK_MB = 64  # of the all-reduce that is timed


def examine(config: Config, ranks: int | None = None, content: bool = False) -> Findings:
    """[(level, about, text)], the same on every rank. All ranks call.

    `ranks`: number of processes that the run will have (default: those that are here). `content`: read all shards and
    compare their fingerprints.
    """
    comm.init(config.run.timeout)
    ranks = ranks or comm.world()
    found = everywhere(lambda: check_shards(config, content))
    if any(level == "fatal" for level, *_ in found):
        return found + check_network()
    index = open_index(config.data)
    found += comm.on_rank0(lambda: check_bad_samples(config.data, index))
    found += comm.on_rank0(lambda: check_config(config, index, ranks))
    found += everywhere(lambda: check_evaluation(config, index))
    found += comm.on_rank0(lambda: check_run_dir(config, index, ranks))
    found += check_shared(config)
    found += everywhere(lambda: check_model(config))
    if any((level, about) == ("fatal", "model") for level, about, _ in found):
        return found + check_network()
    size = measure(config)
    found += comm.on_rank0(lambda: check_disk(config, index, size, ranks))
    found += everywhere(lambda: check_memory(config, index, size, ranks))
    return found + check_network()


def everywhere(check: Callable[[], Findings]) -> Findings:
    """What `check` finds on each host (on its first rank); what only some hosts find is said of them by name."""
    mine = check() if first_ranks()[comm.rank()] == comm.rank() else None
    hosts = [(host, found) for host, found in comm.gather_objects((socket.gethostname(), mine)) if found is not None]
    if all(found == hosts[0][1] for _, found in hosts):
        return hosts[0][1]
    return [(level, about, f"on {host}: {text}") for host, found in hosts for level, about, text in found]


def check_config(config: Config, index: ShardIndex, ranks: int) -> Findings:
    """Batch, processes and pairs fit each other."""
    try:
        steps = steps_per_epoch(config, index, ranks)
        epochs = curriculum(config.train, config.selection.every, steps)
    except UserError as error:
        return [("fatal", "config", str(error))]
    rounds = sum(epoch.round is not None for epoch in epochs)
    local = config.train.batch_size // ranks
    found = [
        (
            "ok",
            "config",
            f"{config.train.epochs} epochs of {steps:,} steps, {rounds} selection rounds; "
            f"batches of {config.train.batch_size} pairs, {local} a rank, world size {ranks}",
        )
    ]
    if config.train.warmup_steps > steps * config.train.epochs / 2:
        found.append(
            (
                "warning",
                "config",
                f"train.warmup_steps: {config.train.warmup_steps:,} of {steps * config.train.epochs:,} steps in all; "
                "the rate will hardly be reached, take fewer",
            )
        )
    if not rounds and (config.guards or config.train.method == "safeclip"):
        text = "no selection round, so all pairs are trained on"
        found.append(("warning", "config", f"{text}; take more train.epochs, or train.method=safeclip with guards"))
    if config.guards and (warning := out_of_range(index.samples)):
        found.append(("warning", "config", warning))
    return found


def check_run_dir(config: Config, index: ShardIndex, ranks: int) -> Findings:
    """The run directory's state is complete and belongs to this config and this data."""
    if not config.run.dir:
        return [("warning", "run.dir", "none named; name the run's directory with run.dir=DIR to have it checked")]
    run_dir = Path(config.run.dir).absolute()
    if in_use := holder_of(run_dir):
        return [("fatal", "run.dir", f"{run_dir} {in_use}")]
    if config.run.restart:
        return [("warning", "run.dir", f"run.restart=true: all state in {run_dir} will be deleted")]
    try:
        newest, warnings = inspect(config, run_dir, data_state(config, index, open_overlay(config.data, index)))
    except UserError as error:
        return [("fatal", "run.dir", str(error))]
    found = [("warning", "run.dir", f"{text}; delete them when you need them no more") for text in warnings]
    if not newest:
        return found + [("ok", "run.dir", f"{run_dir} holds no run yet")]
    state = checkpoint.load_state(newest)
    text = (
        f"{run_dir} resumes after step {state['step']:,} "
        f"(epoch {state['epoch']}, {state['epoch_step']:,} steps of it done)"
    )
    if state["epoch_step"]:
        epochs = curriculum(config.train, config.selection.every, index.views // config.train.batch_size)
        left = epochs[state["epoch"] :]  # none where train.epochs was lowered
        made = left[0].mask_of if left else None
        if made is not None and not (mask := mask_folder(run_dir, made) / "mask.json").exists():
            found.append(
                (
                    "fatal",
                    "run.dir",
                    f"{mask} is missing; bring it back, or delete {newest} to resume from an earlier one",
                )
            )
    if state["world"] != ranks:
        text += f", saved by {state['world']} processes and now with {ranks}: the same global batches"
    return found + [("ok", "run.dir", text)]


def check_shared(config: Config) -> Findings:
    """Every host sees the run directory, or where it will be made: what rank 0 puts there, all must find. All ranks
    call."""
    if not config.run.dir:
        return []
    place, file, wrong = existing(config.run.dir), None, None
    if comm.is_rank0():
        try:
            file = tempfile.NamedTemporaryFile(prefix=".doctor_", dir=place)  # lives until it is closed
        except OSError as error:
            wrong = error.strerror
    name, wrong = comm.broadcast_object((file and file.name, wrong))
    if wrong:
        return [("fatal", "run.dir", f"{place} cannot be written ({wrong}); take another run.dir, or mend that")]

    def see() -> Findings:
        if Path(name).exists():
            return [("ok", "run.dir", f"{Path(name).parent} can be written, and every host sees what is")]
        return [
            (
                "fatal",
                "run.dir",
                f"{name}, written by rank 0, is not seen; run.dir must be on a disk that all hosts share",
            )
        ]

    found = everywhere(see)
    if file:
        file.close()
    return found


def check_network() -> Findings:
    """All ranks answer, and how fast they sum. All ranks call."""
    if comm.world() == 1:
        return [("ok", "network", "one process; start it under torchrun or srun, as the run, to try the network")]
    hosts = sorted({host for host in comm.gather_objects(socket.gethostname())})
    numbers = torch.ones(NETWORK_MB << 18, device=comm.device())
    dist.all_reduce(numbers)  # the first one builds the connections
    comm.barrier()
    started = time.monotonic()
    numbers.fill_(1)
    dist.all_reduce(numbers)
    right = bool((numbers == comm.world()).all())
    seconds = time.monotonic() - started
    if not all(comm.gather_objects(right)):
        return [
            (
                "fatal",
                "network",
                "an all-reduce of ones gives wrong sums; this network or its driver is not to be trusted",
            )
        ]
    text = (
        f"{comm.world()} processes on {len(hosts)} host(s) ({', '.join(hosts[:8])}{' ...' if len(hosts) > 8 else ''})"
    )
    return [
        (
            "ok",
            "network",
            f"{text} sum {NETWORK_MB} MB in {comm.broadcast_object(round(seconds, 3)):g} s by {dist.get_backend()}",
        )
    ]
