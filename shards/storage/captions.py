"""What a usable caption is, and the text of a field of a .json member."""

import html
import json
import re
import unicodedata

from shards.errors import BadSample

MAX_TEXT = 1 << 20  # bytes of a caption or a .json member; more is not read
# A letter or a digit that no normalising removes: not of an entity, a terminal escape or a tokenizer's own word.
# U+FF06 and U+FF1C are the fullwidth & and <, which become the plain ones.
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
    return category[0] in "LNPS" or category == "Co"


def json_field(data: bytes, field: str) -> bytes:
    """The text (UTF-8) in a field of a JSON object; a lone surrogate in it becomes a question mark. Raises
    BadSample."""
    if len(data) > MAX_TEXT:
        raise BadSample(f"caption: .json of more than {MAX_TEXT} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise BadSample("caption: the .json cannot be parsed") from None
    if not isinstance(found, dict):
        raise BadSample(f"caption: the .json is {TYPES.get(type(found), 'a text')}, expected a mapping")
    if field not in found:
        names = ", ".join(f"'{name:.40}'" for name in list(found)[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
        raise BadSample(f"caption: no field {field!r} in the .json, which has {names or 'none'}")
    text = found[field]
    if not isinstance(text, str):
        raise BadSample(f"caption: field {field!r} is {TYPES[type(text)]}, expected a text")
    return text.encode("utf-8", "replace")
