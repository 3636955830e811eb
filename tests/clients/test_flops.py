"""A counter of multiply-accumulates by forward hooks, as thop's, with QKVAttention.count_flops for attention."""

import torch as th
import torch.nn as nn
from parity_cases import recorded_network

from improved_diffusion.unet import AttentionBlock, QKVAttention


def count_convolution(module, args, out):
    module.total_ops += th.DoubleTensor([out.numel() * module.weight[0].numel()])


CUSTOM_OPS = {nn.Conv1d: count_convolution, QKVAttention: QKVAttention.count_flops}


def profile(model, *inputs):
    for module in model.modules():
        if type(module) in CUSTOM_OPS:
            module.register_buffer("total_ops", th.zeros(1, dtype=th.float64))
            module.register_forward_hook(CUSTOM_OPS[type(module)])
    with th.no_grad():
        model(*inputs)


def test_flops():
    model, x, t = recorded_network()
    profile(model, x, t)
    blocks = [m for m in model.modules() if isinstance(m, AttentionBlock)]
    n, length = len(x), 8 * 8
    assert blocks
    for block in blocks:
        c = block.channels
        assert block.qkv.total_ops.item() == n * length * 3 * c * c
        assert block.attention.total_ops.item() == n * 2 * length**2 * c
        assert block.proj_out.total_ops.item() == n * length * c * c
