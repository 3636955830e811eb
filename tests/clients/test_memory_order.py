"""A network whose output lies in memory in another order: the noise is that of torch.randn_like(x) at each step."""

import numpy as np
import torch as th

from improved_diffusion.script_util import create_gaussian_diffusion


def model(x, t):
    return (x.permute(0, 2, 3, 1).contiguous() * 1.1 - 0.3).permute(0, 3, 1, 2)


def test_the_ancestral_chain_by_hand():
    d = create_gaussian_diffusion(steps=30, sigma_small=True, predict_xstart=True)

    def at(table, i):
        return th.tensor(np.float32(table[i])).expand(2, 3, 5, 5)

    th.manual_seed(5)
    x = th.randn(2, 3, 5, 5)
    for i in reversed(range(30)):
        alpha_bar, before = d.alphas_cumprod, d.alphas_cumprod_prev
        x_0 = model(x, None).clamp(-1, 1)
        coef1 = d.betas * np.sqrt(before) / (1 - alpha_bar)
        coef2 = (1 - before) * np.sqrt(1 - d.betas) / (1 - alpha_bar)
        variance = d.betas * (1 - before) / (1 - alpha_bar)
        variance[0] = variance[1]
        mean = at(coef1, i) * x_0 + at(coef2, i) * x
        x = mean + float(i > 0) * th.exp(0.5 * at(np.log(variance), i)) * th.randn_like(x)

    th.manual_seed(5)
    got = d.p_sample_loop(model, (2, 3, 5, 5), device="cpu")
    th.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)
    assert not got.is_contiguous() and got.stride() == x.stride()
