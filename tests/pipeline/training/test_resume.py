"""A run that was cut off anywhere ends as if it never had been: at any step, at every ZeRO stage, on another number of
ranks."""

import os
import shutil
import signal

import numpy as np
import pytest
from safetensors.torch import load_file

from pipeline.distributed import comm
from pipeline.guards.duplicates import Duplicates
from pipeline.training import checkpoint, signals
from pipeline.training import run as running
from pipeline.training.signals import Preempted
from shards.build.shapes import shapes
from shards.errors import RunFailed, UserError
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import STEPS, config, cut_off, metrics, weights


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    shapes(folder / "shapes", pairs=240, test=36)
    return folder


def whole_and_cut(folder, stages):
    for stage in stages:
        for name in ("whole", "cut"):
            made = config(folder, f"{name}{stage}", train__zero_stage=stage)
            if name == "cut":
                cut_off(made, 7)  # in the unimodal epoch: stops after step 8
                cut_off(made, 14, times=2)  # in the first epoch with a selection round, after step 24 of the run
            running.train(made)


def test_resume_gives_the_same_bits_at_every_zero_stage(data):
    run_ranks(whole_and_cut, 2, data, (0, 1, 2, 3))
    for stage in (0, 1, 2, 3):
        whole, cut = config(data, f"whole{stage}"), config(data, f"cut{stage}")
        assert weights(whole) == weights(cut), stage
        assert metrics(whole) == metrics(cut), stage


def cut_off_in_guards(folder):
    """A run that is asked to stop while its guards look at all pictures, and started again."""
    made = config(folder, "guarded")
    original, seen = Duplicates.numbers, []

    def numbers(guard, images):
        seen.append(1)
        if len(seen) == 2 and comm.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(guard, images)

    Duplicates.numbers, signals.AGREE_EVERY = numbers, 2
    try:
        running.train(made)
        raise AssertionError("it was not cut off")
    except Preempted:
        assert not list((folder / "guarded/masks").glob("guards/*"))
    Duplicates.numbers = original
    running.train(made)
    running.train(config(folder, "unguarded"))


def test_resume_after_a_stop_in_the_guards_gives_the_same_bits(data):
    run_ranks(cut_off_in_guards, 2, data)
    cut, whole = config(data, "guarded"), config(data, "unguarded")
    assert weights(cut) == weights(whole) and metrics(cut) == metrics(whole)


def losses(made):
    """{step: loss} of the 20 steps after the cut."""
    return {row["step"]: row["loss"] for row in metrics(made) if "loss" in row and 24 < row["step"] <= 44}


def five_epochs(folder, name, stage):
    return config(folder, name, train__zero_stage=stage, train__epochs=5, run__keep=9)


def continue_on(folder, stages):
    for stage in stages:
        running.LOG_EVERY = 1
        running.train(five_epochs(folder, f"on{comm.world()}_{stage}", stage))


def start_on_two(folder, stages):
    for stage in stages:
        cut_off(
            five_epochs(folder, f"two{stage}", stage), 22
        )  # in the first epoch with a selection round, after its step 4


def test_a_run_goes_on_with_another_number_of_ranks(data):
    """Saved by 2 ranks in mid-epoch, it continues with 1, 2 and 4: the same masks, and losses within 1e-4."""
    stages = (0, 1, 2, 3)
    run_ranks(start_on_two, 2, data, stages)
    for world in (2, 1, 4):
        for stage in stages:
            shutil.copytree(data / f"two{stage}", data / f"on{world}_{stage}")
        run_ranks(continue_on, world, data, stages)
        for stage in stages:
            same, other = (config(data, f"on{w}_{stage}") for w in (2, world))
            expected = losses(same)
            assert len(expected) == 20 and losses(other) == pytest.approx(expected, abs=1e-4), (world, stage)
            masks = [np.load(f"{made.run.dir}/masks/epoch_003/safe.npy", allow_pickle=False) for made in (same, other)]
            assert np.array_equal(*masks)
            folder = checkpoint.newest_complete(data / f"two{stage}")[0]
            converted = data / f"on{world}_{stage}" / "checkpoints" / folder.name / "universal"
            assert converted.exists() == (world != 2 and stage > 0)


def damage(folder, how):
    name = "model.safetensors"
    if how == "truncated":
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    elif how == "missing":
        (folder / name).unlink()
    elif how == "no marker":
        (folder / checkpoint.MARKER).unlink()
    elif how == "marker cut":
        (folder / checkpoint.MARKER).write_bytes(b'{"files": {"mod')
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.fixture(scope="module")
def finished(data):
    """A run of one process with several checkpoints kept."""
    run_ranks(run_one, 1, data)
    return data / "one"


def run_one(folder):
    running.train(config(folder, "one", run__save_steps=7, run__keep=3, run__keep_every=1))


def test_the_newest_checkpoints_and_those_of_every_nth_epoch_are_kept(finished):
    assert [f.name for f in checkpoint.checkpoints(finished)] == [f"step_{step:08d}" for step in (10, 20, 30, 35, 40)]


@pytest.mark.parametrize("how", ["truncated", "missing", "no marker", "marker cut", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_one_warning(finished, tmp_path, how):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    damage(run / "checkpoints" / f"step_{STEPS:08d}", how)
    folder, warnings = checkpoint.newest_complete(run)
    assert folder.name == "step_00000035"
    assert len(warnings) == 1 and f"step_{STEPS:08d}" in warnings[0]


def go_on(folder, restart=False):
    try:
        running.train(config(folder, "run", run__save_steps=7, run__keep=3, run__keep_every=1, run__restart=restart))
    except UserError as error:
        return str(error)
    return None


def test_a_run_without_a_complete_checkpoint_starts_anew_only_if_told_so(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (tmp_path / "shapes").symlink_to(finished.parent / "shapes")
    for folder in checkpoint.checkpoints(run):
        damage(folder, "no marker")
    (message,) = run_ranks(go_on, 1, tmp_path)
    assert "no complete checkpoint" in message and "run.restart=true" in message and "\n" not in message
    assert run_ranks(go_on, 1, tmp_path, True) == [None]
    assert (
        weights(config(tmp_path, "run")) == (finished / f"checkpoints/step_{STEPS:08d}/model.safetensors").read_bytes()
    )


def test_a_checkpoint_with_its_parameters_in_another_order_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "shapes").symlink_to(finished.parent / "shapes")
    path = checkpoint.newest_complete(tmp_path / "run")[0] / "state.json"
    path.write_text(path.read_text().replace(f'"order": {checkpoint.ORDER}', '"order": 1'))
    (message,) = run_ranks(go_on, 1, tmp_path)
    assert "another order" in message and path.parent.name in message and "\n" not in message


def disk_fills(folder):
    """Saves of the last rank fail from the second on, as on a full disk."""
    original = checkpoint.write_bytes

    def write_bytes(path, data):
        if comm.rank() == comm.world() - 1 and "step_00000010" in str(path):
            raise OSError(28, "No space left on device", str(path))
        original(path, data)

    checkpoint.write_bytes = write_bytes
    try:
        running.train(config(folder, "full"))
    except UserError as error:
        return str(error)


def test_a_full_disk_stops_all_ranks_and_leaves_the_last_checkpoint(data):
    messages = run_ranks(disk_fills, 2, data)
    assert messages[0] == messages[1] and "No space left on device" in messages[0] and "\n" not in messages[0]
    folder, warnings = checkpoint.newest_complete(data / "full")
    assert folder.name == "step_00000000" and not warnings


def poisoned(folder, on_nan, stage):
    """The gradient of step 3 is no number on the last rank."""
    original, calls = running.clip_loss, []

    def clip_loss(*arguments):
        calls.append(1)
        loss = original(*arguments)
        return loss * float("nan") if len(calls) == 3 and comm.rank() == comm.world() - 1 else loss

    running.clip_loss = clip_loss
    made = config(
        folder, f"nan_{on_nan}{stage}", train__on_nan=on_nan, train__zero_stage=stage, train__unimodal_epochs=0
    )
    try:
        state = running.train(made)
        return state["skipped"], state["step"]
    except RunFailed as error:
        return str(error)
    finally:
        running.clip_loss = original


def poisoned_all(folder):
    return {(on_nan, stage): poisoned(folder, on_nan, stage) for stage in (0, 1, 2, 3) for on_nan in ("stop", "skip")}


def test_a_gradient_that_is_no_number_stops_the_run_or_is_counted(data):
    for outcome in run_ranks(poisoned_all, 2, data):
        for (on_nan, stage), found in outcome.items():
            if on_nan == "skip":
                assert found == (1, STEPS), stage
                continue
            assert "step 2, epoch 0 (low_rate, clip loss)" in found and "00000.tar" in found and "\n" not in found, (
                stage
            )
            folder, _ = checkpoint.newest_complete(data / f"nan_stop{stage}")
            assert folder.name == "step_00000000"
    for stage in (0, 1, 2, 3):
        folder, _ = checkpoint.newest_complete(data / f"nan_skip{stage}")
        assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())


def hang(folder):
    """The last rank stops answering; the others must not wait for ever."""
    import time

    comm.barrier()
    if comm.rank() == comm.world() - 1:
        time.sleep(8)
        return "silent"
    try:
        with comm.naming_the_lost(3):
            comm.all_reduce_max(1)
    except RunFailed as error:
        return str(error)


def test_a_rank_that_does_not_answer_is_named_within_the_timeout(tmp_path):
    words, silent = run_ranks(hang, 2, tmp_path, timeout=3)
    assert silent == "silent" and "did not answer for run.timeout = 3 s" in words and "\n" not in words
