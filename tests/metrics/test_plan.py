"""Timesteps chosen by dynamic programming: the costs are calc_bpd_loop()'s, the choice is the best of all."""

import itertools

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from parity_cases import image_batch, make_diffusion, toy_model_for

from improved_diffusion import dist_util
from improved_diffusion.data.loader import BatchesInOrder
from improved_diffusion.gaussian_diffusion import ModelMeanType
from improved_diffusion.metrics import plan as module
from improved_diffusion.metrics.plan import Costs, measure_costs, plan
from improved_diffusion.respace import visiting
from improved_diffusion.utils.errors import InputError

IMAGES = [(image.numpy(), {}) for image in image_batch("plan", 5, 3, 4, 4)]


pytestmark = pytest.mark.usefixtures("one_cpu")


def data(batch_size=5, images=IMAGES):
    share = images[dist_util.rank() :: dist_util.world_size()]
    return BatchesInOrder(share, batch_size, num_workers=0)


def random_costs(steps, seed=0):
    rng = np.random.default_rng(seed)
    jump, decoder = rng.uniform(0, 1, (2, steps, steps))
    jump[np.triu_indices(steps)] = decoder[np.tril_indices(steps)] = np.inf
    return Costs(jump, decoder, rng.uniform(0, 1, steps), rng.uniform(0, 1, steps))


@given(st.integers(1, 7), st.integers(0, 1000))
def test_the_chosen_chain_is_the_best_of_all(steps, seed):
    costs = random_costs(steps, seed)
    chosen = plan(costs, range(1, steps + 1))
    assert list(chosen) == list(range(1, steps + 1))
    for count, chain in chosen.items():
        assert len(chain) == count and chain == sorted(set(chain))
        bounds = [costs.bound(other) for other in itertools.combinations(range(steps), count)]
        assert costs.bound(chain) == pytest.approx(min(bounds))


@pytest.mark.parametrize("var", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "VELOCITY"])
def test_a_chains_bound_is_that_of_calc_bpd_loop(monkeypatch, mean, var):
    """For the same noise, whatever timesteps it visits."""
    d = make_diffusion(steps=40, schedule="cosine", mean=mean, var=var, respacing=[40])
    model, noise = toy_model_for(d), th.randn(5, 3, 4, 4)
    monkeypatch.setattr(module, "noise_of", lambda seed, numbers: lambda x: noise[list(numbers)])
    costs = measure_costs(model, d, data(batch_size=2), seed=0)
    x_start = th.stack([th.from_numpy(image) for image, _ in IMAGES])
    for chain in ([0], [5], [0, 39], [2, 3], [0, 1, 2, 20], [4, 11, 19, 30, 38], range(40)):
        short = visiting(d, list(chain)[::-1])
        want = short.calc_bpd_loop(model, x_start, noise_fn=lambda x: noise)["total_bpd"].mean().item()
        assert costs.bound(chain) == pytest.approx(want, rel=2e-3), chain


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_costs_depend_on_neither_batch_size_nor_ranks(on_ranks, world_size):
    d = make_diffusion(steps=6, schedule="cosine", respacing=[6])
    want = measure_costs(toy_model_for(d), d, data(), seed=3)
    for got in on_ranks(world_size, lambda rank: measure_costs(toy_model_for(d), d, data(batch_size=2), seed=3)):
        for name in ("jump", "decoder", "alone", "prior"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-9)


def test_a_network_that_is_not_finite():
    d = make_diffusion(steps=6, schedule="cosine", respacing=[6])
    with pytest.raises(InputError, match=r"weights\.pt: .*not finite"):
        measure_costs(lambda x, t: x * float("nan"), d, data(), model_path="weights.pt")


def test_models_of_single_steps_have_no_other_jumps():
    for changed in (dict(mean="PREVIOUS_X"), dict(var="LEARNED")):
        d = make_diffusion(steps=6, schedule="cosine", respacing=[6], **changed)
        assert d.model_mean_type == ModelMeanType.PREVIOUS_X or "var" in changed
        with pytest.raises(ValueError, match="jumps"):
            measure_costs(toy_model_for(d), d, data())
