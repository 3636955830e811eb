"""
Recorded answers of the original improved_diffusion, and the inputs that led to them.

data/golden.npz was recorded by running the original on a CPU; it is a fixed point, never to be
recorded anew from this library. Inputs and weights come from numpy generators seeded by name, so
nothing random is stored. An entry that holds several answers of one shape stacks them on its first axis.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch as th

from improved_diffusion import gaussian_diffusion as gd
from improved_diffusion.respace import SpacedDiffusion, space_timesteps

with np.load(Path(__file__).parent.parent / "recorded" / "golden.npz") as f:
    GOLDEN = dict(f)

EPS_RANGE = dict(var="LEARNED_RANGE", schedule="cosine")

# name -> how make_diffusion() builds it
TABLES = {
    "linear": dict(steps=100),
    "cosine-ddim25": dict(steps=100, schedule="cosine", respacing="ddim25"),
    "linear-10,15,20": dict(steps=1000, respacing="10,15,20"),
}
FORWARD = {
    "linear": (dict(steps=100), [0, 1, 50, 99]),
    "cosine-spaced": (dict(steps=1000, schedule="cosine", respacing="100"), [0, 3, 98, 99]),
}
REVERSE = {
    "eps-large": (dict(steps=100), [0, 1, 60, 99]),
    "eps-small": (dict(steps=100, var="FIXED_SMALL"), [0, 1, 60, 99]),
    "eps-learned": (dict(steps=100, var="LEARNED"), [0, 1, 60, 99]),
    "eps-range": (dict(steps=100, **EPS_RANGE), [0, 1, 60, 99]),
    "x0-large": (dict(steps=100, mean="START_X"), [0, 1, 60, 99]),
    "x0-range": (dict(steps=100, mean="START_X", var="LEARNED_RANGE"), [0, 1, 60, 99]),
    "prev-small": (dict(steps=100, mean="PREVIOUS_X", var="FIXED_SMALL"), [0, 1, 60, 99]),
    "eps-range-spaced": (dict(steps=400, respacing="40", rescale=True, **EPS_RANGE), [0, 1, 20, 39]),
}
LOSSES = {
    "mse": (dict(steps=100), [0, 1, 60, 99]),
    "mse-range": (dict(steps=100, var="LEARNED_RANGE"), [0, 1, 60, 99]),
    "hybrid-range": (dict(steps=100, loss="RESCALED_MSE", rescale=True, **EPS_RANGE), [0, 1, 60, 99]),
    "hybrid-learned": (dict(steps=100, loss="RESCALED_MSE", var="LEARNED"), [0, 1, 60, 99]),
    "kl-large": (dict(steps=100, loss="KL"), [0, 1, 60, 99]),
    "vlb-range": (dict(steps=100, loss="RESCALED_KL", **EPS_RANGE), [0, 1, 60, 99]),
    "mse-x0": (dict(steps=100, mean="START_X"), [0, 1, 60, 99]),
    "mse-prev": (dict(steps=100, mean="PREVIOUS_X"), [0, 1, 60, 99]),
    "vlb-x0-spaced": (
        dict(steps=400, loss="RESCALED_KL", mean="START_X", var="FIXED_SMALL", respacing="50"),
        [0, 1, 20, 49],
    ),
}
LOOPS = {
    "eps-large": (dict(steps=30), (2, 3, 5, 5)),
    "eps-range": (dict(steps=20, **EPS_RANGE), (2, 3, 5, 5)),
    "eps-range-spaced": (dict(steps=200, respacing="15", rescale=True, **EPS_RANGE), (2, 3, 4, 4)),
    "x0-ddim": (dict(steps=200, respacing="ddim10", mean="START_X", var="FIXED_SMALL"), (2, 3, 4, 4)),
}

UNET = dict(in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1)
# (class in unet.py, its arguments, shape of x, timesteps)
UNETS = [
    (
        "UNetModel",
        dict(**UNET, attention_resolutions=[2], channel_mult=[1, 2], num_heads=2, use_scale_shift_norm=True),
        (2, 3, 16, 16),
        [3.0, 700.0],
    ),
    (
        "UNetModel",
        {
            **UNET,
            "out_channels": 3,
            "num_res_blocks": 2,
            "attention_resolutions": [1, 2],
            "channel_mult": [1, 1, 2],
            "num_heads": 4,
            "num_heads_upsample": 2,
            "num_classes": 5,
        },
        (3, 3, 16, 16),
        [0, 5, 999],
    ),
    (
        "UNetModel",
        {
            **UNET,
            "in_channels": 1,
            "out_channels": 1,
            "attention_resolutions": [2],
            "channel_mult": [1, 2],
            "dims": 1,
            "use_checkpoint": True,
        },
        (2, 1, 32),
        [1, 2],
    ),
    (
        "UNetModel",
        {
            **UNET,
            "in_channels": 2,
            "out_channels": 2,
            "attention_resolutions": [2],
            "channel_mult": [1, 2],
            "dims": 3,
            "use_scale_shift_norm": True,
        },
        (1, 2, 4, 8, 8),
        [10],
    ),
    (
        "SuperResModel",
        dict(**UNET, attention_resolutions=[4], channel_mult=[1, 1, 2], num_heads=2, use_scale_shift_norm=True),
        (2, 3, 16, 16),
        [1, 900],
    ),
]


def recorded_network():
    """A network with attention, and its input: assert_recorded("unet/0/out", model(x, t), rtol=2e-4)."""
    from improved_diffusion.unet import UNetModel

    _, kwargs, shape, t = UNETS[0]
    return fill_parameters(UNetModel(**kwargs)).eval(), tensor("unet_x0", *shape), th.tensor(t)


def assert_recorded(key, *got, rtol=2e-5, exact=False):
    """What the library computes agrees with entry `key`, relative to the largest entry of each answer."""
    want = GOLDEN[key]
    if len(got) == 1:
        want = want[None]
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        g = g.detach().numpy() if isinstance(g, th.Tensor) else np.asarray(g)
        assert g.shape == w.shape, f"{key}, answer {i}"
        atol = 0 if exact else rtol * np.abs(w).max()
        np.testing.assert_allclose(g, w, rtol=0, atol=atol, err_msg=f"{key}, answer {i}")


def recorded_names(key):
    """An entry that is a list of names."""
    return json.loads(str(GOLDEN[key]))


def rng_for(name, seed=0):
    return np.random.default_rng(zlib.crc32(name.encode()) + seed)


def tensor(name, *shape, seed=0, scale=1.0):
    return th.tensor(rng_for(name, seed).standard_normal(shape), dtype=th.float32) * scale


def image_batch(name, *shape):
    """8-bit image values rescaled to [-1, 1], extremes included."""
    a = rng_for(name).integers(0, 256, shape).astype(np.float32)
    a.flat[0], a.flat[1] = 0, 255
    return th.from_numpy(a / 127.5 - 1)


def fill_parameters(model, seed=0):
    """Give every parameter a value that depends on its name and shape alone."""
    with th.no_grad():
        for name, p in model.state_dict().items():
            a = rng_for(name, seed).standard_normal(tuple(p.shape))
            if name.endswith("weight") and p.dim() > 1:
                a = a / np.sqrt(np.prod(p.shape[1:]))
            elif name.endswith("weight"):
                a = 1 + 0.1 * a
            else:
                a = 0.1 * a
            p.copy_(th.from_numpy(a.astype(np.float32)))
    return model


class ToyModel(th.nn.Module):
    """A smooth function of (x, t, y) that remembers the timesteps it saw."""

    def __init__(self, learned=False):
        super().__init__()
        self.w = th.nn.Parameter(th.tensor([0.7, -0.3]))
        self.learned = learned
        self.seen = []

    def forward(self, x, t, y=None):
        self.seen.append(t.tolist())
        ones = [1] * (x.dim() - 1)
        tt = t.float().view(-1, *ones) * 1e-3
        out = th.sin(self.w[0] * x + tt) + self.w[1] * x * th.cos(tt)
        if y is not None:
            out = out + 0.1 * y.float().view(-1, *ones)
        if self.learned:
            out = th.cat([out, th.tanh(0.5 * x - tt)], dim=1)
        return out


def make_diffusion(
    steps, schedule="linear", mean="EPSILON", var="FIXED_LARGE", loss="MSE", rescale=False, respacing=None, **others
):
    kwargs = dict(
        betas=gd.get_named_beta_schedule(schedule, steps),
        model_mean_type=gd.ModelMeanType[mean],
        model_var_type=gd.ModelVarType[var],
        loss_type=gd.LossType[loss],
        rescale_timesteps=rescale,
        **others,
    )
    if respacing is None:
        return gd.GaussianDiffusion(**kwargs)
    return SpacedDiffusion(use_timesteps=space_timesteps(steps, respacing), **kwargs)


def toy_model_for(diffusion):
    """A ToyModel with the outputs that the diffusion expects."""
    return ToyModel(learned=diffusion.model_var_type.name.startswith("LEARNED"))
