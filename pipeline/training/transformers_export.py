"""A run's model in the form of transformers' CLIPModel: config, weights, tokenizer, and what is done to pictures.

Only plain vision transformers have that form. transformers itself is not needed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save

from pipeline.training.model import pixel_stats
from shards.errors import UserError

EPS = 1e-5  # of torch's LayerNorm
# What may differ from open_clip's defaults; transformers has no name for the rest.
VISION = ("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout")
TEXT = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
TOP = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # as it is spelt there
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
START, END = "<|startoftext|>", "<|endoftext|>"


def transformers_files(
    weights: dict[str, torch.Tensor], config: dict, stats: tuple[Sequence[float], Sequence[float]] = pixel_stats()
) -> dict[str, bytes]:
    """{file name: content} of a folder that CLIPModel.from_pretrained and CLIPProcessor.from_pretrained load.

    weights: open_clip's state dict; config: its embed_dim, vision_cfg and text_cfg; stats: mean and standard deviation
    of the pixels. Raises UserError for a model that CLIPModel cannot express.
    """
    described = clip_config(config)
    renamed = {name: tensor.contiguous() for old in weights for name, tensor in renames(old, weights[old])}
    tokenizer = open_clip.SimpleTokenizer()
    size, (mean, std) = described["vision_config"]["image_size"], stats
    # Without its own two words, which have other names here.
    vocabulary = [word for word, _ in sorted(tokenizer.encoder.items(), key=lambda item: item[1])][:-2] + [START, END]
    merges = ["#version: 0.2", *map(" ".join, tokenizer.bpe_ranks)]
    length = described["text_config"]["max_position_embeddings"]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    pictures = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    texts = {
        "config.json": described,
        "preprocessor_config.json": pictures,
        "vocab.json": {word: number for number, word in enumerate(vocabulary)},
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special},
        "special_tokens_map.json": special,
    }
    return {
        "model.safetensors": save(renamed, metadata={"format": "pt"}),
        "merges.txt": ("\n".join(merges) + "\n").encode(),
        **{name: (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode() for name, value in texts.items()},
    }


def clip_config(config: dict) -> dict:
    """transformers' CLIPConfig of an open_clip config. Raises UserError."""
    for key in ("custom_text", "init_logit_bias"):
        if config.get(key) not in (None, False):
            raise UserError(
                f"--format transformers: CLIPModel has no {key}={config[key]!r}; "
                "leave --format out, for open_clip's form"
            )
    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    for section, found, known in (("vision_cfg", vision, VISION), ("text_cfg", text, TEXT)):
        for field in fields(found):
            value = getattr(found, field.name)
            listed = field.name in ("layers", "image_size") and not isinstance(value, int)
            if listed or field.name not in known and value != field.default:
                raise UserError(
                    f"--format transformers: CLIPModel has no {section}.{field.name}={value!r}; "
                    "leave --format out, for open_clip's form"
                )
    words = len(open_clip.SimpleTokenizer().encoder)
    if text.vocab_size != words:
        raise UserError(
            f"--format transformers: text_cfg.vocab_size is {text.vocab_size}, expected the {words} words of CLIP's "
            "tokenizer; leave --format out, for open_clip's form"
        )
    shared = {
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": EPS,
        "projection_dim": config["embed_dim"],
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "max_position_embeddings": text.context_length,
            "vocab_size": words,
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
            "pad_token_id": words - 1,
            **shared,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_attention_heads": vision.width // vision.head_width,
            "num_hidden_layers": vision.layers,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            **shared,
        },
    }


def renames(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in CLIPModel, tensor) of one of open_clip's tensors; three of attn.in_proj. Raises KeyError."""
    if name in ("text_projection", "visual.proj"):  # torch.nn.Linear has its weight transposed
        tensor = tensor.T
    if "resblocks." not in name:
        whole, _, last = ("", "", "") if name in TOP else name.rpartition(".")
        yield (TOP[name] if name in TOP else f"{TOP[whole]}.{last}"), tensor
        return
    tower, _, rest = name.partition("transformer.resblocks.")
    number, _, rest = rest.partition(".")
    layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
    part, _, last = rest.rpartition(".")
    if last.startswith("in_proj_"):
        for side, piece in zip("qkv", tensor.chunk(3)):
            yield f"{layer}.self_attn.{side}_proj.{last.removeprefix('in_proj_')}", piece
    else:
        yield f"{layer}.{BLOCK[part]}.{last}", tensor
