"""Where a sample's captions come from (`--text`), and what a usable one is."""

import html
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from shards.errors import BadSample

MAX_TEXT = 1 << 20  # bytes of a caption or a .json member; more is not read
MAX_CAPTIONS = 8  # usable captions of a sample, of the first MAX_TRIED; all are scored in one batch
MAX_TRIED = 32
# A letter or a digit that no normalising removes: not of an entity, a terminal escape or a tokenizer's own word.
# U+FF06 and U+FF1C are the fullwidth & and <, which become the plain ones.
FILLERS = "\u115f\u1160\u3164\uffa0\u2800"  # letters and a symbol without ink: Hangul fillers, Braille's blank
CERTAIN = re.compile(r"[^&<\x1b\uff06\uff1c]*[0-9A-Za-z][^&<\x1b\uff06\uff1c]*")
OWN_WORDS = re.compile("<(start|end)_of_text>", re.IGNORECASE)
SHOWN = 8  # fields of a .json that a reason names
TYPES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "a mapping",
}


@dataclass(frozen=True)
class Source:
    """One source of captions: the first of these members that a sample has, or with `field` that field of its
    .json."""

    members: tuple[str, ...]
    field: str = ""

    def texts(self, data: bytes) -> list[bytes]:
        """The texts (UTF-8) in a member. Raises BadSample."""
        return json_texts(data, self.field) if self.field else [data]


@lru_cache
def sources(text: str) -> tuple[Source, ...]:
    """The sources that `--text` names, joined by +: members joined by commas, or json:FIELD."""
    found = []
    for part in text.split("+"):
        _, _, field = part.partition(":")
        found.append(Source(("json",), field) if field else Source(tuple(part.split(","))))
    return tuple(found)


def usable(texts: Iterable[bytes], decode: Callable[[bytes], str]) -> list[str]:
    """`decode` of those of `texts` that are usable, at most MAX_CAPTIONS. Raises BadSample, as for the first of them,
    where there is none."""
    found: list[str] = []
    wrong = None
    for text in islice(texts, MAX_TRIED):
        try:
            found.append(decode(text))
        except BadSample as error:
            wrong = wrong or error
        if len(found) == MAX_CAPTIONS:
            break
    if not found:
        raise wrong or BadSample("no caption")
    return found


def read_caption(data: bytes) -> str:
    """The caption in `data`, UTF-8, without byte order marks and white space at its ends. Raises BadSample where it is
    not usable."""
    if len(data) > MAX_TEXT:
        raise BadSample(f"caption of more than {MAX_TEXT} bytes")
    try:
        caption = data.decode("utf-8").replace("\ufeff", "").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"caption is not UTF-8 (byte {error.start})") from None
    if not caption:
        raise BadSample("caption is blank")
    if not is_usable(caption):
        raise BadSample("caption holds no word (invisible characters only)")
    return caption


def is_usable(caption: str) -> bool:
    """Whether a caption has at least one token besides start and end: after the tokenizer's normalising there is a
    visible character in it."""
    if CERTAIN.fullmatch(caption):
        return True
    import ftfy  # it takes a while, and most captions do not need it

    text = html.unescape(html.unescape(ftfy.fix_text(caption)))  # as open_clip's tokenizer
    return any(map(is_visible, OWN_WORDS.sub("", text)))


def is_visible(character: str) -> bool:
    """Whether it is a letter, digit, punctuation mark or symbol, of private use, or not assigned yet.

    What is assigned depends on the version of Python; so the newest emoji are visible to all of them.
    """
    category, number = unicodedata.category(character), ord(character)
    if category == "Cn":
        return not (0xFDD0 <= number <= 0xFDEF or number & 0xFFFE == 0xFFFE)  # these are never assigned
    return category[0] in "LNPS" and character not in FILLERS or category == "Co"


def json_texts(data: bytes, field: str) -> list[bytes]:
    """The texts (UTF-8) in a field of a JSON object; a lone surrogate in them becomes a question mark.

    `field`: a name, or names joined by dots that lead to a field of a mapping in a mapping. Lists on the way and at the
    end give all their items; items without a text there are left out. Raises BadSample where there is no text.
    """
    if len(data) > MAX_TEXT:
        raise BadSample(f"caption: .json of more than {MAX_TEXT} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise BadSample("caption: the .json cannot be parsed") from None
    values, where = [found], "the .json"
    for name in [field] if isinstance(found, dict) and field in found else field.split("."):
        mappings = [value for value in values if isinstance(value, dict)]
        if not mappings:
            raise BadSample(f"caption: {where} is {kind(values)}, expected a mapping")
        values = items(one[name] for one in mappings if name in one)
        if not any(name in one for one in mappings):
            names = ", ".join(f"{known[:40]!r}" for known in list(mappings[0])[:SHOWN])
            names += ", ..." if len(mappings[0]) > SHOWN else ""
            raise BadSample(f"caption: no field {name!r} in {where}, which has {names or 'none'}")
        where = f"field {name!r}"
    texts = [value for value in values if isinstance(value, str)]
    if not texts:
        raise BadSample(f"caption: {where} is {kind(values)}, expected a text")
    return [text.encode("utf-8", "replace") for text in texts]


def items(values: Iterable[object]) -> list[object]:
    """The values, and the items of those that are lists in their place."""
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def kind(values: list[object]) -> str:
    """What the first of the values is, for people."""
    return TYPES.get(type(values[0]), "a text") if values else "an empty list"
