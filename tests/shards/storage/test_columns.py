"""Columns of shards: what is written is what is mapped, or it is refused."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.storage.columns import Rows, digest, open_columns, record_batch, select, to_numpy, write_columns

KINDS = {"path": str, "size": int}
paths = st.binary(max_size=12).map(lambda name: name.decode("utf-8", "surrogateescape"))  # as the system gives them
rows = st.lists(st.tuples(paths, st.integers(0, 2**63 - 1)), max_size=20)


def saved(folder, some):
    columns = {name: [row[place] for row in some] for place, name in enumerate(KINDS)}
    return write_columns(folder, record_batch(KINDS, columns))


@given(rows, rows)
def test_rows_are_what_was_written(tmp_path_factory, some, more):
    folder = tmp_path_factory.mktemp("columns")
    batches = [open_columns(folder, saved(folder, part), len(part)) for part in (some, more)]
    found, whole = Rows([(batch, lambda *row: row) for batch in batches]), some + more
    assert list(found) == whole == [found[i] for i in range(len(whole))] == found[:] and found == whole
    assert list(found.between(1, len(whole) - 1)) == whole[1:-1]
    assert to_numpy(found.column("size")).tolist() == [size for _, size in whole]
    with pytest.raises(IndexError):
        found[len(whole)]


@given(st.data())
def test_no_damage_goes_unnoticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    name = saved(folder, [("a.tar", 1), ("b.tar", 2)])
    whole = bytearray((folder / name).read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(data.draw(st.sampled_from([whole, whole[:at]])))
    with pytest.raises(ValueError, match="shards_") as error:
        open_columns(folder, name, 2)
    assert "\n" not in str(error.value)


@given(st.data())
def test_a_hostile_file_is_refused_or_can_be_read(tmp_path_factory, data):
    """With the right digest, whatever it holds."""
    folder = tmp_path_factory.mktemp("hostile")
    whole = bytearray((folder / saved(folder, [("a.tar", 1), ("b.tar", 2)])).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    name = f"shards_{digest(memoryview(whole))}.arrow"
    (folder / name).write_bytes(whole)
    try:
        found = Rows([(select(open_columns(folder, name, 2), KINDS), lambda *row: row)])
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert len(list(found)) == 2 and all(size >= 0 for _, size in found)


def test_columns_are_views_on_the_mapped_file(tmp_path):
    name = saved(tmp_path, [(f"/data/{number}.tar", number) for number in range(50_000)])
    before = pa.total_allocated_bytes()
    batch = open_columns(tmp_path, name, 50_000)
    sizes = to_numpy(batch["size"])
    assert pa.total_allocated_bytes() == before and not sizes.flags.owndata
    lines = open("/proc/self/maps").read().splitlines()
    maps = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines if line.endswith(name)]
    for column in batch.columns:
        for buffer in filter(None, column.buffers()):
            assert any(first <= buffer.address and buffer.address + buffer.size <= last for first, last in maps)


@pytest.mark.parametrize(
    "columns, wrong",
    [
        ({"path": ["a"], "size": [-1]}, "'size' has a negative"),
        ({"path": ["a"], "size": [None]}, "'size' is missing"),
        ({"path": ["a"], "size": [2**64]}, "too large|too big"),
    ],
)
def test_numbers_that_are_none_are_refused(columns, wrong):
    with pytest.raises(ValueError, match=wrong):
        record_batch(KINDS, columns)


@pytest.mark.parametrize("name", ["../shards_" + "0" * 32 + ".arrow", "/etc/passwd", "shards_.arrow"])
def test_only_a_file_beside_is_opened(tmp_path, name):
    with pytest.raises(ValueError, match="no name of a file of columns"):
        open_columns(tmp_path, name, 1)
