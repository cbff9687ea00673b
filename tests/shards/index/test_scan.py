"""What is wrong with a shard is found, named and listed, and never costs what is intact."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.index import scan, tar
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.storage.reader import Reader
from tests.helpers.pictures import picture
from tests.helpers.tars import contents, write_tar


def listed(paths, folder, **words):
    """(index, rows of its report)."""
    index = build_index([str(path) for path in paths], folder / "index", report=folder / "report.jsonl", **words)
    return index, [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


def pairs(count):
    return [(f"{i:02d}.{e}", picture(i, 8) if e == "png" else b"text") for i in range(count) for e in ("png", "txt")]


def webdataset_keys(path):
    found = []
    try:
        for sample in webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False):
            found.append(sample["__key__"])
    except Exception:  # a cut inside a file it does notice
        found.append("noticed")
    return found


@pytest.mark.parametrize("where", ["at a member's end", "in a header"])
def test_a_cut_that_webdataset_takes_for_the_end_is_listed(tmp_path, where):
    path = write_tar(tmp_path / "a.tar", pairs(6))
    with open(path, "rb") as file:
        third = [member.start for member in tar.members(tar.Stream(file), None, print) if member.name == "03.png"][0]
    at = third + (0 if where == "at a member's end" else 300)
    path.write_bytes(path.read_bytes()[:at])
    assert webdataset_keys(path) == ["00", "01", "02"]  # and not a word
    with pytest.raises(UserError, match=f"a.tar: cut short.*at byte {third}.*--report"):
        build_index([str(path)], tmp_path / "index")
    index, rows = listed([path], tmp_path)
    assert [key for key, *_ in contents(index)] == ["00", "01", "02"]
    assert [(row["byte"], row["damage"]) for row in rows] == [(third, True)] and "cut short" in rows[0]["reason"]


def test_damage_in_one_shard_costs_nothing_of_the_others(tmp_path):
    good, bad = write_tar(tmp_path / "good.tar", pairs(4)), write_tar(tmp_path / "bad.tar", pairs(4))
    bad.write_bytes(bad.read_bytes()[:2000])
    index, rows = listed([bad, good], tmp_path)
    assert index.counts.tolist() == [1, 4] and {row["shard"] for row in rows} == {str(bad)}
    bad.write_bytes(bad.read_bytes()[:1900])
    with pytest.raises(UserError, match="bad.tar: .*indexed"):
        index.verify()  # the fingerprint is of the damaged bytes: what is trained on cannot change unseen
    assert (
        build_index([str(bad), str(good)], tmp_path / "index", report=tmp_path / "r").fingerprint != index.fingerprint
    )


@settings(max_examples=60)
@given(st.integers(0, 11), st.integers(0, 511), st.integers(1, 255))
def test_a_corrupt_header_costs_its_member_and_no_other(tmp_path_factory, number, byte, change):
    folder = tmp_path_factory.mktemp("corrupt")
    path = write_tar(folder / "a.tar", pairs(6))
    with open(path, "rb") as file:
        starts = [member.start for member in tar.members(tar.Stream(file), None, print)]
    data = bytearray(path.read_bytes())
    data[starts[number] + byte] ^= change
    path.write_bytes(data)
    index, rows = listed([path], folder)
    everything = {name: content for name, content in pairs(6)}
    assert index.samples >= 5 and any(row["damage"] and row["byte"] == starts[number] for row in rows)
    for shard_position, key in enumerate(index.table(0).keys):
        table = index.table(0)
        for members, extension in ((table.image, "png"), (table.texts[0], "txt")):
            offset, size = members.offset[shard_position], members.size[shard_position]
            if size >= 0:
                assert bytes(data[offset : offset + size]) == everything[f"{key}.{extension}"]
            else:
                assert (key, extension) == (f"{number // 2:02d}", ("png", "txt")[number % 2])


def test_archives_that_were_joined_and_blocks_that_became_zeros(tmp_path):
    one, two = write_tar(tmp_path / "1.tar", pairs(2)), write_tar(tmp_path / "2.tar", pairs(4)[4:])
    joined = tmp_path / "joined.tar"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    assert webdataset_keys(joined) == ["00", "01"]
    with pytest.raises(UserError, match="joined.tar: a member behind the end of the archive"):
        build_index([str(joined)], tmp_path / "index")
    assert listed([joined], tmp_path)[0].samples == 4


def test_what_is_lacking_is_counted_and_keeps_its_place(tmp_path):
    members = [("a.png", b"1"), ("b.txt", b"2"), ("c.png", b""), ("c.txt", b""), ("d.png", b"1"), ("d.txt", b"2")]
    path = write_tar(tmp_path / "a.tar", members)
    index = build_index([str(path)], tmp_path / "index")
    assert index.samples == 4
    found = {(finding.position, finding.reason) for finding in index.findings}
    assert len(index.findings) == 4 == len(list(index.findings)) and len(list(index.findings.by_sample())) == 3
    assert found == {(0, "no caption"), (1, "no picture"), (2, "empty picture"), (2, "empty caption")}
    with pytest.raises(UserError, match="none of 2 samples in them has both.*'a': no caption"):
        build_index([str(write_tar(tmp_path / "b.tar", members[:2]))], tmp_path / "index2")


def test_captions_without_a_word_are_counted(tmp_path):
    members = [("a.png", b"1"), ("a.txt", "\ufeff".encode()), ("b.png", b"1"), ("b.txt", "\u200b".encode())]
    path = write_tar(
        tmp_path / "a.tar", [*members, ("c.png", b"1"), ("c.txt", b"\xff"), ("d.png", b"1"), ("d.txt", b"a")]
    )
    index = build_index([str(path)], tmp_path / "index")
    assert [(finding.position, finding.damage) for finding in index.findings] == [(0, False), (1, False), (2, False)]
    reasons = ["caption is blank", "caption holds no word (invisible characters only)", "caption is not UTF-8 (byte 0)"]
    assert [finding.reason for finding in index.findings] == reasons


def test_dots_in_keys_are_never_merged_silently(tmp_path):
    """webdataset makes one sample of these two; here that is refused, or listed."""
    members = [(f"photo.v{i}.{e}", b"x") for i in (1, 2) for e in ("jpg", "txt")] + [("b.jpg", b"1"), ("b.txt", b"2")]
    path = write_tar(tmp_path / "a.tar", members)
    assert webdataset_keys(path) == ["photo", "b"]
    with pytest.raises(
        UserError, match="'photo' has no picture, but a member 'photo.v1.jpg': a key ends at the first dot"
    ):
        build_index([str(path)], tmp_path / "index")
    index, rows = listed([path], tmp_path)
    assert index.table(0).keys == ["photo", "b"] and [row["key"] for row in rows] == ["photo", "photo"]


def test_members_are_named_in_order_of_preference(tmp_path):
    members = [(f"a.{name}", name.encode()) for name in ("png", "input.png", "mask.png", "txt", "outputs.txt")]
    members += [("b.png", b"png"), ("b.txt", b"txt"), ("c.outputs.txt", b""), ("c.txt", b"\xff"), ("c.png", b"1")]
    members += [("d.txt", b"\xff"), ("d.outputs.txt", b"sound"), ("d.png", b"2")]
    path = str(write_tar(tmp_path / "a.tar", members))
    index = build_index([path], tmp_path / "index", image="input.png,png", text="outputs.txt,txt")
    reader = Reader(ShardIndex.load(tmp_path / "index"))
    found = [(reader.image_bytes(0, position), reader.texts(0, position)[0]) for position in range(4)]
    assert found == [(b"input.png", b"outputs.txt"), (b"png", b"txt"), (b"1", b""), (b"2", b"sound")]
    assert [(finding.position, finding.reason) for finding in index.findings] == [(2, "empty caption")]
    other = build_index([path], tmp_path / "other", image="png", text="txt")
    assert contents(other)[0] == ("a", b"png", b"txt") and other.fingerprint != index.fingerprint
    only = build_index([path], tmp_path / "only", image="input.png", text="outputs.txt")
    assert [finding.position for finding in only.findings] == [1, 1, 2, 2, 3]
    only.verify()


@pytest.mark.parametrize("words", [{"image": "PNG"}, {"image": "a,,b"}, {"image": "x", "text": "y,x"}, {"text": "a,"}])
def test_names_of_members_that_are_none(tmp_path, words):
    with pytest.raises(UserError, match=r"--(image|text): got '.*expected"):
        build_index([str(tmp_path)], tmp_path / "index", **words)


@pytest.mark.parametrize("program", ["tar", "bsdtar"])
@pytest.mark.parametrize("words", [["--format=ustar"], ["--format=pax"], ["--format=gnutar"]])
def test_shards_made_by_hand(tmp_path, program, words):
    if not shutil.which(program):
        pytest.skip(f"no {program} here (apt-get install libarchive-tools)")
    if program == "tar":
        words = [word.replace("gnutar", "gnu") for word in words]
    names = ["a", "sub.folder/b", "ключ/ü", "long/" + "x" * 80 + "/" + "y" * 60]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"{name}.JPG").write_bytes(f"picture {name}".encode())
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    files = sorted(f"./{path.relative_to(tmp_path / 'in')}" for path in (tmp_path / "in").rglob("*"))
    command = [
        program,
        *words,
        "--no-recursion" if program == "tar" else "-n",
        "-cf",
        tmp_path / "a.tar",
        "-C",
        tmp_path / "in",
    ]
    subprocess.run([*command, *files], check=True)
    index = build_index([str(tmp_path / "a.tar")], tmp_path / "index")
    found = {key: (image, text.decode()) for key, image, text in contents(index)}
    assert found == {f"./{name}": (f"picture {name}".encode(), name) for name in names}
    theirs = {s["__key__"] for s in webdataset.WebDataset([str(tmp_path / "a.tar")], shardshuffle=False)}
    assert theirs == set(found)


def test_what_macos_leaves_in_tars_is_no_sample(tmp_path):
    names = ["._a.jpg", "a.jpg", "a.txt", "__MACOSX/._a.jpg", "._a.txt", ".DS_Store", "b.JPG", "b.TXT"]
    index = build_index([str(write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names]))], tmp_path / "i")
    assert contents(index) == [("a", b"a.jpg", b"a.txt"), ("b", b"b.JPG", b"b.TXT")] and not index.findings


def test_members_of_a_sample_that_stand_apart_are_named(tmp_path):
    """As `tar -cf a.tar .` leaves them on many file systems; webdataset makes two samples of one."""
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4")])
    with pytest.raises(UserError, match="key 'a' comes twice.*tar --sort=name"):
        build_index([str(path)], tmp_path / "index")
    path = write_tar(
        tmp_path / "a.tar", [("a.jpg", b"1"), ("a.txt", b"3"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.txt", b"4")]
    )
    index, rows = listed([path], tmp_path)
    assert index.table(0).keys == ["a", "b", "a"] and [row["damage"] for row in rows] == [True, False]


def test_captions_from_a_field_of_json(tmp_path):
    good = json.dumps({"caption": "größe", "title": "a", "n": 1}).encode()
    bad = [b"{}", b"[", b'{"caption": 3}', b"[" * 200_000]
    members = [("a.png", b"1"), ("a.json", good), ("a.txt", b"another")]
    for number, data in enumerate(bad):
        members += [(f"b{number}.png", b"1"), (f"b{number}.json", data)]
    path = write_tar(tmp_path / "a.tar", members)
    index = build_index([str(path)], tmp_path / "index", text="json:caption")
    assert contents_of(index, 0) == "größe".encode() and len(index.findings) == len(bad)
    plain = build_index([str(path)], tmp_path / "plain")
    assert contents_of(plain, 0) == b"another" and plain.fingerprint != index.fingerprint
    other = build_index([str(path)], tmp_path / "other", text="json:title")
    assert other.fingerprint != index.fingerprint and len(other.findings) == len(bad)


def test_a_lone_surrogate_in_json_does_not_cost_the_caption(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"1"), ("a.json", b'{"c": "cat\\ud800"}')])
    index = build_index([str(path)], tmp_path / "index", text="json:c")
    assert contents_of(index, 0) == b"cat?" and not index.findings


def test_reasons_are_counted_without_their_numbers(tmp_path):
    members = [("a.png", b"1"), ("a.txt", b"cat\xff"), ("b.png", b"1"), ("b.txt", b"text")]
    (finding,) = build_index([str(write_tar(tmp_path / "a.tar", members))], tmp_path / "index").findings
    assert finding.kind == "caption is not UTF-8 (byte ...)"


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'{"a": 1, "b": 2}', "no field 'caption' in the .json, which has 'a', 'b'"),
        (b"{}", "which has none"),
        (b'{"caption": null}', "field 'caption' is null, expected a text"),
        (b'{"caption": []}', "is an empty list"),
        (b'{"caption": 3}', "is a number"),
        (b'{"caption": {}}', "is a mapping"),
        (b"[1]", "the .json is a list, expected a mapping"),
        (b'{"caption": " "}', "caption is blank"),
        (b"{", "cannot be parsed"),
    ],
)
def test_an_index_of_nothing_usable_says_why(tmp_path, content, reason):
    members = [(f"{i}.{e}", content if e == "json" else b"1") for i in range(3) for e in ("png", "json")]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=f"none of 3 samples.*most often, 3 times: sample '0': .*{re.escape(reason)}"):
        build_index([str(path)], tmp_path / "index", text="json:caption", report=tmp_path / "report")
    assert not (tmp_path / "index" / "index.json").exists()


@pytest.mark.parametrize(
    "pack, said",
    [
        (gzip.compress, "compressed with gzip, unpack it with gunzip"),
        (bz2.compress, "compressed with bzip2"),
        (lzma.compress, "compressed with xz"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "compressed with zstd"),
        (lambda data: b"PK\3\4" + data, "a zip archive"),
        (lambda data: b"PAR1" + data, "a Parquet file"),
        (lambda data: picture(0), "a PNG picture"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (lambda data: b"\n<!DOCTYPE html><p>404</p>", "a web page"),
        (lambda data: b'[{"caption": "a red star"}]', "a JSON file"),
        (lambda data: b"/data/00000.tar\n/data/00001.tar\n", "a text file"),
    ],
)
def test_a_file_that_is_no_tar_is_called_what_it_is(tmp_path, pack, said):
    sound, other = write_tar(tmp_path / "a.tar", pairs(2)), tmp_path / "b.tar"
    other.write_bytes(pack(sound.read_bytes()))
    with pytest.raises(UserError, match=f"b.tar: no tar: {said}") as error:
        build_index([str(sound), str(other)], tmp_path / "index")
    assert "fetch or write" not in str(error.value)
    assert listed([sound, other], tmp_path)[0].counts.tolist() == [2, 0]


@given(st.binary(max_size=20) | st.lists(st.sampled_from([b"\\", b"x", b"e9", b"\xe9", "é".encode()])).map(b"".join))
def test_a_key_of_any_bytes_can_be_had_back(data):
    key = data.decode("utf-8", "surrogateescape")
    text = tar.key_text(key)
    assert tar.key_of(text) == key
    text.encode()  # it can be stored
    assert text == key or "\\" in key or key.isprintable() is False


def test_a_folder_is_no_shard(tmp_path):
    with pytest.raises(UserError, match=f"shard {tmp_path}: a folder; name the shards in it"):
        build_index([str(tmp_path)], tmp_path / "index")


def test_members_that_are_not_read_are_named(tmp_path):
    path = tmp_path / "a.tar"
    links = {"b.png": (tarfile.LNKTYPE, "a hard link"), "c.jpg": (tarfile.SYMTYPE, "a symbolic link")}
    with tarfile.open(path, "w") as file:
        for name in ("a.png", "a.txt", "b.png", "b.txt", "c.jpg", "c.txt", "d.gif", "d.txt"):
            member = tarfile.TarInfo(name)
            member.size = 0 if name in links else 5
            if name in links:
                member.type, member.linkname = links[name][0], "a.png"
            file.addfile(member, io.BytesIO(b"hello"))
    index, rows = listed([path], tmp_path)
    assert index.table(0).keys == ["a", "b", "c", "d"] and [row["key"] for row in rows] == ["b", "c", "d"]
    for row, (name, what) in zip(rows, [*links.items(), ("d.gif", ("", "not read"))]):
        assert f"'{name}' is {what[1]}" in row["reason"] and row["reason"].endswith("expected KEY.jpg, jpeg, png, webp")


@pytest.mark.parametrize("words", [["--format=gnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.1"]])
def test_sparse_files_are_named_and_cost_nothing_else(tmp_path, words):
    with open(tmp_path / "b.png", "wb") as file:  # more segments than fit the first header
        for segment in range(9):
            file.seek(segment << 20)
            file.write(b"hello")
    for name in ("a.png", "a.txt", "b.txt", "c.png", "c.txt"):
        (tmp_path / name).write_bytes(b"words")
    names = ["a.png", "a.txt", "b.png", "b.txt", "c.png", "c.txt"]
    made = subprocess.run(["tar", "-S", *words, "-cf", "a.tar", *names], cwd=tmp_path, capture_output=True)
    if made.returncode:
        pytest.skip("no GNU tar here")
    index, rows = listed([tmp_path / "a.tar"], tmp_path)
    assert index.table(0).keys == ["a", "b", "c"] and Reader(index).texts(0, 2)[0] == b"words"
    if (tmp_path / "b.png").stat().st_blocks * 512 < 9 << 20:  # the file system keeps holes
        assert [row["reason"].partition(";")[2].partition(":")[0] for row in rows] == [" 'b.png' is sparse"]


def contents_of(index, position):
    return Reader(index).texts(0, position)[0]


def test_only_new_and_changed_shards_are_read(make_shards, tmp_path, monkeypatch):
    paths = [str(path) for path in make_shards([2, 3, 1, 4])]
    read, original = [], scan.TarSamples
    monkeypatch.setattr(scan, "TarSamples", lambda path, *rest: (read.append(path), original(path, *rest))[1])

    def index(paths, **words):
        read.clear()
        return build_index(paths, tmp_path / "index", workers=1, **words), list(read)

    first, seen = index(paths[:3])
    assert seen == paths[:3]
    assert index(paths[:3])[1] == []
    more, seen = index(paths[::-1])  # in another order, and one more
    assert seen == [paths[3]] and more.counts.tolist() == [4, 1, 3, 2]
    assert contents(more) == contents(build_index(paths[::-1], tmp_path / "fresh"))
    os.utime(paths[1], ns=(0, 0))
    again, seen = index(paths[:3])
    assert seen == [paths[1]] and again.fingerprint == first.fingerprint
    tables = list((tmp_path / "index" / "tables").iterdir())
    assert len(tables) == 5  # what was named until now may still be read
    for table in tables:
        os.utime(table, (0, 0))
    assert index(paths[:3])[1] == []
    assert len(list((tmp_path / "index" / "tables").iterdir())) == 3
    shutil.copyfile(paths[3], paths[2])
    changed, seen = index(paths[:3])
    assert seen == [paths[2]] and changed.fingerprint != first.fingerprint and changed.counts.tolist() == [2, 3, 4]
    assert index(paths[:3], text="cls")[1] == paths[:3]


def test_damage_is_remembered_with_the_table(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(3))
    path.write_bytes(path.read_bytes()[:3000])
    _, rows = listed([path], tmp_path)
    assert listed([path], tmp_path)[1] == rows
    with pytest.raises(UserError, match="cut short"):
        build_index([str(path)], tmp_path / "index")


def test_what_img2dataset_says_it_downloaded_is_missed(tmp_path):
    path = write_tar(tmp_path / "00000.tar", pairs(3))
    table = {"key": ["00", "01", "02", "03", "04"], "status": ["success"] * 4 + ["failed_to_download"]}
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    assert [(row["key"], row["damage"]) for row in listed([path], tmp_path)[1]] == [("03", False)]
    pq.write_table(pa.table({"other": [1]}), tmp_path / "00000.parquet")
    shutil.rmtree(tmp_path / "index")
    assert listed([path], tmp_path)[1] == []


@settings(max_examples=80)
@given(st.data())
def test_no_bytes_make_it_fail_in_another_way(tmp_path_factory, data):
    """Whatever is done to a tar: an index with a report, or a UserError, and what it points at lies inside the file."""
    folder = tmp_path_factory.mktemp("fuzz")
    names = [("a.png", b"1" * 600), ("ü" * 60 + ".txt", b"2"), ("a.txt", b"3"), ("b.jpg", b"4"), ("b.txt", b"5")]
    form = data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    content = bytearray(write_tar(folder / "a.tar", names, form).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (folder / "a.tar").write_bytes(content)
    try:
        index = build_index([str(folder / "a.tar")], folder / "index", report=folder / "r")
    except UserError:
        return
    table = ShardIndex.load(folder / "index").table(0)
    assert len(table.keys) == index.samples
    for member in (table.image, *table.texts):
        assert ((member.offset + member.size <= len(content)) & (member.offset >= 0)).all()
