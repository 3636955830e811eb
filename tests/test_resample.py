"""Which timesteps are trained on, and that the expected loss stays what it is."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_cases import assert_recorded, rng_for

from improved_diffusion import dist_util
from improved_diffusion.resample import (
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)

CPU = th.device("cpu")


def diffusion(steps):
    return SimpleNamespace(num_timesteps=steps)


def trained(histories, **kwargs):
    """A LossSecondMomentResampler that has seen, of each timestep, these losses in this order."""
    kwargs.setdefault("history_per_term", len(histories[0]))
    sampler = LossSecondMomentResampler(diffusion(len(histories)), **kwargs)
    for t, losses in enumerate(histories):
        sampler.update_with_all_losses([t] * len(losses), losses)
    return sampler


class Weighted(ScheduleSampler):
    def __init__(self, weights):
        self._weights = np.array(weights)

    def weights(self):
        return self._weights


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("name", "cls"), [("uniform", UniformSampler), ("loss-second-moment", LossSecondMomentResampler)]
)
def test_samplers_by_name_draw_as_recorded(name, cls):
    sampler = create_named_schedule_sampler(name, diffusion(30))
    assert type(sampler) is cls
    np.random.seed(7)
    assert_recorded(f"sampler/{name}", *sampler.sample(64, CPU))


def test_unknown_sampler():
    with pytest.raises(NotImplementedError, match="'nonesuch'"):
        create_named_schedule_sampler("nonesuch", diffusion(30))


def test_a_trained_sampler_draws_as_recorded():
    sampler = create_named_schedule_sampler("loss-second-moment", diffusion(30))
    r = rng_for("losses")
    for _ in range(14):
        ts = r.permutation(30)
        sampler.update_with_all_losses(ts.tolist(), (r.random(30) * (1 + ts)).tolist())
    assert_recorded("sampler/weights", sampler.weights())
    np.random.seed(8)
    assert_recorded("sampler/second_moment", *sampler.sample(64, CPU))


@settings(max_examples=30)
@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=6))
def test_importance_weights_leave_the_expected_loss_as_it_is(weights):
    """sum over t of p(t) w(t) L(t) is the mean of L, for any L: p(t) w(t) = 1/T."""
    p = np.array(weights) / np.sum(weights)
    np.random.seed(0)
    t, w = Weighted(weights).sample(2000, CPU)
    w_of_t = np.array([w[t == i][0].item() for i in range(len(weights))])
    assert all((w[t == i] == w[t == i][0]).all() for i in range(len(weights)))
    np.testing.assert_allclose(p * w_of_t * len(weights), 1, rtol=1e-6)
    assert (p * w_of_t).sum() == pytest.approx(1, rel=1e-6)


def test_timesteps_are_drawn_in_proportion_to_the_weights():
    np.random.seed(0)
    t, w = Weighted([1.0, 3.0, 0.0]).sample(20000, CPU)
    assert (t.dtype, w.dtype, t.shape, w.shape) == (th.int64, th.float32, (20000,), (20000,))
    share = np.bincount(t.numpy(), minlength=3) / 20000
    np.testing.assert_allclose(share, [0.25, 0.75, 0], atol=0.02)


def test_uniform_weights_are_one():
    _, w = UniformSampler(diffusion(12)).sample(50, CPU)
    assert (w == 1).all()


def test_a_plain_sampler_has_no_state():
    sampler = UniformSampler(diffusion(5))
    assert sampler.state_dict() == {}
    sampler.load_state_dict({})
    assert sampler.weights().tolist() == [1.0] * 5


# ---------------------------------------------------------------- loss-second-moment


def test_uniform_until_every_timestep_has_a_full_history():
    sampler = LossSecondMomentResampler(diffusion(3), history_per_term=2)
    for t in (0, 0, 0, 1, 1, 2):
        assert sampler.weights().tolist() == [1.0, 1.0, 1.0]
        sampler.update_with_all_losses([t], [5.0 + t])
    assert sampler.weights().tolist() == [1.0, 1.0, 1.0]  # timestep 2 has one loss of two
    sampler.update_with_all_losses([2], [9.0])
    assert len(set(sampler.weights())) == 3


losses = st.floats(1e-3, 1e3)
histories = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(losses, min_size=n, max_size=n), min_size=1, max_size=6)
)


@given(histories, st.floats(0, 1))
def test_weights_are_the_root_mean_squares_mixed_with_the_uniform(histories, uniform_prob):
    w = trained(histories, uniform_prob=uniform_prob).weights()
    rms = np.array([np.sqrt(np.mean(np.square(h))) for h in histories])
    want = (1 - uniform_prob) * rms / rms.sum() + uniform_prob / len(rms)
    np.testing.assert_allclose(w, want)
    assert w.sum() == pytest.approx(1)


def test_defaults():
    sampler = trained([[1.0] * 9, [3.0] * 9], history_per_term=10)
    assert sampler.weights().tolist() == [1, 1]
    sampler.update_with_all_losses([0, 1], [1.0, 3.0])
    np.testing.assert_allclose(sampler.weights(), [0.25 * 0.999 + 0.0005, 0.75 * 0.999 + 0.0005])
    by_default = LossSecondMomentResampler(diffusion(2))
    assert (by_default.history_per_term, by_default.uniform_prob) == (10, 0.001)


@given(st.lists(losses, min_size=3, max_size=12))
def test_the_oldest_losses_are_forgotten(seen):
    got = trained([seen, [1.0] * 3], history_per_term=3).weights()
    want = trained([seen[-3:], [1.0] * 3], history_per_term=3).weights()
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_losses_that_are_not_finite_are_ignored(bad):
    sampler = trained([[1.0, 2.0], [3.0, bad]])
    assert sampler.weights().tolist() == [1, 1]  # does not count towards the warm-up
    sampler.update_with_all_losses([1, 0], [4.0, bad])
    assert sampler.weights().tolist() == trained([[1.0, 2.0], [3.0, 4.0]]).weights().tolist()


def test_as_many_losses_as_timesteps():
    with pytest.raises(ValueError):
        LossSecondMomentResampler(diffusion(3)).update_with_all_losses([0, 1], [1.0])


def test_local_losses_need_no_process_group(monkeypatch):
    for name in ("all_gather", "all_reduce", "broadcast", "get_world_size", "get_rank"):
        monkeypatch.setattr(th.distributed, name, None)  # a call of any would raise TypeError
    sampler = LossSecondMomentResampler(diffusion(2), history_per_term=1)
    sampler.update_with_local_losses(th.tensor([0, 1]), th.tensor([1.0, 3.0]))
    assert sampler.weights().tolist() == trained([[1.0], [3.0]]).weights().tolist()


def test_local_losses_of_all_ranks_are_used(monkeypatch):
    elsewhere = {th.int64: th.tensor([1, 0]), th.float32: th.tensor([3.0, 5.0])}
    monkeypatch.setattr(dist_util, "all_gather", lambda v: th.cat([v, elsewhere[v.dtype]]))
    sampler = LossSecondMomentResampler(diffusion(2), history_per_term=2)
    sampler.update_with_local_losses(th.tensor([0, 1]), th.tensor([1.0, 2.0]))
    assert sampler.weights().tolist() == trained([[1.0, 5.0], [2.0, 3.0]]).weights().tolist()


# ---------------------------------------------------------------- state


def through_a_file(state):
    """As a checkpoint keeps it."""
    file = io.BytesIO()
    th.save(state, file)
    file.seek(0)
    return th.load(file, weights_only=True)


@pytest.mark.parametrize("seen", [0, 2, 5])
def test_state_goes_through_a_file_and_back(seen):
    def feed(sampler, rounds):
        for i in rounds:
            sampler.update_with_all_losses([0, 1, 2], [1.0 + i, 2.0 * i, 3.0])

    old = LossSecondMomentResampler(diffusion(3), history_per_term=3)
    feed(old, range(seen))
    state = through_a_file(old.state_dict())
    new = LossSecondMomentResampler(diffusion(3), history_per_term=3)
    new.load_state_dict(state)
    for _ in range(4):
        assert new.weights().tolist() == old.weights().tolist()
        feed(old, [7])
        feed(new, [7])


def test_a_state_is_a_copy():
    sampler = trained([[1.0], [3.0]])
    state, before = sampler.state_dict(), sampler.weights().tolist()
    loaded = LossSecondMomentResampler(diffusion(2), history_per_term=1)
    loaded.load_state_dict(state)
    for changed in (sampler, loaded):
        changed.update_with_all_losses([0], [100.0])
    fresh = LossSecondMomentResampler(diffusion(2), history_per_term=1)
    fresh.load_state_dict(state)
    assert fresh.weights().tolist() == before


@pytest.mark.parametrize(("steps", "history"), [(4, 2), (3, 5)])
def test_a_state_of_another_shape_is_refused(steps, history):
    state = trained([[1.0, 2.0]] * 3).state_dict()
    other = LossSecondMomentResampler(diffusion(steps), history_per_term=history)
    with pytest.raises(ValueError, match=rf"\(3, 2\).*\({steps}, {history}\)"):
        other.load_state_dict(state)
