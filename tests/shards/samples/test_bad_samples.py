"""Bad samples on disk: each sample and reason once, in the file of its shard, also after a death and by other
processes."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shards.samples.bad_samples import PARTS, BadSamplesFiles, part_of, read_bad_samples, summary


def rows(folder):
    return [(row["shard"], row["position"], row["key"], row["reason"]) for row in read_bad_samples(folder)]


def test_each_sample_and_reason_is_there_once_even_after_a_death(tmp_path):
    bad = BadSamplesFiles(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    assert bad.add([(0, 3, "k", "no caption"), (0, 3, "k", "no caption")]) == 1
    with open(bad.path(0), "a") as file:
        file.write('{"shard": 0, "posi')  # a death in mid-line
    bad = BadSamplesFiles(tmp_path / "bad")
    assert bad.add([(0, 3, "k", "no caption"), (PARTS, 0, "l", "no picture"), (1, 0, "l", "picture 7")]) == 2
    assert rows(tmp_path / "bad") == [
        (0, 3, "k", "no caption"),
        (PARTS, 0, "l", "no picture"),
        (1, 0, "l", "picture 7"),
    ]
    assert bad.reasons() == {"no caption": 1, "no picture": 1, "picture N": 1}


BAD = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3), st.just("k"), st.sampled_from(["a", "b"])))


@given(BAD, BAD, st.integers(1, 4), st.integers(1, 4))
def test_any_number_of_processes_writes_the_same(tmp_path_factory, first, second, world, later):
    folder = tmp_path_factory.mktemp("bad")
    for bad, count in ((first, world), (second, later)):
        for rank in range(count):
            files = BadSamplesFiles(folder, range(rank, PARTS, count))
            files.add(sample for sample in bad if part_of(sample[0]) % count == rank)
    assert sorted(rows(folder)) == sorted(set(first + second))


def test_the_most_frequent_reasons_are_said():
    said = summary(Counter({f"reason {letter}": count for count, letter in enumerate("abcdefghij", 1)}))
    assert said.startswith("reason j 10, reason i 9") and said.endswith("reason c 3, 2 other reasons")
