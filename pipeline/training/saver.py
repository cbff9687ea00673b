"""Writes checkpoints (checkpoint.py) in the background."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save as safetensors_bytes

from pipeline.distributed import comm
from pipeline.training import engine as engines
from pipeline.training import weight_average
from pipeline.training.checkpoint import ADDED, MARKER, ORDER, checkpoints, fault, load_state
from pipeline.training.support_queue import SupportQueue
from pipeline.training.weight_average import WeightAverage
from shards.errors import UserError
from shards.storage.files import patiently, sync_folder, write_bytes, write_json

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


class Saver:
    """Saves a run's state. `save` copies it to memory and returns; a thread of each rank writes the files.

    Rank 0's thread writes the marker when the files of all ranks are there, and then removes old checkpoints: all but
    the newest `keep` and, if `keep_every` > 0, those at the end of every `keep_every`-th epoch.
    """

    def __init__(
        self,
        run_dir: Path | str,
        engine: DeepSpeedEngine,
        queues: dict[str, SupportQueue],
        average: WeightAverage | None,
        keep: int,
        keep_every: int = 0,
    ):
        self.run_dir, self.engine, self.queues, self.average = Path(run_dir), engine, queues, average
        self.keep, self.keep_every = keep, keep_every
        self.thread: threading.Thread | None = None
        self.folder: Path | None = None
        self.error: str | None = None
        self.written, self.abandoned = threading.Event(), threading.Event()

    def folder_of(self, state: dict) -> Path:
        return self.run_dir / "checkpoints" / f"step_{state['step']:08d}"

    def save(self, state: dict) -> None:
        """Start saving everything that a resumed run needs; all ranks call. `state`: JSON object with "step".

        Waits for the save before it, and raises UserError on every rank if that one failed on any.
        """
        self.wait()
        self.folder = folder = self.folder_of(state)
        if comm.is_rank0():
            shutil.rmtree(folder, ignore_errors=True)  # only ever an incomplete one: a complete one was resumed from
            folder.mkdir(parents=True)
        comm.barrier()
        files = engines.serialise(self.engine, folder / "deepspeed")
        weights = engines.consolidated_state(self.engine)
        averages = self.average.state() if self.average else {}
        if comm.is_rank0():
            files[folder / "model.safetensors"] = safetensors_bytes(weights)
            if averages:
                files[folder / weight_average.NAME] = safetensors_bytes(averages)
            files[folder / "support_queue.safetensors"] = safetensors_bytes(
                {
                    f"{name}.{key}": value.contiguous()
                    for name, queue in self.queues.items()
                    for key, value in queue.state_dict().items()
                }
            )
            how = {"world": comm.world(), "zero_stage": self.engine.zero_optimization_stage(), "order": ORDER}
            files[folder / "state.json"] = (json.dumps(state | how, indent=1) + "\n").encode()
        self.error = None
        self.written.clear()
        self.thread = threading.Thread(target=self.write, args=(folder, files, comm.rank(), comm.world()), daemon=True)
        self.thread.start()

    def add(self, state: dict, keys: Sequence[str]) -> None:
        """Replace `keys` of the state in the checkpoint of its step, which may still be written. All ranks call."""
        if comm.is_rank0():
            with contextlib.suppress(OSError):  # then they stay as they were
                write_json(self.folder_of(state) / ADDED, {key: state[key] for key in keys})

    def write(self, folder: Path, files: engines.Files, rank: int, world: int) -> None:
        """Thread: write this rank's files, then its receipt; on rank 0 also the marker. No collectives.

        Whatever goes wrong becomes `error`, which `wait` raises.
        """
        try:
            sizes = {}
            for path, data in files.items():
                write_bytes(path, data)
                sizes[str(Path(path).relative_to(folder))] = len(data)
            write_json(folder / f"receipt_{rank:05d}.json", sizes)
            self.written.set()
            if rank == 0:
                self.complete(folder, world)
        except BaseException as error:
            self.error = f"rank {rank}: {getattr(error, 'strerror', None) or repr(error)}"
        finally:
            self.written.set()

    def complete(self, folder: Path, world: int) -> None:
        """Wait for the receipts of all ranks, then turn them into the marker and remove old checkpoints."""
        receipts = [folder / f"receipt_{rank:05d}.json" for rank in range(world)]
        while not patiently(lambda: all(path.exists() for path in receipts)):
            if self.abandoned.wait(0.05):
                return
        files: dict[str, int] = {}
        for path in receipts:
            files |= json.loads(patiently(path.read_text))
        sync_folder(folder)
        write_json(folder / MARKER, {"files": files})
        try:
            for path in receipts:
                path.unlink()
            self.prune()
        except Exception as error:  # this checkpoint is complete
            logger.warning(f"{folder}: old checkpoints cannot be removed ({error}); the next save tries again")

    def prune(self) -> None:
        """Remove old checkpoints, the marker first, so that a partly removed one is not valid. The next save tries
        again those that cannot be removed, as while another host reads them over NFS."""
        complete = [folder for folder in checkpoints(self.run_dir) if fault(folder) is None]
        for folder in checkpoints(self.run_dir):
            if folder >= complete[-self.keep :][0] or folder in complete and self.is_kept(load_state(folder)):
                continue
            try:
                (folder / MARKER).unlink(missing_ok=True)
                shutil.rmtree(folder)
            except OSError as error:
                logger.warning(f"{folder}: cannot be removed ({error.strerror}); the next save tries again")

    def is_kept(self, state: dict) -> bool:
        """Whether `keep_every` keeps this checkpoint."""
        at_an_end = state["epoch"] > 0 and state["epoch_step"] == 0
        return bool(self.keep_every) and at_an_end and state["epoch"] % self.keep_every == 0

    def wait(self) -> None:
        """Until the save that was started is complete. All ranks call; all raise UserError when it failed on one."""
        if not self.thread:
            return
        self.written.wait()
        errors = [error for error in comm.gather_objects(self.error) if error]
        if errors:
            self.abandoned.set()
        self.thread.join()
        self.thread = None
        comm.barrier()
        errors = errors or [error for error in comm.gather_objects(self.error) if error]
        if errors:
            if comm.is_rank0():
                with contextlib.suppress(OSError):
                    if MARKER not in os.listdir(self.folder):
                        shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(
                f"checkpoint {self.folder}: cannot be written ({errors[0]}); "
                "mend that and start the run again, it resumes from the last complete checkpoint"
            )
