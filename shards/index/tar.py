"""Walk the members of a tar and notice every kind of damage.

Readers of tar streams take a cut or a corrupt header for the end of the archive and lose the rest silently. Here the
archive ends where its end-of-archive block says so and nothing stands behind it, and behind damage the next sound
header is looked for.
"""

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shards.storage.protocols import Readable

BLOCK = 512
MAX_EXTENSION = 1 << 20  # bytes of a long name or of PAX records; more is an attack
NO_TAR = "no tar: "  # begins what is said of another kind of file
MAGIC = {
    b"\x1f\x8b": "compressed with gzip, unpack it with gunzip",
    b"BZh": "compressed with bzip2, unpack it with bunzip2",
    b"\xfd7zXZ\0": "compressed with xz, unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd, unpack it with unzstd",
    b"PK\3\4": "a zip archive, pack its files with tar",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive, pack its files with tar",
    b"PAR1": "a Parquet file",
    b"\x89PNG\r\n": "a PNG picture, pack pictures and captions with tar",
    b"\xff\xd8\xff": "a JPEG picture, pack pictures and captions with tar",
    b"version https://git-lfs": "a Git LFS pointer, get the file itself with git lfs pull",
    b"<!doctype html": "a web page, such as a server's message; fetch the file itself",
    b"<html": "a web page, such as a server's message; fetch the file itself",
    b"{": "a JSON file",
    b"[": "a JSON file",
}
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """A regular file. Bytes start to stop of the tar: its headers, content and padding; offset and length: its
    content."""

    name: str
    start: int
    stop: int
    offset: int
    length: int


class Stream:
    """A file that is read once. position: bytes so far; fingerprint(): their BLAKE2b-128 in hex."""

    def __init__(self, file: Readable):
        self.file, self.position, self.digest = file, 0, hashlib.blake2b(digest_size=16)

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end."""
        data = self.file.read(count)
        self.position += len(data)
        self.digest.update(data)
        return data

    def skip_to(self, position: int) -> None:
        """Read on to `position`, or to the end, and forget what stands between."""
        while self.position < position and self.read(min(position - self.position, 1 << 20)):
            pass

    def fingerprint(self) -> str:
        return self.digest.hexdigest()


def members(
    stream: Stream,
    size: int | None,
    damaged: Callable[[int, str | None, str], None],
    skipped: Callable[[int, str, str], None] = lambda byte, name, what: None,
) -> Iterator[Member]:
    """Yield the Members of a tar of `size` bytes (None: not known) from a Stream, which the caller may read on in a
    member's content.

    Names may be GNU or PAX long names. `damaged(byte, name, what)` is told of each damage (name: of the member that is
    lost, or None): cut in a header or a member, no end-of-archive, corrupt header, members behind the end. The walk
    then continues with the next sound header. `skipped(byte, name, what)` is told of links and sparse files, which are
    not yielded.
    """
    at, start, long_name, searching, ended = 0, 0, None, False, False
    pax: dict[str, str] = {}
    while header := stream.read(BLOCK):
        info, wrong = read_header(header)
        if searching or ended:  # for a header; what is none is content of a lost member, or padding behind the end
            if info is None or header[257:262] != b"ustar":
                at = stream.position
                continue
            if ended:
                damaged(
                    at, None, "a member behind the end of the archive (a block of zeros, or archives that were joined)"
                )
            start, long_name, pax, searching, ended = at, None, {}, False, False
        elif info is None:
            if at == 0 and wrong:
                wrong = other_file(header) or wrong
            ended, searching = wrong is None, wrong is not None
            if searching:
                damaged(at, None, wrong)
            at = stream.position
            continue
        length = int(pax.get("size", info.size)) if info.isreg() or info.type in EXTENSIONS else 0
        sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in pax)
        content = at + BLOCK
        more = info.type == tarfile.GNUTYPE_SPARSE and header[482]
        while more:  # of the list of segments
            block = stream.read(BLOCK)
            content, more = content + BLOCK, len(block) == BLOCK and block[504]
        stop = content + -(-length // BLOCK) * BLOCK
        if length < 0 or size is not None and stop > size:
            damaged(at, info.name, f"member {info.name!r} of {length} bytes is cut short")
            at, searching = stream.position, True
            continue
        if info.type in EXTENSIONS:
            if length > MAX_EXTENSION:
                damaged(at, None, f"a name of {length} bytes, expected at most {MAX_EXTENSION}")
            else:
                payload = stream.read(length)
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    long_name = payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif info.type == tarfile.XHDTYPE:
                    pax = pax_records(payload)
        else:
            name = long_name or pax.get("GNU.sparse.name") or pax.get("path") or info.name
            if sparse:
                skipped(at, name, "sparse: pack it without --sparse")
            elif info.islnk() or info.issym():
                kind = "a hard link" if info.islnk() else "a symbolic link"
                skipped(at, name, f"{kind}: pack the file itself with tar --dereference --hard-dereference")
            elif info.isreg():
                yield Member(name, start, stop, content, length)
                start = stop
            long_name, pax = None, {}
        stream.skip_to(stop)
        if stream.position < stop:
            damaged(at, info.name, f"member {info.name!r} of {length} bytes is cut short")
            return
        at = stop
    if not searching and not ended:
        damaged(at, None, "cut short (no end-of-archive)" if at else "cut short (an empty file)")


def other_file(start: bytes) -> str | None:
    """What a file is whose first block is no header; None where it may be a damaged tar."""
    plain = start.lstrip().lower()
    known = next((what for magic, what in MAGIC.items() if start.startswith(magic) or plain.startswith(magic)), None)
    if known is None:
        try:  # of a cut block up to its last line: the cut may be in a character
            text = (start if len(start) < BLOCK else start[: start.rfind(b"\n") + 1]).decode("utf-8")
        except UnicodeDecodeError:
            return None
        if not text or not text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
            return None
        known = "a text file, name a list of shards LIST.txt or @LIST"
    return NO_TAR + known


def read_header(block: bytes) -> tuple[tarfile.TarInfo | None, str | None]:
    """(TarInfo, None), or (None, what is wrong with it); (None, None) for the block of zeros that ends an archive."""
    if len(block) < BLOCK:
        return None, "cut short in a header"
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"), None
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the standard library's stubs lack it
        return None, None
    except tarfile.HeaderError as error:
        return None, f"corrupt header ({error})"


def sample_of(name: str) -> tuple[str | None, str | None]:
    """(key, extension in lower case) of a member's name, or (None, None) where it is of no sample.

    webdataset's rule: the key ends at the first dot of the base name.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else (None, None)


def key_text(key: str) -> str:
    r"""A key as text that can be stored and printed. Bytes that are not UTF-8 become \xHH; a backslash that already
    begins such an escape becomes \x5c. `key_of` undoes it."""
    return re.sub("[\udc80-\udcff]|\\\\(?=x[0-9a-f]{2})", lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", key)


def key_of(text: str) -> str:
    """The key that `key_text` has written, with surrogate escapes (PEP 383), as webdataset reads it."""
    data = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), text.encode())
    return data.decode("utf-8", "surrogateescape")


def pax_records(payload: bytes) -> dict[str, str]:
    """The "length key=value" records of a PAX header; what is malformed is left out."""
    records = {}
    while payload:
        digits, space, _ = payload.partition(b" ")
        if not re.fullmatch(b"[0-9]{1,9}", digits) or not space or not len(digits) < int(digits) <= len(payload):
            break
        key, _, value = payload[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        payload = payload[int(digits) :]
    if not re.fullmatch("[0-9]{1,19}", records.get("size", "0")):
        del records["size"]
    return records
