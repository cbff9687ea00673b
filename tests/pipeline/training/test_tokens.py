"""The fast tokenizer gives open_clip's own tokens, whatever the text."""

import pickle
from functools import cache

import open_clip
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.training import tokens
from pipeline.training.model import tokenizer_for
from pipeline.training.tokens import Tokenizer
from shards.errors import BadSample, UserError
from shards.storage.captions import read_caption

FRAGMENTS = [
    *(
        "a dog",
        "Don't",
        "we'LL",
        "'s",
        "<start_of_text>",
        "<END_OF_TEXT>",
        "&amp;lt;",
        "&",
        "&#x26;",
        "<b>",
        "1999",
        "ß",
        "ſ",
        "Σ",
    ),
    *(
        "İ",
        "ﬁ",
        "“x”",
        "schÃ¶n",
        "\x1b[31m",
        "\x00",
        "\x1c",
        "\x85",
        "\u2028",
        "\u00ad",
        "\r\n",
        "\t",
        "  ",
        "日本",
        "e\u0301",
        "🙂",
        "_",
        "--",
    ),
]
TEXT = st.one_of(
    st.text(), st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text("aB9 '&<!", max_size=8))).map("".join)
)


@cache
def pair(**settings):
    return open_clip.SimpleTokenizer(**settings), Tokenizer(**settings)


@settings(max_examples=300)
@given(
    st.lists(TEXT, max_size=3),
    st.sampled_from([2, 3, 20, 77]),
    st.sampled_from(["lower", "whitespace", "canonicalize"]),
)
@example(["word " * 100, "", " "], 77, "lower")
@example(["".join(FRAGMENTS), " ".join(FRAGMENTS)], 77, "lower")
def test_the_same_tokens_as_open_clip(texts, length, clean):
    theirs, ours = pair(clean=clean)
    found, wanted = ours(texts, length), theirs(texts, length)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape and (found == wanted).all()


@settings(max_examples=150)
@given(
    st.text("aeinorstlhdcum", min_size=1, max_size=300)
    | st.text("a!?", min_size=1, max_size=60)
    | st.text(min_size=1, max_size=60)
)
def test_long_words_have_the_same_parts(word):
    theirs, ours = pair()
    assert ours.encode(word) == theirs.encode(word)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(tokens, "KEPT", 10)
    ours = Tokenizer()
    texts = [" ".join(f"w{i}x{j}" for j in range(7)) for i in range(9)] + ["y" * 5000]
    assert (ours(texts) == pair()[0](texts)).all()
    assert len(ours.words) <= 10 and len(ours.cache) == 2  # the two special tokens


def test_it_goes_to_worker_processes():
    ours = pair()[1]
    assert (pickle.loads(pickle.dumps(ours))(["a red dog"]) == ours(["a red dog"])).all()


def test_a_model_brings_its_tokenizer():
    assert isinstance(tokenizer_for({"name": "RN50"}), Tokenizer)
    config = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"context_length": 9, "hf_tokenizer_name": "/no/such"}}
    with pytest.raises(UserError, match="/no/such"):
        tokenizer_for({"config": config})
    del config["text_cfg"]["hf_tokenizer_name"]
    assert tokenizer_for({"config": config})(["x"]).shape == (1, 9)


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=12), st.lists(st.sampled_from(FRAGMENTS), max_size=4).map("".join)))
@example("\ufeff")
@example("<start_of_text>")
def test_a_usable_caption_has_a_token(text):
    tokenize = pair()[1]
    try:
        caption = read_caption(text.encode("utf-8", "surrogatepass"))
    except BadSample:
        return
    assert set(tokenize.encode(caption)) - {tokenize.sot_token_id, tokenize.eot_token_id}
