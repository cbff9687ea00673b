"""A slice of the fuzz command; the whole of it is run by hand (tests/fuzz.json)."""

from tests.fuzz import fuzz, make, pictures


def test_nothing_that_strangers_send_crashes_hangs_or_takes_too_much_memory():
    figures, findings = fuzz(300, seed=1, workers=1)
    assert findings == [] and figures["findings"] == 0
    kinds = ("picture", "caption", "tar")
    assert sum(figures[f"{kind} {end}"] for kind in kinds for end in ("used", "refused")) == 300


def test_an_item_is_a_function_of_its_number():
    seeds = pictures()
    assert [make(3, n, seeds)[:2] for n in range(30)] == [make(3, n, seeds)[:2] for n in range(30)]
    assert len({make(3, n, seeds)[1] for n in range(30)}) == 30
