"""Lists and folders become shards; a bad row is named and costs nobody else; what was interrupted resumes."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.build import make
from shards.build.ingest import from_csv, from_folder
from shards.build.rows import read_records
from shards.errors import UserError
from shards.index.build_index import build_index
from tests.helpers.pictures import picture
from tests.helpers.tars import contents


@pytest.fixture
def folder(tmp_path):
    """pictures/ with a picture of each kind, one that is none, and an empty one."""
    for number, kind in enumerate(("png", "jpeg", "webp")):
        path = tmp_path / "pictures" / "sub.dir" / f"{number}.v1.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    (tmp_path / "pictures" / "none.jpg").write_bytes(b"root:x:0:0")
    (tmp_path / "pictures" / "empty.png").write_bytes(b"")
    return tmp_path


def made(out):
    """[(picture, caption)] as they are read, and the bad rows."""
    shards = sorted(str(path) for path in out.glob("*.tar"))
    index = build_index(shards, out / "index", workers=1)
    bad = [json.loads(line) for path in sorted(out.glob("*.bad.jsonl")) for line in path.read_text().splitlines()]
    return [(image, text.decode()) for _, image, text in contents(index)], bad


LISTS = {
    "safeclip": ("path,caption\n", ",", {}),
    "safeclip with TABs": ("path\tcaption\n", "\t", {}),
    "open_clip": ("filepath\ttitle\n", "\t", {}),
    "with names of its own": ("picture;text\n", ";", {"path": "picture", "caption": "text", "separator": ";"}),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list(folder, name):
    header, separator, words = LISTS[name]
    rows = [
        ("pictures/sub.dir/0.v1.png", '"one, two; three"' if separator != "\t" else "one, two; three"),
        ("pictures/none.jpg", "no picture"),
        ("pictures/missing.png", "not there"),
        ("https://example.org/a.jpg", "a URL"),
        ("pictures/sub.dir/1.v1.jpeg", '"größe\n2"'),
        ("pictures/empty.png", "empty"),
        ("pictures/sub.dir/2.v1.webp", '"open'),
        ("pictures/sub.dir/2.v1.webp", "   "),
        ("pictures", "a folder"),
        (str(folder / "pictures/sub.dir/0.v1.png"), "absolute"),
    ]
    (folder / "list.csv").write_text(header + "".join(separator.join(row) + "\n" for row in rows) + "alone\n")
    text = from_csv(folder / "list.csv", folder / "out", **words, per_shard=4, workers=1)
    assert "4 pairs in 3 shards; 7 rows could not be used" in text and "{00000..00002}.tar" in text
    pairs, bad = made(folder / "out")
    sub = folder / "pictures" / "sub.dir"
    assert pairs == [
        ((sub / "0.v1.png").read_bytes(), "one, two; three"),
        ((sub / "1.v1.jpeg").read_bytes(), "größe\n2"),
        ((sub / "2.v1.webp").read_bytes(), '"open'),
        ((sub / "0.v1.png").read_bytes(), "absolute"),
    ]
    assert [row["line"] for row in bad] == [3, 4, 5, 8, 10, 11, 13]
    reasons = [row["reason"] for row in bad]
    assert "no JPEG" in reasons[0] and "No such file" in reasons[1] and "URL" in reasons[2] and "blank" in reasons[4]
    assert "1 columns, the header has 2" in reasons[6]


def test_it_resumes_where_it_was_interrupted_and_is_the_same(folder, monkeypatch):
    lines = "".join(f"pictures/sub.dir/{i % 3}.v1.{('png', 'jpeg', 'webp')[i % 3]},caption {i}\n" for i in range(10))
    (folder / "list.csv").write_text("path,caption\n" + lines + "pictures/none.jpg,x\n")
    whole = from_csv(folder / "list.csv", folder / "whole", per_shard=3, workers=1)
    from_csv(folder / "list.csv", folder / "out", per_shard=3, workers=1)
    (folder / "out" / "00001.tar").unlink()
    written, original = [], make.sample
    monkeypatch.setattr(make, "ProcessPoolExecutor", ingest_threads)
    monkeypatch.setattr(make, "sample", lambda *row: (written.append(row), original(*row))[1])
    again = from_csv(folder / "list.csv", folder / "out", per_shard=3)
    assert again.replace("/out", "/whole") == whole and [row[1] for row in written] == [
        f"caption {i}" for i in (3, 4, 5)
    ]
    for path in (folder / "whole").glob("*.*"):
        assert path.read_bytes() == (folder / "out" / path.name).read_bytes()
    with pytest.raises(UserError, match="--out .*holds"):
        from_csv(folder / "list.csv", folder / "out", per_shard=4)
    (folder / "list.csv").write_text("path,caption\npictures/sub.dir/0.v1.png,other\n")
    with pytest.raises(UserError, match="--out .*holds"):
        from_csv(folder / "list.csv", folder / "out", per_shard=3)


def ingest_threads(workers):
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(1)


def test_mistakes_are_named(folder):
    (folder / "list.csv").write_text("url,caption\nx,y\n")
    with pytest.raises(UserError, match="no column path or filepath or image in the header"):
        from_csv(folder / "list.csv", folder / "out")
    with pytest.raises(UserError, match="nowhere.csv: No such file"):
        from_csv(folder / "nowhere.csv", folder / "out")
    with pytest.raises(UserError, match="no KEY.txt beside any picture.*--classes"):
        from_folder(folder / "pictures", folder / "out")
    with pytest.raises(UserError, match="missing"):
        from_folder(folder / "nothing", folder / "out")
    for separator in ("ab", '"', "\n"):
        with pytest.raises(UserError, match="^--separator: got .*expected one character"):
            from_csv(folder / "list.csv", folder / "out", separator=separator)
    assert not (folder / "out").exists()


def test_a_folder_with_captions_beside(folder):
    sub = folder / "pictures" / "sub.dir"
    (sub / "0.v1.txt").write_text("zero")
    (sub / "2.v1.txt").write_bytes(b"\xff")
    from_folder(folder / "pictures", folder / "out", workers=1)
    pairs, bad = made(folder / "out")
    assert pairs == [((sub / "0.v1.png").read_bytes(), "zero")]
    assert [os.path.basename(row["path"]) for row in bad] == ["empty.png", "none.jpg", "1.v1.jpeg", "2.v1.webp"]


def test_a_folder_a_class(folder):
    (folder / "pictures" / "red_fox" / "old").mkdir(parents=True)
    (folder / "pictures" / "red_fox" / "old" / "x.png").write_bytes(picture(1))
    from_folder(folder / "pictures", folder / "out", classes=True, workers=1)
    pairs, bad = made(folder / "out")
    assert [caption for _, caption in pairs] == ["red fox", "sub.dir", "sub.dir", "sub.dir"] and len(bad) == 2
    assert (folder / "out" / "classnames.txt").read_text() == "red fox\nsub.dir\n"
    labels = build_index([str(folder / "out" / "00000.tar")], folder / "labels", text="cls")
    assert [text for *_, text in contents(labels)] == [b"0", b"1", b"1", b"1"]


def test_a_class_whose_name_is_not_utf8(tmp_path):
    place = tmp_path / "pictures" / os.fsdecode(b"f\xfcchse_\xe4")
    place.mkdir(parents=True)
    (place / "x.png").write_bytes(picture(1))
    from_folder(tmp_path / "pictures", tmp_path / "out", classes=True, workers=1)
    assert [caption for _, caption in made(tmp_path / "out")[0]] == [r"f\xfcchse \xe4"]
    assert (tmp_path / "out" / "classnames.txt").read_text() == "f\\xfcchse \\xe4\n"


@settings(max_examples=300)
@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=12)), min_size=1), st.sampled_from(",\t"))
def test_what_a_csv_writer_wrote_is_read(rows, separator):
    import csv
    import io

    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator, lineterminator="\n", quoting=csv.QUOTE_ALL)
    rows = [tuple(field.replace("\0", "").replace("\r", "") for field in row) for row in rows]
    writer.writerows([("path", "caption"), *rows])
    found = [fields for _, fields, _ in read_records(io.BytesIO(file.getvalue().encode("utf-8", "replace")))]
    expected = [[field.encode("utf-8", "replace").decode() for field in row] for row in rows]
    assert found == [["path", "caption"], *expected]


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=30).filter(lambda b: b"\n" not in b), max_size=12), st.integers(0, 11))
def test_no_row_swallows_another(rows, place):
    """A sound row is read, whatever stands in the rows around it; only a closed quote may join lines."""
    rows = [row.replace(b'"', b"") if place != i else row for i, row in enumerate(rows)]
    content = b"path,caption\n" + b"".join(row + b"\n" for row in rows) + b"x.png,sound\n"
    assert [fields for _, fields, _ in read_records(content.splitlines(keepends=True), ",")][-1] == ["x.png", "sound"]


def test_a_list_of_which_nothing_can_be_used_is_refused_and_may_be_mended(folder):
    file, out = folder / "list.csv", folder / "out"
    file.write_text("path,caption\n")
    with pytest.raises(UserError, match="list.csv: no rows in it"):
        from_csv(file, out, workers=1)
    file.write_text("path,caption\nsub.dir/0.v1.png,a dog\nsub.dir/1.v1.jpeg,a cat\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of 2 rows.*first \(line 2\): .*No such file.*--root"):
            from_csv(file, out, workers=1)
    assert len((out / "00000.bad.jsonl").read_text().splitlines()) == 2
    assert "2 pairs in 1 shards;" in from_csv(file, out, root=str(folder / "pictures"), workers=1)
    assert made(out)[1] == []


def test_links_are_followed_and_what_is_hidden_is_left_out(folder):
    for name in ("cat/1", "__MACOSX/2", "@eaDir/5", ".cache/3", "cat/._1", "../elsewhere/4"):
        path = folder / "classes" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(int(name[-1])))
    (folder / "classes" / "fox").symlink_to("../elsewhere")
    (folder / "classes" / "cat" / "up").symlink_to("..")  # no end
    (folder / "elsewhere" / "cats").symlink_to("../classes/cat")
    text = from_folder(folder / "classes", folder / "out", classes=True, workers=1)
    assert "5 hidden files or folders were left out" in text  # one is seen by two ways
    assert (folder / "out" / "classnames.txt").read_text() == "cat\nfox\n"
    pairs = made(folder / "out")[0]
    assert {(image, caption) for image, caption in pairs} == {
        (picture(1), "cat"),
        (picture(4), "fox"),
        (picture(1), "fox"),
    }
    assert len(pairs) == 3


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    monkeypatch.setattr(os, "scandir", lambda path: os.listdir(folder / "missing"))
    with pytest.raises(UserError, match="missing: No such file"):
        from_folder(folder / "pictures", folder / "out")
