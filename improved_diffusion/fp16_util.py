"""
Half-precision training with float32 masters.

The network computes in float16; the optimizer works on one flat float32 vector
that holds every parameter in registration order. These functions copy weights
and gradients between the two.
"""

import torch as th
import torch.nn as nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def convert_module_to_f16(l):  # noqa: E741 (the original's parameter name)
    """Turn a convolution's weight and bias to float16; leave other modules alone. For Module.apply()."""
    _convert(l, th.float16)


def convert_module_to_f32(l):  # noqa: E741
    """Undo convert_module_to_f16()."""
    _convert(l, th.float32)


def _convert(module, dtype):
    if isinstance(module, CONVOLUTIONS):
        for p in module.parameters(recurse=False):
            p.data = p.data.to(dtype)


def make_master_params(model_params):
    """
    A float32 copy of the parameters as one flat vector.

    :return: a list of one nn.Parameter of shape [total number of elements].
    """
    return [nn.Parameter(_flatten(p.detach() for p in model_params))]


def model_grads_to_master_grads(model_params, master_params):
    """Copy the gradients of the model (zeros where a parameter has none) into the masters' .grad."""
    master_params[0].grad = _flatten(
        th.zeros_like(p, dtype=th.float32) if p.grad is None else p.grad.detach() for p in model_params
    )


def master_params_to_model_params(model_params, master_params):
    """Copy the masters back into the model, rounding to each parameter's dtype."""
    model_params = list(model_params)
    with th.no_grad():
        for param, master in zip(model_params, unflatten_master_params(model_params, master_params), strict=True):
            param.copy_(master)


def unflatten_master_params(model_params, master_params):
    """
    The flat masters as a tuple of float32 views with the shapes of model_params.
    """
    shapes = [p.shape for p in model_params]
    pieces = master_params[0].detach().split([s.numel() for s in shapes])
    return tuple(piece.view(s) for piece, s in zip(pieces, shapes, strict=True))


def zero_grad(model_params):
    """Forget the gradients (None, which costs neither memory nor a pass over it)."""
    for param in model_params:
        param.grad = None


def _flatten(tensors):
    return th.cat([t.reshape(-1).float() for t in tensors])
