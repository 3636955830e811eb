"""Whole models of another dtype, and defaults of torch that a notebook has set."""

import pytest
import torch as th
from parity_cases import UNETS, assert_recorded, fill_parameters, recorded_network

from improved_diffusion.script_util import create_gaussian_diffusion
from improved_diffusion.unet import UNetModel

F64, F32, F16, BF16 = th.float64, th.float32, th.float16, th.bfloat16


@pytest.mark.parametrize(
    "dtype, x_dtype, rtol", [(F64, F64, 2e-4), (F64, F32, 2e-4), (F32, F64, 2e-4), (F16, F16, 0.01), (BF16, F32, 0.05)],
    ids=str,
)  # fmt: skip
def test_a_whole_model(dtype, x_dtype, rtol):
    model, x, t = recorded_network()
    out = model.to(dtype)(x.to(x_dtype), t)
    assert out.dtype == x_dtype
    assert_recorded("unet/0/out", out.float(), rtol=rtol)
    out.float().square().mean().backward()
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


def everything(prepare=fill_parameters):
    """Build, train on and sample from a class-conditional model. :return: the loss, the samples."""
    model = prepare(UNetModel(**UNETS[0][1], num_classes=3))
    diffusion = create_gaussian_diffusion(steps=40, learn_sigma=True, timestep_respacing="3")
    x, t, kwargs = th.randn(2, 3, 8, 8), th.tensor([0, 2]), dict(y=th.tensor([0, 2]))
    loss = diffusion.training_losses(model, x, t, kwargs)["loss"].mean()
    loss.backward()
    diffusion.calc_bpd_loop(model, x, model_kwargs=kwargs)
    loops = diffusion.p_sample_loop, diffusion.ddim_sample_loop
    samples = [loop(model, x.shape, model_kwargs=kwargs) for loop in loops]
    assert all(s.shape == x.shape for s in samples)
    return loss, *samples


@pytest.mark.parametrize("method", ["double", "half", "bfloat16"])
def test_a_diffusion_with_a_model_of_another_dtype(method):
    outputs = everything(lambda model: getattr(fill_parameters(model), method)())
    assert all(out.dtype == th.float32 and out.isfinite().all() for out in outputs)


def test_default_dtype():
    th.set_default_dtype(th.float64)
    try:
        assert all(out.dtype == th.float64 and out.isfinite().all() for out in everything())
    finally:
        th.set_default_dtype(th.float32)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_device(device):
    th.set_default_device(device)
    try:
        assert all(out.device.type == device for out in everything(lambda model: model))
    finally:
        th.set_default_device(None)
