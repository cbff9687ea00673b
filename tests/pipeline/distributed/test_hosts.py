"""Arrays that the ranks of a host share: one copy a host, the same on all hosts after they were shared, one line on a
full disk."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import comm, hosts
from shards.errors import UserError
from tests.helpers.ranks import run_ranks

COUNT, BOUNDS = 11, [0, 4, 4, 11]


def two_hosts():
    """Ranks 0 and 2 as if on one host, rank 1 on another: hosts need not hold neighbouring ranks."""
    hosts.host, hosts.PIECE = (lambda: "b" if comm.rank() == 1 else "a"), 3
    array = hosts.host_array(COUNT, np.float32)
    mine = slice(*BOUNDS[comm.rank() : comm.rank() + 2])
    array[mine] = np.arange(COUNT)[mine] + 1
    comm.barrier()
    before = array.copy()
    hosts.share_between_hosts(array, list(zip(BOUNDS, BOUNDS[1:])))
    return before, np.array(array)


def test_a_host_has_one_copy_and_all_hosts_end_with_the_same():
    whole = np.arange(COUNT, dtype=np.float32) + 1
    (first, *after0), (second, *after1), (third, *after2) = run_ranks(two_hosts, 3)
    assert np.array_equal(first, whole) and np.array_equal(third, whole) and not second.any()
    for (after,) in (after0, after1, after2):
        assert np.array_equal(after, whole)


def as_on_gpus():
    """How often this rank split the default group while two hosts shared an array, were that group NCCL's and bound to
    a GPU."""
    splits = []
    comm._control = dist.new_group(backend="gloo")
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    type(backend).perform_nocolor_split = lambda self, device: splits.append(device)
    dist.distributed_c10d._get_split_source = lambda group: backend
    dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
    try:
        _, after = two_hosts()
    finally:
        dist.group.WORLD.bound_device_id = None
    return len(splits), after.tolist()


def test_no_rank_waits_for_a_split_of_the_group_of_the_gpus():
    """Members of a gloo group never take part in it, and the others would wait for good."""
    assert run_ranks(as_on_gpus, 3) == [(0, list(range(1, COUNT + 1)))] * 3


def three_hosts(bounds):
    """Each rank as if on a host of its own."""
    hosts.host, hosts.PIECE = (lambda: str(comm.rank())), 3
    array = hosts.host_array(bounds[-1], np.uint8)
    mine = slice(*bounds[comm.rank() : comm.rank() + 2])
    array[mine] = np.arange(bounds[-1])[mine] + 1
    hosts.share_between_hosts(array, list(zip(bounds, bounds[1:])))
    return array.tolist()


@pytest.mark.parametrize("bounds", [[0, 5, 6, 14], [0, 0, 7, 9], [0, 0, 0, 8], [0, 3, 6, 9]])
def test_hosts_that_wrote_more_or_less_all_send(bounds):
    assert run_ranks(three_hosts, 3, bounds) == [list(range(1, bounds[-1] + 1))] * 3


def full_on_the_second():
    hosts.host = lambda: str(comm.rank())

    def posix_fallocate(file, start, size):
        if comm.rank() == 1:
            raise OSError(28, "No space left on device")

    os.posix_fallocate = posix_fallocate
    with pytest.raises(UserError) as error:
        hosts.host_array(1000, np.int64)
    return str(error.value)


def test_a_full_temporary_folder_on_one_host_is_said_on_all():
    first, second = run_ranks(full_on_the_second, 2)
    assert first == second and "No space left" in first and "8,000 bytes" in first and "TMPDIR" in first


def each_with_a_temporary_folder(folder):
    hosts.tempfile.tempdir = str(folder / f"of_{comm.rank()}")
    with pytest.raises(UserError) as error:
        hosts.host_array(5, np.uint8)
    return str(error.value)


def test_processes_of_one_host_name_that_share_no_folder_are_told_so(tmp_path):
    """Two containers of one host name, or a private folder for each process."""
    for rank in range(2):
        (tmp_path / f"of_{rank}").mkdir()
    first, second = run_ranks(each_with_a_temporary_folder, 2, tmp_path)
    assert first == second and "rank 1 does not see a file that rank 0" in first and "one TMPDIR" in first
    assert not list(tmp_path.glob("*/*"))


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts.tempfile, "tempdir", str(tmp_path))
    assert not hosts.host_array(5, np.uint8).any() and len(hosts.host_array(0, np.uint8)) == 0
    assert not list(tmp_path.iterdir())
