"""What is saved around the evaluation at the end of an epoch."""

import signal
from pathlib import Path

import pytest

from pipeline.distributed import comm
from pipeline.training import checkpoint
from pipeline.training import run as running
from pipeline.training.signals import Preempted
from shards.build.shapes import shapes
from shards.errors import UserError
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import ask, config, metrics

EPOCHS, STEPS = 3, 10


class Evaluator:
    """Its figure is of the weights. `before`: called with the number of the call, which it may cut off."""

    def __init__(self, before=lambda call: None):
        self.calls, self.before = 0, before

    def __call__(self, towers, views, device):
        self.calls += 1
        self.before(self.calls)
        return {"sum": sum(float(p.detach().sum()) for p in towers.module.parameters())}

    def line(self, figures):
        return "summed"


def evaluated(folder, name):
    return config(folder, name, train__method="clip", train__epochs=EPOCHS)


def newest(made):
    """(step, epochs done) of the newest complete checkpoint."""
    state = checkpoint.load_state(checkpoint.newest_complete(made.run.dir)[0])
    return state["step"], state["epoch"]


def fail_at(number):
    def before(call):
        if call == number:
            raise UserError("evaluation.test: not there")

    return before


def whole_and_cut(folder):
    """(newest checkpoint after the failure, calls of each start)."""
    running.train(evaluated(folder, "whole"), {"eval": Evaluator()})
    cut, starts = evaluated(folder, "cut"), [Evaluator(fail_at(2)), Evaluator(fail_at(1)), Evaluator(), Evaluator()]
    found = []
    for number, evaluator in enumerate(starts):
        if number < 2:
            with pytest.raises(UserError, match="not there"):
                running.train(cut, {"eval": evaluator})
        else:
            running.train(cut, {"eval": evaluator})
        comm.barrier()
        found.append((newest(cut), evaluator.calls))
        comm.barrier()
    return found


def test_an_evaluation_that_fails_takes_no_step_away_and_is_made_later(tmp_path):
    shapes(tmp_path / "shapes", pairs=240, test=36)
    for found in run_ranks(whole_and_cut, 2, tmp_path):
        # It fails after the second epoch, and at the next start; then it is made; the last start finds all done.
        assert found == [((20, 2), 2), ((20, 2), 1), ((30, 3), 2), ((30, 3), 0)]
    whole, cut = evaluated(tmp_path, "whole"), evaluated(tmp_path, "cut")
    assert metrics(whole) == metrics(cut) and sum("eval" in row for row in metrics(cut)) == EPOCHS
    ends = [Path(made.run.dir, "checkpoints/step_00000030/model.safetensors").read_bytes() for made in (whole, cut)]
    assert ends[0] == ends[1]


def crash_after_it(folder):
    """Calls of each start, of which the first ends in the step after the evaluation."""
    made, starts = evaluated(folder, "crash"), [Evaluator(), Evaluator()]
    original = running.train_step

    def train_step(*args):
        if starts[0].calls and not starts[1].calls and crash:
            raise KeyError("a crash")
        return original(*args)

    running.train_step, crash = train_step, True
    with pytest.raises(KeyError):
        running.train(made, {"eval": starts[0]})
    crash = False
    running.train(made, {"eval": starts[1]})
    running.train_step = original
    return [evaluator.calls for evaluator in starts]


def test_figures_are_kept_after_a_crash_in_the_next_epoch(tmp_path):
    shapes(tmp_path / "shapes", pairs=240, test=36)
    assert run_ranks(crash_after_it, 1, tmp_path) == [[1, 2]]
    rows = metrics(evaluated(tmp_path, "crash"))
    assert [row["step"] for row in rows if "eval" in row] == [10, 20, 30]


def stop_before_it(folder):
    """(calls, newest checkpoint) of a start that is asked to stop in the last step of the first epoch."""
    made, evaluator, done = evaluated(folder, "stop"), Evaluator(), []
    original = running.train_step

    def train_step(*args):
        done.append(1)
        if len(done) == STEPS:
            ask(None, signal.SIGTERM)
        return original(*args)

    running.train_step = train_step
    with pytest.raises(Preempted):
        running.train(made, {"eval": evaluator})
    running.train_step = original
    comm.barrier()
    return evaluator.calls, newest(made)


def test_a_signal_is_answered_before_the_evaluation(tmp_path):
    shapes(tmp_path / "shapes", pairs=240, test=36)
    assert run_ranks(stop_before_it, 2, tmp_path) == [(0, (10, 1))] * 2
