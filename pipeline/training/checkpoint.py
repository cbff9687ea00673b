"""Checkpoints on disk; one is valid only when it is complete. saver.py writes them.

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
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from pipeline.training import engine as engines
from pipeline.training.support_queue import SupportQueue
from shards.errors import UserError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

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
