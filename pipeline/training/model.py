"""The two towers: any open_clip architecture, by name or by config, from scratch."""

import copy
import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from pipeline.distributed import comm
from pipeline.training.batchnorm import share_batch_norm
from pipeline.training.tokens import Tokenizer
from shards.errors import UserError

MAX_SIZE = 10**6  # of whatever a model's config counts, such as pixels, words and layers
MAX_LOG_SCALE = math.log(100)  # CLIP's clamp of the logit scale
ALIGNED = 64  # numbers: more than any kernel reads at once


def open_clip_config(model: dict) -> dict:
    """As in open_clip's JSON files (embed_dim, vision_cfg, text_cfg) for {"name": ...} or {"config": {...}}.
    Raises UserError."""
    if model.get("name"):
        found = open_clip.get_model_config(model["name"])
        if found is None:
            close = difflib.get_close_matches(model["name"], open_clip.list_models(), 3, 0.4)
            raise UserError(
                f"model.name: open_clip knows no {model['name']!r}; did you mean {' or '.join(close) or 'RN50'}?"
            )
        return found
    config = copy.deepcopy(model["config"])
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in config:
            raise UserError(
                f"model.config: {key} is missing; "
                "expected embed_dim, vision_cfg and text_cfg as in open_clip's model configs"
            )
    check_sizes(config)
    return config


def check_sizes(config: dict) -> None:
    """Raise UserError for numbers that no model has. open_clip checks none of them, and builds layers until it is
    killed."""
    sizes: list[tuple[str, object, int]] = [("embed_dim", config["embed_dim"], 1)]  # key, value, least
    for section, key, usual in (("vision_cfg", "image_size", 224), ("text_cfg", "context_length", 77)):
        values = config[section]
        if not isinstance(values, dict):
            raise UserError(f"model.config.{section}: got {values!r}, expected a mapping")
        size = values.get(key, usual)
        sizes += [(f"{section}.{key}", side, 1) for side in (size if isinstance(size, list) and size else [size])]
        sizes += [(f"{section}.{name}", value, 0) for name, value in values.items() if type(value) is int]
    for key, size, least in sizes:
        if type(size) is not int or not least <= size <= MAX_SIZE:
            raise UserError(f"model.config.{key}: got {size!r}, expected a whole number from {least} to {MAX_SIZE}")


def build_model(model: dict) -> open_clip.CLIP:
    """A CLIP with fresh weights from torch's generator. Raises UserError for a config that open_clip
    refuses."""
    config = open_clip_config(model)
    if set(config) - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"} or "hf_model_name" in config["text_cfg"]:
        raise UserError(
            f"model: {model.get('name') or 'model.config'} is no plain CLIP; take one like RN50 or ViT-B-32"
        )
    try:
        # One element, not none: DeepSpeed cannot store a 0-d parameter.
        return open_clip.CLIP(**config, nonscalar_logit_scale=True)
    except Exception as error:  # open_clip checks nothing itself: a division by zero, a missing key
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"model.config: open_clip refuses it: {words[:300]}") from None


def load_pretrained(clip: nn.Module, source: str) -> None:
    """Load into `clip` the weights of a run directory's newest complete checkpoint, or of a .safetensors file. Raises
    UserError."""
    try:
        clip.load_state_dict(load_file(pretrained_file(source)))
    except RuntimeError as error:
        words = " ".join(str(error).split())
        raise UserError(
            f"model.pretrained: {source}: does not fit the model ({words[:300]}); use the model it was trained with"
        ) from None


def pretrained_file(source: str) -> Path:
    """The .safetensors file of model.pretrained, of which the header is read. Raises UserError."""
    from pipeline.training.checkpoint import newest_complete

    path, where = Path(source), f"model.pretrained: {source}"
    if path.is_dir():
        folder, _ = newest_complete(path)
        if folder is None:
            raise UserError(f"{where}: no complete checkpoint in it; name a run directory or a .safetensors file")
        path = folder / "model.safetensors"
    try:
        with safe_open(path, "pt"):
            return path
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: cannot be read ({error}); name a run directory or a .safetensors file") from None


def tokenizer_for(model: dict) -> Callable[[list[str]], torch.Tensor]:
    """Function: list[str] -> int64 (N, L), L the model's context length. Raises UserError where it cannot be had."""
    text = open_clip_config(model)["text_cfg"]
    length, settings = text.get("context_length", 77), text.get("tokenizer_kwargs", {})
    name = text.get("hf_tokenizer_name")
    if not name:
        return Tokenizer(length, **settings)
    try:
        return HFTokenizer(name, length, **settings)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(
            f"model: the tokenizer {name} cannot be had ({' '.join(str(error).split())[:200]}); "
            "it needs `pip install transformers` and its files on this host"
        ) from None


def picture_size(model: dict) -> int:
    """Pixels of the side of the model's square picture."""
    size = open_clip_config(model)["vision_cfg"].get("image_size", 224)
    return size if isinstance(size, int) else size[0]


def pixel_stats() -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) of the RGB channels in 0..1, those of OpenAI's CLIP."""
    return open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups: no decay for biases, norms and the logit scale (all that has fewer than two dimensions).

    Within a group the sizes that 2 divides most often come first: ZeRO lays a group's parameters end to end, and behind
    the one number of the logit scale no norm's weight would stand where GPU kernels read four numbers at once (fp32
    batch norm: misaligned address).
    """
    ordered = sorted(model.parameters(), key=lambda p: -min(ALIGNED, p.numel() & -p.numel()))
    plain = [p for p in ordered if p.ndim < 2]
    decayed = [p for p in ordered if p.ndim >= 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class Towers(nn.Module):
    """A CLIP that takes pixels as they come from the loader, and in which every parameter takes part in every step."""

    clip: open_clip.CLIP
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, clip: open_clip.CLIP, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.clip = share_batch_norm(clip) if comm.world() > 1 else clip
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(
        self, images_BCHW: torch.Tensor | None, tokens_BL: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """(image_BD, text_BD, scale): unit float32 embeddings and the logit scale (1,).

        images: uint8; tokens: int64. Without gradients either may be None, and so is its embedding. DeepSpeed's ZeRO-3
        applies old gradients to a parameter that a step does not use, so training gives both.
        """
        image_BD = text_BD = None
        if images_BCHW is not None:
            kind = self.clip.text_projection.dtype
            pixels = ((images_BCHW.float() / 255 - self.mean) / self.std).to(kind, memory_format=torch.channels_last)
            image_BD = F.normalize(self.clip.encode_image(pixels).float(), dim=-1)
        if tokens_BL is not None:
            text_BD = F.normalize(self.clip.encode_text(tokens_BL).float(), dim=-1)
        return image_BD, text_BD, self.clip.logit_scale.float().exp()
