"""Captions: EDA, easy data augmentation (Wei and Zou, EMNLP 2019), as SafeCLIP's recipe uses it; and the form of the
default preset.

One of four operations is drawn for each view: replace words by synonyms, insert synonyms, swap words, delete words.
"""

import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.views import wordnet

# NLTK's English list, which EDA uses: no stop word is replaced, and no synonym of one is inserted.
STOP = frozenset(
    """i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
    it its itself they them their theirs themselves what which who whom this that these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while of at by for with about
    against between into through during before after above below to from up down in out on off over under again further
    then once here there when where why how all any both each few more most other some such no nor not only own same so
    than too very s t can will just don should now""".split()
)
MARKS = ".,;:!?"  # at the ends of a word, and no part of it


class Eda:
    """EDA of captions. A call draws one view: (caption, rng) -> caption; never empty where the caption holds a word.

    Of W words n = max(1, int(strength * W)) are replaced, inserted or swapped; deletion drops each with probability
    `strength`, so it may change nothing. Nor do the others where no word has a synonym or there is no second word.
    Synonyms are WordNet's (source "wordnet") if it is found (shards.views.wordnet.find), else those of the shipped
    table ("table"). `clean`: captions in lower case, letters only, as the recipe trains on; false: the form of the
    default preset (caption_view). Raises UserError on other settings.
    """

    def __init__(self, strength: float = 0.1, source: str = "wordnet", clean: bool = True):
        if not 0 <= strength <= 1:
            raise UserError(f"strength of EDA: {strength}; expected a fraction of the words, from 0 to 1")
        if source not in ("wordnet", "table"):
            raise UserError(f"source of EDA's synonyms: {source!r}; expected wordnet or table")
        self.strength, self.clean = strength, clean
        found = wordnet.find() if source == "wordnet" else None
        self.folder = str(found) if found else None  # the database is opened by the process that draws

    def __call__(self, caption: str, rng: np.random.Generator) -> str:
        if not caption.strip():
            return caption
        if not self.clean:
            return caption_view(caption, rng, self.strength, self.folder)
        words = cleaned(caption) or caption.lower().split()
        operation = (self.replace, self.insert, self.swap, self.delete)[rng.integers(4)]
        return " ".join(operation(words, rng))

    def replace(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """n random distinct words that have synonyms, each wherever it stands, by a random one of them."""
        known = list(dict.fromkeys(word for word in words if self.synonyms(word)))
        chosen = [known[i] for i in rng.permutation(len(known))[: self.count(words)]]
        drawn = {word: self.draw(word, rng) for word in chosen}
        return [part for word in words for part in drawn.get(word, (word,))]

    def insert(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """n times: a random synonym of a random word that has any, at a random place."""
        known, longer = [word for word in words if self.synonyms(word)], list(words)
        for _ in range(self.count(words) if known else 0):
            place = rng.integers(len(longer) + 1)
            longer[place:place] = self.draw(known[rng.integers(len(known))], rng)
        return longer

    def swap(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """n times: two words at different random places change places."""
        swapped = list(words)
        for _ in range(self.count(words) if len(words) > 1 else 0):
            i, j = rng.integers(len(words)), rng.integers(len(words) - 1)
            j += j >= i
            swapped[i], swapped[j] = swapped[j], swapped[i]
        return swapped

    def delete(self, words: list[str], rng: np.random.Generator) -> list[str]:
        """Without each word with probability `strength`; a random one is left if all were drawn."""
        dropped = rng.random(len(words)) < self.strength
        return [word for word, drop in zip(words, dropped) if not drop] or [words[rng.integers(len(words))]]

    def count(self, words: list[str]) -> int:
        return max(1, int(self.strength * len(words)))

    def synonyms(self, word: str) -> tuple[tuple[str, ...], ...]:
        """Of a clean word, each as its words, in alphabetical order; none of a stop word."""
        return () if word in STOP else clean_synonyms(self.folder, word)

    def draw(self, word: str, rng: np.random.Generator) -> tuple[str, ...]:
        found = self.synonyms(word)
        return found[rng.integers(len(found))]


def cleaned(text: str) -> list[str]:
    """Words in lower case without anything but letters (of any script, with their marks); "don't" is one word,
    "t-shirt" two."""
    text = text.lower().replace("'", "").replace("\u2019", "")
    return "".join(c if unicodedata.category(c)[0] in "LM" else " " for c in text).split()


def synonym_source() -> str:
    """What Eda's source "wordnet" uses on this machine: "WordNet 3.0 in FOLDER", or "table"."""
    folder = wordnet.find()
    return f"WordNet {wordnet.opened(str(folder)).version} in {folder}" if folder else "table"


@lru_cache(maxsize=1 << 16)
def clean_synonyms(folder: str | None, word: str) -> tuple[tuple[str, ...], ...]:
    """Eda.synonyms of a word that is no stop word."""
    return tuple(sorted({tuple(cleaned(name)) for name in synonyms(folder, word)} - {(), (word,)}))


@lru_cache(maxsize=1 << 16)
def synonyms(folder: str | None, word: str) -> tuple[str, ...]:
    """The synonyms of a word in lower case: of the WordNet in `folder` or, where that is None, of the
    table."""
    if folder:
        return tuple(sorted(name.replace("_", " ") for name in wordnet.opened(folder).synonyms(word)))
    return tuple(table().get(word, ()))


def caption_view(text: str, rng: np.random.Generator, rate: float = 0.1, folder: str | None = None) -> str:
    """The default preset's form: words stay as they are, one operation on round(rate * W) of them, at least one; stop
    words too are replaced, one place at a time, and the two places of a swap may be the same. Never empty."""
    words = text.split()
    count = max(1, round(rate * len(words)))
    operation = ("replace", "insert", "swap", "delete")[rng.integers(4)]
    if operation == "delete":
        keep = rng.random(len(words)) >= rate
        return " ".join(word for word, kept in zip(words, keep) if kept) or words[rng.integers(len(words))]
    for _ in range(count):
        if operation == "swap":
            i, j = rng.integers(len(words), size=2)
            words[i], words[j] = words[j], words[i]
            continue
        found = [synonyms(folder, word.lower().strip(MARKS)) for word in words]
        known = [i for i, others in enumerate(found) if others]
        if not known:
            break
        i = known[rng.integers(len(known))]
        chosen = found[i][rng.integers(len(found[i]))]
        if operation == "replace":
            words[i] = chosen
        else:
            words.insert(rng.integers(len(words) + 1), chosen)
    return " ".join(words)


@lru_cache(maxsize=1)
def table() -> dict[str, list[str]]:
    """Word -> the other words of its lines in synonyms.tsv."""
    words: dict[str, list[str]] = {}
    for line in (Path(__file__).parent / "synonyms.tsv").read_text(encoding="utf-8").splitlines():
        group = line.split("\t")
        for word in group:
            words.setdefault(word, []).extend(other for other in group if other != word)
    return words
