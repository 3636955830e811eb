"""
A straightforward network and training step, the baseline of the benchmarks.

Attention by two einsums, SiLU as x * sigmoid(x), normalisation in float32, contiguous layout; gradient norm, optimizer
and moving average loop over parameters; nothing is compiled.
"""

import copy

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from improved_diffusion.nn import timestep_embedding
from improved_diffusion.unet import AttentionBlock, Downsample, ResBlock, Upsample


class PlainUNet(nn.Module):
    """A UNetModel of images, computed from its parameters alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, timesteps, y=None):
        """As UNetModel.forward()."""
        model = self.model
        first, _, second = model.time_embed
        emb = timestep_embedding(timesteps, model.model_channels)
        emb = F.linear(silu(F.linear(emb, first.weight, first.bias)), second.weight, second.bias)
        if y is not None:
            emb = emb + model.label_emb.weight[y]

        h = x.contiguous()
        skips = []
        for block in model.input_blocks:
            h = sequence(block, h, emb)
            skips.append(h)
        h = sequence(model.middle_block, h, emb)
        for block in model.output_blocks:
            h = sequence(block, th.cat([h, skips.pop()], dim=1), emb)
        return norm_silu_conv(model.out, h)


def sequence(layers, h, emb):
    for layer in layers:
        if isinstance(layer, ResBlock):
            h = residual(layer, h, emb)
        elif isinstance(layer, AttentionBlock):
            h = attention(layer, h)
        elif isinstance(layer, Upsample):
            h = F.interpolate(h, scale_factor=2, mode="nearest")
            h = conv(layer.conv, h) if layer.use_conv else h
        elif isinstance(layer, Downsample):
            h = conv(layer.op, h) if layer.use_conv else F.avg_pool2d(h, 2)
        else:
            h = conv(layer, h)
    return h


def residual(block, x, emb):
    h = norm_silu_conv(block.in_layers, x)
    _, projection = block.emb_layers
    emb = F.linear(silu(emb), projection.weight, projection.bias)[..., None, None]
    norm, _, dropout, last = block.out_layers
    if block.use_scale_shift_norm:
        scale, shift = th.chunk(emb, 2, dim=1)
        h = group_norm(norm, h) * (1 + scale) + shift
    else:
        h = group_norm(norm, h + emb)
    h = conv(last, F.dropout(silu(h), dropout.p, block.training))
    skip = x if isinstance(block.skip_connection, nn.Identity) else conv(block.skip_connection, x)
    return skip + h


def attention(block, x):
    n, c, height, width = x.shape
    x = x.reshape(n, c, -1)
    qkv = F.conv1d(group_norm(block.norm, x), block.qkv.weight, block.qkv.bias)
    q, k, v = qkv.reshape(n * block.num_heads, -1, height * width).chunk(3, dim=1)
    scale = q.shape[1] ** -0.25
    weights = th.einsum("nct,ncs->nts", q * scale, k * scale).softmax(dim=-1)
    h = th.einsum("nts,ncs->nct", weights, v).reshape(n, c, -1)
    return (x + F.conv1d(h, block.proj_out.weight, block.proj_out.bias)).reshape(n, c, height, width)


def norm_silu_conv(layers, x):
    norm, _, last = layers
    return conv(last, silu(group_norm(norm, x)))


def group_norm(layer, x):
    return F.group_norm(x.float(), layer.num_groups, layer.weight, layer.bias, layer.eps).type(x.dtype)


def silu(x):
    return x * th.sigmoid(x)


def conv(layer, x):
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)


class PlainLoop:
    """The training step in float32 on one device."""

    def __init__(self, model, diffusion, lr=1e-4, ema_rate=0.9999):
        self.model, self.diffusion, self.ema_rate = model, diffusion, ema_rate
        self.params = list(model.parameters())
        self.opt = th.optim.AdamW(self.params, lr=lr, weight_decay=0.0, foreach=False, fused=False)
        self.ema_params = copy.deepcopy(self.params)

    def run_step(self, batch, cond):
        """As TrainLoop.run_step()."""
        self.opt.zero_grad()
        t = th.randint(0, self.diffusion.num_timesteps, (len(batch),), device=batch.device)
        self.diffusion.training_losses(self.model, batch, t, model_kwargs=cond)["loss"].mean().backward()
        self.grad_norm = sum((p.grad**2).sum().item() for p in self.params if p.grad is not None) ** 0.5
        self.opt.step()
        with th.no_grad():
            for average, p in zip(self.ema_params, self.params, strict=True):
                average.mul_(self.ema_rate).add_(p, alpha=1 - self.ema_rate)
