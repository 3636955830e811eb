"""Low-rank adapters (LoRA) around the qkv of every attention block."""

import torch as th
import torch.nn as nn
from parity_cases import assert_recorded, recorded_network

from improved_diffusion.unet import AttentionBlock


class LoRA(nn.Module):
    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv1d(base.in_channels, rank, 1, bias=False)
        self.up = nn.Conv1d(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_lora():
    model, x, t = recorded_network()
    model.requires_grad_(False)
    blocks = [m for m in model.modules() if isinstance(m, AttentionBlock)]
    for block in blocks:
        block.qkv = LoRA(block.qkv)
    out = model(x, t)
    assert_recorded("unet/0/out", out, rtol=2e-4)  # adapters begin as nothing

    out.square().mean().backward()
    assert all(block.qkv.up.weight.grad.any() for block in blocks)
    assert all(p.grad is None for name, p in model.named_parameters() if ".up." not in name and ".down." not in name)

    for block in blocks:  # merged into the weights, they compute the same
        nn.init.normal_(block.qkv.up.weight)
    adapted = model(x, t)
    assert (adapted - out).abs().max() > 0.01
    for block in blocks:
        base, update = block.qkv.base, block.qkv.up.weight[..., 0] @ block.qkv.down.weight[..., 0]
        base.weight.data += update.detach()[..., None]
        block.qkv = base
    th.testing.assert_close(model(x, t), adapted, rtol=1e-3, atol=1e-4)
