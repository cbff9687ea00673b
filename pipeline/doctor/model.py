"""Whether the model can be built, begins with the weights it should, and takes the pictures and captions of a config.

Nothing is computed: the towers are on torch's meta device, which knows shapes only.
"""

import warnings

import torch
from open_clip.tokenizer import HFTokenizer

from pipeline.config.schema import Config
from pipeline.doctor.footprint import Findings
from pipeline.training.model import Towers, open_clip_config, picture_size, tokenizer_for
from pipeline.training.pretrained import make_towers
from shards.errors import UserError


def check_model(config: Config) -> Findings:
    """On one rank. A model that cannot be trained is fatal."""
    model = config.model.model_dump()
    try:
        # To copy weights of a file to the meta device does nothing but compare names and shapes, and warn of it.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            towers = make_towers(model)
        tokenize = tokenizer_for(model)
    except UserError as error:
        return [("fatal", "model", str(error))]
    clip, size, tokens_BL = towers.clip, picture_size(model), tokenize(["a caption", ""])
    known = len(tokenize.tokenizer if isinstance(tokenize, HFTokenizer) else getattr(tokenize, "encoder"))
    if known > clip.vocab_size:
        text = f"text_cfg.vocab_size is {clip.vocab_size:,}, but its tokenizer has {known:,} tokens; make them agree"
        return [("fatal", "model", text)]
    if tokens_BL.shape[1] > clip.context_length:
        text = f"its text tower reads {clip.context_length} tokens, text_cfg.context_length is {tokens_BL.shape[1]}"
        return [("fatal", "model", f"{text}; lower it")]
    hugging_face = "hf_model_name" in open_clip_config(model)["text_cfg"]  # its towers look into their tensors
    try:
        unused = unused_weights(towers, size, None if hugging_face else tokens_BL)
    except Exception as error:  # whatever its modules raise for these shapes
        words = " ".join(f"{type(error).__name__}: {error}".split())
        text = f"does not take pictures of {size} px and {tokens_BL.shape[1]} tokens ({words[:200]})"
        return [("fatal", "model", text)]
    found = described(towers, size, tokens_BL.shape[1])
    if unused:
        text = f"{len(unused)} of its weights take no part in a step, the first is {unused[0]}"
        if config.train.zero_stage == 3:
            text += "; ZeRO-3 would apply old gradients to it, take a lower train.zero_stage"
            return found + [("fatal", "model", text)]
        found.append(("warning", "model", f"{text}; it is never trained"))
    return found


def described(towers: Towers, size: int, length: int) -> Findings:
    clip, parameters = towers.clip, list(towers.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    text = (
        f"{type(clip).__name__} of {sum(p.numel() for p in parameters):,} weights, {trained:,} of them trained; "
        f"pictures of {size} px, captions of {length} tokens; "
        + ("softmax (InfoNCE)" if clip.logit_bias is None else "sigmoid (SigLIP)")
        + " loss between them"
    )
    return [("ok", "model", text)]


def unused_weights(towers: Towers, size: int, tokens_BL: torch.Tensor | None) -> list[str]:
    """Names of the weights that are trained and have no gradient after a step on the meta device. Without tokens those
    of the image tower only. Raises whatever the towers raise, and ValueError for embeddings of two sizes."""
    images_BCHW = torch.zeros(2, 3, size, size, dtype=torch.uint8, device="meta")
    image_BD, text_BD, scale = towers(images_BCHW, None if tokens_BL is None else tokens_BL.to("meta"))
    if text_BD is not None and image_BD.shape != text_BD.shape:
        raise ValueError(f"embeddings of {image_BD.shape[1]} and {text_BD.shape[1]} numbers")
    trained = [(name, p) for name, p in towers.clip.named_parameters() if p.requires_grad]
    (image_BD.sum() + scale.sum() + (0 if text_BD is None else text_BD.sum())).backward()
    if text_BD is None:
        trained = [(name, p) for name, p in trained if name.startswith("visual.")]
    return [name for name, p in trained if p.grad is None]
