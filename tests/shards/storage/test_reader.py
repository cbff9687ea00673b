"""A local shard that cannot be read for a moment is opened anew and read again."""

import errno
import os

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.errors import ChangedShard, Unreachable
from shards.index.build_index import build_index
from shards.storage import files
from shards.storage.reader import Reader


@pytest.fixture
def index(make_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAITS", (0.01, 0.01, 0.01), raising=False)
    return build_index([str(path) for path in make_shards([3])], tmp_path / "index")


def failing(monkeypatch, module, name, times):
    """The first calls of a function raise EIO; a list that grows with each."""
    original, calls = getattr(module, name), []

    def function(*args, **options):
        calls.append(args)
        if len(calls) <= times:
            raise OSError(errno.EIO, "Input/output error")
        return original(*args, **options)

    monkeypatch.setattr(module, name, function)
    return calls


def test_a_read_that_fails_is_tried_again_with_the_file_opened_anew(index, monkeypatch):
    reader = Reader(index)
    expected = [reader.image_bytes(0, position) for position in range(3)]
    reads, opened = failing(monkeypatch, os, "pread", 2), failing(monkeypatch, os, "open", 0)
    assert [reader.image_bytes(0, position) for position in range(3)] == expected
    assert (len(reads), len(opened), len(reader.files)) == (5, 2, 1)


@given(most=st.integers(1, 3000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reads_that_give_less_than_they_were_asked_for(index, most):
    expected, pread = [Reader(index).image_bytes(0, position) for position in range(3)], os.pread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, most), offset))
        assert [Reader(index).image_bytes(0, position) for position in range(3)] == expected


def test_a_shard_that_cannot_be_opened_for_a_moment(index, monkeypatch):
    expected = Reader(index).texts(0, 1)
    failing(monkeypatch, os, "open", 3)
    assert Reader(index).texts(0, 1) == expected


def test_a_shard_that_cannot_be_read_is_not_called_changed(index, monkeypatch):
    reads = failing(monkeypatch, os, "pread", 100)
    with pytest.raises(Unreachable, match="00000.tar: cannot be read [(]Input/output error[)]") as error:
        Reader(index).image_bytes(0, 2)
    assert len(reads) == 4 and "\n" not in str(error.value) and "safeclip index" not in str(error.value)


def test_a_table_that_cannot_be_read_for_a_moment(index, monkeypatch):
    calls = failing(monkeypatch, pq, "read_table", 1)
    assert len(index.table(0).keys) == 3 and len(calls) == 2
    calls.clear()
    assert len(index.keys(0)) == 3 and len(calls) == 2
    monkeypatch.setattr(pq, "read_table", lambda *args, **options: calls.append(args) or damaged())
    calls.clear()
    with pytest.raises(ChangedShard, match="cannot be read [(]no magic bytes[)]"):
        index.keys(0)
    assert len(calls) == 1


def damaged():
    raise OSError("no magic bytes")
