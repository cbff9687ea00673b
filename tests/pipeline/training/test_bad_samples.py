"""Too many bad samples stop the run on all ranks, with their reasons by count; told to go on, it ends as if it had
never stopped."""

import socket
from types import SimpleNamespace

import pytest

from pipeline.training import run as running
from pipeline.training.bad_samples import bad_so_far
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.samples.bad_samples import read_bad_samples
from tests.helpers.pictures import picture
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config
from tests.helpers.tars import write_tar

PAIRS, BAD = 240, (7, 40, 100, 101, 102)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    members = [
        member
        for i in range(PAIRS)
        for member in (
            (f"{i:03d}.png", b"no picture" if i in BAD[:2] else picture(i)),
            (f"{i:03d}.txt", b"" if i in BAD[2:] else b"a red star"),
        )
    ]
    # The bad samples are in two shards, so that both ranks write some.
    paths = [write_tar(folder / f"{n}.tar", part) for n, part in enumerate((members[:80], members[80:]))]
    build_index(list(map(str, paths)), folder / "shapes" / "index")
    return folder


def stop_and_go_on(folder):
    """[the error of a strict run, that of its second start], its lines, then without the limit to the end; and a whole
    run."""
    found = []
    for _ in range(2):
        with pytest.raises(UserError) as error:
            running.train(config(folder, "stopped", train__epochs=2, data__max_bad_fraction=0.01))
        found.append(str(error.value))
    for name in ("stopped", "whole"):
        running.train(config(folder, name, train__epochs=2, data__max_bad_fraction=0.1))
    return found


def test_too_many_bad_samples_stop_all_ranks_and_lose_nothing(data):
    ranks = run_ranks(stop_and_go_on, 2, data)
    assert ranks[0] == ranks[1]
    first, second = ranks[0]
    assert first == second and "\n" not in first
    assert first.startswith("data.max_bad_fraction: more than 1.00% of the samples")
    assert (
        "picture is of no known format, expected JPEG, PNG, WebP, GIF 2" in first
        and "stopped/bad_samples names them" in first
    )
    stopped, whole = ((data / name / "checkpoints/step_00000020/model.safetensors") for name in ("stopped", "whole"))
    assert stopped.read_bytes() == whole.read_bytes()
    rows = list(read_bad_samples(data / "whole" / "bad_samples"))
    assert sorted(40 * row["shard"] + row["position"] for row in rows) == sorted(BAD)
    assert sorted(path.name for path in (data / "whole" / "bad_samples").iterdir()) == ["00.jsonl", "01.jsonl"]
    for rank in range(2):  # each has a log of its own, of all three starts, with why the first two ended
        text = (data / "stopped" / "logs" / f"rank_{rank}.log").read_text()
        assert text.count("240 pairs") == 3 and text.count(": done, ") == 1
        assert text.count(f"ERROR rank {rank} {socket.gethostname()}: ") == text.count(f"UserError: {first}") == 2


def test_the_limit_is_of_pairs_however_many_views_a_step_sees(tmp_path):
    made = config(tmp_path, "run", data__max_bad_fraction=0.01)
    index = SimpleNamespace(samples=10**6)
    for views in (1, 2):
        state = {"step": 5_000, "sample_views": 5_000 * 24 * views, "bad_rows": 7}
        rows, limit = bad_so_far(SimpleNamespace(config=made, index=index, state=state), pending=2)
        assert (rows, limit) == (9, pytest.approx(0.01 * 5_000 * made.train.batch_size))
