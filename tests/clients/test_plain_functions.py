"""Models that are no networks: functions, and modules without parameters."""

import pytest
import torch as th

from improved_diffusion.script_util import create_gaussian_diffusion


class Zero(th.nn.Module):
    """The data is always zero."""

    def forward(self, x, t):
        return th.zeros_like(x)


@pytest.mark.parametrize("model", [Zero(), lambda x, t: 0 * x], ids=["module", "function"])
@pytest.mark.parametrize("noise", [None, th.randn(2, 3, 4)], ids=["drawn", "given"])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_sampling(model, noise, loop):
    diffusion = create_gaussian_diffusion(steps=30, predict_xstart=True)
    assert not getattr(diffusion, loop)(model, (2, 3, 4), noise=noise).any()


@pytest.mark.parametrize("noise", [None, th.full((2, 3), 2.0)], ids=["drawn", "given"])
def test_losses(noise):
    diffusion = create_gaussian_diffusion(steps=20)
    loss = diffusion.training_losses(lambda x, t: 0 * x, th.zeros(2, 3), th.tensor([0, 19]), noise=noise)["loss"]
    th.manual_seed(0)
    want = (th.randn(2, 3) if noise is None else noise).square().mean(dim=1)
    th.testing.assert_close(loss, want)
