"""A very small Hugging Face text tower and its tokenizer, in a local folder: nothing is downloaded."""

import json

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "red", "dog", "cat", "."]


def make_folder(folder):
    """A BERT's config without weights, and a tokenizer of WORDS."""
    folder.mkdir()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"model_type": "bert", "vocab_size": len(WORDS), "max_position_embeddings": 32, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    special = [
        {"id": number, "content": word, "special": True, "normalized": False, "single_word": False}
        | {"lstrip": False, "rstrip": False}
        for word, number in vocabulary.items()
        if word.startswith("[")
    ]
    ends = {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]}, "[SEP]": {"id": "[SEP]", "ids": [3]}}
    ends["[SEP]"]["tokens"] = ["[SEP]"]
    first, last = ({"SpecialToken": {"id": word, "type_id": 0}} for word in ends)
    single = [first, {"Sequence": {"id": "A", "type_id": 0}}, last]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ends},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return str(folder)


def model_of(folder, length=9):
    """An open_clip config with this text tower."""
    text = {"hf_model_name": folder, "hf_tokenizer_name": folder, "hf_proj_type": "linear", "context_length": length}
    vision = {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**text, "hf_pooler_type": "mean_pooler"}}
