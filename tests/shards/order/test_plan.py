"""EpochPlan: every sample of a view once an epoch, the same batches at any world size, any step at no cost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.order.plan import EpochPlan, permute, permute_one
from shards.order.safe_mask import SafeMask

counts = st.lists(st.integers(0, 400), min_size=1, max_size=12)


def plan(counts_S, batch=24, **changed):
    return EpochPlan(
        counts_S, **{"seed": 0, "epoch": 0, "view": "all", "batch_size": batch, "streams": 4, "window": 32, **changed}
    )


def all_rows(p):
    return [row for step in range(p.steps) for row in zip(*(a.tolist() for a in p.batch(step)[:2]))]


@given(counts, st.integers(0, 1000), st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from([1, 7, 32, 5000]))
def test_each_sample_once_but_for_the_last_partial_batch(counts_S, seed, streams, window):
    p = plan(counts_S, seed=seed, streams=streams, window=window)
    rows = all_rows(p)
    assert len(rows) == len(set(rows)) == sum(counts_S) // 24 * 24
    assert all(0 <= nth < counts_S[shard] for shard, nth in rows)


@given(counts, st.integers(0, 1000), st.sampled_from([1, 3, 8]), st.sampled_from([1, 7, 32, 5000, 1 << 20]), st.data())
def test_one_slot_is_as_in_its_batch(counts_S, seed, streams, window, data):
    repetitions_S = data.draw(st.lists(st.integers(1, 3), min_size=len(counts_S), max_size=len(counts_S)))
    p = plan(counts_S, seed=seed, streams=streams, window=window, repetitions_S=repetitions_S)
    for step in range(p.steps):
        assert [p.slot(step, slot) for slot in range(24)] == list(zip(*(part.tolist() for part in p.batch(step))))
    with pytest.raises(IndexError):
        p.slot(p.steps, 0)


@given(counts, st.integers(0, 1000), st.data())
def test_safe_and_risky_are_disjoint_and_together_all(counts_S, seed, data):
    flags = np.random.default_rng(seed).random(sum(counts_S)) < data.draw(st.floats(0, 1))
    mask = SafeMask.from_flags(counts_S, flags)
    seen = {}
    for view in ("safe", "risky"):
        p = EpochPlan(mask.counts(view), seed=seed, epoch=1, view=view, batch_size=1, streams=1)
        seen[view] = {
            (int(s[0]), int(mask.locate(view, s, n)[0])) for s, n, _ in (p.batch(step) for step in range(p.steps))
        }
    offsets = np.concatenate([[0], np.cumsum(counts_S)])
    assert {offsets[s] + n for s, n in seen["safe"]} == set(np.flatnonzero(flags))
    assert {offsets[s] + n for s, n in seen["risky"]} == set(np.flatnonzero(~flags))


@given(counts, st.integers(0, 50))
def test_a_global_batch_holds_the_same_samples_at_any_world_size(counts_S, epoch):
    p = plan(counts_S, epoch=epoch)
    for step in range(p.steps):
        whole = p.batch(step)
        for world in (1, 2, 3, 4, 8):
            parts = [p.batch(step, rank, world) for rank in range(world)]
            assert all(len(part[0]) == 24 // world for part in parts)
            assert all(np.array_equal(np.concatenate(joined), one) for joined, one in zip(zip(*parts), whole))


@settings(max_examples=40)
@given(counts, st.integers(0, 50), st.data(), st.sampled_from([1, 2, 4]))
def test_a_weight_is_how_often_each_sample_is_seen(counts_S, seed, data, streams):
    """Each sample exactly `weight` times an epoch, each time under a number of its own, and the same batches at any
    world size."""
    repetitions_S = data.draw(st.lists(st.integers(1, 4), min_size=len(counts_S), max_size=len(counts_S)))
    total = int(np.dot(counts_S, repetitions_S))
    batch = data.draw(st.sampled_from([b for b in (4, 8, 12) if total % b == 0] or [4]))
    p = plan(counts_S, batch, seed=seed, streams=streams, repetitions_S=repetitions_S)
    rows = [row for step in range(p.steps) for row in zip(*(a.tolist() for a in p.batch(step)))]
    every = {(s, n, k) for s, count in enumerate(counts_S) for n in range(count) for k in range(repetitions_S[s])}
    assert len(rows) == len(set(rows)) == total // batch * batch and set(rows) <= every
    for step in range(0, p.steps, 3):
        for world in (2, 4):
            parts = [p.batch(step, rank, world) for rank in range(world)]
            assert all(np.array_equal(np.concatenate(joined), one) for joined, one in zip(zip(*parts), p.batch(step)))


def test_weights_of_one_change_nothing():
    assert all_rows(plan([50, 300, 10], repetitions_S=[1, 1, 1])) == all_rows(plan([50, 300, 10]))


@given(counts, st.integers(0, 50), st.sampled_from([1, 2, 3]), st.sampled_from([1, 7, 32, 5000]), st.integers(1, 3))
def test_a_slot_is_a_row_of_its_batch(counts_S, seed, streams, window, times):
    p = plan(counts_S, seed=seed, streams=streams, window=window, repetitions_S=[times] * len(counts_S))
    for step in range(p.steps):
        assert [p.slot(step, slot) for slot in range(24)] == list(zip(*(a.tolist() for a in p.batch(step))))
    for step, slot in ((p.steps, 0), (0, 24), (-1, 0), (0, -1)):
        with pytest.raises(IndexError):
            p.slot(step, slot)


@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=40), st.integers(0, 2**64 - 1), st.integers(0, 2**62))
def test_one_element_is_permuted_as_among_others(lengths, key, tweak):
    at_B = np.array([length * 2 // 3 for length in lengths])
    found = permute(at_B, np.array(lengths), key, tweak + np.arange(len(lengths))).tolist()
    alone = [permute_one(at, length, key, tweak + i) for i, (at, length) in enumerate(zip(at_B.tolist(), lengths))]
    assert found == alone
    assert all(place < length for place, length in zip(found, lengths))


def test_the_order_stays_what_it_was():
    """Masks and runs in the field are of this order: another one needs another name."""
    p = plan([500, 300, 7], seed=3, epoch=2)
    assert [p.slot(step, slot) for step, slot in ((0, 0), (9, 17), (32, 23))] == [(2, 1, 0), (0, 443, 0), (1, 281, 0)]


def test_a_step_needs_no_step_before_it():
    late, early = plan([50, 300, 10]), plan([50, 300, 10])
    wanted = late.batch(late.steps - 1)
    for step in range(early.steps):
        last = early.batch(step)
    assert np.array_equal(wanted, last)


@given(st.integers(2, 60))
def test_another_order_in_each_epoch_pass_and_seed(seed):
    base = all_rows(plan([500, 100], seed=seed))
    for changed in ({"epoch": 1}, {"pass_number": 1}, {"seed": seed + 1}, {"view": "safe"}):
        other = all_rows(plan([500, 100], **{"seed": seed, **changed}))
        assert other != base and len(other) == len(base)


@settings(max_examples=10)
@given(st.integers(0, 100))
def test_a_window_is_shuffled_evenly(seed):
    """Where the samples of a window land is uniform: no place keeps its sample more often than chance."""
    p = EpochPlan([4096], seed=seed, epoch=0, view="all", batch_size=4096, streams=1, window=4096)
    nth = p.batch(0)[1]
    assert abs(np.corrcoef(nth, np.arange(4096))[0, 1]) < 0.08
    assert np.mean(np.abs(np.diff(nth)) == 1) < 0.01


def test_fewer_shards_than_ranks_and_sizes_that_differ_widely():
    p = plan([1, 0, 100_000, 3], batch=64, streams=8)
    assert {len(p.batch(0, rank, 64)[0]) for rank in range(64)} == {1}
    assert len(set(all_rows(plan([700])))) == 29 * 24


def test_an_empty_view_has_no_steps():
    p = plan([0, 0])
    assert p.steps == 0
    with pytest.raises(IndexError):
        p.batch(0)


def test_a_batch_stays_within_few_shards():
    p = plan([1000] * 200, batch=32, streams=4, window=500)
    assert max(len(set(p.batch(step)[0])) for step in range(0, p.steps, 97)) <= 4 * 2


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: plan([100], batch=10, streams=4), "data.streams"),
        (lambda: plan([100]).batch(0, 0, 5), "train.batch_size"),
    ],
)
def test_what_does_not_divide_is_named(make, names):
    with pytest.raises(UserError, match=names):
        make()
