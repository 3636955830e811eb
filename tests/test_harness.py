"""The helpers of the tests that could hide a failure."""

import time

import pytest
import torch as th
from harness import run_in_threads

from improved_diffusion import dist_util


def test_results_of_threads_are_in_the_order_of_their_ranks():
    assert run_in_threads(3, lambda rank: time.sleep((2 - rank) / 100) or rank) == [0, 1, 2]


@pytest.mark.parametrize("error", [KeyError, SystemExit, KeyboardInterrupt])
def test_what_a_thread_raises_first_comes_out_after_all_have_ended(error):
    ended = []

    def work(rank):
        time.sleep(0.1 * abs(rank - 1))
        ended.append(rank)
        if rank > 0:
            raise error(rank)

    with pytest.raises(error) as info:
        run_in_threads(3, work)
    assert info.value.args == (1,) and ended[0] == 1 and sorted(ended) == [0, 1, 2]


def test_a_rank_that_fails_keeps_no_other_waiting(on_ranks):
    def work(rank):
        if rank == 1:
            raise KeyError("the reason")
        dist_util.barrier()

    start = time.monotonic()
    with pytest.raises(KeyError, match="the reason"):
        on_ranks(3, work)
    assert time.monotonic() - start < 30


def test_collectives_of_ranks_in_threads(on_ranks):
    def work(rank):
        rows = th.full((rank, 2), rank)
        return [
            dist_util.all_gather(rows).tolist(),
            dist_util.all_gather_object({"rank": rank}),
            dist_util.all_reduce_sum(th.tensor(rank)).item(),
            dist_util.broadcast_from_rank_0(lambda: f"of rank {dist_util.rank()}"),
            (dist_util.rank(), dist_util.world_size()),
        ]

    for rank, found in enumerate(on_ranks(3, work)):
        assert found == [
            [[1, 1], [2, 2], [2, 2]],
            [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            3,
            "of rank 0",
            (rank, 3),
        ]
