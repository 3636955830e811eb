"""Flat float32 masters of half-precision weights."""

import copy

import pytest
import torch as th
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from parity_cases import GOLDEN, UNETS, fill_parameters, tensor

from improved_diffusion import unet
from improved_diffusion.fp16_util import (
    convert_module_to_f16,
    convert_module_to_f32,
    make_master_params,
    master_params_to_model_params,
    model_grads_to_master_grads,
    unflatten_master_params,
    zero_grad,
)

shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=5)


def parameters(shapes, dtype=th.float32):
    return [nn.Parameter(tensor(f"p{i}", *shape).to(dtype)) for i, shape in enumerate(shapes)]


def small_net():
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 1, bias=False), nn.Linear(5, 3))


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_become_half_and_come_back(conv, bias):
    layer = conv(2, 3, 1, bias=bias)
    weight = layer.weight.detach().clone()
    layer.apply(convert_module_to_f16)
    assert all(p.dtype == th.float16 for p in layer.parameters())
    layer.apply(convert_module_to_f32)
    assert all(p.dtype == th.float32 for p in layer.parameters())
    assert th.equal(layer.weight, weight.half().float())


def test_other_layers_keep_their_dtype_and_parameters_their_identity():
    net = small_net()
    before = list(net.parameters())
    net.apply(convert_module_to_f16)
    assert {k for k, p in net.named_parameters() if p.dtype == th.float16} == {"0.weight", "0.bias", "2.weight"}
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))


# ---------------------------------------------------------------- masters


@given(shapes, st.sampled_from([th.float32, th.float16]))
def test_flattening_and_unflattening_are_inverse(shapes, dtype):
    params = parameters(shapes, dtype)
    masters = make_master_params(iter(params))
    assert len(masters) == 1
    assert isinstance(masters[0], nn.Parameter)
    assert (masters[0].dtype, masters[0].dim()) == (th.float32, 1)
    pieces = unflatten_master_params(iter(params), masters)
    for piece, p in zip(pieces, params, strict=True):
        assert piece.dtype == th.float32
        assert th.equal(piece, p.detach().float())

    copies = [nn.Parameter(th.zeros_like(p)) for p in params]
    master_params_to_model_params(iter(copies), masters)
    assert all(th.equal(a, b) and a.dtype == b.dtype for a, b in zip(copies, params, strict=True))


def test_masters_are_in_registration_order_and_their_own():
    net = small_net()
    (master,) = make_master_params(net.parameters())
    assert th.equal(master, th.cat([p.detach().flatten() for p in net.parameters()]))
    with th.no_grad():
        master.zero_()
    assert net[0].weight.any()


def test_masters_hold_what_half_precision_loses():
    params = [nn.Parameter(th.ones(2, dtype=th.float16))]
    masters = make_master_params(params)
    for _ in range(8):
        with th.no_grad():
            masters[0].add_(2.0**-13)  # below float16's resolution at 1
        master_params_to_model_params(params, masters)
    assert params[0].tolist() == [1 + 2.0**-10] * 2
    assert params[0].dtype == th.float16


def test_other_numbers_of_elements_are_refused():
    masters = make_master_params(parameters([(2, 3)]))
    with pytest.raises((ValueError, RuntimeError)):
        unflatten_master_params(parameters([(2, 3), (1,)]), masters)


@given(shapes, st.data())
def test_gradients_are_copied_and_missing_ones_are_zero(shapes, data):
    params = parameters(shapes, th.float16)
    masters = make_master_params(params)
    has_grad = data.draw(st.lists(st.booleans(), min_size=len(params), max_size=len(params)))
    for i, p in enumerate(params):
        p.grad = th.full_like(p, i + 0.5) if has_grad[i] else None
    model_grads_to_master_grads(iter(params), masters)
    assert (masters[0].grad.dtype, masters[0].grad.shape) == (th.float32, masters[0].shape)
    want = [th.full((p.numel(),), i + 0.5 if has_grad[i] else 0.0) for i, p in enumerate(params)]
    assert th.equal(masters[0].grad, th.cat(want))


def test_master_gradients_are_their_own():
    params = parameters([(3,)])
    params[0].grad = th.ones(3)
    masters = make_master_params(params)
    model_grads_to_master_grads(params, masters)
    masters[0].grad.mul_(0)
    assert params[0].grad.tolist() == [1, 1, 1]


def test_zero_grad():
    net = small_net()
    for p in net[0].parameters():
        p.grad = th.ones_like(p)
    zero_grad(net.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in net.parameters())


def test_optimizing_masters_is_optimizing_the_model():
    nets = [small_net()]
    nets.append(copy.deepcopy(nets[0]))
    masters = make_master_params(nets[1].parameters())
    plain, flat = (th.optim.AdamW(p, lr=0.1, weight_decay=0.1) for p in (nets[0].parameters(), masters))
    for step in range(3):
        x = tensor(f"x{step}", 4, 2, 7)
        for net in nets:
            zero_grad(net.parameters())
            net(x).square().sum().backward()
        plain.step()
        model_grads_to_master_grads(nets[1].parameters(), masters)
        flat.step()
        master_params_to_model_params(nets[1].parameters(), masters)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        th.testing.assert_close(a, b)


def test_a_networks_masters_are_as_recorded():
    model = fill_parameters(unet.UNetModel(**UNETS[0][1]))
    masters = make_master_params(model.parameters())
    assert list(masters[0].shape) == GOLDEN["fp16/master_shape"].tolist()
    assert masters[0].double().sum().item() == pytest.approx(GOLDEN["fp16/master_sum"].item())
    model.convert_to_fp16()
    for p in model.parameters():
        p.grad = th.full_like(p, 0.25)
    model_grads_to_master_grads(model.parameters(), masters)
    assert masters[0].grad.double().sum().item() == GOLDEN["fp16/grad"]
    with th.no_grad():
        masters[0].mul_(0.5)
    master_params_to_model_params(model.parameters(), masters)
    after = sum(p.detach().double().sum().item() for p in model.parameters())
    assert after == pytest.approx(GOLDEN["fp16/after"].item())
