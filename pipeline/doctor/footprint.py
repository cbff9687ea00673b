"""Memory and disk that a run needs, compared with what is available."""

import os
import shutil
import tempfile
from pathlib import Path

import torch

from pipeline.config.schema import Config
from pipeline.distributed import comm
from pipeline.guards import make_guards
from pipeline.guards.features import FILTERS, SIDE
from pipeline.guards.trigger_clusters import TriggerClusters
from pipeline.training import checkpoint
from pipeline.training.curriculum import curriculum
from pipeline.training.engine import stage_of_run
from pipeline.training.model import open_clip_config
from pipeline.training.precision import precision_here
from pipeline.training.pretrained import make_towers
from shards.index.shard_index import ShardIndex

Findings = list[tuple[str, str, str]]  # (level, about, text)

SCORE_BYTES = 40  # of a pair in a round's score files: position, key, cosine
HOST_BYTES = 4 + 1 / 8  # of a pair: its score and its bit of the mask, mapped by all ranks of a host
# Of trigger_clusters, for each of `sample`: the features of a picture with a low score and of two with high ones.
SAMPLE_BYTES = 3 * (3 * SIDE**2 + FILTERS + 2 * SIDE**2)
SPARE = 0.9  # fraction of a device's memory that may be spoken for before activations


def measure(config: Config) -> dict[str, int]:
    """{"parameters", "trained", "embed_dim"} of the model, without the memory for it. Raises UserError."""
    model = config.model.model_dump()
    with torch.device("meta"):
        towers = make_towers(model | {"pretrained": None})
    counts = [(p.numel(), p.requires_grad) for p in towers.parameters()]
    trained = sum(count for count, is_trained in counts if is_trained)
    width = open_clip_config(model)["embed_dim"]
    return {"parameters": sum(count for count, _ in counts), "trained": trained, "embed_dim": width}


def how(config: Config, ranks: int) -> tuple[int, bool]:
    """(ZeRO stage, whether it is in bf16) of the run of run.dir with `ranks` processes like this one."""
    train = config.train.model_copy(update={"precision": precision_here(config.train.precision)})
    found = checkpoint.newest_complete(config.run.dir)[0] if config.run.dir else None
    return stage_of_run(train, ranks, checkpoint.load_state(found) if found else None), train.precision == "bf16"


def memory_parts(config: Config, size: dict[str, int], ranks: int) -> dict[str, float]:
    """{what: bytes} that one rank holds on its device all the time; activations come on top.

    ZeRO shares out the optimizer's state from stage 1 on, gradients from 2, weights at 3 (Rajbhandari et al. 2020,
    section 5).
    """
    count, (stage, half) = size["trained"], how(config, ranks)
    one = 2 if half else 4
    master = 4 if half or stage else 0  # DeepSpeed's flat fp32 copy of the part that this rank steps
    partitions = lambda first_stage: ranks if stage >= first_stage else 1  # noqa: E731
    return {
        "weights": one * size["parameters"] / partitions(3),
        "gradients": one * count / partitions(2),
        "optimizer": (8 + master) * count / partitions(1),
        "support queues": 2 * 4 * config.train.support_queue * size["embed_dim"] * (config.train.method != "clip"),
    }


def check_memory(config: Config, index: ShardIndex, size: dict[str, int], ranks: int) -> Findings:
    """Whether what a rank holds fits its device, and what its ranks share fits the host. On one rank of each host."""
    parts = memory_parts(config, size, ranks)
    total = sum(parts.values())
    there: float
    if torch.cuda.is_available():
        place, there = "GPU", torch.cuda.get_device_properties(comm.device()).total_memory
    else:
        place, there = "host", host_memory()
    text = (
        f"about {human(total)} a rank of {human(there)} of {place} memory ("
        + ", ".join(f"{name} {human(amount)}" for name, amount in parts.items())
        + "; activations come on top)"
    )
    found = [("ok", "memory", text)]
    if total > SPARE * there:
        found = [("fatal", "memory", f"{text}; take more processes with a higher train.zero_stage, or a smaller model")]
    return found + check_host(config, index)


def check_host(config: Config, index: ShardIndex) -> Findings:
    """Whether what the ranks of a host share fits its temporary folder, and the sample of a guard their memory."""
    guards = make_guards(config.guards) if config.train.method == "safeclip" else []
    asked = len(guards) / 8  # a bit a pair of each guard's mask
    host, temporary = int(index.samples * (HOST_BYTES + asked)), tempfile.gettempdir()
    free = shutil.disk_usage(temporary).free
    text = f"scores, masks and guards take {human(host)} in {temporary}, one copy a host, of {human(free)} free there"
    found = [("ok", "memory", text)]
    if host > free:
        found = [("fatal", "memory", f"{text}; set TMPDIR to a larger disk of the host's own")]
    pairs = sum(min(guard.settings.sample, index.samples) for guard in guards if isinstance(guard, TriggerClusters))
    if pairs:
        text = f"the sample of trigger_clusters takes {human(SAMPLE_BYTES * pairs)} of host memory on rank 0, once"
        if SAMPLE_BYTES * pairs > SPARE * host_memory():
            return found + [("fatal", "memory", f"{text}; lower guards.trigger_clusters.sample")]
        found.append(("ok", "memory", text))
    return found


def host_memory() -> float:
    """Bytes of the host's memory that are this rank's, if its ranks share it equally."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def check_disk(config: Config, index: ShardIndex, size: dict[str, int], ranks: int) -> Findings:
    """Whether the checkpoints and the masks of the run fit where they are written."""
    if not config.run.dir:
        return []
    place = existing(config.run.dir)
    free = shutil.disk_usage(place).free
    one = checkpoint_bytes(config, size, ranks)
    epochs = curriculum(config.train, config.selection.every, index.views // config.train.batch_size)
    rounds = sum(epoch.round is not None for epoch in epochs)
    scored = min(rounds, config.run.keep + 1)  # with those that are being made
    masks = scored * index.samples * SCORE_BYTES + rounds * index.samples // 8
    kept = config.run.keep + (config.train.epochs // config.run.keep_every if config.run.keep_every else 0)
    run = (kept + 1) * one + masks
    text = (
        f"{human(free)} free at {place}; a checkpoint takes about {human(one)}, "
        f"the whole run {human(run)} ({human(masks)} of it scores and masks)"
    )
    if free < 2 * one:
        return [("fatal", "disk", f"{text}; free some, a new checkpoint is written before an old one is removed")]
    if free < run:
        return [("warning", "disk", f"{text}; free some, or keep fewer checkpoints (run.keep, run.keep_every)")]
    return [("ok", "disk", text)]


def checkpoint_bytes(config: Config, size: dict[str, int], ranks: int) -> int:
    """About how large one checkpoint is: DeepSpeed's weights and AdamW's two moments, its fp32 master, the CLIP in
    fp32, the support queues."""
    stage, half = how(config, ranks)
    weights = (0 if stage == 3 else 2 if half else 4) + 4
    moments = 8 + (4 if half or stage else 0)
    return (
        weights * size["parameters"]
        + moments * size["trained"]
        + 2 * 4 * config.train.support_queue * size["embed_dim"]
    )


def existing(path: Path | str) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def human(count: float) -> str:
    """Bytes as text."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
