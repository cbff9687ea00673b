"""safeclip doctor: what would go wrong with a run is found before GPU hours are spent. Nothing is written, nothing trained.

Each check gives findings: ("ok", "warning" or "fatal", what it is about, what was found and what to do). Started under torchrun or
srun it also checks what only the job itself can see: every host's view of the shards and the run directory, and the network.
"""

import os
import shutil
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline import comm
from pipeline.data import describe, open_cache, open_index, open_overlay
from pipeline.evaluation.evaluators import ZeroShot
from pipeline.safety.split import mask_folder
from pipeline.training import checkpoint
from pipeline.training.curriculum import curriculum
from pipeline.training.model import build_model, open_clip_config
from pipeline.training.start import inspect, steps_per_epoch
from shards import tar
from shards.errors import BadSample, UserError
from shards.remote import open_shard
from shards.samples import Samples

SPREAD = 32  # shards of which one sample is decoded
NETWORK_MB = 64  # of the all-reduce that is timed
SCORE_BYTES = 40  # of a pair in a split's score files: position, key, cosine
HOST_BYTES = 4 + 1 / 8  # of a pair: its score and its bit of the mask, mapped by all ranks of a host
SPARE = 0.9  # share of a device's memory that may be spoken for before activations


def examine(config, ranks=None, content=False):
    """[(level, about, text)], the same on every rank. All ranks call.

    `ranks`: number of processes that the run will have (default: those that are here). `content`: read all shards and compare
    their fingerprints.
    """
    comm.init(config.run.timeout)
    ranks = ranks or comm.world()
    found = everywhere(lambda: check_shards(config, content))
    if any(level == "fatal" for level, *_ in found):
        return found + check_network()
    index = open_index(config.data)
    found += comm.on_main(lambda: check_config(config, index, ranks))
    found += comm.on_main(lambda: check_run_dir(config, index, ranks))
    found += check_shared(config)
    try:
        size = measure(config)
    except UserError as error:
        return found + [("fatal", "model", str(error))] + check_network()
    found += comm.on_main(lambda: check_disk(config, index, size, ranks))
    found += everywhere(lambda: check_memory(config, index, size, ranks))
    return found + check_network()


def everywhere(check):
    """What `check` finds on each host (on its first rank); what only some hosts find is said of them by name."""
    mine = check() if os.environ["LOCAL_RANK"] == "0" else None
    hosts = [(host, found) for host, found in comm.gather_objects((socket.gethostname(), mine)) if found is not None]
    if all(found == hosts[0][1] for _, found in hosts):
        return hosts[0][1]
    return [(level, about, f"on {host}: {text}") for host, found in hosts for level, about, text in found]


def check_shards(config, content=False):
    """The shards are there as they were indexed, and samples of them can be read. On one rank of each host."""
    try:
        index = open_index(config.data)
        index.verify(config.data.remote_timeout)
        overlay = open_overlay(config.data, index)
        samples = Samples(
            index, overlay, limits=config.data.limits
        )  # without a cache: single samples, not whole shards
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
                    f"{len(changed)} shard(s) do not hold what was indexed, the first: {changed[0]}; index them again",
                )
            )
        else:
            found.append(("ok", "data", "every shard holds what was indexed, byte for byte"))
    filled = [s for s, count in enumerate(index.counts) if count and not index.shards[s].path.startswith("pipe:")]
    tried = filled[:: -(-len(filled) // SPREAD) or 1]
    bad = []
    for shard in tried:
        position = int(index.counts[shard]) // 2
        try:
            samples.image(shard, position)
            samples.caption(shard, position)
        except BadSample as error:
            bad.append(f"{index.shards[shard].path}, sample {samples.key(shard, position)}: {error}")
    if bad:
        found.append(
            (
                "warning" if len(bad) < len(tried) else "fatal",
                "data",
                f"{len(bad)} of {len(tried)} samples that were tried cannot be read, the first: {bad[0]}; if it is not that "
                "sample alone, index the shards again or mend them",
            )
        )
    return found


def changed_shards(index, data):
    """Paths of the shards whose bytes are not those that were indexed."""

    def content(shard):
        with open_shard(shard.path, shard.size, data.remote_timeout, data.allow_pipe) as file:
            stream = tar.Stream(file)
            stream.skip_to(float("inf"))
            return stream.fingerprint()

    with ThreadPoolExecutor(8) as pool:
        return [s.path for s, found in zip(index.shards, pool.map(content, index.shards)) if found != s.fingerprint]


def check_cache(config, index):
    """Whether the cache of shards from behind URLs can hold what a batch is drawn from, and its disk can hold the cache."""
    sizes = [shard.size for shard in index.shards if shard.remote]
    if not sizes:
        return []
    try:
        cache = open_cache(config.data)
    except UserError as error:
        return [("fatal", "data", str(error))]
    # Each stream is inside one window at a time, and reads of the next are fetched ahead of it.
    mean = sum(sizes) / len(sizes)
    windows = config.data.streams * (config.data.window / (index.samples / len(index.shards)) + 1) * mean
    needed = min(2 * windows, sum(sizes))
    free = shutil.disk_usage(cache.folder).free + sum(path.stat().st_size for path in cache.folder.glob("*.tar"))
    text = (
        f"{len(sizes):,} shards of {human(sum(sizes))} lie behind URLs; up to {human(cache.limit)} of them in {cache.folder}, where "
        f"{human(free)} are free; a batch and the next are drawn from about {human(needed)}"
    )
    if cache.limit < needed:
        return [("warning", "data", f"{text}; raise data.cache_gb, or shards are fetched again and again")]
    if free < min(cache.limit, sum(sizes)):
        return [("fatal", "data", f"{text}; lower data.cache_gb, or name another disk with data.cache")]
    return [("ok", "data", text)]


def check_config(config, index, ranks):
    """Batch, processes and pairs fit each other; the test set is there."""
    try:
        steps = steps_per_epoch(config, index, ranks)
        epochs = curriculum(config.train, config.selection.every)
        if config.evaluation.test:
            ZeroShot(config.evaluation)
    except UserError as error:
        return [("fatal", "config", str(error))]
    splits = sum(epoch.split is not None for epoch in epochs)
    local = config.train.batch_size // ranks
    found = [
        (
            "ok",
            "config",
            f"{len(epochs)} epochs of {steps:,} steps, {splits} splits; {ranks} process(es) with {local} pairs of each batch of "
            f"{config.train.batch_size}",
        )
    ]
    if config.train.warmup_steps > steps * len(epochs) / 2:
        found.append(
            (
                "warning",
                "config",
                f"train.warmup_steps: {config.train.warmup_steps:,} of {steps * len(epochs):,} steps in all; the rate will hardly be reached, "
                "take fewer",
            )
        )
    return found


def check_run_dir(config, index, ranks):
    """The run directory's state is complete and belongs to this config and this data."""
    if not config.run.dir:
        return [("warning", "run.dir", "none named; name the run's directory with run.dir=DIR to have it checked")]
    run_dir = Path(config.run.dir).absolute()
    if config.run.restart:
        return [("warning", "run.dir", f"run.restart=true: all state in {run_dir} will be deleted")]
    try:
        newest, warnings = inspect(config, run_dir, index.fingerprint)
    except UserError as error:
        return [("fatal", "run.dir", str(error))]
    found = [("warning", "run.dir", f"{text}; delete them when you need them no more") for text in warnings]
    if not newest:
        return found + [("ok", "run.dir", f"{run_dir} holds no run yet")]
    state = checkpoint.load_state(newest)
    text = f"{run_dir} goes on after step {state['step']:,} (epoch {state['epoch']}, {state['epoch_step']:,} steps of it done)"
    if state["epoch_step"] and state["epoch"] < config.train.epochs:
        epoch = curriculum(config.train, config.selection.every)[state["epoch"]]
        if epoch.mask_of is not None and not (mask := mask_folder(run_dir, epoch.mask_of) / "mask.json").exists():
            found.append(
                ("fatal", "run.dir", f"{mask} is gone; bring it back, or delete {newest} to go on from an earlier one")
            )
    if state["world"] != ranks:
        text += f", saved by {state['world']} processes and now with {ranks}: the same global batches"
    return found + [("ok", "run.dir", text)]


def check_shared(config):
    """Every host sees the run directory, or where it will be made: what rank 0 puts there, all must find. All ranks call."""
    if not config.run.dir:
        return []
    place, file, wrong = existing(config.run.dir), None, None
    if comm.is_main():
        try:
            file = tempfile.NamedTemporaryFile(prefix=".doctor_", dir=place)  # lives until it is closed
        except OSError as error:
            wrong = error.strerror
    name, wrong = comm.broadcast_object((file and file.name, wrong))
    if wrong:
        return [("fatal", "run.dir", f"{place} cannot be written ({wrong}); take another run.dir, or mend that")]

    def see():
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


def existing(path):
    """The folder itself, or the nearest one above it that exists."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def measure(config):
    """{"parameters", "embed_dim"} of the model, without the memory for it. Raises UserError."""
    with torch.device("meta"):
        model = build_model(asdict(config.model))
    width = open_clip_config(asdict(config.model))["embed_dim"]
    return {"parameters": sum(p.numel() for p in model.parameters()), "embed_dim": width}


def memory_parts(config, size, ranks):
    """{what: bytes} that one rank holds on its device all the time; activations come on top.

    ZeRO shares out the optimizer's state from stage 1 on, gradients from 2, weights at 3 (Rajbhandari et al. 2020, section 5).
    """
    count, stage, half = size["parameters"], config.train.zero_stage, config.train.precision == "bf16"
    one = 2 if half else 4
    master = 4 if half or stage else 0  # DeepSpeed's flat fp32 copy of the part that this rank steps
    share = lambda least: ranks if stage >= least else 1  # noqa: E731
    return {
        "weights": one * count / share(3),
        "gradients": one * count / share(2),
        "optimizer": (8 + master) * count / share(1),
        "pools": 2 * 4 * config.train.pool * size["embed_dim"] * (config.train.method != "clip"),
    }


def check_memory(config, index, size, ranks):
    """Whether what a rank holds fits its device, and what its ranks share fits the host. On one rank of each host."""
    parts = memory_parts(config, size, ranks)
    total = sum(parts.values())
    if torch.cuda.is_available():
        place, there = "GPU", torch.cuda.get_device_properties(comm.device()).total_memory
    else:
        place = "host"
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    text = (
        f"about {human(total)} a rank of {human(there)} of {place} memory ("
        + ", ".join(f"{name} {human(amount)}" for name, amount in parts.items())
        + "; activations come on top)"
    )
    found = [("ok", "memory", text)]
    if total > SPARE * there:
        found = [("fatal", "memory", f"{text}; take a higher train.zero_stage, more processes, or a smaller model")]
    host, temporary = int(index.samples * HOST_BYTES), tempfile.gettempdir()
    free = shutil.disk_usage(temporary).free
    text = f"scores and mask take {human(host)} in {temporary}, one copy a host, of {human(free)} free there"
    if host > free:
        return found + [("fatal", "memory", f"{text}; set TMPDIR to a larger disk of the host's own")]
    return found + [("ok", "memory", text)]


def check_disk(config, index, size, ranks):
    """Whether the checkpoints and the masks of the run fit where they are written."""
    if not config.run.dir:
        return []
    place = existing(config.run.dir)
    free = shutil.disk_usage(place).free
    one = checkpoint_bytes(config, size)
    epochs = curriculum(config.train, config.selection.every)
    splits = sum(epoch.split is not None for epoch in epochs)
    masks = splits * index.samples * (SCORE_BYTES + 1)
    kept = config.run.keep + (config.train.epochs // config.run.keep_every if config.run.keep_every else 0)
    run = (kept + 1) * one + masks
    text = f"{human(free)} free at {place}; a checkpoint takes about {human(one)}, the whole run {human(run)} ({human(masks)} of it scores and masks)"
    if free < 2 * one:
        return [("fatal", "disk", f"{text}; free some, a new checkpoint is written before an old one is removed")]
    if free < run:
        return [("warning", "disk", f"{text}; free some, or keep fewer checkpoints (run.keep, run.keep_every)")]
    return [("ok", "disk", text)]


def checkpoint_bytes(config, size):
    """About how large one checkpoint is: DeepSpeed's weights and AdamW's two moments, its fp32 master, the CLIP in fp32, the pools."""
    stage, half = config.train.zero_stage, config.train.precision == "bf16"
    weights = (0 if stage == 3 else 2 if half else 4) + 8 + (4 if half or stage else 0) + 4
    return weights * size["parameters"] + 2 * 4 * config.train.pool * size["embed_dim"]


def check_network():
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


def human(count):
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
