"""The support queue: first in, first out, valid rows only, the same on every rank; its search is exact."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.distributed import comm
from pipeline.training.support_queue import SupportQueue
from tests.helpers.ranks import run_ranks


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=8), st.integers(1, 12))
def test_it_holds_the_last_valid_rows(pushes, size):
    queue, all_valid = SupportQueue(size, 2, "cpu"), []
    number = 0
    for valid in pushes:
        z = torch.tensor([[float(number + i), 1.0] for i in range(len(valid))])
        number += len(valid)
        queue.push(z, torch.tensor(valid))
        all_valid += z[torch.tensor(valid)].tolist()
    assert sorted(queue.queue_PD[: queue.filled].tolist()) == sorted(all_valid[-size:])


@given(st.integers(0, 99), st.integers(1, 40))
def test_the_nearest_is_the_nearest(seed, filled):
    torch.manual_seed(seed)
    queue, query = SupportQueue(40, 6, "cpu"), F.normalize(torch.randn(7, 6), dim=1)
    rows = F.normalize(torch.randn(filled, 6), dim=1)
    queue.push(rows, torch.ones(filled, dtype=torch.bool))
    assert torch.equal(queue.search(query), rows[(query @ rows.T).argmax(1)])


def test_an_empty_pool_gives_the_row_itself():
    z = torch.ones(2, 3, requires_grad=True)
    near = SupportQueue(4, 3, "cpu").search(z)
    assert torch.equal(near, z) and not near.requires_grad


def test_it_is_restored():
    queue, restored = SupportQueue(5, 3, "cpu"), SupportQueue(5, 3, "cpu")
    queue.push(torch.randn(7, 3), torch.ones(7, dtype=torch.bool))
    restored.load_state_dict(queue.state_dict())
    assert torch.equal(restored.queue_PD, queue.queue_PD) and (restored.head, restored.filled) == (
        queue.head,
        queue.filled,
    )


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12), st.integers(1, 12))
def test_a_queue_of_another_size_takes_the_newest_rows(pushes, size, other):
    """As if they had been pushed into it; and it goes on from there."""
    queue, restored, expected = (
        SupportQueue(size, 1, "cpu"),
        SupportQueue(other, 1, "cpu"),
        SupportQueue(other, 1, "cpu"),
    )
    rows = torch.arange(sum(pushes)).float()[:, None]
    for part in rows.split(pushes):
        queue.push(part, torch.ones(len(part), dtype=torch.bool))
    restored.load_state_dict(queue.state_dict())
    expected.push(rows[-min(size, len(rows)) :], torch.ones(min(size, len(rows)), dtype=torch.bool))
    for _ in range(2):
        assert restored.filled == expected.filled
        held = [set(one.queue_PD[: one.filled, 0].tolist()) for one in (restored, expected)]
        assert held[0] == held[1]
        for one in (restored, expected):
            one.push(torch.full((1, 1), -1.0), torch.ones(1, dtype=torch.bool))


def push(size):
    queue = SupportQueue(size, 2, comm.device())
    for step in range(3):
        z = torch.full((2, 2), 10.0 * step + comm.rank())
        queue.push(z, torch.tensor([True, comm.rank() == step % 2]))
    return queue.queue_PD


def test_both_ranks_hold_the_same_in_rank_order():
    one, two = run_ranks(push, 2, 20)
    assert torch.equal(one, two)
    assert one[:9, 0].tolist() == [0, 0, 1, 10, 11, 11, 20, 20, 21]
