"""The samples of one tar: where their picture and captions stand, and what is wrong with them."""

import zlib

import pyarrow as pa

from shards.errors import BadSample
from shards.index import tar
from shards.index.findings import Finding
from shards.storage.captions import MAX_TEXT, Source, read_caption, sources, usable

PICTURES = ("jpg", "jpeg", "png", "webp")
SHOWN = 3  # members that a reason names
MISSING = -1  # size of a member that the sample does not have
MEMBER = {"offset": pa.int64(), "size": pa.int64(), "crc": pa.uint32()}  # crc: CRC-32 of the content
ABSENT = {"offset": 0, "size": MISSING, "crc": 0}


class TarSamples:
    """The samples of the tar at `path`, in order. rows: as the columns of its table; findings: what is wrong.

    A new key begins a new sample. text, image: names of members, as given to `safeclip index`.
    """

    def __init__(self, path: str, text: str, image: str):
        self.path, self.image_named, self.texts = path, bool(image), texts_of(text)
        self.names = {"image": tuple(image.split(",")) if image else PICTURES}  # of members, by kind
        self.names |= {kind: source.members for kind, source in self.texts.items()}
        self.kinds_of: dict[str, list[str]] = {}
        for kind, names in self.names.items():
            for name in names:
                self.kinds_of.setdefault(name, []).append(kind)
        self.rows: list[dict] = []
        self.findings: list[Finding] = []
        self.seen: set[str] = set()
        self.rank_of: dict[str, int] = {}  # by kind: rank of the member that the last sample has
        self.wrong: dict[tuple[int, str], tuple[int, str]] = {}  # by position and kind: byte, and why it cannot be used
        self.dotted: dict[tuple[int, str], tar.Member] = {}  # by position and picture or caption
        self.unread: dict[str, list[str]] = {}  # by key: members that are not read, and why

    def read(self, stream: tar.Stream, size: int | None) -> None:
        """All samples of a tar of `size` bytes (None: not known)."""
        for member in tar.members(stream, size, self.damaged, self.skipped):
            key, extension = tar.sample_of(member.name)
            if key is not None:
                self.begin(key, member)
                kinds = self.kinds_to_take(key, extension, member)
                if kinds:
                    self.take(member, kinds, stream)
        for position in range(len(self.rows)):
            for what, kinds in (("picture", ["image"]), ("caption", list(self.texts))):
                self.judge(position, what, kinds)

    def begin(self, key: str, member: tar.Member) -> None:
        """Begin a new sample, if the member is of another key than the last one."""
        if self.rows and key == self.rows[-1]["key"]:
            return
        if key in self.seen:
            reason = f"key {key!r} comes twice (the members of a sample must stand together: tar --sort=name)"
            self.find(member.offset, key, reason, True, len(self.rows))
        self.seen.add(key)
        self.rank_of = {}
        self.rows.append({"key": key} | {f"{kind}_{part}": ABSENT[part] for kind in self.names for part in MEMBER})

    def kinds_to_take(self, key: str, extension: str, member: tar.Member) -> list[str]:
        """What the member is of the last sample: image, text, text1 ..."""
        if extension not in self.kinds_of:
            last = self.kinds_of.get(extension.rpartition(".")[2])
            if last and "." in extension:
                self.dotted.setdefault((len(self.rows) - 1, self.said(last[0])), member)
            self.unread.setdefault(key, []).append(f"{member.name!r} is not read")
            return []
        kinds = []
        for kind in self.kinds_of[extension]:
            # Of two members the one that is named first is read; without names two pictures are a mistake.
            rank = self.names[kind].index(extension) if self.image_named or kind in self.texts else 0
            if rank < self.rank_of.get(kind, len(self.names[kind])):
                self.rank_of[kind] = rank
                kinds.append(kind)
            elif rank == self.rank_of[kind]:
                what = "text" if kind in self.texts else "image"
                self.find(member.offset, key, f"sample {key!r} has two {what} members", True, len(self.rows) - 1)
        return kinds

    def take(self, member: tar.Member, kinds: list[str], stream: tar.Stream) -> None:
        """Read a member of the last sample from the stream."""
        row, position = self.rows[-1], len(self.rows) - 1
        data = stream.read(min(member.length, MAX_TEXT + 1)) if self.texts.keys() & kinds else b""
        crc = checksum(stream, data, member.length)
        for kind in kinds:
            row |= {f"{kind}_offset": member.offset, f"{kind}_size": member.length, f"{kind}_crc": crc}
            self.wrong.pop((position, kind), None)
            try:
                if not member.length:
                    raise BadSample(f"empty {self.said(kind)}")
                if kind in self.texts:
                    usable(self.texts[kind].texts(data), read_caption)
            except BadSample as error:
                self.wrong[position, kind] = member.offset, str(error)

    def judge(self, position: int, what: str, kinds: list[str]) -> None:
        """A finding, if a sample has no usable picture or caption (`what`, of one of the `kinds`)."""
        row = self.rows[position]
        key = row["key"]
        there = [kind for kind in kinds if row[f"{kind}_size"] != MISSING]
        faults = [self.wrong[position, kind] for kind in there if (position, kind) in self.wrong]
        other = self.dotted.get((position, what))
        if len(faults) < len(there):
            return
        if faults:
            byte, reason = faults[0]
            self.find(byte, key, reason, False, position, True)
        elif other:
            reason = (
                f"sample {key!r} has no {what}, but a member {other.name!r}: "
                "a key ends at the first dot of the base name (--image and --text name what stands behind it)"
            )
            self.find(other.offset, key, reason, True, position, True)
        else:
            reason = f"no {what}"
            if key in self.unread:
                expected = dict.fromkeys(name for kind in kinds for name in self.names[kind])
                reason = "; ".join([reason, *self.unread[key][:SHOWN], f"expected KEY.{', '.join(expected)}"])
            self.find(max(row[f"{kind}_offset"] for kind in self.names), key, reason, False, position, True)

    def find(
        self, byte: int, key: str | None, reason: str, damage: bool, position: int | None = None, unusable: bool = False
    ) -> None:
        text = key and tar.key_text(key)
        self.findings.append(Finding(self.path, byte, position, text, reason, damage, unusable))

    def damaged(self, byte: int, name: str | None, what: str) -> None:
        self.find(byte, tar.sample_of(name)[0] if name else None, what, True)

    def skipped(self, byte: int, name: str, what: str) -> None:
        key, _ = tar.sample_of(name)
        if key is not None:
            self.unread.setdefault(key, []).append(f"{name!r} is {what}")

    def said(self, kind: str) -> str:
        return "caption" if kind in self.texts else "picture"


def texts_of(text: str) -> dict[str, Source]:
    """The sources that `--text` names, by the name of their columns in a table: text, text1, text2, ..."""
    return {f"text{number or ''}": source for number, source in enumerate(sources(text))}


def checksum(stream: tar.Stream, data: bytes, length: int) -> int:
    """CRC-32 of a member of `length` bytes, the first of which were read from the stream as `data`."""
    crc, left = zlib.crc32(data), length - len(data)
    while left and (block := stream.read(min(left, 1 << 20))):
        crc, left = zlib.crc32(block, crc), left - len(block)
    return crc
