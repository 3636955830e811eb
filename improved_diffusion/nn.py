"""Layers and helpers of the network and the training loop."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch as th
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.autograd import forward_ad


class SiLU(nn.Module):
    """x * sigmoid(x)."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return F.silu(x)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation, computed in float32 or the input's dtype if wider; the output has the input's dtype."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        if x.device.type == "cpu" and x.dtype in (th.bfloat16, th.float16):
            return super().forward(x)  # the CPU kernel accumulates in float32 by itself
        dtype = th.promote_types(x.dtype, th.float32)
        weight, bias = (p if p is None else p.to(dtype) for p in (self.weight, self.bias))
        if has_tangent(x, weight, bias):
            x = x.contiguous()  # torch differentiates no other layout in forward mode
        return F.group_norm(x.to(dtype), self.num_groups, weight, bias, self.eps).type(x.dtype)


def has_tangent(*tensors: th.Tensor | None) -> bool:
    """Whether one of the tensors is differentiated in forward mode, as by torch.func.jvp(), outside torch.compile()."""
    if th.compiler.is_compiling():
        return False
    return any(v is not None and forward_ad.unpack_dual(v).tangent is not None for v in tensors)


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """nn.Conv1d, 2d or 3d by `dims`, with its arguments."""
    return _by_dims(dims, nn.Conv1d, nn.Conv2d, nn.Conv3d)(*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """nn.AvgPool1d, 2d or 3d by `dims`, with its arguments."""
    return _by_dims(dims, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)(*args, **kwargs)


def _by_dims(dims, *layers):
    if dims not in (1, 2, 3):
        raise ValueError(f"dims={dims}: choose 1, 2 or 3")
    return layers[dims - 1]


def linear(*args, **kwargs) -> nn.Linear:
    """nn.Linear with its arguments."""
    return nn.Linear(*args, **kwargs)


def update_ema(target_params: Iterable[th.Tensor], source_params: Iterable[th.Tensor], rate: float = 0.99) -> None:
    """Exponential moving average, in place: target = rate * target + (1 - rate) * source, rate in [0, 1]."""
    targets = [p.detach() for p in target_params]
    sources = [p.detach() for p in source_params]
    if targets:
        th._foreach_mul_(targets, rate)  # foreach: one GPU kernel per list, not per tensor
        th._foreach_add_(targets, sources, alpha=1 - rate)


def match_gradients(optimizer: th.optim.Optimizer, *_) -> None:
    """
    Give each gradient the strides of its parameter, which fused optimizers assume. For register_step_pre_hook().

    Gradients from autograd have these strides; gradients assigned by user code may have others.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = th.empty_like(p).copy_(p.grad)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to zero and return the module."""
    for p in module.parameters():
        p.detach().zero_()
    return module


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters by `scale` and return the module."""
    for p in module.parameters():
        p.detach().mul_(scale)
    return module


def mean_flat(tensor: th.Tensor) -> th.Tensor:
    """Mean over all axes but the first: [N, ...] -> [N]."""
    return tensor.mean(dim=list(range(1, tensor.dim())))


def normalization(channels: int) -> nn.Module:
    """GroupNorm32 with 32 groups; `channels` is a multiple of 32."""
    return GroupNorm32(32, channels)


WITHOUT_FLOAT64 = {"mps"}  # types of devices: Apple's GPUs


def timestep_embedding(timesteps: th.Tensor, dim: int, max_period: float = 10000) -> th.Tensor:
    """
    Sinusoidal embedding (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).

    :param timesteps: [N], may be fractional.
    :param dim: size of the embedding; an odd one is padded with a zero.
    :param max_period: the lowest frequency is about 1 / max_period.
    :return: [N, dim] float32, cosines first, then sines.
    """
    half = dim // 2
    device = "cpu" if timesteps.device.type in WITHOUT_FLOAT64 else timesteps.device
    exponents = -math.log(max_period) * th.arange(half, dtype=th.float32, device=device) / half
    # float64: float32 exp differs in the last bit between processors, and t = 999 multiplies the difference
    freqs = th.exp(exponents.double()).float().to(timesteps.device)
    args = timesteps[:, None].float() * freqs[None]
    embedding = th.cat([th.cos(args), th.sin(args)], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def checkpoint(func: Callable, inputs: Sequence[th.Tensor], params: Iterable[th.Tensor], flag: bool):
    """
    func(*inputs). With `flag`, recompute activations in the backward pass instead of keeping them.

    The random state is kept, so dropout masks agree.

    :param params: unused, since autograd finds parameters itself; part of the original's signature.
    """
    if flag and th.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


class CheckpointFunction(torch.utils.checkpoint.CheckpointFunction):
    """Recomputation in its reentrant form, which the original's client code may call."""

    @staticmethod
    def forward(ctx, run_function: Callable, length: int, *args):
        """:param length: number of inputs; args are the inputs of run_function, then its parameters."""

        def run(*args):
            return run_function(*args[:length])

        return torch.utils.checkpoint.CheckpointFunction.forward(ctx, run, True, *args)
