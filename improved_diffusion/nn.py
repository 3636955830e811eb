"""Small layers and helpers that the network and the training loop are made of."""

import math

import torch as th
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint


class SiLU(nn.Module):
    """x * sigmoid(x)."""

    def forward(self, x):
        return F.silu(x)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the input's dtype, which the output keeps."""

    def forward(self, x):
        if x.device.type == "cpu" and x.dtype in (th.bfloat16, th.float16):
            return super().forward(x)  # a CPU's kernel takes 16 bits and float32 weights, and computes in float32
        return super().forward(x.float()).type(x.dtype)


def conv_nd(dims, *args, **kwargs):
    """A convolution over 1, 2 or 3 axes, with the arguments of nn.Conv1d."""
    return _by_dims(dims, nn.Conv1d, nn.Conv2d, nn.Conv3d)(*args, **kwargs)


def avg_pool_nd(dims, *args, **kwargs):
    """Average pooling over 1, 2 or 3 axes, with the arguments of nn.AvgPool1d."""
    return _by_dims(dims, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)(*args, **kwargs)


def _by_dims(dims, *layers):
    if dims not in (1, 2, 3):
        raise ValueError(f"dims={dims}, but there are layers for 1, 2 and 3 dimensions")
    return layers[dims - 1]


def linear(*args, **kwargs):
    """nn.Linear."""
    return nn.Linear(*args, **kwargs)


def update_ema(target_params, source_params, rate=0.99):
    """
    target <- rate * target + (1 - rate) * source, in place, for each pair.

    :param target_params: iterable of tensors, changed in place.
    :param source_params: iterable of tensors of the same shapes.
    :param rate: in [0, 1]; nearer 1 is slower.
    """
    targets = [p.detach() for p in target_params]
    sources = [p.detach() for p in source_params]
    if targets:
        # one fused launch a list on a GPU, not one a tensor
        th._foreach_mul_(targets, rate)
        th._foreach_add_(targets, sources, alpha=1 - rate)


def match_gradients(optimizer, *_):
    """
    Give each gradient its parameter's strides. For register_step_pre_hook() of a fused optimizer, which assumes them:
    autograd's gradients have them, those assigned by user code may not.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            grad = p.grad
            if grad is not None and grad.stride() != p.stride():
                p.grad = th.empty_like(p).copy_(grad)


def zero_module(module):
    """Set every parameter of `module` to zero and return it."""
    for p in module.parameters():
        p.detach().zero_()
    return module


def scale_module(module, scale):
    """Multiply every parameter of `module` by `scale` and return it."""
    for p in module.parameters():
        p.detach().mul_(scale)
    return module


def mean_flat(tensor):
    """Mean over all axes but the first: [N, ...] -> [N]."""
    return tensor.mean(dim=list(range(1, tensor.dim())))


def normalization(channels):
    """Group normalisation of `channels` (a multiple of 32) channels in 32 groups."""
    return GroupNorm32(32, channels)


def timestep_embedding(timesteps, dim, max_period=10000):
    """
    Sinusoidal position embedding (Vaswani et al. 2017, section 3.5) of timesteps.

    :param timesteps: [N], may be fractional.
    :param dim: width of the embedding; an odd one ends in a zero.
    :param max_period: controls the lowest frequency, about 1 / max_period.
    :return: [N, dim] float32, cosines first, then sines.
    """
    half = dim // 2
    exponents = -math.log(max_period) * th.arange(half, dtype=th.float32, device=timesteps.device) / half
    # exp in float64: float32 ones differ in the last bit between processors, and t = 999 makes that 999 times larger
    freqs = th.exp(exponents.double()).float()
    args = timesteps[:, None].float() * freqs[None]
    embedding = th.cat([th.cos(args), th.sin(args)], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def checkpoint(func, inputs, params, flag):
    """
    func(*inputs), recomputing it in the backward pass instead of keeping its
    activations if `flag` is set.

    The recomputation sees the random numbers of the first pass, so dropout
    masks agree.

    :param params: the parameters func uses; autograd finds them by itself, the
                   argument is there for callers written for the original.
    """
    if flag and th.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)
