"""Networks and diffusions pickled whole, copied, and sent to another process."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch as th
from parity_cases import REVERSE, assert_recorded, make_diffusion, recorded_network

from improved_diffusion.forward_process import TABLES


def test_a_network_saved_whole():
    model, x, t = recorded_network()
    file = io.BytesIO()
    th.save(model, file)
    file.seek(0)
    for other in (th.load(file, weights_only=False), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_recorded("unet/0/out", other(x, t), rtol=2e-4)


def test_a_diffusion_saved_whole():
    kwargs, timesteps = REVERSE["eps-range-spaced"]
    diffusion = pickle.loads(pickle.dumps(make_diffusion(**kwargs)))
    t = th.tensor(timesteps)
    mean, variance, _ = diffusion.q_mean_variance(th.ones(len(t), 1), t)
    th.testing.assert_close(mean.square() + variance, th.ones(len(t), 1))  # data of variance 1 keeps it
    assert diffusion.num_timesteps == 40 and diffusion.original_num_steps == 400


@pytest.mark.parametrize("name", REVERSE)
def test_a_diffusion_of_the_originals_attributes_in_any_order(name):
    kwargs, timesteps = REVERSE[name]
    diffusion = make_diffusion(**kwargs)
    state = {key: value for key, value in vars(diffusion).items() if not key.startswith("_")}
    x, t = th.ones(len(timesteps), 2), th.tensor(timesteps)
    learned = "LEARNED" in diffusion.model_var_type.name

    def predict(d):
        return d.p_mean_variance(lambda x, t: th.cat([x, x], 1) if learned else x, x, t)

    for keys in (list(state), sorted(state), sorted(state, reverse=True)):
        restored = type(diffusion).__new__(type(diffusion))
        restored.__setstate__({key: np.array(state[key]) if key in TABLES else state[key] for key in keys})
        th.testing.assert_close(predict(restored), predict(diffusion), rtol=0, atol=0)
    tables = [value for value in vars(pickle.loads(pickle.dumps(diffusion))).values() if isinstance(value, np.ndarray)]
    assert len(tables) == len(TABLES) and not any(table.flags.writeable for table in tables)
