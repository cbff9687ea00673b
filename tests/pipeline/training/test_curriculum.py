"""The curriculum: stages, equal numbers of pairs, order in an epoch, learning rate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import Config, Data, Selection, Train
from pipeline.training.curriculum import curriculum, epoch_steps, learning_rate, steps_before_selection
from shards.order.safe_mask import SafeMask

COUNTS = np.array([40, 0, 17, 63])


def config(**selection):
    return Config(
        data=Data(streams=2, window=16),
        train=Train(batch_size=4, epochs=6, unimodal_epochs=2, low_rate_epochs=1),
        selection=Selection(**selection),
    )


def test_stages_follow_the_method():
    stages = [(e.stage, e.round) for e in curriculum(config().train, 1, 30)]
    assert stages == [("unimodal", None)] * 2 + [("low_rate", None)] + [
        ("safeclip", 0),
        ("safeclip", 1),
        ("safeclip", 2),
    ]


def test_a_mask_holds_until_the_next_round_and_the_fraction_grows_by_the_epoch():
    train = Train(epochs=7, unimodal_epochs=1, low_rate_epochs=1)
    found = [(e.round, e.mask_of) for e in curriculum(train, 2, 30)]
    assert found == [(None, None), (None, None), (0, 2), (None, 2), (2, 4), (None, 4), (4, 6)]


def test_without_a_number_each_mask_holds_twice_as_long():
    epochs = curriculum(Train(epochs=17, unimodal_epochs=0, low_rate_epochs=1), None, 30)
    assert [e.number for e in epochs if e.round is not None] == [1, 3, 7]
    assert [(e.mask_of, e.before) for e in epochs[1:6]] == [(1, None), (1, None), (3, 1), (3, 1), (3, 1)]
    assert [e.round for e in epochs if e.round is not None] == [0, 2, 6]


@given(
    epochs=st.integers(1, 40),
    before=st.one_of(st.none(), st.integers(0, 30)),
    warmup=st.integers(0, 300),
    total=st.integers(2, 120),
    low_rate=st.integers(0, 2),
)
def test_all_pairs_come_before_the_first_round_and_steps_are_those_of_clip(epochs, before, warmup, total, low_rate):
    chosen, mask = config(risky="skip", refill=True), SafeMask.from_flags(COUNTS, np.arange(120) % 3 > 0)
    chosen.train = Train(
        epochs=epochs,
        unimodal_epochs=0,
        low_rate_epochs=low_rate,
        steps_before_selection=before,
        warmup_steps=warmup,
        batch_size=120 // total,
    )
    chosen.data.streams, total = 1, 120 // chosen.train.batch_size
    stages = curriculum(chosen.train, None, total)
    assert [e.number for e in stages] == list(range(len(stages)))
    steps = [epoch_steps(e, COUNTS, mask if e.mask_of is not None else None, chosen) for e in stages]
    assert sum(map(len, steps)) == epochs * total and all(steps)
    if epochs <= low_rate:
        return
    ramp, start = steps_before_selection(chosen.train, total), low_rate * total
    views = [step.view for step in sum(steps, [])]
    assert views == ["all"] * (start + ramp) + ["safe"] * (epochs * total - start - ramp)
    stage_of = sum(([epoch] * len(part) for epoch, part in zip(stages, steps)), [])
    assert {epoch.stage for epoch in stage_of[start : start + ramp]} <= {"clip"}
    assert stage_of[start + ramp].round == 0 and [e.round for e in stages].count(0) == 1
    chosen.train.lr = 1.0
    numbers = range(start, start + ramp)
    rates = [learning_rate(stage_of[number], number, epochs * total, chosen.train) for number in numbers]
    assert rates == rates[::-1] and max(rates, default=0) <= 1
    if before is None and ramp < (epochs - low_rate) * total // 4:
        assert 15.9 <= sum(rates) <= 19


def test_plain_clip_is_the_same_program_without_warm_up_and_selection():
    train = Train(method="clip", epochs=3, unimodal_epochs=0, low_rate_epochs=0)
    assert [(e.stage, e.round) for e in curriculum(train, 1, 30)] == [("clip", None)] * 3


def test_roclip_matches_in_every_second_epoch_and_cleanclip_has_one_loss():
    roclip = [e.stage for e in curriculum(Train(method="roclip", epochs=5), 1, 30)]
    assert roclip == ["clip", "match", "clip", "match", "clip"]
    assert {e.stage for e in curriculum(Train(method="cleanclip", epochs=2), 1, 30)} == {"cleanclip"}


@pytest.mark.parametrize("method, loss", [("clip", "clip"), ("roclip", "match"), ("cleanclip", "cleanclip")])
def test_a_filter_trains_on_its_pairs_alone_for_as_many_steps_as_all_pairs(method, loss):
    flags = np.arange(120) % 5 > 0
    chosen, mask = config(), SafeMask.from_flags(COUNTS, flags)
    chosen.train.method = method
    steps = epoch_steps(curriculum(chosen.train, 1, 30)[1], COUNTS, mask, chosen)
    assert {(s.loss, s.view) for s in steps} == {(loss, "safe")} and len(steps) == 30
    starts, rows = np.array([0, 40, 40, 57]), []
    for step in steps:
        shard_B, nth_B, _ = step.plan.batch(step.number)
        rows += (starts[shard_B] + step.mask.locate("safe", shard_B, nth_B)).tolist()
    assert flags[rows].all() and len(set(rows)) == flags.sum()


@given(
    safe=st.integers(4, 120), refill=st.booleans(), risky=st.sampled_from(["unimodal", "skip"]), seed=st.integers(0, 99)
)
def test_every_epoch_has_at_most_the_views_of_one_over_all_pairs(safe, refill, risky, seed):
    flags = np.zeros(120, bool)
    flags[np.random.default_rng(seed).permutation(120)[:safe]] = True
    mask, chosen = SafeMask.from_flags(COUNTS, flags), config(refill=refill, risky=risky)
    epoch = curriculum(chosen.train, 1, 30)[3]
    steps = epoch_steps(epoch, COUNTS, mask, chosen)
    kinds = [step.loss for step in steps]
    safe_steps, risky_steps = kinds.count("clip"), kinds.count("unimodal")
    assert risky_steps == ((120 - safe) // 4 if risky == "unimodal" else 0)
    assert safe_steps == (30 - risky_steps if refill else safe // 4)
    assert {(s.loss, s.view) for s in steps} <= {("clip", "safe"), ("unimodal", "risky")}
    # Risky pairs first; each batch once per pass, in order.
    assert kinds == ["unimodal"] * risky_steps + ["clip"] * safe_steps
    assert [(s.pass_number, s.number) for s in steps if s.loss == "clip"] == [
        divmod(i, safe // 4) for i in range(safe_steps)
    ]
    assert [s.number for s in steps if s.loss == "unimodal"] == list(range(risky_steps))


@given(unmarked=st.integers(4, 120), risky=st.sampled_from(["unimodal", "skip"]), refill=st.booleans())
def test_a_low_rate_epoch_fills_up_with_the_pairs_of_its_mask_alone(unmarked, risky, refill):
    flags = np.arange(120) < unmarked
    mask, chosen = SafeMask.from_flags(COUNTS, flags), config(refill=refill, risky=risky)
    steps = epoch_steps(curriculum(chosen.train, 1, 30)[2], COUNTS, mask, chosen)
    assert {(s.loss, s.view) for s in steps} == {("clip", "safe")} and len(steps) == 30
    assert [(s.pass_number, s.number) for s in steps] == [divmod(i, unmarked // 4) for i in range(30)]


def test_passes_have_another_order():
    flags = np.ones(120, bool)
    flags[::2] = False
    chosen = config(refill=True, risky="skip")
    steps = epoch_steps(curriculum(chosen.train, 1, 30)[3], COUNTS, SafeMask.from_flags(COUNTS, flags), chosen)
    first, second = (
        [tuple(s.plan.batch(s.number)[1]) for s in steps if s.pass_number == pass_number] for pass_number in (0, 1)
    )
    assert sorted(sum(first, ())) == sorted(sum(second, ())) and first != second


def test_the_rate_warms_up_falls_as_a_cosine_and_is_low_in_low_rate_epochs():
    train = Train(epochs=6, unimodal_epochs=2, low_rate_epochs=1, lr=1.0, low_rate_lr=0.01, warmup_steps=10)
    stages = curriculum(train, 1, 20)
    rates = [learning_rate(stages[step // 20], step, 120, train) for step in range(120)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[119] < 0.001
    assert set(rates[40:60]) == {0.01}
    falling = rates[10:40] + rates[60:]
    assert all(a > b for a, b in zip(falling[1:], falling[2:]))
