"""The two towers: any architecture of open_clip with an image and a text tower, by name or by config, with fresh
weights.

pretrained.py starts them from given weights, tokens.py makes their tokens.
"""

import copy
import difflib
import math
from collections.abc import Callable, Sequence

import open_clip
import torch
from open_clip.constants import INCEPTION_MEAN, INCEPTION_STD
from open_clip.tokenizer import HFTokenizer
from torch import nn
from torch.nn import functional as F

from pipeline.distributed import comm
from pipeline.training.batchnorm import share_batch_norm
from pipeline.training.tokens import Tokenizer
from shards.errors import UserError

MAX_SIZE = 10**6  # of whatever a model's config counts, such as pixels, words and layers
MAX_LOG_SCALE = math.log(100)  # CLIP's clamp of the logit scale
SIGLIP_SCALE = 10.0  # logit scale at the start of a model with a logit bias (Zhai et al. 2023, section 3.2)
ALIGNED = 64  # numbers: more than any kernel reads at once
NAFLEX = "its pictures keep their shape, those of this pipeline are squares; take a model of one picture size"
KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias"}


def open_clip_config(model: dict) -> dict:
    """As in open_clip's JSON files (embed_dim, vision_cfg, text_cfg) for {"name": ...} or {"config": {...}}.
    Raises UserError for one that is none of a model with two towers."""
    name = model.get("name")
    if name:
        if "naflex" in name.lower():
            raise UserError(f"model.name: {name} is a NaFlex model; {NAFLEX}")
        config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
        if config is None:
            close = difflib.get_close_matches(name, open_clip.list_models(), 3, 0.4)
            raise UserError(f"model.name: open_clip knows no {name!r}; did you mean {' or '.join(close) or 'RN50'}?")
    else:
        config = copy.deepcopy(model["config"])
        for key in ("embed_dim", "vision_cfg", "text_cfg"):
            if key not in config:
                raise UserError(
                    f"model.config: {key} is missing; "
                    "expected embed_dim, vision_cfg and text_cfg as in open_clip's model configs"
                )
        check_sizes(config)
    check_kind(config, f"model.name: {name}" if name else "model.config")
    return config


def check_kind(config: dict, where: str) -> None:
    """Raise UserError, naming the family, for a model that is more than an image and a text tower."""
    if "multimodal_cfg" in config or any(config[part].get("output_tokens") for part in ("vision_cfg", "text_cfg")):
        raise UserError(
            f"{where} is a CoCa, whose decoder writes captions, and only a contrastive loss is trained here; for its "
            "two towers give model.config what it has, but for multimodal_cfg and output_tokens"
        )
    timm = config["vision_cfg"].get("timm_model_name") or ""
    if str(timm).startswith("naflex"):
        raise UserError(f"{where}: vision_cfg.timm_model_name {timm} is a NaFlex model; {NAFLEX}")
    unknown = sorted(set(config) - KEYS)
    if unknown:
        raise UserError(f"{where}: {unknown[0]} is no key of a model with two towers; known here: {', '.join(KEYS)}")


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


def build_model(model: dict) -> open_clip.CLIP | open_clip.CustomTextCLIP:
    """A CLIP with fresh weights from torch's generator. Raises UserError for a config that open_clip refuses.

    Weights come from model.pretrained alone: timm_model_pretrained and hf_model_pretrained are as if false, as in
    open_clip.create_model with a checkpoint. A Hugging Face text tower needs its config only.
    """
    config = open_clip_config(model)
    vision, text = config["vision_cfg"], config["text_cfg"]
    kind = open_clip.CLIP
    if config.pop("custom_text", False) or text.get("hf_model_name"):
        kind = open_clip.CustomTextCLIP
    if vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = False
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = False
    if config.get("init_logit_bias") is not None:
        config.setdefault("init_logit_scale", math.log(SIGLIP_SCALE))  # as open_clip's training does
    try:
        # One element, not none: DeepSpeed cannot store a 0-d parameter.
        return kind(**config, nonscalar_logit_scale=True)
    except Exception as error:  # open_clip checks nothing itself: a division by zero, a missing key
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"model.config: open_clip refuses it: {words[:300]}") from None


def tokenizer_for(model: dict) -> Callable[[list[str]], torch.Tensor]:
    """Function: list[str] -> int64 (N, L), L the model's context length. Raises UserError where it cannot be had."""
    text = open_clip_config(model)["text_cfg"]
    length, settings = text.get("context_length", 77), dict(text.get("tokenizer_kwargs") or {})
    name = text.get("hf_tokenizer_name")
    if not name:
        return Tokenizer(length, **settings)
    try:
        return HFTokenizer(name, length, tokenizer_mode=text.get("tokenizer_mode"), **settings)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(
            f"model.config.text_cfg.hf_tokenizer_name: {name} cannot be had ({' '.join(str(error).split())[:200]}); "
            "it needs `pip install transformers` and its files on this host"
        ) from None


def picture_size(model: dict) -> int:
    """Pixels of the side of the model's square picture."""
    size = open_clip_config(model)["vision_cfg"].get("image_size", 224)
    return size if isinstance(size, int) else size[0]


def pixel_stats(model: dict = {}) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) of the RGB channels in 0..1 by which a model's pictures are normalised: model.mean and model.std, or
    those that all published weights of model.name have, or 0.5 with a logit bias (SigLIP), or those of OpenAI's
    CLIP."""
    found = [(tuple(one["mean"]), tuple(one["std"])) for one in published(model.get("name"))]
    if not found and (model.get("config") or {}).get("init_logit_bias") is not None:
        found = [(INCEPTION_MEAN, INCEPTION_STD)]
    family = found[0] if len(set(found)) == 1 else (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    return model.get("mean") or family[0], model.get("std") or family[1]


def published(name: str | None) -> list[dict]:
    """What open_clip knows of the published weights of an architecture."""
    tags = open_clip.list_pretrained_tags_by_model(name) if name else []
    return [open_clip.get_pretrained_cfg(name, tag) for tag in tags]


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups: no decay for biases, norms, logit scale and logit bias (all that has fewer than two dimensions).
    Frozen parameters are in none.

    Within a group the sizes that 2 divides most often come first: ZeRO lays a group's parameters end to end, and behind
    the one number of the logit scale no norm's weight would stand where GPU kernels read four numbers at once (fp32
    batch norm: misaligned address).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    ordered = sorted(trained, key=lambda p: -min(ALIGNED, p.numel() & -p.numel()))
    plain = [p for p in ordered if p.ndim < 2]
    decayed = [p for p in ordered if p.ndim >= 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Towers(nn.Module):
    """A CLIP that takes pixels as they come from the loader, and in which every parameter that is trained takes part in
    every step."""

    clip: open_clip.CLIP | open_clip.CustomTextCLIP
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, clip: open_clip.CLIP | open_clip.CustomTextCLIP, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.clip = share_batch_norm(clip) if comm.world() > 1 else clip
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def lock(self, image: bool, text: bool) -> None:
        """Freeze towers (LiT, Zhai et al. 2022, section 3), as open_clip's lock_image_tower and lock_text_tower do: all
        of a tower, but the projection behind a timm or a Hugging Face model. Raises UserError where nothing is left."""
        if image:
            self.clip.lock_image_tower()
        if text:
            self.clip.lock_text_tower()
        if not any(p.requires_grad for name, p in self.clip.named_parameters() if not name.startswith("logit_")):
            raise UserError(
                "model.lock_text: with model.lock_image no weight of the towers is trained; lock one of them"
            )
        self.train(self.training)

    def train(self, mode: bool = True) -> "Towers":
        """As of torch.nn.Module, but what is frozen works as in evaluation: batch norm by its stored statistics, no
        dropout."""
        super().train(mode)
        for module in self.clip.modules() if mode else ():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def forward(
        self, images_BCHW: torch.Tensor | None, tokens_BL: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """(image_BD, text_BD, scale): unit float32 embeddings, and the logit scale (1,), or with a logit bias that and
        the bias (2,).

        images: uint8; tokens: int64. Without gradients either may be None, and so is its embedding. DeepSpeed's ZeRO-3
        applies old gradients to a parameter that a step does not use, so training gives both.
        """
        image_BD = text_BD = None
        if images_BCHW is not None:
            kind = next(self.clip.parameters()).dtype
            pixels = ((images_BCHW.float() / 255 - self.mean) / self.std).to(kind, memory_format=torch.channels_last)
            image_BD = F.normalize(self.clip.encode_image(pixels).float(), dim=-1)
        if tokens_BL is not None:
            text_BD = F.normalize(self.clip.encode_text(tokens_BL).float(), dim=-1)
        scale, bias = self.clip.logit_scale.float().exp(), self.clip.logit_bias
        return image_BD, text_BD, scale if bias is None else torch.cat([scale, bias.float()])
