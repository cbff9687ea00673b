"""A run's model for others: as an open_clip local directory, or in the form of transformers' CLIPModel."""

import json
from pathlib import Path

from safetensors.torch import load_file, save

from pipeline.config.schema import Config
from pipeline.training import checkpoint
from pipeline.training.model import open_clip_config, pixel_stats
from pipeline.training.transformers_export import transformers_files
from pipeline.training.weight_average import weights_of
from shards.errors import UserError
from shards.storage.files import write_bytes


def export_run(run_dir: Path | str, config: Config, out: Path | str, form: str = "open_clip") -> None:
    """Write the model of the newest complete checkpoint into the folder `out`. Raises UserError.

    form: "open_clip", for open_clip.create_model_and_transforms("local-dir:OUT"); or "transformers", for
    CLIPModel.from_pretrained(OUT).
    """
    folder, warnings = checkpoint.newest_complete(run_dir)
    if folder is None:
        raise UserError(f"run {run_dir}: no complete checkpoint in it ({'; '.join(warnings) or 'none at all'})")
    weights = load_file(weights_of(folder))
    weights["logit_scale"] = weights["logit_scale"].reshape(())  # 1-d for DeepSpeed, 0-d elsewhere
    out, model = Path(out), open_clip_config(config.model.model_dump())
    if form == "transformers":
        for name, content in transformers_files(weights, model).items():
            write_bytes(out / name, content)
        return
    mean, std = pixel_stats()
    write_bytes(out / "open_clip_model.safetensors", save(weights))
    described = {
        "model_cfg": model,
        "preprocess_cfg": {"mean": list(mean), "std": list(std), "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    write_bytes(out / "open_clip_config.json", (json.dumps(described, indent=1) + "\n").encode())
