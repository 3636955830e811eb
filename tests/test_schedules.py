"""Noise schedules, and the numbers of a table at the timesteps of a batch."""

import copy
import gc
import math

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from parity_cases import assert_recorded, make_diffusion, tensor

from improved_diffusion import schedules
from improved_diffusion.schedules import add_to, betas_for_alpha_bar, get_named_beta_schedule, one_a_sample


@pytest.mark.parametrize(("name", "steps"), [("linear", 100), ("cosine", 50)])
def test_schedules_are_as_recorded(name, steps):
    betas = get_named_beta_schedule(name, steps)
    assert betas.dtype == np.float64
    assert_recorded(f"schedule/{name}:{steps}", betas, rtol=1e-12)


def test_betas_for_alpha_bar_are_as_recorded():
    betas = betas_for_alpha_bar(64, lambda t: np.exp(-5.0 * t * t), max_beta=0.5)
    assert_recorded("schedule/alpha_bar", betas, rtol=1e-12)


@given(st.integers(21, 4000))
def test_linear_schedule_is_equally_noisy_whatever_its_length(steps):
    betas = get_named_beta_schedule("linear", steps)
    assert betas[0] * steps == pytest.approx(0.1)
    assert betas[-1] * steps == pytest.approx(20)
    assert betas.sum() == pytest.approx(10.05)
    assert (np.diff(betas) > 0).all()


@given(st.integers(1, 4000))
def test_cosine_schedule_follows_its_curve_up_to_the_clipped_end(steps):
    betas = get_named_beta_schedule("cosine", steps)
    assert ((betas > 0) & (betas <= 0.999)).all()
    fraction = np.arange(1, steps + 1) / steps
    curve = np.cos((fraction + 0.008) / 1.008 * np.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], curve[:-1], rtol=1e-6, atol=1e-9)


def test_unknown_schedule():
    with pytest.raises(NotImplementedError, match="'quadratic'"):
        get_named_beta_schedule("quadratic", 10)


# ---------------------------------------------------------------- tables on the device


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_copies_of_tables_live_as_long_as_the_table(device):
    def entries():
        return [key for key in schedules._copies if number in key]

    t = th.zeros(2, dtype=th.long, device=device)
    table = np.array([0.5, 0.25])
    number = id(table)
    copies = []
    for inference in (True, False):
        with th.inference_mode(inference):
            (out,) = schedules.at_timesteps((table,), t, 2)
        assert (out.shape, out.dtype, out.device) == ((2, 1), th.float32, t.device)
        copies.append(schedules._copies[entries()[0]][1])
    assert copies[0] is copies[1] and not copies[0].is_inference()
    del table
    gc.collect()
    assert not entries()


def test_a_table_that_is_assigned_anew_is_used_from_then_on():
    d, x, t = make_diffusion(steps=30), tensor("x", 2, 3), th.tensor([2, 7])
    before = d.q_sample(x, t, noise=x)
    d.sqrt_alphas_cumprod = 2 * d.sqrt_alphas_cumprod
    after = d.q_sample(x, t, noise=x)
    th.testing.assert_close(after - before, th.tensor(d.sqrt_alphas_cumprod / 2, dtype=th.float32)[t, None] * x)


def test_a_table_that_is_changed_in_place_is_seen_so():
    d, x, t = make_diffusion(steps=30), tensor("x", 2, 3), th.tensor([2, 7])
    before = d.q_sample(x, t, noise=x)
    d.sqrt_alphas_cumprod[7] += 1
    after = d.q_sample(x, t, noise=x)
    th.testing.assert_close(after - before, th.stack([th.zeros(3), x[1]]))


def test_a_copy_of_a_diffusion_has_its_own_tables():
    d = make_diffusion(steps=30)
    x, t = tensor("x", 2, 3), th.tensor([2, 7])
    assert th.equal(copy.deepcopy(d).q_sample(x, t, noise=x), d.q_sample(x, t, noise=x))


def test_what_float32_cannot_hold_is_infinite():
    (values,) = schedules.at_timesteps((np.array([1e300, 1.0]),), th.tensor([0, 1]), 1)
    assert values.tolist() == [math.inf, 1.0]


# ---------------------------------------------------------------- sums, and what repeats


def test_one_value_a_sample_is_found_where_a_view_repeats_it():
    """And what is computed from it is as large as the batch, not as the data."""
    values = tensor("values", 3, 1, 1, 1)
    found = one_a_sample(values.expand(3, 2, 4, 5))
    assert found.shape == (3, 1, 1, 1) and th.equal(found, values)
    assert th.equal(one_a_sample(values[::2].expand(2, 2, 4, 5)), values[::2])
    (table,) = schedules.at_timesteps((np.array([0.5, 0.25]),), th.tensor([1, 0, 1]), 4)
    assert one_a_sample(table.expand(3, 2, 4, 5)).flatten().tolist() == [0.25, 0.5, 0.25]
    for other in (tensor("other", 3, 2, 4, 5), tensor("rows", 3, 2, 1, 1).expand(3, 2, 4, 5), tensor("flat", 3)):
        assert th.equal(one_a_sample(other), other)


def test_a_sum_in_the_memory_of_what_is_given_up():
    own, other = tensor("own", 2, 3), tensor("other", 2, 3)
    want, kept = own - 2 * other, other.clone()
    got = add_to(own, other, alpha=-2)
    assert got is own and th.equal(got, want) and th.equal(other, kept)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (th.ones(2, 1), th.ones(2, 3)),
        (th.ones(2, 3), th.ones(2, 1)),
        (th.ones(2, 3), th.ones(2, 3, dtype=th.float64)),
        (th.ones(2, 3, dtype=th.float16), th.ones(2, 3)),
    ],
    ids=["smaller", "larger", "double", "half"],
)
def test_a_sum_that_its_first_part_cannot_hold(own, other):
    """Whatever its shape and precision: as own + other."""
    before = own.clone(), other.clone()
    got = add_to(own, other)
    assert got.shape == (2, 3) and got.dtype == th.promote_types(own.dtype, other.dtype) and (got == 2).all()
    assert th.equal(own, before[0]) and th.equal(other, before[1])
