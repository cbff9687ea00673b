"""A run that was cut off anywhere ends as if it never had been: at any step, at every ZeRO stage, on another number of
ranks."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from pipeline.config.schema import Train
from pipeline.distributed import comm
from pipeline.training import checkpoint, saver
from pipeline.training import run as running
from pipeline.training import step as training_step
from pipeline.training.curriculum import curriculum
from pipeline.training.engine import stage_of_run
from shards.build.shapes import shapes
from shards.errors import RunFailed, UserError
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import STEPS, config, cut_off, cut_off_in_pass, metrics, weights


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


def test_resume_gives_the_same_bits_at_every_other_zero_stage(data):
    """Stage 1, the default, below."""
    run_ranks(whole_and_cut, 2, data, (0, 2, 3))
    for stage in (0, 2, 3):
        whole, cut = config(data, f"whole{stage}"), config(data, f"cut{stage}")
        assert weights(whole) == weights(cut), stage
        assert metrics(whole) == metrics(cut), stage


PHASES = [  # (stage, what is cut off, signal, the steps that are done then); ranks ask each other every 4 steps
    ("unimodal", 7, signal.SIGTERM, 8),
    ("low_rate", 6, signal.SIGUSR1, 16),
    ("clip", 6, signal.SIGTERM, 24),  # of the 5 steps before the first selection round
    ("safeclip", "sample", signal.SIGUSR1, 25),  # all pairs: there are few
    ("safeclip", "guards", signal.SIGTERM, 25),
    ("safeclip", 2, signal.SIGUSR1, 28),
    ("safeclip", "scoring", signal.SIGTERM, 30),  # of the second round
]


def every_phase(folder, name):
    """Unimodal, low rate, 5 steps of plain CLIP, a selection round, 5 steps, a selection round, 10 steps."""
    return config(folder, name, train__steps_before_selection=5)


def cut_off_in_every_phase(folder):
    """[(stage, step, masks that are there)] of the checkpoint after each cut; then the run goes on to its end."""
    found, made = [], every_phase(folder, "phases")
    for number, (_, what, which, _) in enumerate(PHASES):
        cut = cut_off_in_pass if isinstance(what, str) else cut_off
        cut(made, what, on=number % comm.world(), which=which)
        comm.barrier()
        state = checkpoint.load_state(checkpoint.newest_complete(made.run.dir)[0])
        epoch = curriculum(made.train, made.selection.every, 10)[state["epoch"]]
        masks = sorted(path.parent.name for path in Path(made.run.dir, "masks").rglob("mask.json"))
        found.append((epoch.stage, state["step"], masks))
        comm.barrier()
    running.train(made)
    return found


def test_resume_after_a_stop_in_every_phase_gives_the_same_bits(data):
    one, two = run_ranks(cut_off_in_every_phase, 2, data)
    assert one == two
    assert [(stage, step) for stage, step, _ in one] == [(stage, step) for stage, _, _, step in PHASES]
    # A pass that is cut off leaves no mask; what guards found is there from the first round on.
    guards, first = ["duplicates", "trigger_clusters"], ["epoch_003"]
    assert [masks for _, _, masks in one] == [[]] * 5 + [sorted(guards + first)] * 2
    run_ranks(train_whole, 2, data)
    cut, whole = every_phase(data, "phases"), every_phase(data, "unstopped")
    assert weights(cut) == weights(whole) and metrics(cut) == metrics(whole)
    for name in ("epoch_003", "epoch_004", "guards/duplicates", "guards/trigger_clusters"):
        masks = [Path(made.run.dir, "masks", name, "safe.npy").read_bytes() for made in (cut, whole)]
        assert masks[0] == masks[1], name


def train_whole(folder):
    running.train(every_phase(folder, "unstopped"))


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


def test_a_run_resumes_with_another_number_of_ranks(data):
    """Saved by 2 ranks in mid-epoch, it continues with 1, 2 and 4: the same masks, and losses within 1e-4."""
    run_ranks(start_on_two, 2, data, (0, 1, 3))  # at stage 2 files and conversion are those of stage 1
    for world, stages in ((2, (0, 1, 3)), (1, (0, 1, 3)), (4, (3,))):
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


def start_alone(folder, stage):
    cut_off(five_epochs(folder, f"alone{stage}", stage), 22)


def test_a_run_of_one_process_is_at_stage_0_and_resumes_so_with_more(data):
    run_ranks(start_alone, 1, data, 3)
    folder, _ = checkpoint.newest_complete(data / "alone3")
    assert checkpoint.load_state(folder)["zero_stage"] == 0
    found = {}
    for world in (1, 2):
        shutil.copytree(data / "alone3", data / f"alone_on{world}")
        run_ranks(continue_alone, world, data)
        made = five_epochs(data, f"alone_on{world}", 3)
        last, _ = checkpoint.newest_complete(made.run.dir)
        state = checkpoint.load_state(last)
        assert (state["world"], state["zero_stage"]) == (world, 0)
        assert not list(Path(made.run.dir).rglob("universal"))
        found[world] = losses(made)
    assert len(found[1]) == 20 and found[2] == pytest.approx(found[1], abs=1e-4)


def continue_alone(folder):
    running.LOG_EVERY = 1
    running.train(five_epochs(folder, f"alone_on{comm.world()}", 3))


def test_only_a_run_of_one_process_in_fp32_changes_its_stage():
    for stage in range(4):
        found = [stage_of_run(Train(zero_stage=stage, precision=p), w, None) for p in ("fp32", "bf16") for w in (1, 2)]
        assert found == [0, stage, stage, stage]
        states = {"zero_stage": 0}, {"zero_stage": 1}, {"step": 1}
        began = [stage_of_run(Train(zero_stage=stage), 2, state) for state in states]
        assert began == [0, stage, stage]


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
    original = saver.write_bytes

    def write_bytes(path, data):
        if comm.rank() == comm.world() - 1 and "step_00000010" in str(path):
            raise OSError(28, "No space left on device", str(path))
        original(path, data)

    saver.write_bytes = write_bytes
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
    original, calls = training_step.clip_loss, []

    def clip_loss(*arguments):
        calls.append(1)
        loss = original(*arguments)
        return loss * float("nan") if len(calls) == 3 and comm.rank() == comm.world() - 1 else loss

    training_step.clip_loss = clip_loss
    made = config(
        folder,
        f"nan_{on_nan}{stage}",
        train__on_nan=on_nan,
        train__zero_stage=stage,
        train__epochs=1,
        train__unimodal_epochs=0,
    )
    try:
        state = running.train(made)
        return state["skipped"], state["step"]
    except RunFailed as error:
        return str(error)
    finally:
        training_step.clip_loss = original


def poisoned_all(folder):
    return {(on_nan, stage): poisoned(folder, on_nan, stage) for stage in (0, 1, 3) for on_nan in ("stop", "skip")}


def test_a_gradient_that_is_no_number_stops_the_run_or_is_counted(data):
    for outcome in run_ranks(poisoned_all, 2, data):
        for (on_nan, stage), found in outcome.items():
            if on_nan == "skip":
                assert found == (1, 10), stage
                continue
            assert "step 2, epoch 0 (low_rate, clip loss)" in found and "00000.tar" in found and "\n" not in found, (
                stage
            )
            folder, _ = checkpoint.newest_complete(data / f"nan_stop{stage}")
            assert folder.name == "step_00000000"
    for stage in (0, 1, 3):
        folder, _ = checkpoint.newest_complete(data / f"nan_skip{stage}")
        assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())
