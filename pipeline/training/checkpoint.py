"""Checkpoints that are complete or absent: a fresh folder, written by all ranks, then a marker (DEEPSPEED trap 5)."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from pipeline import comm
from pipeline.training import engine as engines
from shards.storage import sync_folder, write_bytes, write_json

MARKER = "COMPLETE"


def complete_checkpoints(run_dir):
    """Folders of the run's complete checkpoints, oldest first."""
    return sorted(p.parent for p in Path(run_dir).glob(f"checkpoints/step_*/{MARKER}"))


def newest_complete(run_dir):
    """The newest complete checkpoint, or None. Rank 0 looks, all receive."""
    found = complete_checkpoints(run_dir) if comm.is_main() else None
    return comm.broadcast_object(found[-1] if found else None)


def save_checkpoint(run_dir, engine, pools, state, keep):
    """Save everything that a resumed run needs; all ranks call. `state`: JSON object with "step". Returns the folder.

    In it: deepspeed/ (weights, optimizer), model.safetensors (the CLIP in fp32), pools.safetensors, state.json, COMPLETE.
    """
    folder = Path(run_dir) / "checkpoints" / f"step_{state['step']:08d}"
    if comm.is_main():
        shutil.rmtree(folder, ignore_errors=True)  # only ever an incomplete one: a complete one was resumed from
        folder.mkdir(parents=True)
    comm.barrier()
    engines.save(engine, folder / "deepspeed")
    weights = engines.consolidated_state(engine)
    comm.barrier()
    if comm.is_main():
        save_file(weights, folder / "model.safetensors")
        save_file(
            {
                f"{name}.{key}": value.contiguous()
                for name, pool in pools.items()
                for key, value in pool.state_dict().items()
            },
            folder / "pools.safetensors",
        )
        write_json(folder / "state.json", state)
        sync_folder(folder)
        write_bytes(folder / MARKER, b"")
        for old in complete_checkpoints(run_dir)[:-keep]:
            (old / MARKER).unlink()
            shutil.rmtree(old)
    comm.barrier()
    return folder


def load_checkpoint(folder, engine, pools):
    """Restore engine and pools from a complete checkpoint; returns its state."""
    engines.load(engine, folder / "deepspeed")
    saved = load_file(folder / "pools.safetensors")
    for name, pool in pools.items():
        pool.load_state_dict(
            {key.split(".", 1)[1]: value for key, value in saved.items() if key.startswith(f"{name}.")}
        )
    return load_state(folder)


def load_state(folder):
    """The JSON state of a checkpoint."""
    return json.loads((folder / "state.json").read_text())
