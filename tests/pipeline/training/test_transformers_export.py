"""The form of transformers' CLIPModel: its forward pass, written here from the names and numbers in the files, gives
open_clip's features; and so does transformers, where it is installed."""

import importlib.util
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from torch.nn import functional as F

from pipeline.training.transformers_export import transformers_files
from shards.errors import UserError

MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 3},
}
TEXTS = ["a dog's photo, number 12!", "Größe  ÉTÉ 猫", "<b>x</b> it's", "word " * 50, "🙂🙂 a_b-c"]


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "quick_gelu"])
def exported(request):
    """(open_clip model, {file name: content}); no tensor of the model is all zeros or ones."""
    torch.manual_seed(0)
    config = {**MODEL, "quick_gelu": request.param}
    model = open_clip.CLIP(**config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model, transformers_files(model.state_dict(), config)


def pixels():
    numbers = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in numbers]


def tower(weights, name, about, hidden_BLD, causal):
    """The transformer of a tower, before its last norm."""

    def linear(x, layer):
        return F.linear(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"])

    def norm(x, layer):
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{layer}.weight"], weights[f"{layer}.bias"], about["layer_norm_eps"]
        )

    act = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}[about["hidden_act"]]
    for number in range(about["num_hidden_layers"]):
        layer = f"{name}.encoder.layers.{number}"
        x = norm(hidden_BLD, f"{layer}.layer_norm1")
        q, k, v = (
            linear(x, f"{layer}.self_attn.{side}_proj").unflatten(2, (about["num_attention_heads"], -1)).transpose(1, 2)
            for side in "qkv"
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        hidden_BLD = hidden_BLD + linear(mixed, f"{layer}.self_attn.out_proj")
        x = norm(hidden_BLD, f"{layer}.layer_norm2")
        hidden_BLD = hidden_BLD + linear(act(linear(x, f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
    return hidden_BLD, norm


@torch.no_grad()
def test_the_files_describe_the_same_features(exported):
    model, files = exported
    weights, about = load(files["model.safetensors"]), json.loads(files["config.json"])
    images = torch.randn(3, 3, 32, 32)
    patches = F.conv2d(images, weights["vision_model.embeddings.patch_embedding.weight"], stride=8).flatten(2).mT
    first = weights["vision_model.embeddings.class_embedding"].expand(3, 1, -1)
    x = torch.cat([first, patches], 1) + weights["vision_model.embeddings.position_embedding.weight"]
    x = F.layer_norm(x, x.shape[-1:], *(weights[f"vision_model.pre_layrnorm.{part}"] for part in ("weight", "bias")))
    x, norm = tower(weights, "vision_model", about["vision_config"], x, False)
    image_BD = norm(x[:, 0], "vision_model.post_layernorm") @ weights["visual_projection.weight"].T
    assert (image_BD - model.encode_image(images)).abs().max() < 1e-5

    tokens_BL = open_clip.SimpleTokenizer(context_length=12)(TEXTS)
    table, places = (weights[f"text_model.embeddings.{kind}_embedding.weight"] for kind in ("token", "position"))
    x, norm = tower(weights, "text_model", about["text_config"], table[tokens_BL] + places, True)
    end_B = (tokens_BL == about["text_config"]["eos_token_id"]).int().argmax(1)
    x = norm(x, "text_model.final_layer_norm")[torch.arange(len(TEXTS)), end_B]
    assert (x @ weights["text_projection.weight"].T - model.encode_text(tokens_BL)).abs().max() < 1e-5
    assert weights["logit_scale"] == model.logit_scale
    assert len(weights) == len(model.state_dict()) + 2 * 2 * (2 + 3)  # in_proj's weight and bias become three each


def test_words_and_merges_are_the_tokenizers(exported):
    files, tokenizer = exported[1], open_clip.SimpleTokenizer()
    words = json.loads(files["vocab.json"])
    assert {number: word for word, number in words.items()} == {
        **tokenizer.decoder,
        tokenizer.sot_token_id: "<|startoftext|>",
        tokenizer.eot_token_id: "<|endoftext|>",
    }
    merges = files["merges.txt"].decode().splitlines()[1:]
    assert [tuple(line.split()) for line in merges] == sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)


@pytest.mark.parametrize(
    "section, change",
    [
        ("vision_cfg", {"timm_model_name": "test_resnet"}),
        ("vision_cfg", {"layers": [1, 1, 1, 1]}),
        ("vision_cfg", {"image_size": [32, 16]}),
        ("vision_cfg", {"pool_type": "avg"}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"vocab_size": 500}),
    ],
)
def test_a_model_that_has_no_such_form_is_refused_by_name(section, change):
    with pytest.raises(UserError, match=f"--format transformers: .*{section}.{next(iter(change))}"):
        transformers_files({}, {**MODEL, section: {**MODEL[section], **change}})


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
@torch.no_grad()
def test_transformers_gives_the_same_features(exported, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    model, files = exported
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    other, processor = CLIPModel.from_pretrained(tmp_path).eval(), CLIPProcessor.from_pretrained(tmp_path)
    inputs = processor(text=TEXTS, images=pixels(), padding="max_length", truncation=True, return_tensors="pt")
    tokens_BL = open_clip.SimpleTokenizer(context_length=12)(TEXTS)
    found = other(**inputs)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocess = open_clip.image_transform(32, is_train=False, mean=mean, std=std)
    image_BD = model.encode_image(torch.stack([preprocess(picture) for picture in pixels()]), normalize=True)
    assert (F.normalize(found.image_embeds) - image_BD).abs().max() < 1e-5
    assert (F.normalize(found.text_embeds) - model.encode_text(tokens_BL, normalize=True)).abs().max() < 1e-5
    assert other.logit_scale == model.logit_scale
