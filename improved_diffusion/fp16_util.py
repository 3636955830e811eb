"""
Mixed-precision training (Micikevicius et al. 2018, arXiv 1710.03740) with float32 master parameters.

The network computes in float16; the optimizer updates one flat float32 vector of all parameters in registration
order. These functions copy parameters and gradients between the two.
"""

from collections.abc import Iterable, Sequence

import torch as th
import torch.nn as nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741 (the original's parameter name)
    """Convert the parameters of a convolution to float16, in place; skip other modules. For Module.apply()."""
    _convert(l, th.float16)


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741
    """Convert the parameters of a convolution to float32, in place; skip other modules. For Module.apply()."""
    _convert(l, th.float32)


def _convert(module, dtype):
    if isinstance(module, CONVOLUTIONS):
        for p in module.parameters(recurse=False):
            p.data = p.data.to(dtype)


def make_master_params(model_params: Iterable[th.Tensor]) -> list[nn.Parameter]:
    """A float32 copy of the parameters: a list of one flat nn.Parameter [total number of elements]."""
    return [nn.Parameter(_flatten(p.detach() for p in model_params))]


def model_grads_to_master_grads(model_params: Iterable[th.Tensor], master_params: Sequence[nn.Parameter]) -> None:
    """Set the master's .grad to the model's gradients, flat in float32; zeros for parameters without one."""
    master_params[0].grad = _flatten(
        th.zeros_like(p, dtype=th.float32) if p.grad is None else p.grad.detach() for p in model_params
    )


def master_params_to_model_params(model_params: Iterable[th.Tensor], master_params: Sequence[nn.Parameter]) -> None:
    """Copy the master into the model, rounded to each parameter's dtype."""
    model_params = list(model_params)
    with th.no_grad():
        for param, master in zip(model_params, unflatten_master_params(model_params, master_params), strict=True):
            param.copy_(master)


def unflatten_master_params(
    model_params: Iterable[th.Tensor], master_params: Sequence[nn.Parameter]
) -> tuple[th.Tensor, ...]:
    """Views of the master with the shapes of model_params, float32, without gradients."""
    shapes = [p.shape for p in model_params]
    pieces = master_params[0].detach().split([s.numel() for s in shapes])
    return tuple(piece.view(s) for piece, s in zip(pieces, shapes, strict=True))


def zero_grad(model_params: Iterable[th.Tensor]) -> None:
    """Set the gradients that there are to zero, in place."""
    for param in model_params:
        if param.grad is not None:
            param.grad.detach_().zero_()


def _flatten(tensors):
    return th.cat([t.reshape(-1).float() for t in tensors])
