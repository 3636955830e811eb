"""Networks and diffusions pickled whole, copied, and sent to another process."""

import copy
import io
import pickle

import torch as th
from parity_cases import REVERSE, assert_recorded, make_diffusion, recorded_network


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
