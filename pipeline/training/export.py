"""A run's model for others: as an open_clip local directory, or in the form of transformers' CLIPModel."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.training import checkpoint
from pipeline.training.model import open_clip_config, pixel_stats, tokenizer_for
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
    for name in {"logit_scale", "logit_bias"} & weights.keys():
        weights[name] = weights[name].reshape(())  # 1-d for DeepSpeed, 0-d elsewhere
    out, keys = Path(out), config.model.model_dump()
    model, stats = open_clip_config(keys), pixel_stats(keys)
    if form == "transformers":
        for name, content in transformers_files(weights, model, stats).items():
            write_bytes(out / name, content)
        return
    mean, std = map(list, stats)
    write_bytes(out / "open_clip_model.safetensors", save(weights))
    described = {
        "model_cfg": model,
        "preprocess_cfg": {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    write_bytes(out / "open_clip_config.json", (json.dumps(described, indent=1) + "\n").encode())
    for name, content in tokenizer_files(tokenizer_for(keys)).items():
        write_bytes(out / name, content)


def tokenizer_files(tokenizer: Callable[[list[str]], Tensor]) -> dict[str, bytes]:
    """{file name: content} of a Hugging Face tokenizer, which open_clip looks for in a local directory."""
    if not isinstance(tokenizer, HFTokenizer):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
