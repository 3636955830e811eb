"""Noise schedules, and the numbers of a table at the timesteps of a batch."""

import gc
import math

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from parity_cases import assert_recorded, tensor

from improved_diffusion import schedules
from improved_diffusion.schedules import _extract_into_tensor, betas_for_alpha_bar, get_named_beta_schedule


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


def read_only(values):
    table = np.array(values)
    table.setflags(write=False)
    return table


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_read_only_table_is_copied_once_and_the_copy_lives_as_long_as_the_table(device):
    def copies():
        return [copy for (of, _), copy in schedules._copies.items() if of == number]

    t, table = th.zeros(2, dtype=th.long, device=device), read_only([0.5, 0.25])
    number = id(table)
    seen = []
    for inference in (True, False):
        with th.inference_mode(inference):
            out = _extract_into_tensor(table, t, (2, 1))
        assert (out.shape, out.dtype, out.device) == ((2, 1), th.float32, t.device)
        seen += copies()
    assert seen[0] is seen[1] and not seen[0].is_inference()
    del table
    gc.collect()
    assert not copies()


def test_a_table_that_may_change_is_read_each_time():
    table, t = np.array([0.5, 0.25]), th.tensor([1, 0])
    assert _extract_into_tensor(table, t, (2,)).tolist() == [0.25, 0.5]
    table[1] = 7
    assert _extract_into_tensor(table, t, (2,)).tolist() == [7, 0.5]


def test_a_copy_made_inside_a_transform_is_usable_outside():
    table, t, x = read_only([0.5, 0.25]), th.tensor([1, 0]), tensor("x", 2)
    grad = th.func.grad(lambda x: (_extract_into_tensor(table, t, (2,)) * x).sum())(x)
    w = th.ones(2, requires_grad=True)
    (_extract_into_tensor(table, t, (2,)) * w).sum().backward()
    assert grad.tolist() == w.grad.tolist() == [0.25, 0.5]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
@pytest.mark.parametrize(
    "shape", [(4,), (4, 1), (4, 3), (4, 1, 1, 1), (4, 1, 5, 6), (4, 3, 5, 6), (1,), (1, 3)], ids=str
)
def test_the_entries_are_those_of_numpy_with_trailing_axes(shape, dtype):
    table = (100 * np.random.default_rng(0).random(9)).astype(dtype)
    t = np.random.default_rng(1).integers(-9, 9, shape)
    want = table[t].reshape(*shape, *[1] * (4 - len(shape)))
    got = _extract_into_tensor(table, th.from_numpy(t), (4, 3, 5, 6))
    assert got.dtype == th.float32
    np.testing.assert_array_equal(got.numpy(), np.broadcast_to(want, (4, 3, 5, 6)).astype(np.float32))


def test_what_float32_cannot_hold_is_infinite():
    with np.errstate(over="raise"):
        assert _extract_into_tensor(np.array([1e300, 1.0]), th.tensor([0, 1]), (2,)).tolist() == [math.inf, 1.0]
