"""Checkpoints, written in the background; a checkpoint is valid only when it is complete.

RUN/checkpoints/step_00001200/
    deepspeed/*.pt        weights and optimizer, each rank its part
    model.safetensors     the CLIP in fp32
    average.safetensors   the same with averaged weights (train.average)
    support_queue.safetensors
                          past embeddings of each modality
    state.json            step, epoch, step in the epoch, world size, ZeRO stage, ...
    evaluated.json        what replaces some of that when the evaluation of the epoch is done
    COMPLETE              {"files": {name: bytes}}, written last: a folder without it, or with other sizes, is ignored
    universal/            DeepSpeed's universal form, made when a run resumes with another number of ranks
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from pipeline.distributed import comm
from pipeline.training import engine as engines
from pipeline.training import weight_average
from pipeline.training.support_queue import SupportQueue
from pipeline.training.weight_average import WeightAverage
from shards.errors import UserError
from shards.storage.files import patiently, sync_folder, write_bytes, write_json

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

MARKER, ADDED = "COMPLETE", "evaluated.json"
# Of the parameters in the optimizer, by model.param_groups: a checkpoint holds them end to end, without names.
ORDER = 2


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder in one phrase, or None when it is complete."""
    try:
        files = json.loads((folder / MARKER).read_text())["files"]
    except FileNotFoundError:
        return "it has no COMPLETE marker"
    except (ValueError, KeyError, TypeError):
        return "its COMPLETE marker is damaged"
    for name, size in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def checkpoints(run_dir: Path | str) -> list[Path]:
    """All checkpoint folders of a run, complete or not, oldest first. A copy that somebody has made beside them, as
    step_00012000_good, is none of them: it is neither resumed from nor removed."""
    found = Path(run_dir).glob("checkpoints/step_*")
    return sorted(folder for folder in found if folder.name.removeprefix("step_").isdecimal())


def newest_complete(run_dir: Path | str) -> tuple[Path | None, list[str]]:
    """(folder or None, [warning]): the newest complete checkpoint, and a line about those that were passed over."""
    passed = []
    for folder in reversed(checkpoints(run_dir)):
        wrong = fault(folder)
        if wrong is None:
            break
        passed.append(f"{folder.name}: {wrong}")
    else:
        folder = None
    if not passed:
        return folder, []
    return folder, [f"passed over {len(passed)} checkpoint(s) that are not complete ({'; '.join(passed)})"]


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


def load_checkpoint(folder: Path, engine: DeepSpeedEngine, queues: dict[str, SupportQueue]) -> dict:
    """Restore engine and queues from a complete checkpoint (or from its universal form, by an engine made for that);
    returns its state."""
    state = load_state(folder)
    if state.get("order") != ORDER:
        raise UserError(
            f"checkpoint {folder}: made by another version, "
            f"which laid its parameters in another order (order {state.get('order', 1)}, expected {ORDER}); "
            "continue with the version that made it, or start anew in another run.dir"
        )
    if engine.load_universal_checkpoint():
        engines.load(engine, folder / "universal")
        saved = load_file(folder / "model.safetensors")
        for name, buffer in engine.module.clip.named_buffers():  # DeepSpeed's universal form holds parameters only
            if name in saved:
                buffer.copy_(saved[name])
    else:
        engines.load(engine, folder / "deepspeed")
    saved = load_file(folder / "support_queue.safetensors")
    for name, queue in queues.items():
        queue.load_state_dict(
            {key.split(".", 1)[1]: value for key, value in saved.items() if key.startswith(f"{name}.")}
        )
    return state


def load_state(folder: Path) -> dict:
    """The JSON state of a checkpoint."""
    state = json.loads((folder / "state.json").read_text())
    if (folder / ADDED).exists():
        state |= json.loads((folder / ADDED).read_text())
    return state


def to_universal(folder: Path) -> None:
    """Convert a checkpoint, once, to the form that any number of ranks can load. One rank calls; a lock keeps other
    jobs out."""
    done = folder / "universal"
    with open(folder / "universal.lock", "w") as lock:
        with contextlib.suppress(OSError):  # a disk without locks: the lease of the run directory keeps others out
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go of by the system when its holder dies
        if done.exists():
            return
        part = folder / "universal.part"
        shutil.rmtree(part, ignore_errors=True)
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "deepspeed.checkpoint.ds_to_universal",
            "--inject_missing_state",
        ]
        command += ["--input_folder", folder / "deepspeed", "--output_folder", part]
        finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=alone())
        if finished.returncode:
            raise UserError(
                f"checkpoint {folder}: DeepSpeed cannot convert it to another world size "
                f"({(finished.stderr.strip() or 'no message').splitlines()[-1]}); "
                "start with the number of ranks that wrote it"
            )
        os.replace(part, done)


def alone() -> dict[str, str]:
    """The environment without what makes a process a rank of this run."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
