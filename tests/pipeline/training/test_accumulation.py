"""A step in parts trains what the step on the whole batch trains."""

import copy
from unittest import mock

import pytest
import torch

from pipeline.config.schema import Train
from pipeline.distributed import comm
from pipeline.training import engine as engines
from pipeline.training.accumulation import check_parts
from pipeline.training.step import step_loss, train_step
from pipeline.training.support_queue import SupportQueue
from shards.errors import UserError
from tests.helpers.models import RESNET, VIT
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import KINDS, ROWS, global_batch, own_rows, towers

STAGES = (0, 1, 2, 3)
SIGMOID = {**VIT, "custom_text": True, "init_logit_bias": -10}
DROPPED = copy.deepcopy(VIT)
DROPPED["vision_cfg"]["patch_dropout"] = 0.5


def start(stage, config=VIT):
    # A large eps: where a true gradient is 0 (the keys' bias) Adam would step by the sign of its rounding error.
    settings = Train(batch_size=ROWS, lr=1e-3, eps=1e-2, zero_stage=stage)
    return engines.start_engine(towers(config), settings, comm.device())


def stepped(stage, kind, config, parts):
    """(losses, weights, queues) of two steps, of one at ZeRO-3, which is slow here."""
    engine = start(stage, config)
    queues = {name: SupportQueue(12, 16, comm.device()) for name in ("image", "text")}
    losses = []
    for step in range(1 if stage == 3 else 2):
        batch = own_rows(global_batch(kind, 16, step))
        loss, _, finite = train_step(engine, queues, batch, "clip" if kind == "crossed" else kind, parts)
        assert finite
        losses.append(comm.mean(loss))
    return losses, engines.consolidated_state(engine), [queue.queue_PD for queue in queues.values()]


def whole_and_parts(cases):
    return [[stepped(*case, parts) for parts in (1, 3)] for case in cases]


def test_parts_train_what_the_whole_batch_trains():
    """Every loss, at every ZeRO stage; 3 parts of 4 or 8 rows are of different sizes."""
    cases = [(stage, "crossed", VIT) for stage in STAGES] + [(1, "crossed", SIGMOID)]
    cases += [(1, kind, VIT) for kind in KINDS if kind != "crossed"]
    for (stage, kind, _), (whole, parts) in zip(cases, run_ranks(whole_and_parts, 2, cases)[0]):
        key = stage, kind
        assert parts[0] == pytest.approx(whole[0], rel=1e-6), key
        assert whole[1], key
        for name, weight in whole[1].items():
            torch.testing.assert_close(parts[1][name], weight, rtol=0, atol=1e-6, msg=f"{key} {name}")
        for queue, other in zip(whole[2], parts[2]):
            torch.testing.assert_close(other, queue, rtol=0, atol=1e-6, msg=str(key))


def reductions(stage, parts):
    """Numbers that all_reduce adds in one step."""
    engine = start(stage)
    with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as watched:
        train_step(engine, {}, own_rows(global_batch("clip", 16)), "clip", parts)
    return sum(next(iter([*call.args, *call.kwargs.values()])).numel() for call in watched.call_args_list)


def all_reductions():
    return {(stage, parts): reductions(stage, parts) for stage in (0, 1) for parts in (1, 4)}


def test_gradients_are_reduced_once_a_step_where_they_are_not_partitioned():
    found = run_ranks(all_reductions, 2)[0]
    weights = sum(p.numel() for p in towers(VIT).parameters())
    assert found[0, 4] == found[0, 1] > weights and found[1, 4] == found[1, 1] > weights


def with_dropout(parts):
    """Weights after a step in parts, and after one that keeps the graphs of all parts."""
    batch = own_rows(global_batch("clip", 16))
    one, other = start(0, DROPPED), start(0, DROPPED)
    torch.manual_seed(3)
    train_step(one, {}, batch, "clip", parts)
    torch.manual_seed(3)
    found = [other(*rows) for rows in zip(batch.images.tensor_split(parts), batch.tokens.tensor_split(parts))]
    image_parts, text_parts, (scale, *_) = zip(*found)
    other.backward(step_loss("clip", torch.cat(image_parts), torch.cat(text_parts), scale, {}, batch.valid))
    other.step()
    return engines.consolidated_state(one), engines.consolidated_state(other)


def test_a_part_drops_the_same_patches_in_both_passes():
    ((one, other),) = run_ranks(with_dropout, 1, 2)
    for name, weight in other.items():
        torch.testing.assert_close(one[name], weight, rtol=0, atol=1e-6, msg=name)


def with_nan(stage):
    """(finite, whether anything moved) of a step whose pixels are no numbers."""
    engine = start(stage)
    before = engines.consolidated_state(engine)
    engine.module.mean.fill_(float("nan"))
    _, _, finite = train_step(engine, {}, own_rows(global_batch("clip", 16)), "clip", 2)
    after = engines.consolidated_state(engine)
    return finite, any(not torch.equal(before[name], after[name]) for name in before)


def all_with_nan():
    return [with_nan(stage) for stage in (0, 1, 2)]


def test_a_step_in_parts_whose_gradient_is_no_number_is_skipped():
    assert run_ranks(all_with_nan, 2)[0] == [(False, False)] * 3


def test_parts_that_no_process_can_take_are_refused_by_name():
    check_parts(towers(VIT), 4, 4)
    check_parts(towers(RESNET), 4, 1)
    with pytest.raises(UserError, match="train.accumulate: got 5, but a process has only 4 of the rows"):
        check_parts(towers(VIT), 4, 5)
    with pytest.raises(UserError, match="batch norm .*visual.* set train.accumulate=1"):
        check_parts(towers(RESNET), 4, 2)
