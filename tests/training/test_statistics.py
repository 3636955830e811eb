"""The means between two rows of the log, against means computed by hand."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion import dist_util, logger
from improved_diffusion.training.statistics import StepStatistics, log_loss_dict

finite = st.floats(-1e6, 1e6, width=32)


class Steps:
    """As much of a diffusion as the statistics ask for."""

    def __init__(self, num_timesteps):
        self.num_timesteps = num_timesteps


pytestmark = pytest.mark.usefixtures("one_cpu")


def means(statistics):
    return {key: mean for key, (mean, _) in statistics.read().items()}


def counts(statistics):
    return {key: count for key, (_, count) in statistics.read().items()}


def test_nothing_taken_in():
    assert StepStatistics().read() == {}
    assert StepStatistics().state_dict() == {}


def test_scalars():
    statistics = StepStatistics()
    for value in [1.0, 2.0, 6.0]:
        statistics.add("grad_norm", th.tensor(value))
    statistics.add("other", th.tensor(-4, dtype=th.float16))
    assert statistics.read() == {"grad_norm": (3.0, 3), "other": (-4.0, 1)}


@pytest.mark.parametrize(
    "num_timesteps, ts, quartiles",
    [
        (8, range(8), [0, 0, 1, 1, 2, 2, 3, 3]),
        (4000, [0, 999, 1000, 1999, 2000, 2999, 3000, 3999], [0, 0, 1, 1, 2, 2, 3, 3]),
        (10, range(10), [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (3, range(3), [0, 1, 2]),
        (1, [0], [0]),
    ],
)
def test_quartile_of_a_timestep(num_timesteps, ts, quartiles):
    for t, quartile in zip(ts, quartiles, strict=True):
        statistics = StepStatistics()
        statistics.add_losses(Steps(num_timesteps), th.tensor([t]), {"loss": th.tensor([2.0])})
        assert statistics.read() == {"loss": (2.0, 1), f"loss_q{quartile}": (2.0, 1)}


@given(
    num_timesteps=st.integers(1, 50),
    steps=st.lists(
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), finite, finite), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    ),
)
def test_means_by_hand(num_timesteps, steps):
    """Steps of any sizes: the overall mean is one of steps, the quarters' are ones of samples."""
    statistics = StepStatistics()
    by_key = defaultdict(list)
    for step in steps:
        ts = [int(share * num_timesteps) for share, _, _ in step]
        for i, key in enumerate(["mse", "vb"], start=1):
            by_key[key].append(np.mean([sample[i] for sample in step]))
            for t, sample in zip(ts, step, strict=True):
                by_key[f"{key}_q{4 * t // num_timesteps}"].append(sample[i])
        losses = {key: th.tensor([s[i] for s in step]) for i, key in enumerate(["mse", "vb"], start=1)}
        statistics.add_losses(Steps(num_timesteps), th.tensor(ts), losses)
    assert means(statistics) == pytest.approx({key: np.mean(values) for key, values in by_key.items()}, abs=1e-6)
    assert counts(statistics) == {key: len(values) for key, values in by_key.items()}


def test_many_small_values_after_a_large_one():
    """In float32 the sum would stay at 2^24."""
    statistics = StepStatistics()
    for value in [2.0**24] + [1.0] * 15:
        statistics.add("x", th.tensor(value))
    assert statistics.read()["x"] == ((2**24 + 15) / 16, 16)


def test_no_graph_is_kept():
    loss = th.ones(2, requires_grad=True) * 3
    statistics = StepStatistics()
    statistics.add("norm", loss.sum())
    statistics.add_losses(Steps(4), th.tensor([0, 3]), {"loss": loss})
    assert not any(table.requires_grad for table in statistics.state_dict().values())


def test_what_is_not_finite_stays_visible():
    statistics = StepStatistics()
    statistics.add_losses(Steps(4), th.tensor([0, 3]), {"loss": th.tensor([1.0, float("nan")])})
    statistics.add_losses(Steps(4), th.tensor([0, 3]), {"loss": th.tensor([3.0, 1.0])})
    read = means(statistics)
    assert np.isnan([read["loss"], read["loss_q3"]]).all() and read["loss_q0"] == 2


def test_reading_over_ranks(on_ranks):
    """Sums are added over the ranks; what this rank has taken in stays as it was."""

    def work(rank):
        statistics = StepStatistics()
        statistics.add("x", th.tensor(3.0 + 6 * rank))
        return [statistics.read(), statistics.read(), statistics.read(over_ranks=False)]

    both = {"x": (6.0, 2)}
    assert on_ranks(2, work) == [[both, both, {"x": (3.0, 1)}], [both, both, {"x": (9.0, 1)}]]


def test_state_goes_through_a_file(tmp_path):
    steps = [(th.tensor([0, 5]), th.tensor([1.0, 2.0])), (th.tensor([7]), th.tensor([0.1]))]

    def take_in(statistics, step):
        statistics.add_losses(Steps(8), step[0], {"loss": step[1]})
        statistics.add("norm", step[1].sum())

    whole, first, second = StepStatistics(), StepStatistics(), StepStatistics()
    for step in steps:
        take_in(whole, step)
    take_in(first, steps[0])
    th.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(th.load(tmp_path / "state.pt", weights_only=True))
    take_in(second, steps[1])
    assert second.read() == whole.read()


rows = st.lists(st.tuples(st.sampled_from("abc"), finite), max_size=5)


@given(ranks=st.lists(rows, min_size=1, max_size=4), world_size=st.integers(1, 3))
def test_states_of_another_number_of_ranks(ranks, world_size):
    """Together the new ranks have what the old ones had together, and the same keys each, lest they wait in vain."""
    states, everything = [], defaultdict(list)
    for taken_in in ranks:
        statistics = StepStatistics()
        for key, value in taken_in:
            statistics.add(key, th.tensor(value))
            everything[key].append(value)
        states.append(statistics.state_dict())
    loaded = []
    for rank in range(world_size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist_util, "rank", lambda rank=rank: rank)
            statistics = StepStatistics()
            statistics.load_state_dicts(states)
            loaded.append(statistics)
    assert len({tuple(statistics.state_dict()) for statistics in loaded}) == 1
    totals = {key: sum(one.state_dict()[key] for one in loaded) for key in everything}
    together = StepStatistics()
    together.load_state_dict(totals)
    assert means(together) == pytest.approx({key: np.mean(values) for key, values in everything.items()}, abs=1e-6)
    assert counts(together) == {key: len(values) for key, values in everything.items()}


def test_quarters_of_another_number_of_ranks():
    statistics = StepStatistics()
    states = []
    for t in (0, 7):
        one = StepStatistics()
        one.add_losses(Steps(8), th.tensor([t]), {"loss": th.tensor([float(t)])})
        states.append(one.state_dict())
    statistics.load_state_dicts(states)
    assert statistics.read() == {"loss": (3.5, 2), "loss_q0": (0.0, 1), "loss_q3": (7.0, 1)}


# ---------------------------------------------------------------- which ranks have a mean that is not finite


def statistics_of(*values, key="loss"):
    statistics = StepStatistics()
    for value in values:
        statistics.add(key, th.tensor(value))
    return statistics


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_the_only_rank_is_not_finite(value):
    assert statistics_of(1.0, 2.0).ranks_not_finite("loss") == []
    assert statistics_of(1.0, value, 2.0).ranks_not_finite("loss") == [0]
    assert statistics_of(value, key="grad_norm").ranks_not_finite("grad_norm") == [0]


def test_a_mean_that_a_rank_does_not_have():
    """Nobody can say that it was finite."""
    assert StepStatistics().ranks_not_finite("loss") == [0]
    assert statistics_of(1.0, key="grad_norm").ranks_not_finite("loss") == [0]


def test_losses_of_one_quarter_are_recognized_by_their_key_alone():
    statistics = StepStatistics()
    statistics.add_losses(Steps(8), th.tensor([0, 7]), {"mse": th.tensor([math.nan, 1.0]), "vb": th.ones(2)})
    assert statistics.ranks_not_finite("vb") == statistics.ranks_not_finite("mse_q3") == []
    assert statistics.ranks_not_finite("mse") == statistics.ranks_not_finite("mse_q0") == [0]


@pytest.mark.parametrize("bad", [(), (0,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_ranks_that_are_not_finite_are_known_to_all(on_ranks, bad):
    """By their own means, whatever the sum over the ranks is; what they have taken in stays as it was."""

    def work(rank):
        statistics = statistics_of(1.0, math.inf if rank in bad else 3.0)
        found = statistics.ranks_not_finite("loss")
        assert statistics.read(over_ranks=False) == {"loss": (math.inf if rank in bad else 2.0, 2)}
        return found

    assert on_ranks(3, work) == [list(bad)] * 3


@pytest.mark.parametrize("sizes", [(4,), (3, 1), (1, 1, 2)])
def test_a_batch_in_passes_is_one_step(sizes):
    """Also for a term that only some of them have."""
    ts, values = th.tensor([0, 3, 5, 7]), th.tensor([1.0, 2.0, 4.0, 8.0])
    whole, parts = StepStatistics(), StepStatistics()
    whole.add_losses(Steps(8), ts, {"loss": values})
    for i, (t, v) in enumerate(zip(ts.split(sizes), values.split(sizes), strict=True)):
        last = {"last": th.full_like(v, 3.0)} if i == len(sizes) - 1 else {}
        parts.add_losses(Steps(8), t, {"loss": v, **last}, share=len(t) / 4)
    found, want = parts.read(), whole.read()
    assert all(found[key] == pytest.approx(want[key]) for key in want)
    assert found["last"] == pytest.approx((3.0, sizes[-1] / 4))


def test_a_rank_without_a_mean_among_others(on_ranks):
    """It takes part, and nobody waits in vain."""
    found = on_ranks(3, lambda rank: (StepStatistics() if rank == 1 else statistics_of(1.0)).ranks_not_finite("loss"))
    assert found == [[1]] * 3


# ---------------------------------------------------------------- outside a loop


def test_log_loss_dict():
    """Outside a loop: means over all calls since the last dump."""
    diffusion = Steps(8)
    with logger.scoped_configure(format_strs=[]):
        log_loss_dict(diffusion, th.tensor([0, 1, 7]), {"loss": th.tensor([1.0, 3.0, 5.0]), "vb": th.zeros(3)})
        log_loss_dict(diffusion, th.tensor([0]), {"loss": th.tensor([5.0])})
        assert logger.getkvs() == {
            "loss": 4.0, "loss_q0": 3.0, "loss_q3": 5.0, "vb": 0.0, "vb_q0": 0.0, "vb_q3": 0.0,
        }  # fmt: skip
