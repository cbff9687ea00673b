"""Several captions of one picture: which ones a sample has, which one a view draws, and which one is scored."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.safety.scoring import least_similar
from pipeline.training.curriculum import Step
from shards.errors import BadSample, UserError
from shards.index.build_index import build_index
from shards.order.plan import EpochPlan
from shards.samples.samples import Samples
from shards.storage.captions import MAX_CAPTIONS, MAX_TRIED, json_texts, usable
from shards.views.batch import View, Views
from shards.views.loader import PlainBatches, TrainBatches
from tests.helpers.pictures import picture
from tests.helpers.tars import write_tar


def indexed(folder, samples, text):
    """Samples of a shard: for each {extension: bytes} a picture and those members."""
    members = []
    for number, sample in enumerate(samples):
        members += [(f"{number}.png", picture(number, 16))] + [(f"{number}.{e}", data) for e, data in sample.items()]
    return Samples(build_index([str(write_tar(folder / "a.tar", members))], folder / "index", text=text))


def as_json(value):
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    "value, field, texts",
    [
        ({"a": "one"}, "a", ["one"]),
        ({"a": ["one", "two"]}, "a", ["one", "two"]),
        ({"a": {"b": "one"}}, "a.b", ["one"]),
        ({"a.b": "one", "a": {"b": "two"}}, "a.b", ["one"]),
        ({"sentences": [{"raw": "one"}, {"id": 1}, {"raw": "two"}]}, "sentences.raw", ["one", "two"]),
        ({"a": [["one"], "two", None, 3]}, "a", ["two"]),
        ({"a": {"b": {"c": ["one"]}}}, "a.b.c", ["one"]),
    ],
)
def test_texts_of_a_field(value, field, texts):
    assert json_texts(as_json(value), field) == [text.encode() for text in texts]


@pytest.mark.parametrize(
    "value, field, reason",
    [
        ({"a": []}, "a", "field 'a' is an empty list, expected a text"),
        ({"a": [1]}, "a", "field 'a' is a number, expected a text"),
        ({"a": "one"}, "a.b", "field 'a' is a text, expected a mapping"),
        ({"a": {"c": 1}}, "a.b", "no field 'b' in field 'a', which has 'c'"),
        ({"a": [{"c": 1}, {"d": 1}]}, "a.b", "no field 'b' in field 'a', which has 'c'"),
        ({"a": [{"b": []}]}, "a.b", "field 'b' is an empty list"),
    ],
)
def test_a_field_without_a_text_is_a_reason(value, field, reason):
    with pytest.raises(BadSample, match=reason):
        json_texts(as_json(value), field)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "a.b"]), inner),
)


@given(JSON, st.sampled_from(["a", "b", "a.b", "a.b.a"]))
def test_any_json_gives_texts_of_it_or_a_reason(value, field):
    try:
        texts = json_texts(as_json(value), field)
    except BadSample as error:
        assert str(error).startswith("caption: ")
    else:
        assert texts and all(as_json(text.decode()) in as_json(value) for text in texts)


def test_sources_joined_by_plus_are_all_captions(tmp_path):
    found = {"caption": ["one", " "], "alt": "two"}
    samples = indexed(
        tmp_path,
        [
            {"json": as_json(found), "txt": b"three", "long.txt": b"four"},
            {"txt": b"five"},
            {"json": as_json({"alt": "six"})},
            {"json": as_json({"alt": ""}), "txt": b"\xff"},
            {},
        ],
        "json:caption+json:alt+txt+long.txt,longer.txt",
    )
    assert [samples.captions(0, position) for position in range(3)] == [
        ["one", "two", "three", "four"],
        ["five"],
        ["six"],
    ]
    assert samples.caption(0, 0) == "one"
    wrong = {finding.position: finding.reason for finding in samples.index.findings}
    assert wrong.keys() == {3, 4} and "no field 'caption'" in wrong[3] and "no caption" in wrong[4]
    for position in (3, 4):
        with pytest.raises(BadSample):
            samples.captions(0, position)


def test_a_sample_has_a_bounded_number_of_captions(tmp_path):
    captions = ["", *(f"caption {n}" for n in range(100))]
    samples = indexed(tmp_path, [{"json": as_json({"c": captions})}], "json:c")
    assert samples.captions(0, 0) == captions[1 : MAX_CAPTIONS + 1]


def test_few_of_many_unusable_texts_are_tried():
    tried = []

    def decode(text):
        tried.append(text)
        raise BadSample(f"number {len(tried)}")

    with pytest.raises(BadSample, match="number 1$"):
        usable([b"x"] * 100_000, decode)
    assert len(tried) == MAX_TRIED


def test_a_reason_with_names_of_fields_is_one_line_without_escapes(tmp_path):
    with pytest.raises(BadSample) as error:
        json_texts(as_json({"x\n\x1b[31m": "y"}), "c")
    assert str(error.value).isprintable()


def test_other_members_are_another_index(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [(f"a.{e}", picture(0, 16) if e == "png" else b"one") for e in ("png", "txt", "alt")]
    )
    names = ("txt", "alt", "txt+alt", "alt+txt", "txt,alt")
    prints = {build_index([str(path)], tmp_path / f"index{n}", text=text).fingerprint for n, text in enumerate(names)}
    assert len(prints) == len(names)


@pytest.mark.parametrize("text", ["+", "txt+", "+txt", "txt+json:", "txt+A"])
def test_a_source_that_is_none_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="--text: got .*joined by"):
        build_index(["a.tar"], tmp_path, text=text)


def tokenize(captions):
    return torch.tensor([[int(caption)] for caption in captions])


def drawn(samples, epoch, rank=0, world=1):
    """{row: numbers of the captions of its two views} of one epoch."""
    views = Views(16, tokenize, {"clip": (View(), View())})
    plan = EpochPlan(samples.index.counts, seed=0, epoch=epoch, view="all", batch_size=4, streams=1)
    steps = [Step("clip", "all", plan, number) for number in range(plan.steps)]
    data, found = TrainBatches(samples, steps, views, seed=0, epoch=epoch, rank=rank, world=world), {}
    for number in range(len(data)):
        tokens_VB = data[number].tokens.view(2, -1).tolist()
        found |= dict(zip(data[number].rows.tolist(), zip(*tokens_VB)))
    return found


def test_each_view_draws_one_caption_keyed_by_its_place(tmp_path):
    samples = indexed(tmp_path, [{"json": as_json({"c": ["0", "1", "2"]})} for _ in range(64)], "json:c")
    first, again = drawn(samples, 0), drawn(samples, 0)
    assert first == again == drawn(samples, 0, 0, 2) | drawn(samples, 0, 1, 2) and len(first) == 64
    views = np.array([first[row] for row in range(64)])
    assert (np.bincount(views.ravel(), minlength=3) > 25).all() and 20 < (views[:, 0] != views[:, 1]).sum() < 64
    assert first != drawn(samples, 1)


def test_all_captions_are_scored(tmp_path):
    lists = [["0"], ["1", "2", "3"], ["4", "5"]]
    samples = indexed(tmp_path, [{"json": as_json({"c": captions})} for captions in lists] + [{}], "json:c")
    views = Views(16, lambda texts: tokenize([text or "9" for text in texts]), {})
    batch = PlainBatches(samples, [(range(4), range(4))], views)[0]
    assert batch.tokens.flatten().tolist() == [0, 1, 2, 3, 4, 5, 9]
    assert batch.caption_of.tolist() == [0, 1, 1, 1, 2, 2, 3] and batch.valid.tolist() == [True] * 3 + [False]
    assert torch.equal(batch.to("cpu").caption_of, batch.caption_of)
    assert PlainBatches(samples, [(range(1), range(1))], views)[0].caption_of is None


@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=4), min_size=1, max_size=6))
def test_the_least_similar_caption_is_found(cosines):
    caption_of_T = torch.tensor([row for row, found in enumerate(cosines) for _ in found])
    text_TD = torch.tensor([[float(cosine)] for found in cosines for cosine in found])
    least_B = least_similar(torch.ones(len(cosines), 1), text_TD, caption_of_T)
    starts = np.cumsum([0, *map(len, cosines)])
    assert least_B.tolist() == [int(at + np.argmin(found)) for at, found in zip(starts, cosines)]
