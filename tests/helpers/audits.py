"""Shards, a small CLIP and its scores, for the tests of the audit."""

import io
import json

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from shards.build.write import write_shards

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def make_model(folder):
    """An open_clip local directory with random weights."""
    torch.manual_seed(0)
    folder.mkdir()
    save_file(open_clip.CLIP(**MODEL).state_dict(), folder / "open_clip_model.safetensors")
    stats = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": stats}))
    return str(folder)


def picture(seed, patch=False):
    """PNG of a smooth random picture, with a noisy square in the corner if asked."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    image = coarse.resize((64, 64), Image.BICUBIC)
    if patch:
        noise = Image.fromarray(np.random.default_rng(7).integers(0, 2, (4, 4, 3), dtype=np.uint8) * 255)
        image.paste(noise.resize((12, 12), Image.NEAREST), (48, 48))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def make_pairs(folder, captions, pictures=None, per_shard=20):
    """Shards of pairs with these captions (bytes are kept as they are); pictures: {row: bytes} in place of random
    ones."""
    pictures = pictures or {}
    samples = [
        {"__key__": f"{row:05d}", "png": pictures.get(row, picture(row)), "txt": text}
        for row, text in enumerate(captions)
    ]
    return [str(path) for path in write_shards(samples, folder, per_shard)]
