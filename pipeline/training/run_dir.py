"""The run directory at a start: whether it holds a run that goes on, and of which config and data."""

import os
import shutil
from pathlib import Path

from pipeline.config.learnt import differences
from pipeline.config.load import read_yaml, to_yaml
from pipeline.config.schema import Config
from pipeline.guards import REGISTRY
from pipeline.training import checkpoint
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import fingerprint
from shards.samples.overlay import Overlay
from shards.storage.files import write_bytes

# Keys that decide which pairs the batches of an epoch hold.
PLAN: tuple[str, ...] = ("run.seed", "train.batch_size", "train.method", "train.steps_before_selection")
PLAN += ("data.streams", "data.window", "data.weights", "selection.risky", "selection.refill")


def data_state(config: Config, index: ShardIndex, overlay: Overlay | None) -> dict:
    """What a run's state says of the data that it is trained on: fingerprints of the shards and of data.mask, digest of
    the attack."""
    data = index.fingerprint
    if config.data.mask:
        data += "/" + fingerprint(Path(config.data.mask) / "safe.npy")
    return {"data": data, "overlay": overlay.digest if overlay else None}


def claim(config: Config, run_dir: Path, data: dict) -> tuple[Path | None, list[str]]:
    """(newest complete checkpoint or None, warnings); writes config.yaml. data: of `data_state`. Rank 0 calls.

    Raises UserError as `inspect` does, unless a fresh start is asked for.
    """
    # The launcher restarts a failed job with the same arguments; run.restart applies to its first start only.
    restarted = any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    restart = config.run.restart and not restarted
    found: Path | None = None
    warnings: list[str] = []
    if restart:
        # Checkpoints first: were it cut off after the masks, the next start would resume without them.
        for name in ("checkpoints", "masks", "bad_samples", "tensorboard", "profile"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
            if (run_dir / name).exists():  # a start later would resume from what is left
                raise UserError(f"run.restart: {run_dir / name} cannot be removed; remove it, or take another run.dir")
        for name in ("eval.json", "wandb_id", "metrics.jsonl"):  # lines without a checkpoint are a run that is refused
            (run_dir / name).unlink(missing_ok=True)
    else:
        found, warnings = inspect(config, run_dir, data)
    values = {"hash": config.hash(), **config.model_dump()}  # of the last start: what is no part of the hash may change
    values["guards"] = dict.fromkeys(REGISTRY) | values["guards"]  # null: off, also where a preset has it
    values["run"].update(restart=False, accept_changes=False)
    write_bytes(run_dir / "config.yaml", to_yaml(values))
    return found, warnings


def inspect(config: Config, run_dir: Path, data: dict) -> tuple[Path | None, list[str]]:
    """(newest complete checkpoint or None, warnings) of a run directory, which is only read. data: of `data_state`.

    Raises UserError when it belongs to another config or other data, or holds a run without a complete checkpoint. The
    config of a start that did not reach its first checkpoint binds nobody.
    """
    found, warnings = checkpoint.newest_complete(run_dir)
    metrics = run_dir / "metrics.jsonl"
    first = [folder.name for folder in checkpoint.checkpoints(run_dir)] == ["step_00000000"]
    if not found and not first and metrics.exists() and metrics.stat().st_size:
        raise UserError(
            f"run.dir: {run_dir} holds a run, but no complete checkpoint ({'; '.join(warnings) or 'none at all'}); "
            "bring one back, or start it anew with run.restart=true"
        )
    state = checkpoint.load_state(found) if found else {}
    if found and (run_dir / "config.yaml").exists():
        check_config(config, run_dir, state.get("epoch_step", 0))
    if found and state["data"] != data["data"]:
        raise UserError(
            f"data: these are other shards, other captions or another data.mask than {run_dir} was trained on; "
            "bring them back, or take another run.dir"
        )
    saved, asked = state.get("zero_stage"), config.train.zero_stage
    if saved and saved != asked and {saved, asked} != {1, 2}:
        raise UserError(
            f"train.zero_stage: got {asked}, and {run_dir} is saved at stage {saved}, which no other stage can read "
            f"but 1 and 2 each other; set train.zero_stage={saved}"
        )
    # Runs that began before the digest was kept have none.
    if state.get("overlay", data["overlay"]) != data["overlay"] and not config.run.accept_changes:
        raise UserError(
            f"data.overlay: {config.data.overlay} holds another attack than {run_dir} was trained on; "
            "bring that one back, take another run.dir, or continue with this one by run.accept_changes=true"
        )
    return found, warnings


def check_config(config: Config, run_dir: Path, epoch_step: int = 0) -> None:
    """Raise UserError, naming the keys, if the run directory has a config with another hash, which is not accepted, or
    cannot be after `epoch_step` steps of an epoch."""
    there = read_yaml(run_dir / "config.yaml")
    if there.pop("hash", None) == config.hash():
        return
    found = differences(there, config.model_dump())
    if config.run.accept_changes:
        fixed = [f"{key}: {old!r} -> {new!r}" for key, old, new in found if key in PLAN]
        if epoch_step and fixed:
            raise UserError(
                f"run.accept_changes: {run_dir} resumes after {epoch_step:,} steps of an epoch, and what is left of it "
                f"would hold other pairs ({', '.join(fixed)}); finish the epoch with the old value, or remove its "
                "checkpoints to go back to the end of the epoch before"
            )
        return
    # A run has what "auto" means where it runs; `safeclip doctor` may be called elsewhere.
    found = [one for one in found if (one[0], one[2]) != ("train.precision", "auto")]
    if not found:
        return
    changed = ", ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in found)
    raise UserError(
        f"run.dir: {run_dir} holds a run with another config ({changed}); "
        "use the same config, another run.dir, or run.accept_changes=true to continue with the new values"
    )
