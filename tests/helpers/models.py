"""Open_clip configs of very small models."""

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}

VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}
# Families of open_clip, with real code and as small as it allows. A name of timm's has its own picture size.
TIMM_TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
SIGLIP_TEXT = {
    **TIMM_TEXT,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}
FAMILIES = {
    "clip": MODEL,
    "modified resnet": {**MODEL, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}},
    "custom text": {**MODEL, "custom_text": True, "quick_gelu": True},
    "siglip": {
        "embed_dim": 96,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": SIGLIP_TEXT,
    },
    "convnext": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TIMM_TEXT,
    },
    "eva": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "eva02_tiny_patch14_224",
            "timm_pool": "token",
            "timm_proj": None,
        },
        "text_cfg": TIMM_TEXT,
    },
    "coca's towers": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {**MODEL["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 4},
        "text_cfg": {**TIMM_TEXT, "embed_cls": True},
    },
}
# A small CLIP with SigLIP's loss.
SIGMOID = {**MODEL, "custom_text": True, "init_logit_bias": -10}

RESNET = {
    **VIT,
    "vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
}
