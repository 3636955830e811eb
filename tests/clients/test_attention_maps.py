"""Attention replaced by a module of the client's that keeps its weights, as for drawing attention maps."""

import pytest
import torch as th
from parity_cases import assert_recorded, recorded_network

from improved_diffusion.unet import AttentionBlock


class AttentionWithMaps(th.nn.Module):
    def forward(self, qkv):
        q, k, v = th.split(qkv, qkv.shape[1] // 3, dim=1)
        scale = q.shape[1] ** -0.25
        self.maps = th.softmax(th.einsum("bct,bcs->bts", q * scale, k * scale).float(), dim=-1)
        return th.einsum("bts,bcs->bct", self.maps, v)


@pytest.mark.parametrize("grad", [False, True])
def test_attention_maps(grad):
    model, x, t = recorded_network()
    blocks = [m for m in model.modules() if isinstance(m, AttentionBlock)]
    for block in blocks:
        block.attention = AttentionWithMaps()
    with th.set_grad_enabled(grad):
        assert_recorded("unet/0/out", model(x, t), rtol=2e-4)
    for block in blocks:
        maps = block.attention.maps
        assert maps.shape == (2 * block.num_heads, 8 * 8, 8 * 8)
        th.testing.assert_close(maps.sum(dim=-1), th.ones(maps.shape[:2]))
