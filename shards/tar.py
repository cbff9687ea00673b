"""Walk the members of a tar and notice every kind of damage.

Readers of tar streams take a cut or a corrupt header for the end of the archive and lose the rest silently. Here the archive
ends where its end-of-archive block says so, and nowhere else.
"""

import tarfile

from shards.errors import UserError

BLOCK = 512
MAX_EXTENSION = 1 << 20  # bytes of a long name or of PAX records; more is an attack


def members(path, size, read):
    """Yield (name, offset, size in bytes) of the regular files in a tar of `size` bytes.

    `read(n)` gives the next n bytes (fewer only at the end). Names may be GNU or PAX long names. Raises UserError naming the
    file, the byte and the mend: cut in a header or a member, no end-of-archive, corrupt header.
    """
    at, long_name, pax = 0, None, {}

    def damaged(what):
        return UserError(
            f"shard {path}: {what} at byte {at} of {size}; fetch or write the shard again, or leave it out"
        )

    while True:
        header = read(BLOCK)
        if len(header) < BLOCK:
            raise damaged("cut short (no end-of-archive)" if not header else "cut short in a header")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:
            while read(1 << 20):  # what follows the end belongs to the fingerprint, not to the archive
                pass
            return
        except tarfile.HeaderError as error:
            raise damaged(f"corrupt header ({error})") from None
        start = at + BLOCK
        length = int(pax.get("size", info.size)) if info.isreg() or info.type in EXTENSIONS else 0
        padded = -(-length // BLOCK) * BLOCK
        if length < 0 or start + padded > size:
            raise damaged(f"member {info.name!r} of {length} bytes is cut short")
        if info.type in EXTENSIONS:
            if length > MAX_EXTENSION:
                raise damaged(f"a name of {length} bytes, expected at most {MAX_EXTENSION}")
            payload = read(padded)[:length]
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                pax = pax_records(payload)
        else:
            if info.isreg():
                yield long_name or pax.get("path") or info.name, start, length
            skip(read, padded)
            long_name, pax = None, {}
        at = start + padded


EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)


def sample_of(name):
    """(key, extension in lower case) of a member's name, or (None, None) where it is of no sample.

    webdataset's rule: the key ends at the first dot of the base name.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else (None, None)


def pax_records(payload):
    """dict of the "length key=value" records of a PAX header; what is malformed is left out."""
    records = {}
    while payload:
        digits, space, _ = payload.partition(b" ")
        if not space or not digits.isdigit() or not len(digits) < int(digits) <= len(payload):
            break
        key, _, value = payload[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        payload = payload[int(digits) :]
    if not records.get("size", "0").isdigit():
        del records["size"]
    return records


def skip(read, count):
    """Read `count` bytes in pieces and forget them."""
    while count:
        count -= len(read(min(count, 1 << 20)))
