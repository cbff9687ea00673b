"""Processes that share a job take each item once, and one of them concludes."""

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.shares import Parts, Share, in_order, launched, processes
from shards.storage.files import claim_folder, remove_leftovers, whole_file


def array(task, tasks, first, last, step=1):
    names = {"ID": task, "COUNT": tasks, "MIN": first, "MAX": last, "STEP": step}
    return {"SLURM_ARRAY_JOB_ID": "7"} | {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


STEP = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    "env, share",
    [
        ({}, Share()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Share()),
        ({"RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, Share(1, 4, "x", False)),
        (STEP, Share(2, 4, "5.0", False)),
        ({"RANK": "0", "WORLD_SIZE": "1", **STEP}, Share(2, 4, "5.0", False)),  # of the shell that submitted it
        ({"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Share()),  # a batch script without srun
        (array(9, 3, 3, 9, 3), Share(2, 3, "7")),
        (array(0, 64, 0, 63), Share(0, 64, "7")),
        (array(5, 1, 5, 5), Share(0, 1, "7")),  # one task that is submitted again
        (array(4, 3, 2, 6, 2) | STEP, Share(6, 12, "7", False)),
    ],
)
def test_the_share_follows_from_the_launchers_variables(env, share):
    assert launched(env) == share


def test_an_array_with_gaps_is_refused():
    with pytest.raises(UserError, match="got 3, one of 3 tasks from 0 to 4, expected an array without gaps"):
        launched(array(3, 3, 0, 4))


@given(st.integers(0, 40), st.integers(1, 9))
def test_each_item_has_one_share(items, world):
    shares = [Share(rank, world) for rank in range(world)]
    assert sorted(item for share in shares for item in share.of(range(items))) == list(range(items))
    assert all(share.has(item) for share in shares for item in share.of(range(items)))


def test_the_cores_of_a_process_are_its_own():
    assert processes({"SLURM_CPUS_PER_TASK": "7"}) == 7
    assert processes({"LOCAL_WORLD_SIZE": "1000"}) == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_last_part_gets_all_of_them_and_leaves_nothing(tmp_path, order):
    parts = {rank: Parts(tmp_path, Share(rank, 3), "job") for rank in order}
    joined = [parts[rank].join({"found": rank}) for rank in order]
    assert joined == [None, None, [{"found": 0}, {"found": 1}, {"found": 2}]]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [(Share(0, 2), "another"), (Share(0, 3), "job"), (Share(0, 2, "later"), "job")])
def test_parts_of_another_job_or_another_start_are_not_taken(tmp_path, other):
    Parts(tmp_path, *other).join("not mine")
    assert Parts(tmp_path, Share(1, 2), "job").join("mine") is None
    assert Parts(tmp_path, Share(0, 2), "job").join("mine too") == ["mine too", "mine"]


def test_a_part_of_an_attempt_that_was_cut_off_is_not_taken(tmp_path):
    Parts(tmp_path, Share(0, 2), "job").join("old")
    again = Parts(tmp_path, Share(0, 2), "job")
    assert Parts(tmp_path, Share(1, 2), "job").join("new") is None
    assert again.join("new") == ["new", "new"]
    Parts(tmp_path, Share(0, 2), "job").join("old")
    assert Parts(tmp_path, Share(), "job").join("alone") == ["alone"] and not list(tmp_path.iterdir())


def joined(folder, rank, gate, answers):
    parts = Parts(folder, Share(rank, 4), "job")
    gate.wait()
    answers.put(parts.join(rank))


def test_of_processes_that_finish_in_the_same_moment_one_gets_the_parts(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        gate, answers = context.Barrier(4), context.Queue()
        ranks = [context.Process(target=joined, args=(tmp_path, rank, gate, answers)) for rank in range(4)]
        for process in ranks:
            process.start()
        found = [answers.get(timeout=60) for _ in ranks]
        for process in ranks:
            process.join()
        assert sorted(found, key=bool) == [None, None, None, [0, 1, 2, 3]]


def test_a_folder_is_claimed_for_one_use(tmp_path):
    for attempt in range(20):
        mark = tmp_path / str(attempt) / "mark.json"
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda number: claim_folder(mark, {"use": number % 2}), range(4)))
        assert found in ([{"use": 0}] * 4, [{"use": 1}] * 4) and [*mark.parent.iterdir()] == [mark]
    (tmp_path / "other" / "file").mkdir(parents=True)
    assert claim_folder(tmp_path / "other" / "mark.json", {}) is None


def test_leftovers_of_whole_files_are_removed(tmp_path):
    for name in (".a.tar.0123456789ab.part", ".b.tar.0123456789ab.part", "a.tar"):
        (tmp_path / name).write_bytes(b"")
    with whole_file(tmp_path / "c.tar") as file:  # a second process, which is late
        file.write(b"same")
        (tmp_path / "c.tar").write_bytes(b"same")
        remove_leftovers([tmp_path / "a.tar", tmp_path / "c.tar"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.tar.0123456789ab.part", "a.tar", "c.tar"]


def test_results_come_in_order_and_few_jobs_wait():
    taken = []
    jobs = ((taken.append(number) or number, 1) for number in range(20))
    with ThreadPoolExecutor(2) as pool:
        for number, found in enumerate(in_order(pool, int.__add__, jobs, 4)):
            assert found == number + 1 and len(taken) <= number + 4
    assert len(taken) == 20


def test_after_an_error_no_other_job_begins():
    begun = []

    def fail(number):
        begun.append(number)
        time.sleep(0.01)
        if number == 1:
            raise UserError("one is enough")

    with pytest.raises(UserError, match="one is enough"), ThreadPoolExecutor(1) as pool:
        list(in_order(pool, fail, ((number,) for number in range(100)), 50))
    assert len(begun) < 10
