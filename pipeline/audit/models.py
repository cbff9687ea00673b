"""Any CLIP that scores pairs: a run of ours, an open_clip name with a checkpoint, or an open_clip local directory."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from PIL import Image

from pipeline.config.schema import Data
from pipeline.distributed import comm
from shards.errors import UserError
from shards.order.safe_mask import fingerprint
from shards.views.augment import plain_view


@dataclass
class Scorer:
    """preprocess: PIL picture -> tensor (C, H, W). tokenize: list[str] -> int64 (N, L). encode: (images, tokens) ->
    unit float32 (image_BD, text_BD). name: for people; identity: of these very weights. data: the config.Data that a
    run was trained on, or None."""

    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenize: Callable[[list[str]], torch.Tensor]
    encode: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    name: str
    identity: str
    data: Data | None = None


class PlainPixels:
    """uint8 (C, size, size): a run's un-augmented view."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.tensor(plain_view(image, self.size)).permute(2, 0, 1)


def load_scorer(model: str, pretrained: str | None = None) -> Scorer:
    """Scorer on this process's device, for `model`: a run directory, an open_clip local directory or an open_clip name.
    Raises UserError."""
    if (Path(model) / "config.yaml").exists():
        if pretrained:
            raise UserError(f"--pretrained: run {model} has its own weights; leave it out")
        return from_run(model)
    return from_open_clip(model, pretrained)


def from_run(run_dir: str) -> Scorer:
    from pipeline.evaluation.run import load_run
    from pipeline.training.start import make_views

    config, folder, towers = load_run(run_dir)
    views = make_views(config)

    def encode(images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return towers(images, tokens)[:2]

    identity = f"{config.hash()}/{folder.name}"
    return Scorer(
        PlainPixels(views.size), views.tokenize, encode, f"run {run_dir}, {folder.name}", identity, config.data
    )


def from_open_clip(model: str, pretrained: str | None) -> Scorer:
    """A name that open_clip knows with `pretrained` (file, or a tag of open_clip's), or a local directory, which holds
    its weights."""
    local = Path(model.removeprefix("local-dir:"))
    if local.is_dir():
        if not (local / "open_clip_config.json").exists():
            raise UserError(
                f"--model {model}: a folder with neither config.yaml (a run) nor open_clip_config.json "
                "(an open_clip local directory)"
            )
        if pretrained:
            raise UserError(f"--pretrained: local directory {model} has its own weights; leave it out")
        weights = [path for path in sorted(local.iterdir()) if path.suffix in (".safetensors", ".bin", ".pt")]
        name, source = f"local-dir:{local}", str(weights[0]) if weights else None
    else:
        if model not in open_clip.list_models() and not model.startswith(("hf-hub:", "local-dir:")):
            raise UserError(
                f"--model {model}: no folder, and no name that open_clip knows; see open_clip.list_models()"
            )
        if not pretrained and not model.startswith("hf-hub:"):
            raise UserError(
                f"--pretrained: missing; {model} without a checkpoint has random weights, whose cosines say nothing"
            )
        name, source = model, pretrained
        if pretrained and ("/" in pretrained or "." in pretrained) and not Path(pretrained).is_file():
            raise UserError(
                f"--pretrained {pretrained}: no such file; name a checkpoint, or a tag that open_clip knows"
            )
    try:
        with contextlib.redirect_stdout(None):
            clip, _, preprocess = open_clip.create_model_and_transforms(name, pretrained, device=comm.device())
    except Exception as error:  # whatever open_clip, torch or the hub raise for these files and names
        raise UserError(
            f"--model {model}: open_clip cannot load it with {pretrained or local} "
            f"({' '.join(str(error).split())[:300]})"
        ) from None
    clip.eval().requires_grad_(False)

    def encode(images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return clip.encode_image(images, normalize=True).float(), clip.encode_text(tokens, normalize=True).float()

    weights_id = fingerprint(source) if source and Path(source).is_file() else str(pretrained)
    return Scorer(
        preprocess, open_clip.get_tokenizer(name), encode, f"{model} {pretrained or ''}".strip(), f"{name}/{weights_id}"
    )
