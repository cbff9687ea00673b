"""A run's model as an open_clip local directory: open_clip.create_model_and_transforms("local-dir:OUT") loads it."""

import json
from pathlib import Path

from safetensors.torch import load_file, save

from pipeline.config.schema import Config
from pipeline.training import checkpoint
from pipeline.training.model import open_clip_config, pixel_stats
from shards.errors import UserError
from shards.storage.files import write_bytes


def export_run(run_dir: Path | str, config: Config, out: Path | str) -> None:
    """Write OUT/open_clip_config.json and OUT/open_clip_model.safetensors from the newest complete checkpoint. Raises
    UserError."""
    folder, warnings = checkpoint.newest_complete(run_dir)
    if folder is None:
        raise UserError(f"run {run_dir}: no complete checkpoint in it ({'; '.join(warnings) or 'none at all'})")
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] = weights["logit_scale"].reshape(())  # 1-d for DeepSpeed, 0-d in open_clip's files
    mean, std = pixel_stats()
    out = Path(out)
    write_bytes(out / "open_clip_model.safetensors", save(weights))
    described = {
        "model_cfg": open_clip_config(config.model.model_dump()),
        "preprocess_cfg": {"mean": list(mean), "std": list(std), "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    write_bytes(out / "open_clip_config.json", (json.dumps(described, indent=1) + "\n").encode())
