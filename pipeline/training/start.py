"""Start or resume a run. Rank 0 inspects the run directory and decides for all ranks."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch

from pipeline import logs
from pipeline.config.data import describe, open_index, open_samples
from pipeline.config.schema import Config
from pipeline.distributed import comm
from pipeline.guards.excluded import Excluded
from pipeline.training import checkpoint, weight_average
from pipeline.training.curriculum import curriculum
from pipeline.training.engine import stage_of_run, start_engine
from pipeline.training.flops import least_seconds
from pipeline.training.lease import Lease
from pipeline.training.levers import apply_levers
from pipeline.training.metrics import MetricsLogger
from pipeline.training.model import Towers, open_clip_config, picture_size, tokenizer_for
from pipeline.training.precision import with_precision
from pipeline.training.pretrained import make_towers
from pipeline.training.run_dir import claim, data_state
from pipeline.training.saver import Saver
from pipeline.training.signals import Preempted, ignore
from pipeline.training.support_queue import SupportQueue
from pipeline.training.weight_average import WeightAverage
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SafeMask
from shards.samples.bad_samples import PARTS, BadSamplesFiles
from shards.views.batch import View, Views
from shards.views.eda import Eda, synonym_source
from shards.views.readers import Readers

logger = logging.getLogger(__name__)

FRESH: dict = {
    "step": 0,
    "epoch": 0,  # epochs done
    "epoch_step": 0,  # steps done in the epoch after them
    "seconds": 0.0,
    "sample_views": 0,
    "bad_rows": 0,  # of them those that could not be used
    "skipped": 0,  # steps with an infinite or NaN gradient
    "first_fraction": None,  # of the pairs, in the first safe set
    "first_views": None,  # the same of the samples of an epoch; differs with weights of data.sources
    "metrics_bytes": 0,
    "to_evaluate": False,  # the last of the epochs that are done
}


class Run:
    """State of a run: config, run_dir, device, samples, index, mask, excluded, views, readers, engine, queues, average,
    state, logger, bad_samples, saver, lease.

    A context manager that closes the run's files and releases its lease.
    """

    mask: SafeMask | None
    excluded: Excluded | None

    def __init__(self, config: Config, stop: Callable[[], bool] = lambda: False):
        """Open everything that `config` names, and the newest complete checkpoint. Raises UserError on every rank.

        stop: whether the run was asked to stop. Verification ends then, and Preempted is raised, before anything is
        written.
        """
        if not config.run.dir:
            raise UserError("run.dir: missing; name the run's directory with run.dir=DIR")
        comm.init(config.run.timeout)
        config = with_precision(config)
        self.config, self.device = config, comm.device()
        self.index = open_index(config.data)
        self.samples, self.views = open_samples(config.data, self.index), make_views(config)
        self.readers = Readers(self.samples, self.views, config.data.workers, ignore)
        comm.on_rank0(self.samples.verify, config.data.remote_timeout, stop)
        # With run.restart the directory is emptied first: a job that is put back into the queue does not do it again.
        if any(comm.all_reduce_max(stop())) and not config.run.restart:
            logger.info(f"{config.run.dir}: asked to stop before it began; start it again")
            raise Preempted
        self.steps_per_epoch = steps_per_epoch(config, self.index, comm.world())
        self.epochs = curriculum(config.train, config.selection.every, self.steps_per_epoch)
        self.mask = SafeMask.load(config.data.mask, self.index.fingerprint)[0] if config.data.mask else None
        self.excluded = None
        data = comm.on_rank0(data_state, config, self.index, self.samples.overlay)
        torch.manual_seed(config.run.seed)
        towers = make_towers(config.model.model_dump())
        apply_levers(towers, config)
        # After all checks of the input: a start that fails must not claim the directory.
        self.run_dir = Path(config.run.dir).absolute()
        self.lease = Lease(self.run_dir)
        self.lease.acquire()
        found, warnings = comm.on_rank0(claim, config, self.run_dir, data)
        logs.open_file(self.run_dir / "logs")
        try:
            self.open_state(found, warnings, towers, data)
        except BaseException as error:
            logs.close_file(error)
            raise

    def open_state(self, found: Path | None, warnings: list[str], towers: Towers, data: dict) -> None:
        """Open the checkpoint `found`, or begin without one, and the files that the run writes. `data`: what the state
        says of the data. All ranks call."""
        config = self.config
        synonyms = synonyms_of(config)
        self.state = copy.deepcopy(FRESH) | data | {"synonyms": synonyms}
        there, universal = checkpoint.load_state(found) if found else None, False
        stage = stage_of_run(config.train, comm.world(), there)
        if there:
            self.state |= there | data
            check_synonyms(synonyms, self.state["synonyms"])
            universal = self.state["world"] != comm.world() and stage > 0
            if universal:
                comm.on_rank0(checkpoint.to_universal, found)
        train = config.train.model_copy(update={"zero_stage": stage})
        self.engine = start_engine(towers, train, self.device, universal)
        width = open_clip_config(config.model.model_dump())["embed_dim"]
        self.queues = {name: SupportQueue(config.train.support_queue, width, self.device) for name in ("image", "text")}
        if found:
            checkpoint.load_checkpoint(found, self.engine, self.queues)
        self.average = WeightAverage(self.engine, config.train.average) if config.train.average else None
        if self.average and found and (found / weight_average.NAME).exists():
            self.average.load(found / weight_average.NAME)
        self.view_seconds = least_seconds(config.model.model_dump(), self.device, config.train.precision)
        self.logger = MetricsLogger(self.run_dir, config, self.state["metrics_bytes"])
        self.bad_samples = BadSamplesFiles(self.run_dir / "bad_samples", range(comm.rank(), PARTS, comm.world()))
        self.saver = Saver(self.run_dir, self.engine, self.queues, self.average, config.run.keep, config.run.keep_every)
        for warning in warnings if comm.is_rank0() else ():
            logger.warning(f"{self.run_dir}: {warning}")
        logger.info(self.headline(found))
        if not found:
            self.saver.save(self.state)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, Preempted):
            self.logger.close()
            error = None
        logs.close_file(error)
        self.lease.release()

    def exit_preempted(self) -> NoReturn:
        """Wait until the state is on disk, say so, and raise Preempted on every rank."""
        self.saver.wait()
        logger.info(f"{self.run_dir}: asked to stop; saved, start it again to resume after step {self.state['step']}")
        raise Preempted

    def headline(self, found: Path | None) -> str:
        config, state = self.config, self.state
        text = (
            f"{self.run_dir}: {describe(self.index)}, world size {comm.world()}, on {self.device.type} in "
            f"{config.train.precision} at ZeRO {self.engine.zero_optimization_stage()}, "
            f"{config.train.epochs} epochs of {self.steps_per_epoch} steps"
        )
        if (config.guards or config.train.method == "safeclip") and all(epoch.round is None for epoch in self.epochs):
            text += ", no selection round: it trains on all pairs"
        if state["synonyms"]:
            text += f", synonyms of captions from {state['synonyms']}"
        if found:
            text += (
                f"; resumes after step {state['step']} (epoch {state['epoch']}, {state['epoch_step']} steps of it done)"
            )
            if state["world"] != comm.world():
                text += f", saved at world size {state['world']}, the same global batches"
        return text


def synonyms_of(config: Config) -> str | None:
    """Source of EDA's synonyms, the same on every rank: "WordNet 3.0" or "table"; None without EDA. Raises
    UserError."""
    data = config.data
    if not (data.clip_eda or data.unimodal_eda) or data.eda_synonyms == "table":
        return None
    found = comm.gather_objects(synonym_source().partition(" in ")[0])
    if len(set(found)) > 1:
        raise UserError(
            f"data.eda_synonyms: processes found different ones ({', '.join(sorted(set(found)))}); "
            "install WordNet on every host (`safeclip data wordnet data/wordnet`), or set data.eda_synonyms=table"
        )
    return found[0]


def check_synonyms(here: str | None, then: str | None) -> None:
    """Raise UserError unless a run resumes with the synonyms that it began with."""
    if here != then:
        raise UserError(
            f"data.eda_synonyms: the run began with {then}, here is {here}; "
            "set WNSEARCHDIR to WordNet's folder, or bring it back (`safeclip data wordnet data/wordnet`)"
        )


def steps_per_epoch(config: Config, index: ShardIndex, world: int) -> int:
    """Steps of an epoch over all pairs. Raises UserError when the batch does not fit the data or the `world`
    ranks."""
    batch = config.train.batch_size
    if batch % world:
        raise UserError(
            f"train.batch_size: got {batch}, which {world} processes do not divide; take a multiple of their number"
        )
    if index.views < batch:
        raise UserError(
            f"train.batch_size: got {batch}, but an epoch over the data has only {index.views} pairs; "
            "take a smaller batch"
        )
    return index.views // batch


def make_views(config: Config) -> Views:
    """How a config's samples become rows."""
    model, data = config.model.model_dump(), config.data

    def eda(strength: float) -> Eda | None:
        return Eda(strength, data.eda_synonyms, data.eda_clean) if strength else None

    clip, unimodal = View(data.clip_augment, eda(data.clip_eda)), View(data.unimodal_augment, eda(data.unimodal_eda))
    views_of_loss = {
        "clip": (clip,) * config.train.clip_views,
        "unimodal": (unimodal, unimodal),
        "match": (clip,),
        "cleanclip": (View(), unimodal),
    }
    return Views(picture_size(model), tokenizer_for(model), views_of_loss, data.augment_on == "device", data.eda_once)
